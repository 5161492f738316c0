"""``max_accept_rate``: the token bucket."""

import pytest

from harken.limits.rate import MaxAcceptRate


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_it_holds_one_second_and_fills_at_the_rate():
    """A second's worth at once, then one for each tick; after a long pause no more than a second's worth."""
    clock = Clock()
    limit = MaxAcceptRate(10, clock)
    assert [limit.admit(None) for _ in range(11)] == [None] * 10 + ["max_accept_rate"]
    clock.now += 0.1
    assert [limit.admit(None) for _ in range(2)] == [None, "max_accept_rate"]
    clock.now += 3600
    assert [limit.admit(None) for _ in range(11)].count(None) == 10


def test_over_a_long_time_the_rate_is_exact():
    """Asked at any pace, in ten seconds eleven seconds' worth gets in, the full bucket of the begin counted."""
    clock = Clock()
    limit = MaxAcceptRate(100, clock)
    taken = 0
    for _ in range(10_000):
        clock.now += 0.001
        taken += limit.admit(None) is None
    assert taken == pytest.approx(1100, abs=1)


def test_a_lower_rate_empties_the_bucket_to_its_size():
    """A change holds at once, in both directions; None takes no token."""
    clock = Clock()
    limit = MaxAcceptRate(100, clock)
    limit.maximum = 2
    assert [limit.admit(None) for _ in range(3)].count(None) == 2
    limit.maximum = None
    assert [limit.admit(None) for _ in range(50)].count(None) == 50
    limit.maximum = 3
    assert [limit.admit(None) for _ in range(5)].count(None) == 3
