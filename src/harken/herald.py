"""Tells forked children that their server drains: they have copies of everything and see no change in the parent."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterable

__all__ = ["Herald"]

_NOTE = struct.Struct("=?d")  # whether the server drains, and over how many seconds its goodbyes are spread


class Herald:
    """A page of memory that parent and children share, and a signal that makes a child look at it.

    The signal is SIGURG, which nobody misses: its default is to be ignored, and what it was made for, urgent data by
    ``F_SETOWN``, is not used by servers. A thread of each child's own that waits for the word would cost a short
    connection a tenth of all that it costs.
    """

    def __init__(self) -> None:
        """Have nothing to say yet."""
        self._page = mmap.mmap(-1, _NOTE.size)
        self._told: set[int] = set()

    def tell(self, jitter: float, children: Iterable[int]) -> None:
        """Say that the server drains, with goodbyes spread over ``jitter`` seconds; again, to children forked since."""
        self._page[:] = _NOTE.pack(True, jitter)
        for pid in set(children) - self._told:
            self._told.add(pid)
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
            if drains and not heard:
                heard = True
                threading.Thread(target=act, args=(jitter,), name="harken-herald", daemon=True).start()

        if signal.getsignal(signal.SIGURG) is signal.SIG_DFL:  # else it is the program's own
            signal.signal(signal.SIGURG, hear)
        hear()
