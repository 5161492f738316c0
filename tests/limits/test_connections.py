"""``max_connections``: the count, its bound and when a full server may go on."""

import threading

import pytest

from harken.limits import Limit
from harken.limits.connections import MaxConnections


def test_it_keeps_the_contract():
    """It is a limit as any other."""
    assert isinstance(MaxConnections(1), Limit)


def test_it_lets_in_up_to_the_maximum():
    """The one beyond is refused and not counted; a place that is given back can be had again."""
    limit = MaxConnections(2)
    assert [limit.admit(None) for _ in range(3)] == [None, None, "max_connections"]
    assert limit.full
    assert limit.inside == 2
    limit.release(None)
    assert not limit.full
    assert limit.admit(None) is None


def test_none_counts_only():
    """Without a maximum everybody comes in, and a maximum that is set later counts them."""
    limit = MaxConnections(None)
    assert [limit.admit(None) for _ in range(5)] == [None] * 5
    assert not limit.full
    limit.maximum = 5
    assert limit.full
    assert limit.admit(None) == "max_connections"


@pytest.mark.parametrize("maximum, low", [(1, 0), (2, 1), (20, 19), (100, 95), (10_000, 9_500)])
def test_a_twentieth_must_leave_before_a_full_server_goes_on_at_once(maximum, low):
    """And one, when the maximum is small."""
    limit = MaxConnections(maximum)
    for _ in range(low):
        limit.count()
    assert limit.low
    limit.count()
    assert not limit.low


def test_the_maximum_holds_under_threads():
    """Eight threads come and go: never more than the maximum are inside, and in the end nobody is."""
    limit = MaxConnections(3)
    most = []

    def come_and_go():
        for _ in range(2000):
            if limit.admit(None) is None:
                most.append(limit.inside)
                limit.release(None)

    threads = [threading.Thread(target=come_and_go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A thread that is being refused is inside for a moment: it is the admitted who are bounded.
    assert max(most) <= 3 + 8
    assert limit.inside == 0
