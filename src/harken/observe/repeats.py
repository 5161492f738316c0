"""Warnings that repeat: the first few are written, the rest counted, and the count is told when its time is over.

A client that is turned away a thousand times a second must not fill the disk, nor hide what else is in the log.
"""

from __future__ import annotations

import atexit
import mmap
import struct
import threading
import time
from collections.abc import Callable

from harken.forking import told_in_child

__all__ = ["BURST", "WINDOW_SECONDS", "Repeats"]

# Alike lines that are written in one window. The kernel's own printk_ratelimit takes 10 in 5 seconds.
BURST = 10
WINDOW_SECONDS = 10.0
# Kinds that are counted apart; what is beyond counts as one, since a kind may have in it what a stranger made up.
MOST_KINDS = 256
# Places for kinds: those, and what is beyond, by the name of the event alone. Memory is taken as it is used.
_PLACES = MOST_KINDS + 64
# Bytes of a kind, which is a word or two and an exception's name; a longer one is known by its event alone.
_KIND_BYTES = 480
_HEAD = struct.Struct("=dq")  # when the window began, by time.monotonic(), or 0; how many places are used
_COUNT = struct.Struct("=q")
_BETWEEN = "\x1f"  # the words of a kind, which are escaped, and so without control characters

Kind = tuple[str, ...]


class Seen:
    """How often what was seen in a window, in memory that a process shares with those it forks.

    There is no lock between processes: two that count in the same moment may count one too few, and a line is written
    that need not be.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _HEAD.size + _PLACES * (_COUNT.size + _KIND_BYTES))  # anonymous and shared
        self._kinds_at = _HEAD.size + _PLACES * _COUNT.size

    @property
    def since(self) -> float:
        """When the window began, by ``time.monotonic()``; 0 while nothing was seen."""
        return float(_HEAD.unpack_from(self._memory)[0])

    def add(self, kind: Kind, now: float) -> int:
        """Count one more; return how many that makes."""
        since, used = _HEAD.unpack_from(self._memory)
        text = _BETWEEN.join(kind).encode(errors="replace")
        if len(text) >= _KIND_BYTES:
            return self.add(kind[:1], now)
        text = text.ljust(_KIND_BYTES, b"\0")
        found = self._memory.find(text, self._kinds_at, self._kinds_at + used * _KIND_BYTES)
        place = used if found < 0 else (found - self._kinds_at) // _KIND_BYTES
        if place == used:
            if used >= MOST_KINDS and len(kind) > 1:
                return self.add(kind[:1], now)
            at = self._kinds_at + place * _KIND_BYTES
            self._memory[at : at + _KIND_BYTES] = text
            self._write(place, 0)
            _HEAD.pack_into(self._memory, 0, since or now, used + 1)
        count = self._read(place) + 1
        self._write(place, count)
        return count

    def take(self) -> dict[Kind, int]:
        """Return all that was seen, and begin anew."""
        seen = {self._kind(place): self._read(place) for place in range(_HEAD.unpack_from(self._memory)[1])}
        _HEAD.pack_into(self._memory, 0, 0.0, 0)
        return seen

    def _kind(self, place: int) -> Kind:
        at = self._kinds_at + place * _KIND_BYTES
        text = self._memory[at : at + _KIND_BYTES].rstrip(b"\0").decode(errors="replace")
        return tuple(text.split(_BETWEEN))

    def _read(self, place: int) -> int:
        return int(_COUNT.unpack_from(self._memory, _HEAD.size + place * _COUNT.size)[0])

    def _write(self, place: int, count: int) -> None:
        _COUNT.pack_into(self._memory, _HEAD.size + place * _COUNT.size, count)


class Repeats:
    """Counts events by their kind, together with the processes that this one forks. Any thread.

    Whoever repeats itself ends the window when its time is over; if it has ended by then, whoever counts next does.
    """

    def __init__(self, tell: Callable[[Kind, int], object], window: float = WINDOW_SECONDS) -> None:
        """Begin with none seen.

        Args:
            tell: called with a kind and how many of it were left out, in a thread, when a window is over.
            window: seconds.
        """
        self._tell = tell
        self._window = window
        self._seen = Seen()
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        _all.add(self)

    def after_fork(self) -> None:
        """In a child: the thread that ends the window stayed in the parent, and so did whoever holds the lock."""
        self._lock = threading.Lock()
        self._timer = None

    def admit(self, kind: Kind) -> bool:
        """Count one more; tell whether it is to be written."""
        with self._lock:
            over = self._take_over()
            seen = self._seen.add(kind, time.monotonic())
            # The window ends by a thread of its own, which is started for those alone who repeat themselves.
            if seen > 1 and self._timer is None:
                self._start_timer()
        self._tell_all(over)
        return seen <= BURST

    def _start_timer(self) -> None:
        left = self._seen.since + self._window - time.monotonic()
        timer = threading.Timer(max(0.0, left), self._turn)
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError:  # there are no threads left: whoever counts next ends the window, or starts one then
            return
        self._timer = timer

    def _take_over(self) -> dict[Kind, int]:
        """Take what was seen in a window that is over."""
        since = self._seen.since
        return self._seen.take() if since and time.monotonic() - since >= self._window else {}

    def _turn(self) -> None:
        with self._lock:
            self._timer = None
            over = self._take_over()
            if self._seen.since:  # another process has begun the next one
                self._start_timer()
        self._tell_all(over)

    def _tell_all(self, seen: dict[Kind, int]) -> None:
        for kind, count in seen.items():
            if count > BURST:
                self._tell(kind, count - BURST)

    def close(self) -> None:
        """Tell at once what was left out."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            seen = self._seen.take()
        self._tell_all(seen)


_all = told_in_child(Repeats)


@atexit.register
def _at_exit() -> None:
    """Tell what was left out of windows that nobody will end."""
    for repeats in _all:
        repeats.close()
