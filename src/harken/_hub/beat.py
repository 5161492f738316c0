"""What a loop says of itself, for a watchdog in another thread. The contract is the room's.

The compiled ``Beat`` needs no GIL to listen. This one does: of a piece of work that holds the GIL it learns at the
moment when that lets go, which is still at the same line.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from harken._hub import LONG_SECONDS, LOOK_SECONDS
from harken.unpatched import original

__all__ = ["Beat"]

SHORTEST = 0.001  # seconds between two looks


class Beat:
    """See :mod:`harken._hub`.

    Attributes:
        after: seconds after which a piece of work is late; None: never.
    """

    def __init__(self, unsent: Callable[[], bool] | None = None) -> None:
        """Make the beat of a loop.

        Args:
            unsent: tells whether the running green thread has written something that is not sent.
        """
        self.after: float | None = None
        self._unsent = unsent
        self.forget()
        self._stopped = False
        self._bell = original("_thread", "allocate_lock")()
        self._bell.acquire()
        self._suspect = 0.0
        self._told_long = False
        self._rests = False

    def forget(self) -> None:
        """In a forked child, which has no watchdog yet."""
        self._since = 0.0
        self._caught = False
        self._ended = 0.0
        self._parked = False

    def enter(self) -> None:
        """A piece of work begins."""
        self._since = monotonic()
        if self._caught:
            self._over()
        if self._parked:
            self._parked = False
            self._ring()

    def leave(self) -> None:
        """The loop is about to sleep."""
        self._since = 0.0
        if self._caught:
            self._over()

    def _over(self) -> None:
        self._caught = False
        self._ended = monotonic()
        self._ring()

    def _ring(self) -> None:
        try:
            self._bell.release()
        except RuntimeError:
            pass  # it rings already

    # -- the watchdog's side -------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Let ``watch`` return ``stopped``, now and from now on."""
        self._stopped = True
        self._ring()

    def same(self) -> bool:
        """Tell whether the late piece of work still runs."""
        return self._since == self._suspect != 0.0

    def watch(self) -> tuple[str, float]:
        """Wait for news; see the contract."""
        if self._rests:  # what was unsent may not have gone
            self._bell.acquire(timeout=self._interval())
        while True:
            since = self._since
            age = monotonic() - since
            word, seconds = self._look(since, age)
            if word:
                self._rests = word == "unsent"
                return word, seconds
            if since:
                self._bell.acquire(timeout=self._patience(age))
            else:
                self._park()

    def _look(self, since: float, age: float) -> tuple[str, float]:
        if self._ended:
            seconds, self._ended = self._ended - self._suspect, 0.0
            return "over", seconds
        if self._stopped:
            return "stopped", age
        return self._judge(since, age) if since else "", age

    def _judge(self, since: float, age: float) -> str:
        """Look at the piece of work that began at ``since``."""
        if self._caught:
            if age >= LONG_SECONDS and not self._told_long:
                self._told_long = True
                return "long"
        elif self.after is not None and age >= self.after:
            self._suspect, self._told_long, self._caught = since, False, True
            if self._since == since:
                return "late"
            self._caught = False  # it went on at this very moment
        owes = age >= LOOK_SECONDS and self._unsent is not None and self._unsent()
        return "unsent" if owes else ""

    def _interval(self) -> float:
        return LOOK_SECONDS if self.after is None else max(SHORTEST, min(self.after / 4, LOOK_SECONDS))

    def _patience(self, age: float) -> float:
        if self._caught or self.after is None:
            return self._interval()
        return max(SHORTEST, min(self.after - age, self._interval()))

    def _park(self) -> None:
        self._parked = True
        if not (self._since or self._stopped or self._ended):
            self._bell.acquire()
        self._parked = False
        if not (self._stopped or self._ended):
            self._bell.acquire(timeout=self._interval())
