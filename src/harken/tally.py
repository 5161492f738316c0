"""What forked children have counted when they end, told to their parent by memory that they share."""

from __future__ import annotations

import mmap
import struct
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from harken.records import Record

__all__ = ["Tally", "Told"]

# Children at once for which there is a place; those beyond tell nothing. Memory is taken as it is used.
MAX_PLACES = 16384
# Bytes that came, bytes sent, requests (-1 for what nobody counts); exceptions; seconds of preambles, of the handler.
_PLACE = struct.Struct("=qqqqdd")
_NOTHING = (-1, -1, -1, 0, -1.0, -1.0)


class Told(NamedTuple):
    """What a child tells beside its connection's figures.

    Attributes:
        failures: exceptions out of handlers.
        preamble: seconds that the preambles took, which were passed; below 0 where there were none, or nobody measures.
        handler: seconds of the handler, likewise.
    """

    failures: int = 0
    preamble: float = -1.0
    handler: float = -1.0


class Tally:
    """A place of memory for each child. Places are given out and taken back in the parent."""

    def __init__(self) -> None:
        """Begin with every place free."""
        self._memory = mmap.mmap(-1, MAX_PLACES * _PLACE.size)
        self._free: list[int] = []
        self._unused = count()

    def take(self) -> int:
        """Return a place for a child that is about to be forked; -1 when there is none."""
        try:  # not a look first: several loops fork at once
            place = self._free.pop()
        except IndexError:
            place = next(self._unused)
        if place >= MAX_PLACES:
            return -1
        self._write(place, _NOTHING)
        return place

    def tell(self, place: int, record: Record | None, told: Told) -> None:
        """Tell what was counted on a connection, or of a datagram; in the child, at its end.

        Args:
            place: the child's.
            record: the connection's; a datagram has none.
            told: what else there is to tell.
        """
        if place >= 0:
            received, sent = (record and record.moved) or (-1, -1)
            requests = record.requests if record is not None else None
            self._write(place, (received, sent, -1 if requests is None else requests, *told))

    def give_back(self, place: int, record: Record | None) -> Told:
        """The child has ended, or was not forked: note what it told of the connection, and return the rest."""
        if place < 0:
            return Told()
        received, sent, requests, *told = _PLACE.unpack_from(self._memory, place * _PLACE.size)
        self._free.append(place)
        if record is not None:
            record.moved = (received, sent) if received >= 0 else record.moved
            record.requests = requests if requests >= 0 else record.requests
        return Told(*told)

    def _write(self, place: int, numbers: tuple[float, ...]) -> None:
        _PLACE.pack_into(self._memory, place * _PLACE.size, *numbers)
