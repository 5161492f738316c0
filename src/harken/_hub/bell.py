"""One wait, by a green thread or a plain one, that anybody can end. Locks, queues and joins are made of it."""

from __future__ import annotations

import _thread
import threading
import time
from typing import Any

from greenlet import getcurrent

from harken import _hub

__all__ = ["Bell"]

_EXPIRED = object()


class Bell:
    """Made by the one who will wait, rung once by anybody; then thrown away.

    Attributes:
        rung: whether it was rung.
    """

    __slots__ = ("_green", "_hub", "_lock", "_thread", "_waiting", "rung")

    def __init__(self) -> None:
        self.rung = False
        self._waiting = False
        self._hub: Any = _hub.current()
        if self._hub is not None:
            self._green = getcurrent()
            self._thread = threading.get_ident()
        else:
            self._lock = _thread.allocate_lock()
            self._lock.acquire()

    def ring(self) -> None:
        """End the wait, or the one to come. Any thread, any signal handler; ringing twice is harmless."""
        if self.rung:
            return
        self.rung = True
        if self._hub is None:
            self._lock.release()
        elif threading.get_ident() == self._thread:
            self._go_on()
        else:
            self._hub.call_soon_threadsafe(self._go_on)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is rung, at most ``timeout`` seconds; tell whether it was."""
        if self._hub is None:
            return self._lock.acquire(timeout=-1 if timeout is None else max(0.0, timeout)) or self.rung
        self._hub.settle()  # it may wait by itself, where nobody else may end that
        timer = None
        if timeout is not None:
            timer = self._hub.call_at(time.monotonic() + timeout, self._expire)
        self._waiting = True
        try:
            while not self.rung and self._hub.park() is not _EXPIRED:
                pass
        finally:
            self._waiting = False
            if timer is not None:
                timer.cancel()
        return self.rung

    def _go_on(self) -> None:
        if self._waiting:  # and not somewhere else by now
            self._hub.unpark(self._green)

    def _expire(self) -> None:
        if self._waiting:
            self._hub.unpark(self._green, _EXPIRED)
