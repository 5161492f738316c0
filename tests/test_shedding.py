"""Finding the connection that was idle longest."""

import time

from harken.records import YOUNG_SECONDS
from harken.shedding import Shedder
from harken.stamps import Stamps


class Fake:
    """A record whose idle time a test sets."""

    def __init__(self, since, started=0.0):
        self.since = since
        self.started = started
        self.reason = None
        self.is_open = True
        self.asked = self.process = 0
        self.stamps = None
        self.received = 1

    def stamped(self):
        """What else is known."""
        return self.stamps

    def bytes_moved(self):
        """What came, and nothing sent."""
        return self.received, 0

    def idle_seconds(self):
        """How long ago ``since`` is."""
        self.asked += 1
        return None if self.since is None else time.monotonic() - self.since

    def cut(self, reason):
        """Be cut."""
        self.reason = reason


def test_the_longest_idle_go_in_order():
    """One after the other; those that have gone or are on their way are passed over."""
    now = time.monotonic()
    records = [Fake(now - idle) for idle in (5, 50, 20, 40, 30)]
    shedder = Shedder(lambda: records)
    records[3].is_open = False
    assert shedder.shed()
    assert records[1].reason == "shed"
    assert shedder.find() is records[4]
    records[2].reason = "killed"
    assert shedder.find() is records[0]


def test_one_that_moved_since_the_look_is_put_back():
    """The order is that of the moment, not that of the look."""
    now = time.monotonic()
    records = [Fake(now - idle) for idle in (30, 20, 10)]
    shedder = Shedder(lambda: records)
    assert shedder.find() is records[0]
    records[1].since = now - 5
    assert shedder.find() is records[2]
    assert shedder.find() is records[1]


def test_each_costs_a_look_at_few():
    """A hundred are shed from ten thousand by little more than one look at all of them."""
    now = time.monotonic()
    records = [Fake(now - 100 - number) for number in range(10_000)]
    shedder = Shedder(lambda: records)
    for _ in range(100):
        assert shedder.shed()
    assert sum(record.asked for record in records) < 10_000 + 1000
    assert [record.reason for record in records[-100:]] == ["shed"] * 100


def test_where_the_kernel_tells_no_idle_time_the_oldest_goes():
    """Unix sockets on blocking engines."""
    records = [Fake(None, started) for started in (3.0, 1.0, 2.0)]
    shedder = Shedder(lambda: records)
    assert shedder.find() is records[1]


def test_where_the_kernel_tells_no_idle_time_stamps_do():
    """The oldest may be the busiest."""
    records = [Fake(None, started) for started in (1.0, 2.0, 3.0)]
    for record, moved in zip(records, (9.0, 5.0, 7.0), strict=True):
        record.stamps = Stamps()
        record.stamps.moved = moved
    assert Shedder(lambda: records).find() is records[1]


def test_who_has_just_come_is_left_for_a_moment():
    """Until its first byte, or a second; and nobody busier goes before."""
    now = time.monotonic()
    young, busy = Fake(now - 0.3, now - 0.3), Fake(now, now - 10)
    young.received = 0
    shedder = Shedder(lambda: [young, busy])
    assert not shedder.shed()
    young.started -= YOUNG_SECONDS
    assert shedder.shed()
    assert (young.reason, busy.reason) == ("shed", None)


def test_who_has_just_come_is_left_also_where_nobody_tells_its_first_byte():
    """In a child of the fork engine, and on Unix sockets of engines that block."""
    now = time.monotonic()
    in_child, on_unix = Fake(None, now - 0.3), Fake(None, now - 0.2)
    in_child.process = 1
    on_unix.bytes_moved = lambda: None
    for young in (in_child, on_unix):
        shedder = Shedder(lambda young=young: [young])
        assert not shedder.shed()
        young.started -= YOUNG_SECONDS
        assert shedder.shed()


def test_nobody_is_found_where_nobody_is():
    """An empty server sheds nobody."""
    assert not Shedder(list).shed()
