"""The handlers that a hub has under way, and who waits for their ends."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

from greenlet import getcurrent, greenlet

from harken._hub.bell import Bell

__all__ = ["Job", "Underway", "caller"]

# The handler for whom a plain thread does something; see Engine.aside.
caller: contextvars.ContextVar[greenlet | None] = contextvars.ContextVar("harken_green_caller", default=None)


class Job:
    """A handler that another thread wants started."""

    __slots__ = ("args", "begun", "function", "jobs")

    def __init__(self, jobs: set[Any], function: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.begun = Bell()
        self.jobs = jobs
        self.function = function
        self.args = args

    def __call__(self) -> None:
        green = getcurrent()
        self.jobs.add(green)
        self.jobs.discard(self)
        self.begun.ring()
        try:
            self.function(*self.args)
        finally:
            self.jobs.discard(green)


class Underway:
    """Handlers under way, or to come. Any thread, but that greens come and go in the hub's."""

    def __init__(self, wake: Callable[[], object]) -> None:
        """Begin without any; ``wake`` makes the hub look, and so ``ring()``."""
        self.jobs: set[Any] = set()
        """Green threads, and what will start one; the hub adds and takes away."""
        self.lodgers = 0
        """Handlers that will be started at the first bytes of their connections."""
        self._bells: list[tuple[Bell, int]] = []  # rung once there are not so many handlers any more
        self._wake = wake

    def __len__(self) -> int:
        return len(self.jobs) + self.lodgers

    @property
    def others(self) -> int:
        """How many there are, not counting the caller."""
        served = caller.get()
        return len(self) - ((getcurrent() if served is None else served) in self.jobs)

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for an end."""
        return bool(self._bells)

    def ring(self) -> None:
        """Tell those who wait for ends that there were some."""
        for bell, handlers in tuple(self._bells):
            if handlers != len(self):
                bell.ring()

    def await_end(self, seconds: float | None) -> None:
        """Wait until some handler has ended, at most so long."""
        waiting = (bell := Bell(), len(self))
        self._bells.append(waiting)
        self._wake()
        try:
            if self.others:
                bell.wait(seconds)
        finally:
            self._bells.remove(waiting)

    def lose(self) -> None:
        """What had not begun went with the hub."""
        self.jobs.clear()
        self.lodgers = 0

    def forget(self) -> None:
        """In a forked child: they are the parent's, and so are those who wait."""
        self.lose()
        self._bells.clear()
