"""What children have counted is told by memory: each has a place, and a place is used again."""

from __future__ import annotations

import os
import types

from harken import tally
from harken.tally import Tally, Told


def record(moved=None, requests=None):
    """What is told of."""
    return types.SimpleNamespace(moved=moved, requests=requests)


def test_a_child_tells_its_parent():
    """Also figures beyond 32 bits, and that something is not known."""
    counts, known, unknown = Tally(), record(), record()
    places = counts.take(), counts.take()
    pid = os.fork()
    if pid == 0:
        try:
            counts.tell(places[0], record((1 << 40, 7), 3), Told(5, 0.5, 2.5))
            counts.tell(places[1], record(), Told())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert [counts.give_back(places[0], known), counts.give_back(places[1], unknown)] == [Told(5, 0.5, 2.5), Told()]
    assert (known.moved, known.requests) == ((1 << 40, 7), 3)
    assert (unknown.moved, unknown.requests) == (None, None)


def test_a_datagram_has_no_record():
    """Its exceptions are told all the same."""
    counts = Tally()
    place = counts.take()
    counts.tell(place, None, Told(2))
    assert counts.give_back(place, None) == Told(2)


def test_a_place_that_is_used_again_tells_nothing_old():
    """A child that is killed has told nothing, whoever was there before."""
    counts, later = Tally(), record()
    place = counts.take()
    counts.tell(place, record((1, 2), 3), Told(4))
    counts.give_back(place, None)
    assert counts.take() == place
    assert counts.give_back(place, later) == Told()
    assert later.moved is None


def test_when_there_is_no_place_left(monkeypatch):
    """The child is served all the same."""
    monkeypatch.setattr(tally, "MAX_PLACES", 1)
    counts, lost = Tally(), record()
    assert counts.take() == 0
    assert counts.take() == -1
    counts.tell(-1, record((1, 2), 3), Told(4))
    counts.give_back(-1, lost)
    assert lost.moved is None
    counts.give_back(0, None)
    assert counts.take() == 0
