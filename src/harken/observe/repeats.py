"""Warnings that repeat: the first few are written, the rest counted, and the count is told when its time is over.

A client that is turned away a thousand times a second must not fill the disk, nor hide what else is in the log.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable

__all__ = ["BURST", "WINDOW_SECONDS", "Repeats"]

# Alike lines that are written in one window. The kernel's own printk_ratelimit takes 10 in 5 seconds.
BURST = 10
WINDOW_SECONDS = 10.0
# Kinds that are counted apart; what is beyond counts as one, since a kind may have in it what a stranger made up.
MOST_KINDS = 256

Kind = tuple[str, ...]


class Repeats:
    """Counts events by their kind. Any thread."""

    def __init__(self, tell: Callable[[Kind, int], object], window: float = WINDOW_SECONDS) -> None:
        """Begin with none seen.

        Args:
            tell: called with a kind and how many of it were left out, in a thread, when a window is over.
            window: seconds.
        """
        self._tell = tell
        self._window = window
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[Kind, int] = {}
        self._timer: threading.Timer | None = None

    def admit(self, kind: Kind) -> bool:
        """Count one more; tell whether it is to be written."""
        with self._lock:
            if len(self._seen) >= MOST_KINDS and kind not in self._seen:
                kind = kind[:1]
            seen = self._seen[kind] = self._seen.get(kind, 0) + 1
            # The window ends by a thread of its own, which is started for those alone who repeat themselves.
            if seen > 1 and self._timer is None:
                self._timer = threading.Timer(self._window, self._turn)
                self._timer.daemon = True
                self._timer.start()
            return seen <= BURST

    def _turn(self) -> None:
        with self._lock:
            seen, self._seen, self._timer = self._seen, {}, None
        for kind, count in seen.items():
            if count > BURST:
                self._tell(kind, count - BURST)

    def close(self) -> None:
        """Tell at once what was left out."""
        with self._lock:
            timer = self._timer
        if timer is not None:
            timer.cancel()
        self._turn()


_all: weakref.WeakSet[Repeats] = weakref.WeakSet()


def _after_fork() -> None:
    """A child counts anew: what was seen is its parent's to tell, and the thread that ends the window stayed there."""
    for repeats in _all:
        repeats._begin()


@atexit.register
def _at_exit() -> None:
    """Tell what was left out of windows that nobody will end."""
    for repeats in _all:
        repeats.close()


os.register_at_fork(after_in_child=_after_fork)
