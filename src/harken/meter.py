"""What is measured of a server beside counting, if somebody asks for metrics: times and bytes.

It happens where connections come and go, so it is plain integers: no lock, no objects of a metrics library. One thread
adds at a time: between reading a number of a list and writing it back CPython changes to no other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from time import monotonic
from typing import Any

from harken.settings import setting, text
from harken.traffic import since_handshake

__all__ = ["METRICS", "METRICS_TOKEN", "SAMPLED", "SECONDS", "Histogram", "Meter"]


def _can_carry_page(url: str) -> None:
    if not url.startswith(("tcp:", "unix:")):
        raise ValueError("is no address for a page; take tcp://HOST:PORT or unix:/PATH")


METRICS = setting(
    "metrics",
    text(optional=True, test=_can_carry_page),
    None,
    meaning="the address, `tcp://…` or `unix:…`, of a page of its own: `/metrics` for Prometheus, `/health/live`, "
    "`/health/ready`, and a live view for people",
    origin="what is not asked for is not open",
)
METRICS_TOKEN = setting(
    "metrics_token",
    text(optional=True),
    None,
    meaning="a file with the token, of at least 16 letters, by which people trace and close connections in the live "
    "view and see it from other machines; none: from this machine they look, and nobody touches",
    origin="a secret on the command line is in everybody's list of processes",
)

# Upper bounds of the buckets of all times, in seconds: Prometheus' own defaults, begun earlier, since handlers of short
# connections take less than a millisecond, and continued, since those of long ones take hours.
SECONDS = (0.0001, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0, 3600.0)
# One connection in so many is asked how long it waited in the accept queue, which costs a system call.
SAMPLED = 16


class Histogram:
    """How often a time fell between which bounds."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count one."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


class Meter:
    """One server's.

    Attributes:
        handler: seconds of handlers.
        preamble: seconds of preambles that a connection passed.
        queue: seconds in the accept queue, of one connection in :data:`SAMPLED`.
        lag: seconds from asking the loop for a turn to that turn.
        asked: when the loop was asked, by ``time.monotonic()``; 0 when it was not.
        received: bytes that came on connections that have ended.
        sent: bytes that were sent on them.
    """

    def __init__(self) -> None:
        self.handler = Histogram()
        self.preamble = Histogram()
        self.queue = Histogram()
        self.lag = Histogram()
        self.asked = 0.0
        self.received = 0
        self.sent = 0
        self._until_sample = 1

    def accepted(self, request: Any, count: int = 1) -> None:
        """Connections were taken from the kernel, ``request`` first; it waited the longest."""
        self._until_sample -= count
        if self._until_sample <= 0:
            self._until_sample = SAMPLED
            waited = since_handshake(request)
            if waited is not None:
                self.queue.add(waited)

    def handled(self, begun: float) -> None:
        """A handler that began at ``begun``, by ``time.monotonic()``, has ended."""
        seconds, times = monotonic() - begun, self.handler
        times.counts[bisect_left(SECONDS, seconds)] += 1  # as Histogram.add, without the call
        times.sum += seconds

    def entered(self, begun: float) -> None:
        """A connection that came to its preambles at ``begun`` has passed them."""
        self.preamble.add(monotonic() - begun)

    def moved(self, counts: tuple[int, int]) -> None:
        """A connection has ended on which so many bytes were received and sent."""
        self.received += counts[0]
        self.sent += counts[1]

    def turned(self) -> None:
        """The loop has turned."""
        if self.asked:
            asked, self.asked = self.asked, 0.0
            self.lag.add(monotonic() - asked)
