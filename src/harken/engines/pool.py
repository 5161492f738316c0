"""A bounded number of threads and a bounded queue before them. What happens beyond is the setting ``overload``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harken.engines import Options
from harken.engines._crew import Crew
from harken.engines._selector import SelectorEngine
from harken.settings import count, setting

__all__ = ["Engine"]

POOL_SIZE = setting(
    "pool_size",
    count(1),
    32,
    unit="threads",
    live=True,
    meaning="threads of the pool engine: connections served at once",
    origin="concurrent.futures starts at most 32 by default",
)
POOL_QUEUE = setting(
    "pool_queue",
    count(),
    128,
    unit="connections",
    live=True,
    meaning="accepted connections that may wait for a thread of the pool; more wait in the backlog",
    origin="four times the threads; the kernel's backlog holds the rest",
)


class Engine(SelectorEngine):
    """At most ``pool_size`` handlers at once, at most ``pool_queue`` connections waiting for one."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._crew = Crew(lambda: bool(self.options("daemon_threads")))
        self._asked = False
        self._crew.on_room = self._room
        self.refresh()

    def refresh(self) -> None:
        """Read ``pool_size`` and ``pool_queue`` anew; threads above a smaller size go as they get idle."""
        self._crew.resize(self.options("pool_size"), self.options("pool_queue"))
        self.wake()

    @property
    def full(self) -> bool:
        """Whether all threads and all places in the queue are taken."""
        self._asked = True  # before the look: room that comes in between must wake the loop all the same
        self._asked = self._crew.full
        return self._asked

    def spawn(self, function: Callable[..., object], *args: Any, done: Callable[[int], None] | None = None) -> int:
        """Give ``function`` to the pool; wait for a place when it is full (a loop of harken's asks ``full`` before)."""
        self._crew.submit_when_room(function, *args)
        return 0

    def join(self, deadline: float | None) -> int:
        """Wait for the handlers, running and queued; see :class:`harken.engines.Engine`."""
        return self._crew.join(deadline)

    def _room(self) -> None:
        if self._asked:
            self._asked = False
            self.wake()
