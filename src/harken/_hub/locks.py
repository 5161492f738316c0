"""Locks and queues that green threads and plain threads may share.

A short plain lock guards the books; nobody waits while it is held, so that it is never held across a switch.
"""

from __future__ import annotations

import threading
from collections import deque
from queue import Empty, Full
from types import TracebackType
from typing import Generic, TypeVar

from harken._hub.bell import Bell

__all__ = ["Event", "Lock", "Queue", "Semaphore"]

T = TypeVar("T")


class Event:
    """A flag to wait for, as ``threading.Event``."""

    def __init__(self) -> None:
        self._on = False
        self._bells: deque[Bell] = deque()

    def is_set(self) -> bool:
        """Tell whether the flag is up."""
        return self._on

    def set(self) -> None:
        """Put the flag up and let everybody go on who waits."""
        self._on = True
        while self._bells:
            try:
                self._bells.popleft().ring()
            except IndexError:
                return  # another thread set it too

    def clear(self) -> None:
        """Take the flag down."""
        self._on = False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the flag is up, at most ``timeout`` seconds; tell whether it was."""
        if self._on:
            return True
        bell = Bell()
        self._bells.append(bell)
        try:
            return self.is_set() or bell.wait(timeout)  # set() may have come before the bell hung there
        finally:
            _drop(self._bells, bell)


class Semaphore:
    """So many may hold it at once, as ``threading.Semaphore``; who waits longest is next."""

    def __init__(self, value: int = 1) -> None:
        if value < 0:
            raise ValueError(f"a semaphore cannot start at {value}; 0 is the smallest value")
        self._value = value
        self._guard = threading.Lock()
        self._bells: deque[Bell] = deque()

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Take one, waiting at most ``timeout`` seconds; tell whether that was so.

        Raises:
            ValueError: a timeout for what does not wait.
        """
        if not blocking and timeout is not None:
            raise ValueError("can't specify timeout for non-blocking acquire")
        with self._guard:
            if self._value > 0:
                self._value -= 1
                return True
            if not blocking:
                return False
            bell = Bell()
            self._bells.append(bell)
        try:
            got = bell.wait(timeout)
        except BaseException:
            if not self._withdraw(bell):
                self.release()  # it had been given to us at that moment
            raise
        return got or not self._withdraw(bell)

    def release(self, n: int = 1) -> None:
        """Give ``n`` back, to those who wait longest. Any thread.

        Raises:
            ValueError: ``n`` is less than 1.
        """
        if n < 1:
            raise ValueError("n must be one or more")
        for _ in range(n):
            with self._guard:
                if self._bells:
                    self._bells.popleft().ring()
                else:
                    self._value += 1

    def _withdraw(self, bell: Bell) -> bool:
        """Stop waiting; False when it was given to us already."""
        with self._guard:
            return _drop(self._bells, bell)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Lock(Semaphore):
    """One at a time, as ``threading.Lock``: not re-entrant, and anybody may release it."""

    def __init__(self) -> None:
        super().__init__(1)

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Take it, waiting at most ``timeout`` seconds, or without end with None or -1; tell whether that was so.

        Raises:
            ValueError: another negative timeout, or one for what does not wait.
        """
        if timeout == -1:
            timeout = None
        if timeout is not None and timeout < 0:
            raise ValueError("timeout value must be a non-negative number")
        return super().acquire(blocking, timeout)

    def locked(self) -> bool:
        """Tell whether somebody holds it."""
        return self._value == 0

    def release(self, n: int = 1) -> None:
        """Let the next one have it.

        Raises:
            RuntimeError: nobody holds it.
        """
        if not self.locked():
            raise RuntimeError("release unlocked lock")
        super().release(1)


class Queue(Generic[T]):
    """First in, first out, as ``queue.Queue``.

    Attributes:
        maxsize: items that it holds at most; 0 is no bound.
    """

    def __init__(self, maxsize: int = 0) -> None:
        self.maxsize = max(0, maxsize)
        self._items: deque[T] = deque()
        self._filled = Semaphore(0)
        self._room = Semaphore(maxsize) if maxsize > 0 else None

    def qsize(self) -> int:
        """The number of items."""
        return len(self._items)

    def empty(self) -> bool:
        """Tell whether there is no item."""
        return not self._items

    def full(self) -> bool:
        """Tell whether there is no room."""
        return 0 < self.maxsize <= len(self._items)

    def put(self, item: T, block: bool = True, timeout: float | None = None) -> None:
        """Put an item in, waiting at most ``timeout`` seconds for room.

        Raises:
            Full: there was no room.
            ValueError: a negative timeout.
        """
        if self._room is not None and not self._room.acquire(block, _patience(block, timeout)):
            raise Full
        self._items.append(item)
        self._filled.release()

    def get(self, block: bool = True, timeout: float | None = None) -> T:
        """Take the oldest item out, waiting at most ``timeout`` seconds for one.

        Raises:
            Empty: there was none.
            ValueError: a negative timeout.
        """
        if not self._filled.acquire(block, _patience(block, timeout)):
            raise Empty
        item = self._items.popleft()
        if self._room is not None:
            self._room.release()
        return item

    def put_nowait(self, item: T) -> None:
        """Put an item in, if there is room."""
        self.put(item, block=False)

    def get_nowait(self) -> T:
        """Take the oldest item out, if there is one."""
        return self.get(block=False)


def _patience(block: bool, timeout: float | None) -> float | None:
    """The seconds that a queue waits; as in ``queue.Queue``, those of a call that does not wait are ignored."""
    if block and timeout is not None and timeout < 0:
        raise ValueError("'timeout' must be a non-negative number")
    return timeout if block else None


def _drop(bells: deque[Bell], bell: Bell) -> bool:
    try:
        bells.remove(bell)
    except ValueError:
        return False
    return True
