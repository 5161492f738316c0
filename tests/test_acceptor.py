"""The acceptor: what a failed accept means, pauses that double, and the reserve that sheds the queue."""

import errno
import math
import os
import socket
import ssl
import struct
import time

import pytest

from harken import acceptor as module, events
from harken.acceptor import ACCEPT_ERRORS, LONGEST_PAUSE, Acceptor, Readable, Verdict, judge, refuse

PATIENCE = 5.0  # seconds
EMFILE = OSError(errno.EMFILE, "Too many open files")

# accept(2) and recv(2), written down once more so that a slip in the module's table shows.
TABLE = {
    Verdict.STOP: "EAGAIN EWOULDBLOCK",
    Verdict.NEXT: "ECONNABORTED EINTR EPERM EPROTO ENOPROTOOPT ENETDOWN ENETUNREACH EHOSTDOWN EHOSTUNREACH ENONET "
    "ETIMEDOUT ECONNREFUSED ECONNRESET",
    Verdict.PAUSE: "EMFILE ENFILE ENOBUFS ENOMEM",
    Verdict.FAIL: "EBADF EINVAL ENOTSOCK EFAULT EOPNOTSUPP",
}


class Clock:
    """Time that moves when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


class Door:
    """What an acceptor does to its door, and what it tells."""

    def __init__(self, listener=None):
        self.done = []
        self.acceptor = Acceptor(
            listener=lambda: listener,
            pause=lambda: self.done.append("pause"),
            resume=lambda: self.done.append("resume"),
            address=lambda: "tcp://here:1",
        )


@pytest.fixture
def clock(monkeypatch):
    """The acceptor's clock, moved by hand."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def told():
    """The events ``paused`` and ``resumed`` of this test."""
    seen = []
    end = events.subscribe(seen.append, "paused", "resumed")
    yield seen
    end()


@pytest.fixture
def door():
    """A door without a socket."""
    return Door()


@pytest.fixture
def listener():
    """A stream listener."""
    with socket.create_server(("127.0.0.1", 0)) as opened:
        yield opened


def client_of(listener):
    """Return a client that waits in the queue."""
    client = socket.create_connection(listener.getsockname(), PATIENCE)
    assert wait_readable(listener)
    return client


def wait_readable(listener):
    """Wait until the queue is not empty."""
    end, ask = time.monotonic() + PATIENCE, Readable()
    while not ask(listener.fileno()) and time.monotonic() < end:
        time.sleep(0.001)
    return ask(listener.fileno())


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("verdict, name", [(v, name) for v, listed in TABLE.items() for name in listed.split()])
def test_each_error_has_its_verdict(verdict, name):
    """As accept(2) sorts them."""
    number = getattr(errno, name)
    assert ACCEPT_ERRORS[number] is verdict
    assert judge(OSError(number, name)) is verdict


def test_the_table_holds_nothing_else():
    """No error is judged that is not written down here."""
    named = {getattr(errno, name) for listed in TABLE.values() for name in listed.split()}
    assert set(ACCEPT_ERRORS) == named


def test_an_error_that_the_table_lacks_pauses():
    """No surprise of a kernel becomes a spin."""
    assert judge(OSError(errno.EXDEV, "odd")) is Verdict.PAUSE


@pytest.mark.parametrize(
    "error",
    [ssl.SSLError(1, "bad handshake"), TimeoutError("timed out"), OSError("no number"), socket.gaierror(-2, "no name")],
    ids=lambda error: type(error).__name__,
)
def test_what_was_raised_above_accept_is_that_connections_trouble(error):
    """Numbers of other tables mean something else; a TLS listener's failed handshake must not pause it."""
    assert judge(error) is Verdict.NEXT


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ECONNABORTED])
def test_a_peers_trouble_is_nothing_to_talk_about(door, told, number):
    """No pause, no event, nothing fatal."""
    assert door.acceptor.failed(OSError(number, "x")) is False
    assert (door.done, told, door.acceptor.paused, door.acceptor.troubled) == ([], [], False, False)


