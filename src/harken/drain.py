"""A drain: accept no more, let connections come to their end, cut what is left, and report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from harken import events
from harken.closing import DOOR_SECONDS, Closing
from harken.farewell import Farewell
from harken.lifecycle import Latch, State
from harken.records import ConnectionInfo, Record
from harken.settings import seconds, setting

if TYPE_CHECKING:
    from harken.serving import Serving

__all__ = ["CUT_GRACE", "Drain", "DrainReport", "drain", "run"]

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
DRAIN_JITTER = setting(
    "drain_jitter",
    seconds(),
    0.0,
    unit="seconds",
    live=True,
    meaning="over how long a drain spreads its goodbyes, so that clients do not all come back at once",
    origin="at once, unless asked: how soon clients come back is known to who runs them",
)

# Seconds that a cut handler gets to notice that its socket is shut: it wakes within milliseconds.
CUT_GRACE = 1.0
# Seconds between the end of what a handler can read, at the deadline, and the end of its connection: time for a last
# word, which is sent in less.
LAST_WORD_SECONDS = 0.2
# Seconds between looks at handlers that work on although their connections have ended.
_SLICE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class DrainReport:
    """How a drain went.

    Attributes:
        finished: connections that ended by themselves in time, or when what they had under way was done.
        left: connections that were idle, and left when they were asked to.
        cut: connections that were closed at the deadline.
        seconds: how long it took.
        connections: those that were cut; ``reason`` says why.
    """

    finished: int
    left: int
    cut: int
    seconds: float
    connections: list[ConnectionInfo]

    @classmethod
    def of_all(cls, reports: Sequence[DrainReport]) -> DrainReport:
        """Return one report for servers that share an engine and were drained together; none make an empty one."""
        return cls(
            sum(report.finished for report in reports),
            sum(report.left for report in reports),
            sum(report.cut for report in reports),
            max((report.seconds for report in reports), default=0.0),
            [info for report in reports for info in report.connections],
        )

    def __str__(self) -> str:
        return f"{self.finished} finished, {self.left} left, {self.cut} cut, {self.seconds:.2f} s"


class Drain:
    """A drain of one server that is under way.

    Attributes:
        deadline: ``time.monotonic()`` when what is left is cut.
        over: set when there is a report.
        report: how it went, at the end.
        running: how many handlers still run then, although their connections have ended.
    """

    def __init__(self, serving: Serving, timeout: float, own: Iterable[Record] = ()) -> None:
        """Begin none yet.

        Args:
            serving: the server's running side.
            timeout: seconds until the deadline.
            own: the connections of the handler that asks, which waits for the drain and so is not waited for.
        """
        self.since = time.monotonic()
        self.deadline = self.since + timeout
        self.over = Latch(owned=True)
        self.report: DrainReport | None = None
        self.running = 0
        self._serving = serving
        self._timeout = timeout
        self._own = set(own)
        self._joined = 0
        self._open = len(serving.connections)
        self._closed_before = Counter(serving.books.reasons)
        self._cut: list[ConnectionInfo] = []
        self._closing = Closing(serving)
        self._farewell = Farewell(serving, serving.settings["drain_jitter"])
        serving.under_way = self

    def begin(self) -> None:
        """Let nobody new come, and tell everybody who asks that the server drains."""
        serving = self._serving
        self.over.clear()
        left = serving.lifecycle.state is State.SUSPENDED and serving.door_stays()
        serving.lifecycle.move("drain")
        serving.connections.careful = True
        if left:
            self._closing.leave()
        elif self._timeout:
            self._closing.shut_out()
        events.emit("draining", server=serving.server, open=self._open, timeout=self._timeout)

    def turn(self) -> float:
        """Say the goodbyes that are due; return how many seconds the next turn may wait."""
        self._serving.tell_children()  # those that were forked since, too
        others = self._others() if time.monotonic() < self.deadline else []
        return self._farewell.turn(others)

    def may_close(self) -> bool:
        """Let in who waits at the door; tell whether it may be closed."""
        now = time.monotonic()
        return now >= self.deadline or self._closing.is_empty(now)

    def close_door(self) -> None:
        """Close the listener, once the loop was asked to end."""
        self._closing.close()

    def is_done(self) -> bool:
        """Tell whether nobody is waited for any more."""
        return time.monotonic() >= self.deadline or not self._others()

    def wait(self, timeout: float) -> None:
        """Wait until nobody is waited for, or something calls for another look; at most ``timeout`` seconds."""
        serving = self._serving
        timeout = max(0.0, min(timeout, self.deadline - time.monotonic()))
        if serving.started and serving.engine.in_child and serving.last_loop:
            serving.engine.join(time.monotonic() + timeout)  # nobody else reaps children now
        else:
            serving.connections.wait_for(self.is_done, timeout)

    def end(self) -> DrainReport:
        """Cut what is left, and report."""
        try:
            self._cut_others()
            self.running = self._await_handlers()
            self._closing.end()
            self._serving.abandoned = self.running > 0
            self.report = self._report()
            events.emit("drained", server=self._serving.server, report=self.report, running=self.running)
            return self.report
        finally:
            self.over.set()

    def hurry(self, reason: str) -> None:
        """Cut what is open now. Any thread; the report will count them."""
        self.deadline = self.since
        self._note(self._others(), reason)
        self._serving.cut(reason)
        self._serving.connections.nudge()

    def shorten(self, timeout: float) -> None:
        """Cut what is left in ``timeout`` seconds at the latest. Any thread."""
        self.deadline = min(self.deadline, time.monotonic() + timeout)
        self._serving.connections.nudge()

    def join(self, timeout: float, own: Iterable[Record]) -> DrainReport:
        """Wait for its end with somebody else, who may be more in a hurry. The thread that drains does not wait."""
        own = set(own)
        self._joined += bool(own)
        self._own |= own
        self.shorten(timeout)
        self.over.wait()
        return self.report or self._report()

    def spared(self) -> bool:
        """Tell whether a handler that asked for the drain, or joined it, still has its connection."""
        return any(record in self._own for record in self._serving.connections)

    def _others(self) -> list[Record]:
        return [record for record in self._serving.connections if record not in self._own]

    def _note(self, records: Iterable[Record], reason: str) -> None:
        """Give the reason to those that have none, or that were asked to leave and did not; and put them on record."""
        for record in records:
            if record.reason in (None, "drained", "handler_returned"):
                record.reason = reason
                self._cut.append(replace(record.info(), reason=reason))

    def _cut_others(self) -> None:
        others = self._others()
        self._note(others, "drain_deadline")
        if others and self.deadline > self.since:
            for record in others:
                record.leave("drain_deadline")
            self._serving.connections.wait_for(lambda: not self._others(), LAST_WORD_SECONDS)
        for record in self._others():
            record.cut("drain_deadline")
        if others and self._serving.started:
            self._serving.engine.terminate()

    def _await_handlers(self) -> int:
        """Wait for handlers, which may outlive their connections and serve datagrams; return how many still run."""
        serving = self._serving
        end = max(self.deadline, time.monotonic() + CUT_GRACE)
        running = 0
        while serving.started:
            running = serving.engine.join(min(end, time.monotonic() + _SLICE_SECONDS))
            if running <= self._joined or time.monotonic() >= end:
                break
        running = max(0, running - self._joined)
        if running and serving.started and serving.engine.in_child:
            running = serving.engine.kill()
        return running + (not serving.left.wait(max(0.0, end - time.monotonic())) and not serving.in_loop)

    def _report(self) -> DrainReport:
        closed = Counter(self._serving.books.reasons)
        closed.subtract(self._closed_before)
        ended_by_us = {"drained", "drain_deadline", "shutdown"}
        finished = sum(count for reason, count in closed.items() if reason not in ended_by_us)
        cut = list(self._cut)
        return DrainReport(max(0, finished), closed["drained"], len(cut), time.monotonic() - self.since, cut)


def run(drains: list[Drain], stop: Callable[[], None]) -> list[DrainReport]:
    """Drain servers whose loop is one.

    Args:
        drains: none of them begun.
        stop: asks the loop to end, without waiting for it.
    """
    try:
        for each in drains:
            each.begin()
        _await_closing(drains)
        stop()
        for each in drains:
            each.close_door()
        while waited_for := [each for each in drains if not each.is_done()]:
            pause = min(each.turn() for each in drains)
            waited_for[0].wait(pause)
        return [each.end() for each in drains]
    finally:
        for each in drains:
            each.over.set()


def _await_closing(drains: list[Drain]) -> None:
    """Go on until every door may be closed.

    Goodbyes are said meanwhile: who waits at a door may wait for a handler to be free.
    """
    due = 0.0
    while sum(each.may_close() for each in drains) < len(drains):  # not all(): each lets in who waits
        now = time.monotonic()
        if now >= due:
            due = now + min(each.turn() for each in drains)
        time.sleep(DOOR_SECONDS)


def drain(serving: Serving, timeout: float, stop: Callable[[], None], own: Sequence[Record]) -> DrainReport:
    """Drain one server, or wait for the end of the drain that is under way.

    Who is no handler drains once more where handlers that asked as well were spared: they have their report by then.

    Args:
        serving: its running side.
        timeout: seconds to wait before what is left is cut.
        stop: asks the loop to end, without waiting for it.
        own: the connections of the handler that asks.
    """
    with serving.guard:
        under_way = serving.under_way
        first = under_way is None or under_way.report is not None
        if first:
            under_way = Drain(serving, timeout, own)
    assert under_way is not None
    deadline = time.monotonic() + timeout
    report = run([under_way], stop)[0] if first else under_way.join(timeout, own)
    if own or not under_way.spared():
        return report
    left = max(LAST_WORD_SECONDS, deadline - time.monotonic())
    return DrainReport.of_all([report, drain(serving, left, stop, own)])
