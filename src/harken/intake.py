"""What happens at a readable door: one connection after the other through the hooks, or as ``overload`` says."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from harken.acceptor import Readable, refuse
from harken.lifecycle import State

if TYPE_CHECKING:
    from harken.serving import Serving

__all__ = ["Intake"]


class Intake:
    """Takes the connections of one server when its engine says that there are some."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._readable = Readable()
        self._lock = threading.Lock()

    def watch(self) -> None:
        """Watch the door, unless the server is suspended: room in the pool does not end a suspension."""
        serving = self._serving
        if serving.lifecycle.state is State.SERVING:
            serving.engine.watch(serving.server, self._accept_ready)

    def readable(self) -> bool:
        """Whether a connection waits at the door."""
        return self._readable(self._serving.server.fileno())

    @property
    def bursts(self) -> bool:
        """Whether ``get_request`` may be called again while the door is readable: whether it is our own."""
        return bool(getattr(self._serving.server.get_request, "bursts", False))

    def take_turns(self, get: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """Call ``get`` as the only one of several loops, and only while a connection is there.

        Raises:
            BlockingIOError: another loop was quicker.
        """
        with self._lock:
            if not self.readable():
                raise BlockingIOError("another thread took the connection")
            return get()

    def _accept_ready(self) -> bool:
        """Take one connection of the readable door through the hooks; tell whether there is another.

        Only our own ``get_request`` is called twice in a turn: an overridden one may do anything in between. The
        listener is asked by poll() and not made non-blocking, since its flags belong to all processes that share it.

        Raises:
            OSError: the door is no listener any more.
        """
        serving = self._serving
        engine, server = serving.engine, serving.server
        if engine.full and not self._make_room():
            return False
        taken = server._handle_request_noblock()
        if serving.acceptor.troubled:
            serving.acceptor.settle(taken=bool(taken))
        if taken is not True or serving.shared or engine.full or not getattr(server.get_request, "bursts", False):
            return False
        return self._readable(server.fileno())

    def _make_room(self) -> bool:
        """The engine is full: do as ``overload`` says. True when a connection may be accepted all the same."""
        policy = self._serving.settings["overload"]
        if policy in ("reset", "reply"):
            self._turn_away(policy)
        else:
            if policy == "shed":
                self._shed()
            self._serving.acceptor.hold("no handler is free: pool or max_children in use")
        return False

    def _turn_away(self, policy: str) -> None:
        serving = self._serving
        try:
            request, client_address = serving.server.get_request()
        except OSError as error:
            serving.acceptor.failed(error)
            return
        reply = serving.settings["overload_reply"] if policy == "reply" else b""
        refuse(request, reply.encode() if isinstance(reply, str) else reply)
        serving.books.rejected(None, client_address, "overload")

    def _shed(self) -> None:
        idle = [
            (record.idle_seconds() or 0.0, -record.started, record)
            for record in self._serving.connections
            if not record.reason
        ]
        if idle:
            max(idle, key=lambda entry: entry[:2])[2].cut("shed")
