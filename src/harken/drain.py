"""A drain: accept no more, let connections come to their end, cut what is left, and report."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harken import events
from harken.connection import ConnectionInfo, Record, backlog_length
from harken.settings import seconds, setting

if TYPE_CHECKING:
    from harken.serving import Serving

__all__ = ["CUT_GRACE", "Drain", "DrainReport", "drain", "hurry"]

DRAIN_TIMEOUT = setting(
    "drain_timeout",
    seconds(),
    0.0,
    serve=30.0,
    unit="seconds",
    live=True,
    meaning="how long a drain waits for connections before it cuts what is left",
    origin="gunicorn's graceful_timeout; the drop-in classes have no drain of their own",
)

# Seconds that a cut handler gets to notice that its socket is shut: it wakes within milliseconds.
CUT_GRACE = 1.0
# Seconds that a drain gives the loop to leave its poll(): it takes one turn.
LEAVE_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class DrainReport:
    """How a drain went.

    Attributes:
        finished: connections that ended by themselves in time.
        left: handlers that still run although their connection was cut.
        cut: connections that were closed at the deadline.
        seconds: how long it took.
        connections: those that were cut.
    """

    finished: int
    left: int
    cut: int
    seconds: float
    connections: list[ConnectionInfo]

    def __str__(self) -> str:
        return f"{self.finished} finished, {self.cut} cut, {self.left} handlers left, {self.seconds:.2f} s"


class Drain:
    """A drain under way.

    Attributes:
        since: ``time.monotonic()`` at its begin.
    """

    def __init__(self, serving: Serving) -> None:
        self.since = time.monotonic()
        self._serving = serving
        self._open = len(serving.connections)

    def begin(self, timeout: float, stop: Callable[[], None]) -> None:
        """Stop accepting and close the listener.

        Args:
            timeout: seconds until the deadline.
            stop: asks the loop to end, without waiting for it.
        """
        serving = self._serving
        serving.lifecycle.move("drain")
        events.emit("draining", server=serving.server, open=self._open, timeout=timeout)
        stop()
        serving.wake()
        # Its poll() would hold the listener's port; a loop that is inside a handler holds nothing, and may stay there.
        serving.left.wait(LEAVE_SECONDS)
        self._serve_backlog(self.since + timeout)
        listener = getattr(serving.server, "socket", None)
        if listener is not None:
            listener.close()

    def _serve_backlog(self, deadline: float) -> None:
        """Take what has reached the backlog, which closing would reset; inline there is no place to serve it."""
        serving = self._serving
        if not serving.started or serving.engine.in_loop or not serving.intake.bursts:
            return
        for _ in range(backlog_length(getattr(serving.server, "socket", None))):
            if serving.engine.full or time.monotonic() >= deadline or not serving.intake.readable():
                return
            serving.server._handle_request_noblock()

    def end(self, deadline: float) -> DrainReport:
        """Wait for connections until ``deadline`` (``time.monotonic()``), then cut what is left."""
        serving = self._serving
        if serving.started and serving.engine.in_child:
            serving.engine.join(deadline)  # nobody else reaps now, and a connection lasts until its child is reaped
        own = self._own()
        serving.connections.wait_empty(max(0.0, deadline - time.monotonic()), besides=len(own))
        cut = [record.info() for record in serving.cut("drain_deadline", besides=own)]
        left = serving.engine.join(time.monotonic() + CUT_GRACE) if serving.started else 0
        left += not serving.left.wait(CUT_GRACE) and not serving.in_loop
        serving.abandoned = left > 0
        cut += serving.hurried
        finished = max(0, self._open - len(cut) - len(own))
        report = DrainReport(finished, left, len(cut), time.monotonic() - self.since, cut)
        events.emit("drained", server=serving.server, report=report)
        return report

    def _own(self) -> list[Record]:
        """The connections whose handler is the caller: a verb that a handler calls does not wait for that handler."""
        here = threading.get_ident()
        return [record for record in self._serving.connections if record.thread == here]


def drain(serving: Serving, timeout: float, stop: Callable[[], None]) -> DrainReport:
    """Begin a drain and end it within ``timeout`` seconds; ``stop`` asks the loop to end."""
    under_way = Drain(serving)
    under_way.begin(timeout, stop)
    return under_way.end(under_way.since + timeout)


def hurry(serving: Serving, reason: str) -> None:
    """Cut what is open now, before a drain's time is over; its report will count them. Any thread."""
    # Noted before their handlers wake, and with them whoever reports the drain.
    serving.hurried += [record.info() for record in serving.connections if record.reason is None]
    serving.cut(reason)