def test_no_listener_fails_loudly_once(door):
    """The error leaves the loop by settle(), and is not raised again."""
    door.acceptor.failed(OSError(errno.EBADF, "Bad file descriptor"))
    assert door.acceptor.troubled
    with pytest.raises(OSError, match="Bad file descriptor"):
        door.acceptor.settle(taken=False)
    door.acceptor.settle(taken=False)


def test_a_failure_is_forgotten_when_the_door_opens_anew(door, told):
    """What handle_request() met before is no fault of a later loop, and its recovery no end of a pause."""
    door.acceptor.failed(OSError(errno.EINVAL, "not listening yet"))
    door.acceptor.open()
    try:
        if door.acceptor.troubled:
            door.acceptor.settle(taken=True)
        assert told == []
    finally:
        door.acceptor.close()


# ── pauses ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_exhaustion_pauses_and_the_pause_doubles_to_its_longest(door, clock):
    """0.1, 0.2, 0.4, 0.8, then 1 s each time."""
    pauses = []
    for _ in range(6):
        door.acceptor.failed(EMFILE)
        pauses.append(round(door.acceptor.patience(60), 6))
        clock.now += pauses[-1]
        door.acceptor.turn(room=True)
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert door.done == ["pause", "resume"] * 6


def test_one_event_when_it_begins_and_one_when_it_ends(door, clock, told):
    """However many pauses lie between; the end is the first connection that is taken again."""
    for _ in range(4):
        door.acceptor.failed(EMFILE)
        clock.now += 1.0
        door.acceptor.turn(room=True)
    assert [event.name for event in told] == ["paused"]
    assert told[0].reason == "EMFILE: Too many open files"
    assert told[0].address == "tcp://here:1"
    door.acceptor.settle(taken=True)
    assert [event.name for event in told] == ["paused", "resumed"]
    assert told[1].seconds == pytest.approx(4.0)
    assert not door.acceptor.troubled


def test_who_was_taken_in_vain_is_no_recovery(door, clock, told):
    """No thread could be started: the door pauses, longer each time, until one can, with two events in all."""
    for pause in (0.1, 0.2, 0.4):
        door.acceptor.starved(RuntimeError("can't start new thread"))
        door.acceptor.starved(RuntimeError("can't start new thread"))  # the next of a burst
        door.acceptor.settle(taken=True)
        assert door.acceptor.paused
        assert door.acceptor.patience(60.0) == pytest.approx(pause)
        clock.now += pause
        door.acceptor.turn(room=True)
    assert [(event.name, event.reason) for event in told] == [("paused", "can't start new thread")]
    assert door.done == ["pause", "resume"] * 3
    door.acceptor.settle(taken=True)
    assert [event.name for event in told] == ["paused", "resumed"]
    assert not door.acceptor.troubled


def test_at_a_door_that_is_to_close_nobody_waits_for_a_thread(door, told):
    """A drain is not held up: who finds none is lost."""
    door.acceptor.last = True
    door.acceptor.starved(RuntimeError("can't start new thread"))
    assert (door.done, told, door.acceptor.paused, door.acceptor.troubled) == ([], [], False, False)


def test_an_accept_that_takes_nothing_is_no_recovery(door, told):
    """The trouble lasts until a connection is taken."""
    door.acceptor.failed(EMFILE)
    door.acceptor.settle(taken=False)
    assert door.acceptor.troubled
    assert len(told) == 1


def test_after_a_recovery_the_pause_is_short_again(door, clock):
    """The next exhaustion begins anew."""
    for _ in range(3):
        door.acceptor.failed(EMFILE)
        clock.now += 1.0
        door.acceptor.turn(room=True)
    door.acceptor.settle(taken=True)
    door.acceptor.failed(EMFILE)
    assert door.acceptor.patience(60) == pytest.approx(0.1)


def test_the_door_is_watched_again_when_the_pause_is_over_and_not_before(door, clock):
    """Neither too early nor twice."""
    door.acceptor.failed(EMFILE)
    clock.now += 0.09
    door.acceptor.turn(room=True)
    assert (door.acceptor.paused, door.done) == (True, ["pause"])
    clock.now += 0.01
    door.acceptor.turn(room=False)
    door.acceptor.turn(room=False)
    assert (door.acceptor.paused, door.done) == (False, ["pause", "resume"])


