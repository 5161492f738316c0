"""The selector loop that the blocking engines share, and what wakes it."""

import os
import selectors
import signal
import socket
import threading
import time

import pytest

from harken.engines import _selector
from harken.engines._selector import SelectorEngine
from harken.waker import Waker

PATIENCE = 5.0  # seconds
FOREVER = 3600.0  # seconds that a loop may sleep: only a wake-up ends it within the test


class Engine(SelectorEngine):
    """The loop alone."""

    def __init__(self, selector=selectors.DefaultSelector):
        super().__init__(lambda name: selector)

    def spawn(self, function, *args, done=None):
        raise NotImplementedError

    def join(self, deadline):
        raise NotImplementedError


class Door:
    """One end of a socket pair; readable while bytes wait."""

    def __init__(self):
        self.end, self.far = socket.socketpair()
        self.end.setblocking(False)
        self.read = []
        self.again = threading.Event()

    def fileno(self):
        return self.end.fileno()

    def take(self):
        """Read one byte; tell whether there may be another."""
        try:
            self.read.append(self.end.recv(1))
        except BlockingIOError:
            return False
        self.again.set()
        return True

    def close(self):
        self.end.close()
        self.far.close()


class Loop:
    """An engine that runs in a thread."""

    def __init__(self, engine, patience=FOREVER):
        self.engine, self.ended, self.ticks, self.error = engine, False, 0, None
        self.turned = threading.Condition()
        self.thread = threading.Thread(target=self._run, args=(patience,))
        self.thread.start()
        self.wait_ticks_after(self.engine.wake, 0)

    def _run(self, patience):
        try:
            self.engine.run(lambda: self.ended, self._tick, lambda: patience)
        except Exception as error:
            self.error = error

    def _tick(self):
        with self.turned:
            self.ticks += 1
            self.turned.notify_all()

    def wait_ticks_after(self, act, more):
        """Do something and wait for more than ``more`` further turns."""
        with self.turned:
            before = self.ticks
        end = time.monotonic() + PATIENCE
        act()
        with self.turned:
            while self.ticks <= before + more:
                assert time.monotonic() < end, "the loop took no turn"
                if not self.turned.wait(0.05):
                    act()  # before the loop ran, a wake-up goes nowhere

    def end(self):
        self.ended = True
        self.engine.wake()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@pytest.fixture(params=["eventfd", "socketpair"])
def way(request, monkeypatch):
    """Both ways of waking: with eventfd and without."""
    if request.param == "socketpair":
        monkeypatch.delattr(os, "eventfd")
    return request.param


@pytest.fixture
def engine():
    """The bare loop."""
    return Engine()


@pytest.fixture
def door():
    """A door with nothing to read yet."""
    opened = Door()
    yield opened
    opened.close()


# ── the waker ────────────────────────────────────────────────────────────────────────────────────────────────────────


def readable(waker):
    """Tell whether a selector would return for it."""
    with selectors.DefaultSelector() as selector:
        selector.register(waker, selectors.EVENT_READ)
        return bool(selector.select(0))


def test_a_wake_up_is_seen_once(way):
    """Any number of wake-ups before a turn are one, and drain() forgets them."""
    waker = Waker()
    assert not readable(waker)
    for _ in range(100):
        waker.wake()
    assert readable(waker)
    waker.drain()
    assert not readable(waker)
    waker.close()


def test_draining_what_is_empty_does_not_wait(way):
    """Another thread that runs the loop may have been quicker."""
    waker = Waker()
    waker.drain()
    assert not readable(waker)
    waker.close()


def test_a_wake_up_after_the_end_writes_nowhere(way):
    """The descriptor's number may be somebody else's by then."""
    waker = Waker()
    number = waker.fileno()
    waker.close()
    waker.close()
    reader, writer = os.pipe()
    if number not in (reader, writer):
        os.dup2(writer, number)
    waker.wake()
    os.set_blocking(reader, False)
    with pytest.raises(BlockingIOError):
        os.read(reader, 8)
    for fd in {reader, writer, number}:
        os.close(fd)


def test_a_full_eventfd_is_a_wake_up_already():
    """wake() neither blocks nor raises when the counter is at its end."""
    waker = Waker()
    os.eventfd_write(waker.fileno(), 2**64 - 2)
    waker.wake()
    assert readable(waker)
    waker.close()


