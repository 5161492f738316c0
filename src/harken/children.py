"""Connections that are served in forked children: what the parent does for each, and the child before its handler.

The parent keeps the books. A child tells it, through memory that both have, what was counted on its connection
(``Tally``); by a pipe, what the preambles learned of the client (``Report``); and by its exit status, why it ended.
The parent tells its children that the server drains (``Herald``).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from harken.deadlines import NAMES as DEADLINES
from harken.expiry import child_status
from harken.farewell import LOOK_SECONDS, Farewell
from harken.herald import Herald
from harken.lifecycle import State
from harken.meter import Meter
from harken.records import CHILD_STATUS
from harken.report import Report
from harken.tally import Tally, Told

if TYPE_CHECKING:
    from harken.books import Books
    from harken.records import Record
    from harken.serving import Serving

__all__ = ["Children"]


class Children:
    """The children of one server. Any thread: several loops may fork and collect at once."""

    def __init__(self, serving: Serving) -> None:
        """Have none yet."""
        self._serving = serving
        # A worker that is killed leaves connections of which nobody knows; those of a program's own server go on.
        self._parent = os.getpid() if serving.settings.profile == "serve" else 0
        self._herald = Herald(self._parent)
        self._tally = Tally()

    def serve(self, function: Callable[..., object], request: Any, client_address: Any) -> None:
        """Run ``function(request, client_address)`` in a child; the connection's record lasts until the child exits.

        Raises:
            OSError: the system starts no more processes; the connection is as it was.
        """
        serving = self._serving
        if serving.entry is not None:
            serving.entry.refresh()
        child = _Child(serving, self._tally, serving.connections.find(request))
        child.start(self._serve_here, function, request, client_address, child.place)

    def tell_of_drain(self) -> None:
        """Let those that run know that the server drains, and those that were forked since."""
        pids = [record.process for record in self._serving.connections if record.process]
        self._herald.tell(self._serving.settings["drain_jitter"], pids)

    def serve_on(self) -> None:
        """The drain is over: children to come are told nothing of it."""
        self._herald = Herald(self._parent)

    # -- in the child --------------------------------------------------------------------------------------------------

    def _serve_here(self, function: Callable[..., object], request: Any, client_address: Any, place: int) -> int:
        """The listener is the parent's alone, and so are the books."""
        serving = self._serving
        serving.on_child()
        record = serving.connections.find(request)
        if record is not None:
            record.silent = True
        if not isinstance(request, tuple) and hasattr(serving.server, "socket"):
            serving.server.socket.close()
        if record is not None:
            self._herald.listen(partial(self._say_goodbye, record))
        books = serving.books
        failed_before = books.counts["handler_failed"]  # by then, in the parent
        if books.meter is not None:
            books.meter = Meter()
        deadlines = serving.bounds.deadlines
        try:
            if deadlines is not None:
                deadlines.after_fork(record)
            function(request, client_address)
        except SystemExit:  # ends this connection alone, as in a thread, and is no fault of its handler's
            pass
        except Exception as error:
            if (record is not None and record.failed) or books.counts["handler_failed"] > failed_before:
                raise
            books.failed(request, client_address, error)  # no thread for the deadlines, say: else nobody is told
            serving.server.handle_error(request, client_address)
            serving.server.shutdown_request(request)
        finally:
            self._tally.tell(place, record, _told(books, books.counts["handler_failed"] - failed_before))
        return child_status(record)

    def _say_goodbye(self, record: Record, jitter: float) -> None:
        """The server drains: to the one connection that is served here, until the process ends."""
        serving = self._serving
        serving.lifecycle.state = State.DRAINING
        serving.connections.careful = True
        farewell = Farewell(serving, jitter)
        time.sleep(LOOK_SECONDS)  # the word woke the handler's thread, which goes back to what it waited for
        while True:
            time.sleep(farewell.turn([record]))


def _told(books: Books, failures: int) -> Told:
    """What a child tells of its one request."""
    meter = books.meter
    if meter is None:
        return Told(failures)
    return Told(failures, *(times.sum if any(times.counts) else -1.0 for times in (meter.preamble, meter.handler)))


class _Child:
    """One child, as its parent knows it.

    Several loops may hear of it, also while the one that forks it is getting to know it. What they do stands under its
    lock: else an end could be told before the connection is the child's, or the descriptor of its report be closed
    twice, and by then be another connection's.
    """

    def __init__(self, serving: Serving, tally: Tally, record: Record | None) -> None:
        self._serving = serving
        self._tally = tally
        self._record = record
        self._begun = record.started if record is not None else time.monotonic()
        self._known = threading.RLock()
        deadlines = serving.bounds.deadlines
        self._limits = deadlines.limits if deadlines is not None else dict.fromkeys(DEADLINES)
        self._report = Report(record, self._opened) if serving.entry is not None and record is not None else None
        self.place = tally.take()

    def start(self, function: Callable[..., int], *args: Any) -> None:
        """Fork it; its exit status is what ``function(*args)`` returns."""
        engine, record, report = self._serving.engine, self._record, self._report
        try:
            if record is not None:
                record.report = report
            with self._known:
                pid = engine.spawn(function, *args, done=self._ended)
                self._serving.connections.hand_over(record, pid)
        except BaseException:
            self._tally.give_back(self.place, None)
            if report is not None:
                report.close()
            raise
        finally:
            if report is not None:
                report.hand_on()
        with self._known:
            if report is not None and report.open:
                engine.watch(report, self._told)

    def _told(self) -> bool:
        """It has told what the preambles learned, or ended without."""
        with self._known:
            if self._report is not None and self._report.open:
                self._serving.engine.unwatch(self._report)
                self._report.hear()
        return False

    def _opened(self, record: Record) -> None:
        if record.held:
            self._serving.books.opened(record, record.client_address)

    def _ended(self, status: int) -> None:
        """It has exited, and its status says why its connection ended."""
        record, books = self._record, self._serving.books
        with self._known:
            self._told()
            told = self._tally.give_back(self.place, record)
            books.failed_elsewhere(told.failures)
            if books.meter is not None:
                self._measure(books.meter, told, status)
            if record is not None:
                self._tell_reason(record, status)
            self._serving.connections.child_ended(record, status)

    def _measure(self, meter: Meter, told: Told, status: int) -> None:
        if told.preamble >= 0:
            meter.preamble.add(told.preamble)
        if told.handler >= 0:
            meter.handler.add(told.handler)
        elif status not in (CHILD_STATUS["preamble_failed"], CHILD_STATUS["rejected"]):  # it was killed, say
            meter.handled(self._begun)

    def _tell_reason(self, record: Record, status: int) -> None:
        books = self._serving.books
        if status == CHILD_STATUS["rejected"]:
            books.rejected(record, record.client_address, record.detail or "verify_request")
        if status == CHILD_STATUS["preamble_failed"]:
            books.preamble_failed(record)
        which = next((name for name in DEADLINES if CHILD_STATUS[name] == status), None)
        if which is not None:
            books.timed_out(record, record.client_address, which, self._limits[which] or 0.0)
