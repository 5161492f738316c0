"""The mix-ins: each names its engine and keeps the attributes of its stdlib namesake.

They override what stdlib's override and no more, so that they can stand in front of any server class. In front of
stdlib's own (``class Web(PoolMixIn, http.server.ThreadingHTTPServer)``) they also graft harken's loop and verbs onto
the new class, wherever that class has nothing but stdlib's.
"""

from __future__ import annotations

import os
from typing import Any

from harken import straight
from harken.engines.thread import Threads
from harken.server import BaseServer, TCPServer, UDPServer
from harken.serving import RunningSide

__all__ = ["AsyncMixIn", "ForkingMixIn", "GreenMixIn", "PoolMixIn", "ThreadingMixIn"]

_GRAFTS = {
    "BaseServer": (
        BaseServer,
        ("serve_forever", "shutdown", "handle_request", "_handle_request_noblock", "handle_error"),
    ),
    "TCPServer": (TCPServer, ("get_request", "shutdown_request", "close_request")),
    "UDPServer": (UDPServer, ("get_request", "shutdown_request", "close_request")),
}
_VERBS = (
    "process_request_thread",
    "suspend",
    "resume",
    "drain",
    "wait_ready",
    "connections",
    "close_connection",
    "configure",
    "stats",
)


def _graft(cls: type) -> None:
    """Give a class built on stdlib's servers harken's loop: each method that nobody but stdlib defines."""
    for stdlib in reversed(cls.__mro__):
        if stdlib.__module__ != "socketserver" or stdlib.__name__ not in _GRAFTS:
            continue
        ours, names = _GRAFTS[stdlib.__name__]
        for name in names:
            if getattr(cls, name, None) is vars(stdlib).get(name):
                setattr(cls, name, vars(ours)[name])
        for name in _VERBS if stdlib.__name__ == "BaseServer" else ():
            if not hasattr(cls, name):
                setattr(cls, name, vars(BaseServer)[name])


class _NoThreads:
    """What ``_threads`` is until a thread is to be waited for."""

    def append(self, thread: object) -> None:
        """Forget ``thread``."""

    def join(self) -> None:
        """Wait for nobody."""


class ThreadingMixIn:
    """Serve each request in a thread.

    Attributes:
        daemon_threads: whether the threads are daemons; ``server_close()`` does not wait for those.
        block_on_close: whether ``server_close()`` waits for the threads.
        engine: the engine; ``HARKEN_ENGINE`` and ``harken run --engine`` name another.
    """

    _harken = RunningSide()
    daemon_threads = False
    block_on_close = True
    engine: str | None = "thread"
    _threads: Any = _NoThreads()
    _engine_from_environment = True

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        _graft(cls)

    process_request_thread = BaseServer.process_request_thread

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for the request. May be overridden. Serving thread."""
        if self.block_on_close and "_threads" not in vars(self):
            self._threads = getattr(self._harken.engine, "threads", Threads())
        BaseServer._process_elsewhere(self, request, client_address)  # type: ignore[arg-type]

    def server_close(self) -> None:
        """Close the server; wait for its threads if ``block_on_close``, unless they are daemons."""
        BaseServer.server_close(self)  # type: ignore[arg-type]  # stdlib's own class would close under a running loop
        super().server_close()  # type: ignore[misc]
        self._harken.join()


straight.stock(ThreadingMixIn)


class PoolMixIn(ThreadingMixIn):
    """Serve requests in a bounded number of threads, with a bounded queue before them.

    How many, and what happens beyond, is said by ``pool_size``, ``pool_queue`` and ``overload``.
    """

    engine: str | None = "pool"
    _engine_from_environment = False


class GreenMixIn(ThreadingMixIn):
    """Serve each request in a green thread; see ``harken.green``."""

    engine: str | None = "green"
    _engine_from_environment = False


class AsyncMixIn(ThreadingMixIn):
    """Serve each request by ``async def handle`` in an event loop; handlers with a plain ``handle`` in threads."""

    engine: str | None = "asyncio"
    _engine_from_environment = False


if hasattr(os, "fork"):

    class ForkingMixIn:
        """Serve each request in a child process.

        Attributes:
            timeout: seconds that ``handle_request`` waits before it looks for children that have ended.
            active_children: pids of the children that run, None before the first.
            max_children: at this many the next connections wait.
            block_on_close: whether ``server_close()`` waits for the children.
            engine: the engine; ``harken run --engine`` names another.
        """

        _harken = RunningSide()
        timeout: float | None = 300
        active_children: set[int] | None = None
        max_children = 40
        block_on_close = True
        engine: str | None = "fork"

        def __init_subclass__(cls, **keywords: Any) -> None:
            super().__init_subclass__(**keywords)
            _graft(cls)

        def collect_children(self, *, blocking: bool = False) -> None:
            """Reap children of this server that have ended; wait for all of them if ``blocking``."""
            if self.active_children is None:
                return
            serving = self._harken
            if serving.engine.in_child:
                serving.engine.collect()
                if blocking:
                    serving.engine.join(None)

        def handle_timeout(self) -> None:
            """Reap children. May be extended."""
            self.collect_children()

        def service_actions(self) -> None:
            """Reap children. May be extended. Serving thread; once a turn."""
            self.collect_children()

        def process_request(self, request: Any, client_address: Any) -> None:
            """Start a child for the request. May be overridden. Serving thread."""
            if self.active_children is None:
                self.active_children = getattr(self._harken.engine, "children", set())
            BaseServer._process_elsewhere(self, request, client_address)  # type: ignore[arg-type]

        def server_close(self) -> None:
            """Close the server; wait for its children if ``block_on_close``."""
            BaseServer.server_close(self)  # type: ignore[arg-type]
            super().server_close()  # type: ignore[misc]
            self.collect_children(blocking=self.block_on_close)
            self._harken.join()
