"""Limits that hold over several processes: a page of memory in which each says how many it has let in.

Each process writes its own place and nobody else's, so that what a killed one had let in is forgotten by clearing its
place. Whoever is let in near the limit is let in under a lock: a record lock, which the kernel takes from a process
that dies (fcntl(2)).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ROUNDING", "Across", "Place"]

_BUCKET = struct.Struct("=dd")  # tokens, and when they were counted (CLOCK_MONOTONIC: one clock for all processes)
_NUMBER_BYTES = 8
# What a token may lack: sums of fractions of a second come out a little below a whole.
ROUNDING = 1e-6
# Connections that each process may have accepted, or let in, that the others do not see yet: a burst of its acceptor.
MARGIN = 64


class Across:
    """The memory. Made by the parent of the processes; they inherit it."""

    def __init__(self, places: int) -> None:
        """Begin with nobody inside.

        Args:
            places: processes at once.
        """
        # Anonymous and shared. Behind the numbers a byte for each place: whether a handler is free there.
        self._memory = mmap.mmap(-1, _BUCKET.size + (1 + places) * _NUMBER_BYTES + places)
        self._free = _BUCKET.size + (1 + places) * _NUMBER_BYTES
        # How many places are used at all, lowest first; and how many each has let in.
        self._numbers = memoryview(self._memory)[_BUCKET.size : self._free].cast("q")
        self._lock = os.memfd_create("harken-limits", os.MFD_CLOEXEC)

    def place(self, number: int) -> Place:
        """Return the place of one process, empty. In the parent."""
        self.clear(number)
        self._numbers[0] = max(self._numbers[0], number + 1)
        return Place(self, number)

    def clear(self, number: int) -> None:
        """A process has ended, and nobody is inside by it any more."""
        self._numbers[1 + number] = 0
        self._memory[self._free + number] = 0

    def say_free(self, number: int, free: bool) -> None:
        """Whether one process has a handler free for who comes. In that process."""
        self._memory[self._free + number] = free

    def others_are_free(self, number: int) -> bool:
        """Whether another process has one."""
        states = self._memory[self._free : self._free + self._numbers[0]]
        return any(states[:number]) or any(states[number + 1 :])

    def add(self, number: int, change: int) -> None:
        """So many more are inside by one process, or fewer. In that process."""
        self._numbers[1 + number] += change

    @property
    def inside(self) -> int:
        """How many are inside, over all processes."""
        return sum(self._numbers[1 : 1 + self._numbers[0]])

    @property
    def processes(self) -> int:
        """How many there may be."""
        return self._numbers[0]

    def near(self, maximum: int) -> bool:
        """Tell whether so few places are left that the lock is needed."""
        return self.inside + MARGIN * self.processes >= maximum

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out while the block runs."""
        fcntl.lockf(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)

    def read_bucket(self) -> tuple[float, float]:
        """Return the tokens that are left, and when that was; (0, 0) at first. Under the lock."""
        tokens, at = _BUCKET.unpack_from(self._memory)
        return tokens, at

    def write_bucket(self, tokens: float, at: float) -> None:
        """Say how many are left now. Under the lock."""
        _BUCKET.pack_into(self._memory, 0, tokens, at)

    def close(self) -> None:
        """Let go of memory and lock."""
        self._numbers.release()
        self._memory.close()
        os.close(self._lock)


class Place:
    """One process's. Any thread.

    A release may come at any point, also in the middle of an admission, by a garbage collection: hence the RLock.
    The parent makes it, and whoever uses it first has it. What that process forks writes nothing: it inherits the
    tickets of connections that stay inside by its parent.
    """

    def __init__(self, across: Across, number: int) -> None:
        self.across = across
        self._number = number
        self._guard = threading.RLock()
        self._user = 0

    @property
    def inside(self) -> int:
        """How many are inside, over all processes."""
        return self.across.inside

    @property
    def processes(self) -> int:
        """How many let in, this one among them."""
        return self.across.processes

    def near(self, maximum: int) -> bool:
        """Tell whether other processes may take the places that are left."""
        return self.across.near(maximum)

    def add(self, change: int) -> None:
        """So many more are inside by this process, or fewer."""
        if self._is_used_here():  # asked first: a thread that is not in this child may hold the guard
            with self._guard:
                self.across.add(self._number, change)

    def _is_used_here(self) -> bool:
        """Whether this process is the one that uses it, and not one that it has forked."""
        pid = os.getpid()
        self._user = self._user or pid
        return self._user == pid

    def say_free(self, free: bool) -> None:
        """Whether a handler is free here for who comes."""
        if self._is_used_here():
            self.across.say_free(self._number, free)

    @property
    def others_are_free(self) -> bool:
        """Whether one is free in another process."""
        return self.across.others_are_free(self._number)

    def admit(self, maximum: int) -> bool:
        """Let one in, if fewer than ``maximum`` are inside; tell whether.

        It counts before it is asked whether there is room: whoever is held up in between, while others fill the last
        places, has been seen by them. So the number is exact, and who is turned away was so for one that is let in.
        """
        if not self._is_used_here():
            return self.across.inside < maximum
        with self._guard:
            self.across.add(self._number, 1)
            if not self.near(maximum):
                return True
            with self.across.locked():
                if self.across.inside <= maximum:
                    return True
                self.across.add(self._number, -1)
                return False

    def take_token(self, maximum: float, now: float) -> bool:
        """Take a token of the bucket, which holds one second's; tell whether one was left.

        Args:
            maximum: tokens a second.
            now: by ``time.monotonic()``.
        """
        with self._guard, self.across.locked():
            tokens, at = self.across.read_bucket()
            tokens = min(maximum, tokens + (now - at) * maximum) if at else maximum
            taken = tokens >= 1.0 - ROUNDING
            self.across.write_bucket(tokens - taken, now)
            return taken