def test_a_signal_handler_may_wake_while_its_thread_wakes(way):
    """The handler runs inside wake() or close() of the same thread: the lock is re-entrant."""
    waker = Waker()
    with waker._lock:
        before = signal.signal(signal.SIGUSR1, lambda *_: waker.wake())
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            end = time.monotonic() + PATIENCE
            while not readable(waker) and time.monotonic() < end:
                pass
        finally:
            signal.signal(signal.SIGUSR1, before)
    assert readable(waker)
    waker.close()


def test_it_is_not_inherited():
    """A program that is started must not hold it."""
    waker = Waker()
    assert not os.get_inheritable(waker.fileno())
    waker.close()


# ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_ends_when_woken(way, engine):
    """The loop sleeps for an hour, and one wake-up ends it."""
    loop = Loop(engine)
    began = time.monotonic()
    loop.end()
    assert time.monotonic() - began < PATIENCE


def test_it_does_not_begin_when_it_is_stopped_already(engine):
    """No door is asked."""
    engine.run(lambda: True, pytest.fail, pytest.fail)


def test_it_takes_a_turn_at_least_every_patience(engine):
    """service_actions() and the like come by themselves."""
    loop = Loop(engine, patience=0.002)
    loop.wait_ticks_after(lambda: None, 5)
    loop.end()


def test_a_door_is_served_while_it_says_that_there_is_more(engine, door):
    """Three bytes that wait are three calls (and turns are counted between them)."""
    door.far.sendall(b"abc")
    engine.watch(door, door.take)
    loop = Loop(engine)
    loop.wait_ticks_after(engine.wake, 5)
    assert door.read == [b"a", b"b", b"c"]
    loop.end()


def test_a_tick_follows_each_connection(engine, door):
    """Not only each turn."""
    ticks = []
    door.far.sendall(b"abc")
    engine.watch(door, door.take)
    engine.run(lambda: len(ticks) >= 3, lambda: ticks.append(len(door.read)), lambda: FOREVER)
    assert ticks[:3] == [1, 2, 3]


def test_it_stops_between_two_connections(engine, door):
    """Nothing more is taken once ``stopped`` says so."""
    door.far.sendall(b"abc")
    engine.watch(door, door.take)
    engine.run(lambda: bool(door.read), lambda: None, lambda: FOREVER)
    assert door.read == [b"a"]


def test_a_burst_is_bounded(engine, door, monkeypatch):
    """A door that is never empty leaves the others their turn."""
    monkeypatch.setattr(_selector, "MAX_BURST", 2)
    other = Door()
    order = []
    door.far.sendall(b"aaaa")
    other.far.sendall(b"bbbb")
    engine.watch(door, lambda: order.append("a") or door.take())
    engine.watch(other, lambda: order.append("b") or other.take())
    engine.run(lambda: len(order) >= 4, lambda: None, lambda: FOREVER)
    assert sorted(order[:4]) == ["a", "a", "b", "b"]
    other.close()


def test_a_door_may_come_while_it_runs(engine, door):
    """watch() wakes the loop, which then sees the new door."""
    loop = Loop(engine)
    door.far.sendall(b"x")
    engine.watch(door, door.take)
    assert door.again.wait(PATIENCE)
    loop.end()


def test_a_door_may_go_while_it_runs(engine, door):
    """After unwatch() and a turn it is left alone, and its bytes stay where they are."""
    engine.watch(door, door.take)
    loop = Loop(engine)
    loop.wait_ticks_after(lambda: engine.unwatch(door), 0)
    door.far.sendall(b"x")
    loop.wait_ticks_after(engine.wake, 0)
    assert door.read == []
    engine.watch(door, door.take)
    assert door.again.wait(PATIENCE)
    loop.end()


def test_a_door_may_go_from_its_own_call(engine, door):
    """As an accept error does that pauses the door."""

    def once():
        door.take()
        engine.unwatch(door)
        return False

    door.far.sendall(b"abc")
    engine.watch(door, once)
    loop = Loop(engine)
    loop.wait_ticks_after(engine.wake, 1)
    assert door.read == [b"a"]
    loop.end()


