"""``alarm_connections``."""

from harken.limits.alarm import COOLDOWN_SECONDS, Alarm


def test_it_rings_at_the_threshold_and_then_keeps_quiet_for_a_while():
    """Not below; once at it; not again while it cools down, however many come; then again."""
    now, inside, rung = [100.0], [0], []
    alarm = Alarm(3, lambda: inside[0], rung.append, lambda: now[0])
    for inside[0] in (1, 2, 3, 4, 5):
        assert alarm.admit(None) is None
    assert rung == [3]
    now[0] += COOLDOWN_SECONDS
    inside[0] = 2
    alarm.admit(None)
    assert rung == [3]
    inside[0] = 7
    alarm.admit(None)
    assert rung == [3, 7]


def test_none_is_silent():
    """Without a threshold nothing rings."""
    rung = []
    Alarm(None, lambda: 1_000_000, rung.append).admit(None)
    assert rung == []
