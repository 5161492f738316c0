"""Datagrams at a readable door: through the hooks one by one, but taken together where the engine can.

``request`` is ``(bytes, server.socket)``. Where no hook was overridden and nobody listens, the hooks between taking a
datagram and calling its handler do nothing that anybody could see, and are left out.
"""

from __future__ import annotations

import threading
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from harken import events, preambles
from harken.engines import DatagramService

if TYPE_CHECKING:
    from harken.serving import Serving

__all__ = ["DatagramIntake"]

# The longest datagram that a batch has room for; only Unix sockets carry longer ones.
MOST_BYTES = 65536
# Hooks that stand between the kernel and the handler; what is overridden on the server object itself counts too.
_HOOKS = frozenset(
    ("verify_request", "process_request", "process_request_thread", "finish_request", "shutdown_request",
     "close_request", "service_actions")
)  # fmt: skip


class DatagramIntake:
    """Takes the datagrams of one server."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._fed: tuple[int, Any, Any] | None = None
        self._fed_one = self._feed  # one object, to be compared
        self._made: object = None  # of what the service was made
        self._service: Any = None

    def take(self) -> bool:
        """Take what is there, if several may be taken at once; tell whether that was so.

        They may when ``get_request`` and the loop's own step are ours: an overridden one may do anything in between.
        """
        serving = self._serving
        server = serving.server
        if not getattr(server.get_request, "batches", False) or serving.datagram_proxy is not None:
            return False
        ours = _ours()
        if type(server)._handle_request_noblock is not ours.step:
            return False
        size = serving.packet_size(server.max_packet_size)
        served = serving.engine.datagrams(server.socket) if size <= MOST_BYTES else None
        if served is None:
            return False
        handler = server.RequestHandlerClass if self._is_plain(server, ours) else self._fed_one
        made = (handler, size, ours.is_bare(handler))
        if made != self._made:
            self._made, self._service = made, self._make(*made)
        try:
            served.take(self._service)
        except OSError as error:
            serving.acceptor.failed(error)
        return True

    def _make(self, handler: Any, size: int, bare: bool) -> DatagramService:
        return DatagramService(
            size=size,
            taken=self._taken,
            cut=lambda address: self._serving.books.truncated(address, size),
            serve=handler,
            server=None if handler is self._fed_one else self._serving.server,
            failed=self._failed,
            lean=bare,
        )

    def _is_plain(self, server: Any, ours: _Ours) -> bool:
        """Whether nobody would see the hooks being left out."""
        bounds, listened = self._serving.bounds, events.subscribers
        admission, deadlines = bounds.admission, bounds.deadlines
        return not (
            listened["accepted"]
            or listened["opened"]
            or preambles.armed
            or (admission is not None and admission.asks_datagrams)
            or (deadlines is not None and deadlines.times_datagrams)
            or not ours.are_those_of(type(server))
            or not _HOOKS.isdisjoint(vars(server))
        )

    def _feed(self, request: Any, client_address: Any) -> None:
        """Send one through all hooks: ``get_request`` finds it, and the engine serves it in this green thread."""
        server = self._serving.server
        self._serving.books.counts["accepted"] -= 1  # it is counted again
        self._fed = (threading.get_ident(), request, client_address)
        self._serving.engine.here(request)
        server._handle_request_noblock()
        server.service_actions()

    def _taken(self, count: int) -> None:
        self._serving.books.counts["accepted"] += count

    def fed(self) -> tuple[Any, Any] | None:
        """Return what ``get_request`` is to return: a datagram that was taken before; None if there is none."""
        fed = self._fed
        if fed is None or fed[0] != threading.get_ident():
            return None
        self._fed = None
        return fed[1], fed[2]

    def _failed(self, request: Any, client_address: Any, error: BaseException) -> None:
        """A handler raised, or its answer could not be sent."""
        server = self._serving.server
        self._serving.books.failed(request, client_address, error)
        if not isinstance(error, Exception):
            raise error  # shown as in a thread
        server.handle_error(request, client_address)


class _Ours:
    """The hooks of harken's own servers."""

    def __init__(self) -> None:
        from harken.handlers import BaseRequestHandler
        from harken.mixins import ThreadingMixIn
        from harken.server import BaseServer, UDPServer

        self.step = BaseServer._handle_request_noblock
        self._starts = (BaseServer.process_request, ThreadingMixIn.process_request)
        self._read = attrgetter(*sorted(_HOOKS))
        self._hooks = tuple(
            tuple(start if name == "process_request" else getattr(UDPServer, name) for name in sorted(_HOOKS))
            for start in self._starts
        )
        self._base = BaseRequestHandler
        names = ("__new__", "__init__", "setup", "finish", "on_timeout")
        self._make = attrgetter(*(name for name in names if hasattr(BaseRequestHandler, name)))
        self._bare = self._make(BaseRequestHandler)

    def are_those_of(self, kind: Any) -> bool:
        """Whether a server class overrides none."""
        return self._read(kind) in self._hooks

    def is_bare(self, handler: Any) -> bool:
        """Whether making a handler of this class does nothing besides BaseRequestHandler's own constructor."""
        return type(handler) is type and issubclass(handler, self._base) and bool(self._make(handler) == self._bare)


def is_lean(handler: Any) -> bool:
    """Tell whether serving by this class is to call its ``handle``: there is nothing to make, set up or finish."""
    return not preambles.armed and _ours().is_bare(handler) and not handler._is_called_from_outside


@cache
def _ours() -> _Ours:
    return _Ours()
