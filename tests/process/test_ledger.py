"""Figures that outlive the worker that wrote them."""

import json
import os
from types import SimpleNamespace

import pytest

from harken.process.ledger import _HEAD, _PLACE_BYTES, Ledger, Slate


@pytest.fixture
def slate():
    """One slate."""
    made = Slate()
    yield made
    made.close()


def test_the_newest_writing_is_read(slate):
    """Nothing at first, then the last that was written."""
    assert slate.read() == b""
    for text in (b"one", b"two", b"three"):
        slate.write(text)
        assert slate.read() == text


def test_half_a_writing_is_not_read(slate):
    """A process that is killed while it writes leaves what it wrote before."""
    slate.write(b"whole")
    os.pwrite(slate._fd, _HEAD.pack(2, 10, 0) + b"half", 0)
    assert slate.read() == b"whole"


def test_what_has_no_room_is_left_out(slate):
    """One text never runs into the other place."""
    slate.write(b"known")
    slate.write(b"x" * _PLACE_BYTES)
    assert slate.read() == b"known"


def test_counts_of_the_dead_stay(slate):
    """The total does not go down when a worker goes, and its gauges go with it."""
    where = ["tcp://127.0.0.1:1"]
    plain = [["harken_accepted_total", where, [4]], ["harken_connections_open", where, [4]]]
    slate.write(json.dumps(plain).encode())
    ledger, child = Ledger(), SimpleNamespace(slate=slate)
    assert ledger.total([child]).number("harken_accepted_total", tuple(where)) == 4
    ledger.bury(child)
    assert ledger.total([]).plain() == plain[:1]


def test_what_the_dead_had_open_is_closed(slate):
    """On each listener as many as had opened; who ended properly has left nothing to be closed."""
    one, two = ["tcp://127.0.0.1:1"], ["tcp://127.0.0.1:2"]
    plain = [
        ["harken_connections_opened_total", one, [9]],
        ["harken_connections_opened_total", two, [3]],
        ["harken_connections_closed_total", [*one, "peer_closed"], [4]],
        ["harken_connections_closed_total", [*one, "shutdown"], [1]],
        ["harken_connections_closed_total", [*two, "peer_closed"], [3]],
    ]
    slate.write(json.dumps(plain).encode())
    ledger = Ledger()
    ledger.bury(SimpleNamespace(slate=slate))
    total = ledger.total([])
    assert total.number("harken_connections_closed_total", (*one, "shutdown")) == 5
    assert total.number("harken_connections_closed_total", (*two, "shutdown")) == 0