@pytest.mark.parametrize("name", ["ENOSPC", "ENOMEM"])
def test_a_pause_goes_on_while_the_kernel_has_no_room_for_the_door(clock, told, name):
    """In its epoll set: the loop does not end by it, and asks again; what else is wrong ends it."""
    door = Door()
    errors = [OSError(getattr(errno, name), "no room")]

    def resume():
        if errors:
            raise errors.pop()
        door.done.append("resume")

    door.acceptor._resume = resume
    door.acceptor.hold("full")
    door.acceptor.turn(room=True)
    assert door.acceptor.paused
    assert door.acceptor.patience(60.0) == LONGEST_PAUSE
    clock.now += LONGEST_PAUSE
    door.acceptor.turn(room=True)
    assert (door.done, door.acceptor.paused) == (["pause", "resume"], False)
    door.acceptor.settle(taken=True)
    assert [event.name for event in told] == ["paused", "resumed"]
    errors.append(OSError(errno.EBADF, "closed"))
    door.acceptor.hold("full")
    with pytest.raises(OSError, match="closed"):
        door.acceptor.turn(room=True)


def test_the_loop_sleeps_no_longer_than_the_pause(door, clock):
    """And never longer than it would by itself; a pause that is over lets it sleep no time at all."""
    assert door.acceptor.patience(0.5) == 0.5
    door.acceptor.failed(EMFILE)
    assert door.acceptor.patience(0.5) == pytest.approx(0.1)
    assert door.acceptor.patience(0.05) == 0.05
    clock.now += 5
    assert door.acceptor.patience(0.5) == 0


def test_a_full_engine_holds_the_door_until_there_is_room(door, clock, told):
    """However long it takes."""
    door.acceptor.hold("pool full")
    clock.now += 1000
    door.acceptor.turn(room=False)
    assert door.acceptor.patience(0.5) == 0.5
    assert (door.acceptor.paused, door.done) == (True, ["pause"])
    door.acceptor.turn(room=True)
    assert (door.acceptor.paused, door.done) == (False, ["pause", "resume"])
    assert [(event.name, event.reason or event.seconds) for event in told] == [
        ("paused", "pool full"),
        ("resumed", 1000),
    ]


def test_a_door_at_which_nobody_waits_rests_in_silence(door, told):
    """A pause is told when somebody waits, and its end when it was told."""
    door.acceptor.rest("pool full")
    assert (door.acceptor.paused, door.acceptor.rests) == (True, True)
    door.acceptor.turn(room=True)
    assert (told, door.done, door.acceptor.rests) == ([], ["pause", "resume"], False)
    door.acceptor.rest("pool full")
    door.acceptor.awaited()
    assert not door.acceptor.rests
    door.acceptor.turn(room=True)
    assert [event.name for event in told] == ["paused", "resumed"]


def test_holding_twice_is_one_pause(door, told):
    """One event and one unwatch."""
    door.acceptor.hold("pool full")
    door.acceptor.hold("pool full")
    assert door.done == ["pause"]
    assert len(told) == 1


def test_a_door_that_is_closed_waits_for_nothing(door):
    """A loop that begins later starts with the door open."""
    door.acceptor.hold("pool full")
    door.acceptor.close()
    assert not door.acceptor.paused
    door.acceptor.turn(room=True)
    assert door.done == ["pause"]
    assert door.acceptor.patience(math.inf) == math.inf


# ── the reserve ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_opening_twice_takes_one_descriptor(door):
    """And closing twice gives back one; nothing_leaks watches."""
    before = len(os.listdir("/proc/self/fd"))
    door.acceptor.open()
    door.acceptor.open()
    assert len(os.listdir("/proc/self/fd")) == before + 1
    door.acceptor.close()
    door.acceptor.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_at_exhaustion_the_queue_is_reset(listener, told):
    """Clients that wait learn at once, by a reset, that they are not served, and the event counts them."""
    door = Door(listener)
    door.acceptor.open()
    clients = [client_of(listener) for _ in range(3)]
    door.acceptor.failed(EMFILE)
    for client in clients:
        with client, pytest.raises(ConnectionResetError):
            client.recv(1)
    door.acceptor.settle(taken=True)
    assert told[-1].shed == 3
    door.acceptor.close()


