"""Deadlines in a heap. A cancelled timer stays until its turn comes or the dead outnumber the living."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any

__all__ = ["Timer", "Timers"]

# Cancelled timers that are not worth a sweep: a recv with a timeout leaves one each time.
FEW = 512


class Timer:
    """A call to come; see ``Hub.call_at``."""

    __slots__ = ("_args", "_function", "_timers", "deadline")

    def __init__(self, deadline: float, function: Callable[..., object], args: tuple[Any, ...], timers: Timers) -> None:
        self.deadline = deadline
        self._function: Callable[..., object] | None = function
        self._args = args
        self._timers: Timers | None = timers  # None once it is due

    def cancel(self) -> None:
        """Do not call; harmless when it was called already."""
        if self._function is not None:
            self._function, self._args = None, ()
            if self._timers is not None:
                self._timers.cancelled()

    def fire(self) -> None:
        """Call it, unless it was cancelled while others had their turn before it."""
        function, args = self._function, self._args
        self._function, self._args = None, ()
        if function is not None:
            function(*args)


class Timers:
    """The timers of one hub."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._count = itertools.count()  # timers of one deadline fire in the order they were made
        self._dead = 0

    def add(self, deadline: float, function: Callable[..., object], args: tuple[Any, ...]) -> Timer:
        """Make a timer.

        Raises:
            ValueError: the deadline is no number.
        """
        if math.isnan(deadline):
            raise ValueError("seconds must be a number, not nan")
        timer = Timer(deadline, function, args, self)
        heapq.heappush(self._heap, (deadline, next(self._count), timer))
        return timer

    def cancelled(self) -> None:
        """Count a timer that was cancelled, and sweep when it is time."""
        self._dead += 1
        if self._dead > FEW and self._dead * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2]._function is not None]
            heapq.heapify(self._heap)
            self._dead = 0

    def next(self) -> float | None:
        """The earliest deadline of a living timer."""
        while self._heap:
            if self._heap[0][2]._function is not None:
                return self._heap[0][0]
            heapq.heappop(self._heap)
            self._dead -= 1
        return None

    def pop_due(self, now: float) -> list[Timer]:
        """Take out what is due."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            timer = heapq.heappop(self._heap)[2]
            if timer._function is not None:
                timer._timers = None
                due.append(timer)
            else:
                self._dead -= 1
        return due

    def clear(self) -> None:
        """Forget them all."""
        self._heap.clear()
        self._dead = 0