def test_a_door_that_closed_may_be_unwatched(engine, door):
    """Its descriptor is -1 by then; the loop goes on with the others."""
    closing = Door()
    engine.watch(closing, closing.take)
    engine.watch(door, door.take)
    loop = Loop(engine)
    closing.close()
    loop.wait_ticks_after(lambda: engine.unwatch(closing), 0)
    door.far.sendall(b"x")
    assert door.again.wait(PATIENCE)
    loop.end()
    assert loop.error is None


def test_unwatching_a_stranger_is_harmless(engine, door):
    """And does not wake anybody."""
    engine.unwatch(door)
    assert engine._generation == 0


def test_what_a_door_raises_ends_the_loop(engine, door):
    """The error is run()'s, and the waker is closed; nothing_leaks watches."""

    def broken():
        raise OSError("no listener")

    door.far.sendall(b"x")
    engine.watch(door, broken)
    with pytest.raises(OSError, match="no listener"):
        engine.run(lambda: False, lambda: None, lambda: FOREVER)
    assert engine._wakers == []


def test_waking_an_engine_that_does_not_run_is_harmless(engine):
    """Before the loop and after it."""
    engine.wake()
    Loop(engine).end()
    engine.wake()


def test_two_loops_share_the_doors(engine, door):
    """Either takes what comes, one wake-up reaches both, and one may end alone."""
    engine.watch(door, door.take)
    first, second = Loop(engine), Loop(engine)
    first.wait_ticks_after(lambda: second.wait_ticks_after(engine.wake, 0), 0)
    first.end()
    assert second.thread.is_alive()
    door.far.sendall(b"x")
    assert door.again.wait(PATIENCE)
    second.end()


def test_many_threads_may_wake_it(engine):
    """Wake-ups from everywhere while loops come and go."""
    going = threading.Event()

    def wake():
        while not going.is_set():
            engine.wake()

    threads = [threading.Thread(target=wake) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        Loop(engine).end()
    going.set()
    for thread in threads:
        thread.join(PATIENCE)


@pytest.mark.parametrize("kind", [selectors.SelectSelector, selectors.PollSelector, selectors.EpollSelector])
def test_any_selector_will_do(kind, door):
    """Programs put one of their own in the module; only public methods are used."""
    engine = Engine(kind)
    engine.watch(door, door.take)
    loop = Loop(engine)
    loop.wait_ticks_after(lambda: engine.unwatch(door), 0)
    engine.watch(door, door.take)
    door.far.sendall(b"x")
    assert door.again.wait(PATIENCE)
    loop.end()
    assert loop.error is None


@pytest.mark.parametrize("shared", [True, False])
def test_who_woke_a_loop_that_ends_is_taken_where_nobody_else_was_woken(shared):
    """At a door of several processes EPOLLEXCLUSIVE wakes one; at a door of one's own who waits is left there."""
    engine = Engine()
    engine.shares_doors = shared
    taken = []
    stops = iter([False, True])  # between the two somebody comes
    with socket.create_server(("127.0.0.1", 0)) as door, socket.create_connection(door.getsockname()):
        engine.watch(door, lambda: bool(taken.append("one")))
        engine.run(lambda: next(stops), lambda: None, lambda: 20.0)
    assert taken == ["one"] * shared


FORKED = """
import os, signal, threading
{uses}
real, waking, go_on = os.eventfd_write, threading.Event(), threading.Event()

def write(fd, number):
    waking.set()
    go_on.wait(20)
    real(fd, number)

os.eventfd_write = write
thread = threading.Thread(target=one.wake)
thread.start()
waking.wait(20)
pid = os.fork()
if pid == 0:
    signal.alarm(10)
    os.eventfd_write = real
    one.wake()
    one.close()
    os._exit(0)
go_on.set()
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
one.close()
"""


@pytest.mark.parametrize(
    "uses", ["from harken.waker import Waker; one = Waker()", "from harken._hub.fallback import Hub; one = Hub()"]
)
def test_a_fork_while_another_thread_wakes_does_not_hang_the_child(run_program, uses):
    """That thread holds the lock, and stays in the parent; a hub gives its waker back in the child."""
    assert run_program("-W", "ignore", "-c", FORKED.format(uses=uses)).communicate(timeout=40) == ("0\n", "")
