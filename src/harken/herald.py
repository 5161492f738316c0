"""Tells forked children that their server drains: they have copies of everything and see no change in the parent."""

from __future__ import annotations

import math
import mmap
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial

__all__ = ["Herald"]

_NOTE = struct.Struct("=?d")  # whether the server drains, and over how many seconds its goodbyes are spread

# In a child that a thread other than the main one has forked Python 3.13 runs no handler between two bytecodes, only
# where the signal interrupts a system call: who was computing is told once more, after so many seconds.
AGAIN_SECONDS = 1.0

_PR_SET_PDEATHSIG = 1  # prctl(2)


class Herald:
    """A page of memory that parent and children share, and a signal that makes a child look at it.

    The signal is SIGURG, which nobody misses: its default is to be ignored, and what it was made for, urgent data by
    ``F_SETOWN``, is not used by servers. A thread of each child's own that waits for the word would cost a short
    connection a tenth of all that it costs.
    """

    def __init__(self, parent: int = 0) -> None:
        """Have nothing to say yet.

        Args:
            parent: the process whose end says the same to its children, or 0: then they go on without it.
        """
        self._parent = parent
        self._signal_at_end = _parent_death() if parent else None
        self._page = mmap.mmap(-1, _NOTE.size)
        self._told: dict[int, float] = {}

    def tell(self, jitter: float, children: Iterable[int]) -> None:
        """Say that the server drains, with goodbyes spread over ``jitter`` seconds; again, to who is still there."""
        self._page[:] = _NOTE.pack(True, jitter)
        now = time.monotonic()
        for pid in children:
            if now - self._told.get(pid, -math.inf) < AGAIN_SECONDS:
                continue
            self._told[pid] = now
            try:
                os.kill(pid, signal.SIGURG)
            except ProcessLookupError:
                pass  # it has ended; whoever reaps it is told

    def listen(self, act: Callable[[float], None]) -> None:
        """Call ``act(jitter)`` in a thread once that is said. In the child, before its handler."""
        heard = False

        def hear(_number: int = 0, _frame: object = None) -> None:
            nonlocal heard
            drains, jitter = _NOTE.unpack(self._page[:])
            if (drains or self._parent not in (0, os.getppid())) and not heard:
                heard = True
                threading.Thread(target=act, args=(jitter,), name="harken-herald", daemon=True).start()

        if signal.getsignal(signal.SIGURG) is signal.SIG_DFL:  # else it is the program's own
            signal.signal(signal.SIGURG, hear)
            if self._signal_at_end is not None:
                self._signal_at_end(signal.SIGURG)
        hear()


def _parent_death() -> Callable[[int], object] | None:
    """Return what asks the kernel for a signal when our parent, or the thread that forked us, ends; None elsewhere.

    Looked up before anybody is forked, since that takes longer than a short connection.
    """
    if sys.platform != "linux":
        return None
    try:
        import ctypes

        return partial(ctypes.CDLL(None).prctl, _PR_SET_PDEATHSIG)
    except (ImportError, OSError, AttributeError):  # a Python without libffi
        return None
