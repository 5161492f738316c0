"""``alarm_connections``: says when many are open. It refuses nobody."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from harken import settings

if TYPE_CHECKING:
    from harken.peer import Peer

__all__ = ["ALARM_CONNECTIONS", "Alarm"]

ALARM_CONNECTIONS = settings.setting(
    "alarm_connections",
    settings.count(1, optional=True),
    None,
    unit="connections",
    live=True,
    meaning="emit the event `alarm` when a connection comes in and so many are open, at most once in 5 seconds",
    origin="Ranch's alarms",
)

# Seconds between two alarms: Ranch's default.
COOLDOWN_SECONDS = 5.0


class Alarm:
    """Calls ``ring(open)`` when one comes in and at least ``threshold`` are open; None never does."""

    def __init__(
        self,
        threshold: int | None,
        inside: Callable[[], int],
        ring: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make an alarm that has not rung.

        Args:
            threshold: how many.
            inside: tells how many are open, the one that is asked about included.
            ring: called with that number.
            clock: in seconds.
        """
        self.threshold = threshold
        self._inside = inside
        self._ring = ring
        self._clock = clock
        self._next = -math.inf

    def admit(self, peer: Peer | None) -> str | None:
        """Ring if it is time."""
        if self.threshold is not None and self._inside() >= self.threshold and self._clock() >= self._next:
            self._next = self._clock() + COOLDOWN_SECONDS
            self._ring(self._inside())
        return None

    def release(self, peer: Peer | None) -> None:
        """Nothing is held."""
