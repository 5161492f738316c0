"""Which connection goes when room is needed: the one that was idle longest."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from harken.records import YOUNG_SECONDS

if TYPE_CHECKING:
    from harken.records import Record

__all__ = ["Shedder"]


class Shedder:
    """Finds the longest idle connections, one after the other, at O(log n) each.

    All connections are looked at once and put in order. While that order lasts it is exact: a connection that has moved
    since only comes later, so whoever is taken out is asked again, and put back if it has; one that was opened since
    has been idle for less than the look is ago. When the order is used up, all are looked at anew.
    """

    def __init__(self, records: Callable[[], Iterable[Record]]) -> None:
        """Make a shedder that has looked at nobody.

        Args:
            records: the open connections of the moment.
        """
        self._records = records
        self._order: list[tuple[float, float, int, Record]] = []
        self._numbers = itertools.count()
        self._looked_at = 0.0

    def find(self) -> Record | None:
        """Return the connection that was idle longest and is not on its way out; None when there is none."""
        found = self._next()
        if found is None:
            self._look()
            found = self._next()
        return found

    def shed(self) -> bool:
        """Cut that connection; tell whether there was one.

        One that has just come is left for a moment; nor does a busier one go in its stead.
        """
        record = self.find()
        if record is not None and _is_young(record):
            self._order.clear()  # it is looked at again with all others
            return False
        if record is not None:
            record.cut("shed")
        return record is not None

    def _look(self) -> None:
        self._looked_at = time.monotonic()
        self._order = [entry for record in self._records() if (entry := self._entry(record)) is not None]
        heapq.heapify(self._order)

    def _entry(self, record: Record) -> tuple[float, float, int, Record] | None:
        if record.reason is not None:
            return None
        return _since(record), record.started, next(self._numbers), record

    def _next(self) -> Record | None:
        while self._order:
            since, _, _, record = heapq.heappop(self._order)
            if not record.is_open:
                continue
            entry = self._entry(record)
            if entry is None:
                continue
            if entry[0] <= since + GRAIN_SECONDS:
                return record
            if entry[0] < self._looked_at:
                heapq.heappush(self._order, entry)
        return None


def _since(record: Record) -> float:
    """Since when it has been idle: as the kernel tells, or else its stamps; where nobody does, since it was opened."""
    if record.process:  # only its child could ask
        return record.started
    idle = record.idle_seconds()
    if idle is not None:
        return time.monotonic() - idle
    stamps = record.stamped()
    return (stamps.moved if stamps is not None else 0.0) or record.started


def _is_young(record: Record) -> bool:
    """Whether its first byte may be on the way; where nobody tells (in a child, on Unix sockets) it may."""
    if time.monotonic() - record.started >= YOUNG_SECONDS:
        return False
    told = None if record.process else record.bytes_moved()
    return told is None or not told[0]


# Seconds by which two looks at one idle connection may differ: the kernel counts idle time in ticks of up to 10 ms.
GRAIN_SECONDS = 0.02
