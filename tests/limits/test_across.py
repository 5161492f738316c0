"""Numbers that hold over several processes, which may be killed at any moment."""

import os
import signal

import pytest

from harken.limits.across import MARGIN, Across
from harken.limits.connections import MaxConnections
from harken.limits.rate import MaxAcceptRate

PROCESSES = 4


@pytest.fixture
def across():
    """The memory, closed in the end."""
    made = Across(16)
    yield made
    made.close()


def crowd(across, task):
    """Run ``task(place)`` in several processes at once; return what each wrote, as a number."""
    start = os.pipe()
    children = []
    for number in range(PROCESSES):
        place, (reader, writer) = across.place(number), os.pipe()
        pid = os.fork()
        if pid == 0:
            os.read(start[0], 1)
            os.write(writer, b"%d" % task(place))
            os._exit(0)
        os.close(writer)
        children.append((pid, reader))
    os.write(start[1], b"x" * PROCESSES)
    numbers = [int(os.read(reader, 100)) for _, reader in children]
    for pid, reader in children:
        os.waitpid(pid, 0)
        os.close(reader)
    for end in start:
        os.close(end)
    return numbers


@pytest.mark.parametrize("maximum", [1, 10, PROCESSES * MARGIN + 1, 1000])
def test_never_more_than_the_maximum_are_let_in(across, maximum):
    """And never fewer: what one leaves another takes."""

    def task(place):
        limit = MaxConnections(maximum, place)
        return sum(limit.admit(None) is None for _ in range(maximum))

    assert sum(crowd(across, task)) == maximum
    assert across.inside == maximum


def test_who_is_held_up_on_the_way_in_has_been_counted(across):
    """Others may fill all places between its look at them and its entry."""
    slow, quick = across.place(0), across.place(1)
    near, maximum = across.near, 1000

    def be_held_up(asked):
        answer, across.near = near(asked), near
        while quick.admit(maximum):
            pass
        return answer

    across.near = be_held_up
    assert slow.admit(maximum)
    assert across.inside == maximum


def test_who_leaves_makes_room_for_all(across):
    """Whatever process it was in."""
    one, two = (MaxConnections(1, across.place(number)) for number in range(2))
    assert one.admit(None) is None
    assert two.full
    assert two.admit(None) == "max_connections"
    one.release(None)
    assert two.admit(None) is None
    assert one.full


def test_a_killed_process_has_nobody_inside(across):
    """Its place is cleared, and a lock that it held is free."""
    place = across.place(1)
    pid = os.fork()
    if pid == 0:
        place.add(5)
        with across.locked():
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert across.inside == 5
    across.clear(1)
    assert MaxConnections(1, across.place(0)).admit(None) is None


def test_one_bucket_is_for_all(across):
    """As many tokens as it holds, however many processes ask."""

    def task(place):
        limit = MaxAcceptRate(25, lambda: 1.0, place)
        return sum(limit.admit(None) is None for _ in range(100))

    assert sum(crowd(across, task)) == 25
    later = MaxAcceptRate(25, lambda: 1.2, across.place(5))
    assert sum(later.admit(None) is None for _ in range(100)) == 5


def test_a_child_that_its_process_forks_gives_nothing_back(across):
    """It inherits what its parent has let in; that leaves once, when the parent says so."""
    limit = MaxConnections(2, across.place(0))
    assert [limit.admit(None) for _ in range(2)] == [None, None]
    pid = os.fork()
    if pid == 0:
        limit.release(None)
        os._exit(0 if limit.admit(None) == "max_connections" else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert across.inside == 2
    limit.release(None)
    assert across.inside == 1


def test_who_is_free_is_known_to_the_others(across):
    """Not to itself; and who has ended, or begins anew, is not free."""
    first, second = across.place(0), across.place(1)
    assert not first.others_are_free
    first.say_free(True)
    assert (first.others_are_free, second.others_are_free) == (False, True)
    first.say_free(False)
    assert not second.others_are_free
    second.say_free(True)
    assert first.others_are_free
    across.clear(1)
    assert not first.others_are_free
