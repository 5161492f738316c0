"""The figures of workers, which outlive them: each writes its own down in memory that its supervisor can read."""

from __future__ import annotations

import json
import os
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from harken.observe.figures import Figures

if TYPE_CHECKING:
    from harken.process.child import Child

__all__ = ["Ledger", "Slate"]

_HEAD = struct.Struct("=QLL")  # which writing it is, bytes of the text, their CRC-32
# Bytes between the two places, which are written in turn: the figures of some hundred listeners. Only what is written
# takes memory.
_PLACE_BYTES = 1 << 20


class Slate:
    """Memory that one process writes and another reads, even one that was killed in the middle of a word."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("harken-figures", os.MFD_CLOEXEC)
        self._number = 0
        self._lock = threading.Lock()

    def write(self, text: bytes) -> None:
        """Replace what stands there; a text that has no room is left out. Any thread of one process."""
        if len(text) > _PLACE_BYTES - _HEAD.size:
            return
        with self._lock:
            self._number += 1
            head = _HEAD.pack(self._number, len(text), zlib.crc32(text))
            os.pwrite(self._fd, head + text, self._number % 2 * _PLACE_BYTES)

    def read(self) -> bytes:
        """Return the newest text that is whole; empty when none was written."""
        return max(map(self._read, range(2)))[1]

    def _read(self, place: int) -> tuple[int, bytes]:
        head = os.pread(self._fd, _HEAD.size, place * _PLACE_BYTES)
        if len(head) < _HEAD.size:
            return 0, b""
        number, length, checksum = _HEAD.unpack(head)
        text = os.pread(self._fd, min(length, _PLACE_BYTES), place * _PLACE_BYTES + _HEAD.size)
        return (number, text) if zlib.crc32(text) == checksum else (0, b"")

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)


class Ledger:
    """Adds up what workers have counted. The supervisor's thread."""

    def __init__(self) -> None:
        self._gone = Figures()

    def bury(self, child: Child) -> None:
        """A worker has ended: keep what lasts of its figures."""
        figures = _figures(child)
        _close_all(figures)
        self._gone.take(figures, lasting=True)

    def total(self, children: Iterable[Child]) -> Figures:
        """Return the figures of those that were and those that are."""
        total = Figures()
        total.take(self._gone)
        for child in children:
            total.take(_figures(child))
        return total


def _close_all(figures: Figures) -> None:
    """What a worker that was killed had open has ended with it, and it could not say so itself."""
    missing = Counter[str]()
    for name, labels, numbers in figures:
        if name == "harken_connections_opened_total":
            missing[labels[0]] += int(numbers[0])
        elif name == "harken_connections_closed_total":
            missing[labels[0]] -= int(numbers[0])
    for listener, number in (+missing).items():
        figures.add("harken_connections_closed_total", (listener, "shutdown"), number)


def _figures(child: Child) -> Figures:
    return Figures(json.loads(child.slate.read() or b"[]"))
