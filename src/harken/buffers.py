"""What harken itself holds for the connections of a server, and the bounds of that.

On most ways harken holds nothing: a handler's ``sendall`` waits until the kernel has taken the bytes. It does hold what
``wfile.write`` of an ``async def handle`` could not send yet, and, where a hub waits, the part of a line or block that
has come while ``rfile`` waits for the rest. Whoever holds such bytes says so here when it grows beyond what each
connection has anyway; nobody is asked, and a server without these bounds has none of this.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from harken import settings
from harken.reaper import reaper

if TYPE_CHECKING:
    from harken.records import Record

__all__ = ["FREE_BYTES", "READING", "WRITING", "Buffers", "buffers_of", "wanted"]

settings.setting(
    "max_write_buffer",
    settings.size(optional=True),
    None,
    serve=1 << 20,
    unit="bytes",
    live=True,
    meaning="how much of what `wfile.write` of an `async def handle` was given, and the client has not taken, is held "
    "for one connection; beyond it the handler's own writes wait, and a write from elsewhere ends the connection",
    origin="Netty's and asyncio's high-water marks are 64 KiB; 1 MiB lets an answer of usual size through at once",
)
settings.setting(
    "max_memory_bytes",
    settings.size(optional=True),
    None,
    unit="bytes",
    live=True,
    meaning="how much harken may hold for all connections together, unsent and half read; beyond it "
    "whoever holds some is slowed, and after a second those that hold most are closed",
    origin="off: only who runs the server knows what the machine has",
)

NAMES = ("max_write_buffer", "max_memory_bytes")
# The two sides of a connection on which bytes are held.
READING, WRITING = "reading", "writing"
# What a side holds without saying so: the hub's own pieces are of 64 KiB.
FREE_BYTES = 1 << 17
# Seconds that slowing gets before connections are closed, and between two looks after that.
PATIENCE_SECONDS, LOOK_SECONDS = 1.0, 0.05
# The share of the budget below which it counts as kept again: else each piece would end it and begin it anew.
ENOUGH = 0.9


def wanted(values: Any) -> bool:
    """Tell whether any bound is set."""
    return any(values[name] is not None for name in NAMES)


def buffers_of(request: Any) -> tuple[Buffers, Record] | None:
    """Return who is to be told what is held for a connection, and its record; None where nobody is."""
    record: Record | None = getattr(request, "record", None)
    buffers = record.buffers if record is not None else None
    return None if record is None or buffers is None else (buffers, record)


class Buffers:
    """What is held for the connections of the servers that share one budget. Any thread."""

    def __init__(self) -> None:
        """Begin with no bound; see :meth:`refresh`."""
        self.most_each: int | None = None
        self.most: int | None = None
        self.over = False
        self._held: dict[tuple[Record, str], int] = {}
        self._total = 0
        self._guard = threading.RLock()
        self._rings: list[Callable[..., None]] = []
        self._look: int | None = None

    def join(self, ring: Callable[..., None]) -> None:
        """Let a server count here.

        Args:
            ring: called as ``ring(name, held=bytes, limit=bytes)`` with the name of an event; the first to join tells.
        """
        if ring not in self._rings:
            self._rings.append(ring)

    def refresh(self, values: Any) -> None:
        """Read the settings anew."""
        self.most_each, self.most = values["max_write_buffer"], settings.share(values["max_memory_bytes"], values)
        self._judge()

    @property
    def total(self) -> int:
        """Bytes that are held beyond :data:`FREE_BYTES` a side."""
        return self._total

    def hold(self, record: Record, side: str, size: int) -> None:
        """So many bytes are held now on one side of a connection."""
        key = (record, side)
        with self._guard:
            self._total -= self._held.pop(key, 0)
            if size >= FREE_BYTES and record.is_open:
                self._held[key] = size
                self._total += size
        self._judge()

    def forget(self, record: Record) -> None:
        """A connection has ended."""
        if self._held:
            self.hold(record, READING, 0)
            self.hold(record, WRITING, 0)

    def must_wait(self, size: int) -> bool:
        """Tell whether a writer that would hold ``size`` bytes is to wait instead, until its client has taken them."""
        return (self.most_each is not None and size > self.most_each) or (self.over and size >= FREE_BYTES)

    def _judge(self) -> None:
        """Say so when the budget is exceeded, and when that is over."""
        with self._guard:
            before, most = self.over, self.most
            self.over = most is not None and self._total > most * (ENOUGH if before else 1)
            if self.over == before:
                return
            if self.over and self._look is None:
                self._look = reaper.call_at(time.monotonic() + PATIENCE_SECONDS, self._relieve)
        for ring in self._rings[:1]:
            ring("memory_exceeded" if self.over else "memory_recovered", held=self._total, limit=most)

    def _relieve(self) -> None:
        """Close who holds most. The reaper's thread."""
        with self._guard:
            self._look = None
            if not self.over:
                return
            sizes: dict[Record, int] = {}
            for (record, _), size in self._held.items():
                if record.reason is None:
                    sizes[record] = sizes.get(record, 0) + size
            self._look = reaper.call_at(time.monotonic() + LOOK_SECONDS, self._relieve)
        # Without those that are on their way out: so many are closed that the rest fits.
        excess = sum(sizes.values()) - (self.most or 0) * ENOUGH
        for record in sorted(sizes, key=lambda record: sizes[record], reverse=True):
            if excess <= 0:
                return
            excess -= sizes[record]
            record.abandon("shed", "max_memory_bytes")

    def stop(self) -> None:
        """Look no more: nobody is served."""
        with self._guard:
            if self._look is not None:
                reaper.cancel(self._look)
            self._look = None
