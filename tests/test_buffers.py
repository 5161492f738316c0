"""What harken holds for connections, and its bounds, without a server."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from harken import buffers as room
from harken.buffers import FREE_BYTES, READING, WRITING, Buffers, buffers_of, wanted

MIB = 1 << 20


class FakeRecord:
    """A connection that may be abandoned."""

    def __init__(self, buffers: Buffers) -> None:
        self.reason: str | None = None
        self.is_open = True
        self.buffers = buffers

    def abandon(self, reason: str, detail: str | None = None) -> None:
        """End, as a real one does when its handler notices."""
        self.reason = reason
        self.detail = detail
        self.is_open = False
        self.buffers.forget(self)  # type: ignore[arg-type]


def bounds(each: int | None = None, everything: int | None = None) -> dict[str, Any]:
    """Settings."""
    return {"max_write_buffer": each, "max_memory_bytes": everything, "workers": 1}


class Values(dict[str, Any]):
    """Settings of a drop-in server."""

    profile = "drop-in"


def made(each: int | None = None, everything: int | None = None) -> tuple[Buffers, list[str]]:
    """Make buffers, and the list of what they tell."""
    buffers, told = Buffers(), []
    buffers.join(lambda name, **fields: told.append(name))
    buffers.refresh(Values(bounds(each, everything)))
    return buffers, told


def test_nothing_is_wanted_unless_asked() -> None:
    """Either setting alone is enough."""
    assert not wanted(bounds())
    assert wanted(bounds(each=1))
    assert wanted(bounds(everything=1))


def test_small_pieces_do_not_count() -> None:
    """What each connection may have anyway is not in the sum; both sides of a connection are."""
    buffers, _ = made(everything=MIB)
    record: Any = FakeRecord(buffers)
    buffers.hold(record, WRITING, FREE_BYTES - 1)
    assert buffers.total == 0
    buffers.hold(record, WRITING, FREE_BYTES)
    buffers.hold(record, READING, FREE_BYTES)
    assert buffers.total == 2 * FREE_BYTES
    buffers.hold(record, WRITING, 0)
    assert buffers.total == FREE_BYTES
    buffers.forget(record)
    assert buffers.total == 0


def test_one_event_each_way() -> None:
    """The budget is exceeded once and kept once, however the sum moves in between."""
    buffers, told = made(everything=MIB)
    first, second = (FakeRecord(buffers) for _ in range(2))
    buffers.hold(first, WRITING, MIB)  # type: ignore[arg-type]
    assert told == []
    buffers.hold(second, WRITING, MIB // 2)  # type: ignore[arg-type]
    buffers.hold(second, WRITING, MIB // 4)  # type: ignore[arg-type]
    assert told == ["memory_exceeded"]
    assert buffers.must_wait(MIB // 4)
    buffers.hold(first, WRITING, MIB // 2)  # type: ignore[arg-type]
    assert told == ["memory_exceeded", "memory_recovered"]
    assert not buffers.must_wait(MIB)
    buffers.stop()


def test_who_holds_most_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a time the largest are closed, and no more of them than must be."""
    monkeypatch.setattr(room, "PATIENCE_SECONDS", 0.01)
    recovered = threading.Event()
    buffers = Buffers()
    buffers.join(lambda name, **fields: recovered.set() if name == "memory_recovered" else None)
    buffers.refresh(Values(bounds(everything=10 * MIB)))
    records: list[Any] = [FakeRecord(buffers) for _ in range(4)]
    for number, record in enumerate(records, start=1):
        buffers.hold(record, WRITING, number * 2 * MIB)
    assert recovered.wait(5)
    assert [record.reason for record in records] == [None, None, "shed", "shed"]
    assert records[3].detail == "max_memory_bytes"
    assert buffers.total == 6 * MIB
    buffers.stop()


def test_a_bound_that_changes_is_judged_at_once() -> None:
    """A larger budget ends the shortage, none has none."""
    buffers, told = made(everything=MIB)
    record: Any = FakeRecord(buffers)
    buffers.hold(record, READING, 2 * MIB)
    buffers.refresh(Values(bounds(everything=4 * MIB)))
    assert told == ["memory_exceeded", "memory_recovered"]
    buffers.refresh(Values(bounds()))
    assert not buffers.over
    buffers.stop()


def test_a_connection_without_a_record_tells_nobody() -> None:
    """A socket of somebody else's has no bounds."""
    assert buffers_of(object()) is None
