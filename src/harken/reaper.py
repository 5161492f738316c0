"""Calls at a time, by one thread for the whole process, which runs only while a call is due some day."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable

from harken.forking import in_child

__all__ = ["Reaper", "reaper"]

# Seconds by which the thread itself is late where more than a busy machine kept it: the process was stopped (a frozen
# container, SIGSTOP), or something held the GIL. Its clients did not.
LATE_SECONDS = 0.5
# Seconds that everybody gets then, to read what has come meanwhile, before a call is made.
GRACE_SECONDS = 0.25


class Reaper:
    """A heap of calls to come. All verbs may be called from any thread and from a signal handler."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._heap: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self._not_before = 0.0

    def call_at(self, deadline: float, function: Callable[[], object]) -> int:
        """Call ``function`` at ``deadline`` (``time.monotonic()``), in the reaper's thread; it must not wait.

        A little later where the process could not run at that time.

        Returns:
            A number for :meth:`cancel`.
        """
        number = next(self._numbers)
        with self._changed:
            heapq.heappush(self._heap, (deadline, number, function))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="harken-reaper", daemon=True)
                self._thread.start()
            elif self._heap[0][1] == number:
                self._changed.notify()
        return number

    def cancel(self, number: int) -> None:
        """Do not make that call; harmless when it was made. It looks at all, which are one or two for each server."""
        with self._changed:
            self._heap = [entry for entry in self._heap if entry[1] != number]
            heapq.heapify(self._heap)
            if not self._heap:
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                function = self._next()
            if function is None:
                return
            try:
                function()
            except Exception:  # noqa: BLE001 - shown as of a thread of its own; the other deadlines still hold
                import sys

                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
            del function  # whoever it belongs to may go while we sleep

    def _next(self) -> Callable[[], object] | None:
        """Sleep until a call is due, and return it; None when there is none at all."""
        while self._heap:
            now = time.monotonic()
            left = min(max(self._heap[0][0], self._not_before) - now, threading.TIMEOUT_MAX)
            if left <= 0:
                return heapq.heappop(self._heap)[2]
            self._changed.wait(left)
            if time.monotonic() - now - left > LATE_SECONDS:
                self._not_before = time.monotonic() + GRACE_SECONDS
        self._thread = None
        return None


reaper = Reaper()
"""The process's own."""

in_child(reaper._forget)  # the thread stayed in the parent
