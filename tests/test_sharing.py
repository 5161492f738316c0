"""A door that several processes share: who leaves it to whom, and for how long."""

from types import SimpleNamespace

import pytest

from harken import sharing
from harken.lifecycle import State
from harken.sharing import LOOK_SECONDS, OTHERS_SECONDS, Sharing


class Clock:
    """Time that stands until it is moved."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        """Return the time."""
        return self.now


class Place:
    """What is known of the other processes."""

    def __init__(self):
        self.others_are_free = True
        self.told = []

    def say_free(self, free):
        """Note what this process says."""
        self.told.append(free)


class Door:
    """A server's door, its engine, and what was done at it."""

    def __init__(self, policy):
        self.waits, self.did = False, []
        self.place = Place()
        self.engine = SimpleNamespace(full=False, shares_doors=True)
        acceptor = SimpleNamespace(
            rest=lambda reason: self.did.append("rest"), awaited=lambda: self.did.append("awaited")
        )
        serving = SimpleNamespace(
            engine=self.engine,
            lifecycle=SimpleNamespace(state=State.SERVING),
            bounds=SimpleNamespace(place=self.place),
            settings={"overload": policy},
            acceptor=acceptor,
        )
        self.sharing = Sharing(serving, lambda: self.waits, lambda: self.did.append("watch"))


@pytest.fixture
def clock(monkeypatch):
    """Time for the sharing."""
    made = Clock()
    monkeypatch.setattr(sharing, "time", made)
    return made


def test_who_waits_is_looked_for_now_and_then(clock):
    """Whoever was woken for them may not come; a door where nobody waits is left as it is."""
    door = Door("wait")
    door.sharing.turn()
    assert door.did == []
    door.waits = True
    door.sharing.turn()
    assert door.did == [], "it was looked at just now"
    clock.now += LOOK_SECONDS
    door.sharing.turn()
    assert door.did == ["watch"]


def test_whether_a_handler_is_free_is_told_when_it_changes(clock):
    """Once each, to all who share the door."""
    door = Door("wait")
    for full in (False, False, True, True, False):
        door.engine.full = full
        door.sharing.turn()
    assert door.place.told == [True, False, True]


@pytest.mark.parametrize(
    ("policy", "others", "rests"), [("wait", False, True), ("reset", True, True), ("reset", False, False)]
)
def test_the_door_is_left_to_those_who_have_a_handler_free(clock, policy, others, rests):
    """Where clients wait anyhow, always; where they would be refused, only while somebody else can take them."""
    door = Door(policy)
    door.engine.full, door.place.others_are_free = True, others
    door.sharing.turn()
    assert door.did == (["rest"] if rests else [])


def test_a_door_of_ones_own_is_not_left(clock):
    """There is nobody to leave it to."""
    door = Door("wait")
    door.engine.shares_doors = False
    assert not door.sharing.may_rest()


def test_who_waits_longer_than_others_take_to_come_is_seen_to(clock):
    """And for a moment the door is not left again, so that who comes then is refused at once."""
    door = Door("reset")
    door.waits = True
    assert not door.sharing.is_awaited("reset")
    clock.now += OTHERS_SECONDS
    assert door.sharing.is_awaited("reset")
    assert not door.sharing.may_rest()
    clock.now += LOOK_SECONDS
    assert door.sharing.may_rest()


def test_the_time_begins_anew_when_somebody_came(clock):
    """It is the time of one who waits, not of the door."""
    door = Door("reset")
    for waits in (True, False, True):
        door.waits = waits
        assert not door.sharing.is_awaited("reset")
        clock.now += OTHERS_SECONDS * 0.9


def test_where_clients_wait_it_is_told_at_once(clock):
    """As a pause, by an event."""
    door = Door("wait")
    door.waits = True
    assert door.sharing.is_awaited("wait")
    assert door.did == ["awaited"]
