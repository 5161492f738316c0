"""Deadlines of connections: which is over, and when to look again. No call of a handler is slowed by them.

Nothing is written down when bytes move. A connection is looked at when a deadline *could* be over, as if nothing had
moved since the last look; what the kernel and the stamps tell then says whether it is, and when the next look is due.
So a busy connection costs a look for each span of its shortest timeout, and all are kept in one heap: O(log n) a look.

``write_timeout`` is the exception. When a peer stopped reading is known to nobody afterwards, so the queues of unsent
bytes are sampled, fifty times in the span: one short system call a connection, and for those that have a queue one
more, to see whether the peer takes any of it.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from harken import settings
from harken.reaper import reaper
from harken.stamps import stamp
from harken.traffic import queued, tells, traffic

if TYPE_CHECKING:
    from harken.records import Record

__all__ = ["NAMES", "Deadlines"]


def _declare(name: str, meaning: str, origin: str, serve: float | None = None) -> None:
    settings.setting(
        name,
        settings.seconds(optional=True),
        None,
        serve=serve,
        unit="seconds",
        live=True,
        meaning=meaning,
        origin=origin,
    )


_declare(
    "idle_timeout",
    "close a connection on which no byte moved either way for so long, whatever its handler does",
    "five minutes outlast the pauses of people; Netty's and Ranch's users set one to five minutes",
    serve=300.0,
)
_declare(
    "read_timeout",
    "close a connection when one call of its handler that reads takes longer; a `readline` counts whole, so it ends "
    "a slow dribble too",
    "off: many protocols wait for the client to speak",
)
_declare(
    "write_timeout",
    "close a connection whose peer takes nothing of what was sent to it for so long",
    "Ranch's and ThousandIsland's send_timeout",
    serve=30.0,
)
_declare("lifetime", "close a connection that has been open for so long", "off: protocols differ")
_declare(
    "handler_timeout",
    "close a connection when one request takes longer, from its first byte after idleness to the answer's last; of a "
    "datagram it is only reported",
    "off: only the program knows; leave it off where clients send and are never answered",
)

NAMES = ("idle_timeout", "read_timeout", "write_timeout", "lifetime", "handler_timeout")
# The share of a write timeout between two samples, and the bounds of the span: 2 % and never finer than 20 ms, so that
# the cost stays below a per cent of a processor for ten thousand connections.
SAMPLES, FINEST_SECONDS, COARSEST_SECONDS = 0.02, 0.02, 1.0
# Looks that are due within this time are made together.
SLACK_SECONDS = 0.002
# Entries that are not worth looking which of their connections have ended: a look at so many takes some 10 µs.
FEW = 64
# Those that come unannounced are found within this share of the shortest deadline, and few of the short ones are.
SWEEP = 0.25
# Seconds for which connections may come unannounced once they were expected; compiled lanes take 10 ms of it.
EXPECTED_SECONDS = 1.0


class Deadlines:
    """The deadlines of one server's connections."""

    def __init__(
        self,
        records: Callable[[], Iterable[Record]],
        expire: Callable[[Record, str, float], None],
        is_entering: Callable[[Record], bool],
    ) -> None:
        """Make deadlines that hold for nobody yet; see :meth:`refresh`.

        Args:
            records: the open connections.
            expire: called in the reaper's thread with a record, the setting's name, and the seconds that it took.
            is_entering: whether a connection's preambles have still to run or to end.
        """
        self._records = records
        self._expire = expire
        self._is_entering = is_entering
        self.limits: dict[str, float | None] = dict.fromkeys(NAMES)
        self._soonest: float | None = None
        self._stamps_all = False
        self._heap: list[tuple[float, int, Record]] = []
        self._weed_at = FEW
        self._guard = threading.RLock()  # over what adds to the heap: a collection may, in the middle of that
        self._new: list[Record] = []
        self._numbers = itertools.count()
        self._look_at = math.inf
        self._look: int | None = None
        self._sampling: int | None = None
        self._expected = -math.inf
        self._stuck: dict[int, tuple[Record, object, float]] = {}
        self._datagrams: dict[int, tuple[float, Any]] = {}  # in the order in which they came
        self._datagram_look: int | None = None
        self.report: Callable[[Any, str, float], None] = lambda address, which, seconds: None
        """Told of a datagram that takes too long: its sender, ``handler_timeout``, and the seconds so far."""

    def refresh(self, values: Any) -> None:
        """Read the settings anew; what is open is judged by them from now on."""
        self.limits = limits = {name: values[name] for name in NAMES}
        self._soonest = min((limit for limit in limits.values() if limit is not None), default=None)
        self._stamps_all = limits["read_timeout"] is not None or limits["handler_timeout"] is not None
        self._forget()
        for record in self._records():
            if record.opened:
                self.watch(record)
        self.expect()  # those that came while other settings held

    # -- a connection comes and goes -----------------------------------------------------------------------------------

    def watch(self, record: Record) -> None:
        """A connection goes to its handler, or to its preambles."""
        soonest = self._soonest
        if soonest is None or record.request is None:
            return
        if not self._is_entering(record):
            self.entered(record)
        self._push(record.started + soonest, record)
        if self._sampling is None and self.limits["write_timeout"] is not None:
            self._sample_in(self._span)

    def expect(self) -> None:
        """Connections may come of which nobody tells: they are looked for, get records so, and are watched."""
        if self._soonest is not None:
            self._expected = time.monotonic()  # before the look: who stops sampling looks the other way round
            if self._sampling is None:
                self._sample_in(self._span)

    def entered(self, record: Record) -> None:
        """Its preambles have run, if there are any: from now on it is its handler's."""
        request = record.request
        if self.needs_stamps(request):
            stamp(request, record)

    def needs_stamps(self, request: Any) -> bool:
        """Tell whether connections such as this, or of this listener, have to stamp what they do."""
        return self._stamps_all or (self.limits["idle_timeout"] is not None and not tells(request))

    def stop(self) -> None:
        """Look at nobody any more."""
        for number in (self._look, self._sampling, self._datagram_look):
            if number is not None:
                reaper.cancel(number)
        self._look = self._sampling = self._datagram_look = None
        self._look_at = math.inf
        self._forget()

    def _forget(self) -> None:
        self._heap = []
        self._weed_at = FEW
        self._stuck = {}

    def after_fork(self, record: Record | None) -> None:
        """In a child, which serves one connection: the others are the parent's."""
        self._guard = threading.RLock()  # another thread may have held it
        self._look = self._sampling = self._datagram_look = None
        self._look_at = math.inf
        self._forget()
        self._datagrams = {}
        if record is not None:
            self._records = lambda: [record]
            self.watch(record)

    def _push(self, when: float, record: Record) -> None:
        with self._guard:
            heap = self._heap
            heapq.heappush(heap, (when, next(self._numbers), record))
            if len(heap) >= self._weed_at:
                heap[:] = [entry for entry in list(heap) if entry[2].is_open]
                heapq.heapify(heap)
                self._weed_at = max(FEW, 2 * len(heap))
        if when < self._look_at:
            self._arm(when)

    def _arm(self, when: float) -> None:
        old, self._look_at = self._look, when
        self._look = reaper.call_at(when, self._turn)
        if old is not None:
            reaper.cancel(old)

    # -- looking -------------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Look at the connections that are due. The reaper's thread."""
        self._look = None
        now = time.monotonic()
        heap = self._heap
        self._look_at = -math.inf  # who comes meanwhile need not arm: we do, at the end
        while heap and heap[0][0] <= now + SLACK_SECONDS:
            record = heapq.heappop(heap)[2]
            when = self._judge(record, now)
            if when is not None:
                with self._guard:
                    heapq.heappush(heap, (when, next(self._numbers), record))
        self._look_at = math.inf
        while heap and not heap[0][2].is_open:
            heapq.heappop(heap)
        if heap:
            self._arm(heap[0][0])

    def _judge(self, record: Record, now: float) -> float | None:
        """Expire a connection, or return when to look again; None: never."""
        if record.reason is not None or not record.is_open:
            return None
        soonest = math.inf
        for name, since in self._spans(record, now):
            limit = self.limits[name]
            if limit is None:
                continue
            left = limit if since is None else since + limit - now
            if left <= SLACK_SECONDS:
                self._expire(record, name, limit - left)
                return None
            soonest = min(soonest, left)
        return None if soonest == math.inf else now + soonest

    def _spans(self, record: Record, now: float) -> Iterable[tuple[str, float | None]]:
        """Since when each deadline runs; None: it does not run now, and could begin at any moment."""
        yield "lifetime", record.started
        if self._is_entering(record):  # which has a timeout of its own
            yield "idle_timeout", None
            return
        stamps = record.stamped()
        yield "handler_timeout", (stamps and stamps.first) or None
        yield "read_timeout", (stamps and stamps.reading) or None
        if self.limits["idle_timeout"] is not None:
            yield "idle_timeout", max(record.started, idle_since(record, now))

    # -- datagrams -----------------------------------------------------------------------------------------------------

    @property
    def times_datagrams(self) -> bool:
        """Whether somebody must know how long a datagram's handler takes."""
        return self.limits["handler_timeout"] is not None

    def begin_datagram(self, address: Any) -> int:
        """A datagram goes to its handler; return a number for :meth:`end_datagram`."""
        number = next(self._numbers)
        limit = self.limits["handler_timeout"]
        if limit is not None:
            now = time.monotonic()
            self._datagrams[number] = (now, address)
            if self._datagram_look is None:
                self._datagram_look = reaper.call_at(now + limit, self._look_at_datagrams)
        return number

    def end_datagram(self, number: int) -> None:
        """Its handler is done."""
        self._datagrams.pop(number, None)

    def _look_at_datagrams(self) -> None:
        self._datagram_look = None
        limit = self.limits["handler_timeout"]
        if limit is None:
            return
        for number, (since, address) in list(self._datagrams.items()):
            now = time.monotonic()
            if since + limit > now + SLACK_SECONDS:
                self._datagram_look = reaper.call_at(since + limit, self._look_at_datagrams)
                return
            if self._datagrams.pop(number, None) is not None:
                self.report(address, "handler_timeout", now - since)

    # -- sampling ------------------------------------------------------------------------------------------------------

    @property
    def _span(self) -> float:
        limit, soonest = self.limits["write_timeout"], self._soonest or 0.0
        if limit is None:
            return max(FINEST_SECONDS, soonest * SWEEP)
        return min(COARSEST_SECONDS, max(FINEST_SECONDS, limit * SAMPLES), max(FINEST_SECONDS, soonest * SWEEP))

    def _sample_in(self, seconds: float) -> None:
        self._sampling = reaper.call_at(time.monotonic() + seconds, self._sample)

    def _sample(self) -> None:
        """Look who has come, who has unsent bytes, and whose peer takes none of them. The reaper's thread."""
        self._sampling = None
        records = list(self._records())
        wait, limit = self._span, self.limits["write_timeout"]
        if limit is not None:
            wait = self._look_for_stuck(records, limit, wait)
        more = (limit is not None and records) or time.monotonic() - self._expected <= EXPECTED_SECONDS
        if more and self._sampling is None:
            self._sample_in(wait)

    def _look_for_stuck(self, records: Iterable[Record], limit: float, wait: float) -> float:
        """Return after how many seconds to look again, at most ``wait``."""
        before, self._stuck = self._stuck, {}
        for record in records:
            request = record.request
            if record.reason is not None or request is None or not (unsent := queued(request)):
                continue
            if self._is_entering(record):
                continue
            now = time.monotonic()
            mark = taken(request, unsent)
            known = before.get(id(record))
            since = known[2] if known is not None and known[0] is record and known[1] == mark else now
            if now - since >= limit - SLACK_SECONDS:
                self._expire(record, "write_timeout", now - since)
                continue
            self._stuck[id(record)] = (record, mark, since)
            wait = min(wait, max(SLACK_SECONDS, since + limit - now))
        return wait


def taken(request: Any, unsent: int) -> object:
    """Return what changes whenever the peer takes some of what is queued."""
    told = traffic(request)
    return unsent if told is None else told.acked


def idle_since(record: Record, now: float) -> float:
    """Return when a byte last moved on a connection, either way.

    On TCP the kernel's stamp of the last send is also renewed by probes to a peer that does not read; it counts only
    when bytes left for the first time since the last look. A long write on a Unix socket shows in its queue alone.
    """
    stamps = record.stamped()
    told = traffic(record.request)
    if told is None:
        since = stamps.moved if stamps else now
        if stamps and stamps.writing:
            unsent = queued(record.request)
            if record.seen[0] != unsent:
                record.seen = (unsent, now)
            since = max(since, record.seen[1])
        return since
    since = now - min(told.since_sent, told.since_received)
    if told.acked >= told.sent:
        return since
    mark, before = record.seen
    if mark == (told.acked, told.out):
        since = max(before, now - told.since_received)
    record.seen = ((told.acked, told.out), since)
    return since
