"""``max_accept_rate``: how many may come in a second."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from harken import settings
from harken.limits.across import ROUNDING

if TYPE_CHECKING:
    from harken.limits.across import Place
    from harken.peer import Peer

__all__ = ["MAX_ACCEPT_RATE", "MaxAcceptRate"]

MAX_ACCEPT_RATE = settings.setting(
    "max_accept_rate",
    settings.count(1, optional=True),
    None,
    unit="connections a second",
    live=True,
    meaning="connections taken in a second, by a token bucket that holds one second; those beyond are reset, or get "
    "`overload_reply`, since clients that wait in the backlog time out, come back and never let it empty",
    origin="off; EMQX resets what is over its rate after reconnect storms that lasted for ever (emqx#14145)",
)


class MaxAcceptRate:
    """A token bucket that fills at ``maximum`` a second and holds one second's tokens."""

    def __init__(
        self, maximum: int | None, clock: Callable[[], float] = time.monotonic, place: Place | None = None
    ) -> None:
        """Begin with a full bucket.

        Args:
            maximum: tokens a second.
            clock: in seconds.
            place: this process's among several that take from one bucket; None: it is alone.
        """
        self._clock = clock
        self._place = place
        self._lock = threading.Lock()
        self._maximum = maximum
        self._tokens = float(maximum or 0)
        self._at = clock()

    @property
    def maximum(self) -> int | None:
        """Tokens a second, and in the full bucket; None takes no token."""
        return self._maximum

    @maximum.setter
    def maximum(self, maximum: int | None) -> None:
        with self._lock:
            self._fill()
            if self._maximum is None:
                self._tokens = float(maximum or 0)
            self._maximum = maximum
            self._tokens = min(self._tokens, float(maximum or 0))

    def admit(self, peer: Peer | None) -> str | None:
        """Take a token."""
        if self._maximum is None:
            return None
        if self._place is not None:
            return None if self._place.take_token(self._maximum, self._clock()) else "max_accept_rate"
        with self._lock:
            self._fill()
            if self._tokens < 1.0 - ROUNDING:
                return "max_accept_rate"
            self._tokens -= 1.0
        return None

    def release(self, peer: Peer | None) -> None:
        """Nothing: a token is spent."""

    def _fill(self) -> None:
        now = self._clock()
        if self._maximum is not None:
            self._tokens = min(float(self._maximum), self._tokens + (now - self._at) * self._maximum)
        self._at = now
