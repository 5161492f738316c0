"""``async def handle``: the green engine in an event loop, where each handler's coroutine is run by a green thread.

So a handler that waits for its connection waits in the hub, and what it waits for besides is the loop's business:
futures, timers, other tasks. Handlers with a plain ``def handle`` run in threads, as in the pool engine.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from harken.connection import Connection
from harken.engines import Engine as AnyEngine, Options, is_async
from harken.engines._crew import Crew
from harken.engines._datagrams import Datagrams
from harken.engines.green import Engine as Green
from harken.errors import ConfigError
from harken.unpatched import patched

__all__ = ["Engine"]


class Engine(Green):
    """A task for each connection, in one event loop in a thread of the engine's own."""

    host: str | None = "asyncio"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._threads = False
        self._pool = Crew(self._are_daemons)
        self._pool.on_room = self.wake

    @classmethod
    def fit(cls, handler: Any) -> None:
        """All but handlers with ``async def handle`` that are none of harken's: they would be given a blocking socket.

        Raises:
            ConfigError: it is such a one.
        """
        if is_async(handler) and not hasattr(handler, "is_async"):
            raise ConfigError(f"{handler.__qualname__}.handle is async: derive it from harken.AsyncRequestHandler")

    def prepare(self, handler: Any) -> None:
        """Handlers with ``async def handle`` will run in the loop, all others in threads."""
        self.fit(handler)
        self.check(self.options)
        self._threads = not is_async(handler)
        # Threads need no event loop; but gevent's cannot be started in a callback of gevent's loop.
        self.host = None if self._threads and not patched() else type(self).host
        self.connection = Connection if self._threads else type(self).connection  # and no hub that waits for them
        if self._threads:
            self.refresh()

    def datagrams(self, sock: socket.socket) -> Datagrams | None:
        """Each datagram has a task of its own, in a green thread, or a thread."""
        return None if self._threads else super().datagrams(sock)

    def refresh(self) -> None:
        """Read ``pool_size`` and ``pool_queue`` anew, as the pool engine does, and ``stall_after``."""
        super().refresh()
        self._pool.resize(self.options("pool_size"), self.options("pool_queue"))
        self.wake()

    @property
    def bursts(self) -> bool:  # type: ignore[override]
        """Not where handlers run in threads, of which there may be too few."""
        return not self._threads

    @property
    def full(self) -> bool:
        """Whether all threads and places in the queue are taken; or as many handlers of datagrams wait as may."""
        return self._pool.full if self._threads else super().full

    def spawn(self, function: Callable[..., object], *args: Any, done: Callable[[int], None] | None = None) -> int:
        """Run ``function`` in a green thread, or in a thread."""
        if not self._threads:
            return super().spawn(function, *args)
        self._pool.submit(function, *args)
        return 0

    def adopt(self, request: Any) -> Any:
        """Make a plain socket a connection of the hub's; for a handler in a thread it stays as it is."""
        return request if self._threads else super().adopt(request)

    def spawn_on_data(self, function: Callable[..., object], request: Any, *args: Any) -> None:
        """Start the green thread of ``request`` when its first bytes have come; a thread at once."""
        if self._threads:
            self.spawn(function, request, *args)
        else:
            super().spawn_on_data(function, request, *args)

    def beside(self, function: Callable[..., object], *args: Any) -> None:
        """Run ``function`` in a green thread, or in a plain one where handlers do."""
        if self._threads:
            AnyEngine.beside(self, function, *args)
        else:
            super().beside(function, *args)

    def join(self, deadline: float | None) -> int:
        """Wait for the handlers, in threads and in the loop; see :class:`harken.engines.Engine`."""
        return self._pool.join(deadline) + super().join(deadline)