def test_shed_connections_are_counted_once(listener, told):
    """The next exhaustion begins to count from zero."""
    door = Door(listener)
    door.acceptor.open()
    with client_of(listener):
        door.acceptor.failed(EMFILE)
    door.acceptor.settle(taken=True)
    door.acceptor.failed(EMFILE)
    door.acceptor.settle(taken=True)
    assert [event.shed for event in told if event.name == "resumed"] == [1, 0]
    door.acceptor.close()


def test_without_a_reserve_the_pauses_alone_must_do(listener, monkeypatch):
    """Exhausted from the start: the queue is left as it is, and the door pauses all the same."""

    def exhausted(*_):
        raise EMFILE

    door = Door(listener)
    monkeypatch.setattr(module.os, "open", exhausted)
    door.acceptor.open()
    monkeypatch.undo()
    with client_of(listener):
        door.acceptor.failed(EMFILE)
        assert wait_readable(listener)
    assert door.done == ["pause"]
    door.acceptor.close()


def test_a_datagram_socket_has_no_queue_to_shed():
    """Datagrams are left to the kernel, which drops what is too much."""
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        door = Door(sock)
        door.acceptor.open()
        door.acceptor.failed(OSError(errno.ENOBUFS, "No buffer space"))
        assert door.done == ["pause"]
        door.acceptor.close()


def test_shedding_is_bounded(listener, monkeypatch):
    """A flood of clients cannot keep the loop in it."""
    monkeypatch.setattr(module, "MAX_SHED", 2)
    door = Door(listener)
    door.acceptor.open()
    clients = [client_of(listener) for _ in range(3)]
    door.acceptor.failed(EMFILE)
    assert wait_readable(listener)
    for client in clients:
        client.close()
    door.acceptor.close()


# ── refusing, and asking ─────────────────────────────────────────────────────────────────────────────────────────────


def test_refused_without_a_word_is_a_reset(listener):
    """No client takes a reset for an answer."""
    with client_of(listener) as client:
        refuse(listener.accept()[0])
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_refused_with_a_reply(listener):
    """The reply arrives, then the end."""
    with client_of(listener) as client:
        refuse(listener.accept()[0], b"busy\n")
        assert client.recv(100) == b"busy\n"
        assert client.recv(100) == b""


def test_refusing_who_sends_without_end_comes_to_an_end():
    """It is done in the loop, where everybody waits meanwhile."""

    class Endless(socket.socket):
        reads = 0

        def recv(self, size, flags=0):
            self.reads += 1
            assert self.reads <= 1000
            return b"x" * size

    ours, theirs = socket.socketpair()
    with theirs:
        taken = Endless(fileno=ours.detach())
        refuse(taken, b"busy\n")
        assert taken.fileno() == -1
        assert taken.reads > 1


def test_a_client_that_has_gone_is_refused_in_silence(listener):
    """It wanted to go anyway."""
    client = client_of(listener)
    taken = listener.accept()[0]
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    refuse(taken, b"busy\n")
    assert taken.fileno() == -1


def test_what_is_no_socket_is_left_alone():
    """A program's own request object knows best itself."""
    refuse(object())
    refuse((b"data", None), b"busy")


def test_readable_asks_for_the_descriptor_of_the_moment(listener):
    """It follows a server whose socket is replaced; a closed one is never readable."""
    ask = Readable()
    assert not ask(listener.fileno())
    with client_of(listener):
        assert ask(listener.fileno())
        assert not ask(-1)
        assert ask(listener.fileno())
        with socket.create_server(("127.0.0.1", 0)) as other:
            assert not ask(other.fileno())


def test_readable_takes_nothing(listener):
    """The connection is still there to be accepted."""
    ask = Readable()
    with client_of(listener):
        assert ask(listener.fileno())
        assert ask(listener.fileno())
        listener.accept()[0].close()
        assert not ask(listener.fileno())
