"""What the workers tell their supervisor without a message: a page of memory that all of them share.

Each worker writes its own row and nobody else's, so no lock is needed; a row outlives its worker, so that what a killed
one held can still be read.
"""

from __future__ import annotations

import errno
import mmap
import struct
import time

__all__ = ["MAX_ROWS", "Row", "Scoreboard"]

# Workers at once, old and new ones together; a page and a half.
MAX_ROWS = 1024
_ROW = struct.Struct("=dQQ")  # when the loop last turned (CLOCK_MONOTONIC, seconds), connections open, accepted in all


class Row:
    """One worker's row."""

    def __init__(self, memory: mmap.mmap, number: int) -> None:
        self._memory = memory
        self._at = number * _ROW.size
        self.number = number

    def write(self, opened: int, accepted: int) -> None:
        """Say that the loop turns, and how many connections are open and were accepted. The worker's loop."""
        _ROW.pack_into(self._memory, self._at, time.monotonic(), opened, accepted)

    def clear(self) -> None:
        """Make the row a new worker's, whose time begins now."""
        self.write(0, 0)

    @property
    def silence(self) -> float:
        """Seconds since the loop last turned. CLOCK_MONOTONIC is one clock for all processes of a machine."""
        return time.monotonic() - float(_ROW.unpack_from(self._memory, self._at)[0])

    @property
    def open(self) -> int:
        """Connections open."""
        return int(_ROW.unpack_from(self._memory, self._at)[1])

    @property
    def accepted(self) -> int:
        """Connections accepted so far."""
        return int(_ROW.unpack_from(self._memory, self._at)[2])

    @property
    def doors_close(self) -> bool:
        """Whether the service ends, and nobody will take whom this worker leaves at a door."""
        return bool(self._memory[-1])


class Scoreboard:
    """The rows."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, MAX_ROWS * _ROW.size + 1)  # anonymous and shared: forked children see it
        self._free = list(range(MAX_ROWS - 1, -1, -1))

    def take(self) -> Row:
        """Return a free row, cleared.

        Raises:
            OSError: every row is taken.
        """
        if not self._free:
            raise OSError(errno.EAGAIN, f"there are {MAX_ROWS} workers, old and new, already")
        row = Row(self._memory, self._free.pop())
        row.clear()
        return row

    def give_back(self, row: Row) -> None:
        """Free the row of a worker that has ended."""
        row.clear()
        self._free.append(row.number)

    def close_doors(self) -> None:
        """Tell all workers that the service ends."""
        self._memory[-1] = 1

    def close(self) -> None:
        """Let go of the memory."""
        self._memory.close()
