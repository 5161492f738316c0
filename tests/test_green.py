"""harken.green: what handlers on the green engine may use."""

from __future__ import annotations

import contextvars
import os
import queue
import socket
import ssl
import threading
import time
from functools import partial

import pytest
import trustme

import harken
from harken import green
from harken.engines.green import Engine
from harken.errors import ConfigError, DeadlineExceeded

PATIENCE = 5.0  # seconds


@pytest.fixture
def run():
    """Return a function that runs others in green threads beside one another, and returns what they returned."""
    engine = Engine(lambda _: False)

    def act(*functions):
        outcomes = [None] * len(functions)

        def note(number, function):
            try:
                outcomes[number] = function()
            except BaseException as error:
                outcomes[number] = error

        def start():
            for number, function in enumerate(functions):
                green.spawn(note, number, function)
            for thread in [green.spawn(lambda: None)]:
                thread.join()
            while any(outcome is None for outcome in outcomes):
                green.sleep(0.001)

        engine.spawn(start)
        assert engine.join(time.monotonic() + PATIENCE) == 0, outcomes
        return outcomes

    yield act
    engine.join(time.monotonic())


# -- threads ---------------------------------------------------------------------------------------------------------


def test_spawn_join_current(run):
    """A handle to wait for; current() names who runs."""

    def act():
        seen = []

        def child(number):
            green.sleep(0.02)
            seen.append((number, green.current()))

        thread = green.spawn(child, 1)
        assert thread.is_alive()
        assert not thread.join(0.001)
        assert thread.join()
        assert not thread.is_alive()
        return seen == [(1, thread.greenlet)] and green.current() is not thread.greenlet

    assert run(act) == [True]


def test_a_green_thread_cannot_wait_for_itself(run):
    """It would for ever."""
    box = []
    said = []

    def itself():
        with pytest.raises(RuntimeError, match="current"):
            box[0].join()
        said.append(True)

    def act():
        box.append(green.spawn(itself))
        return box[0].join(PATIENCE)

    assert run(act) == [True]
    assert said == [True]


def test_who_never_began_is_waited_for_by_nobody():
    """The last handler ended in the turn in which it was spawned; a plain thread joins it all the same."""
    engine = Engine(lambda _: False)
    made = []
    engine.spawn(lambda: made.append(green.spawn(time.sleep, 0)))
    assert engine.join(time.monotonic() + PATIENCE) == 0
    assert made[0].join(PATIENCE)
    assert not made[0].is_alive()


def test_a_spawned_thread_that_raises_is_joined_too(run, monkeypatch):
    """The error is shown as a thread's."""
    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda args: shown.append(args.exc_value))
    assert run(lambda: green.spawn([].pop).join(PATIENCE)) == [True]
    assert [type(error) for error in shown] == [IndexError]


@pytest.mark.parametrize("use", [lambda: green.spawn(print), lambda: green.timeout(1).__enter__()])
def test_outside_a_green_thread_it_says_so(use):
    """One clear line with the remedy."""
    with pytest.raises(
        RuntimeError, match="needs a green thread around it: call it in a handler on the green engine, and"
    ):
        use()
    assert green.current() is None


def test_in_a_forked_child_it_says_so(run):
    """Which is no green thread any more."""
    read, write = os.pipe()

    def act():
        pid = os.fork()
        if pid == 0:
            try:
                green.spawn(print)
            except RuntimeError as error:
                os.write(write, str(error).encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        os.close(write)
        with open(read) as file:
            return file.read()

    assert run(act)[0].endswith("in no child that such a handler has forked")


def test_in_a_plain_thread_the_rest_blocks():
    """So that code may be shared."""
    began = time.monotonic()
    green.sleep(0.01)
    assert time.monotonic() - began >= 0.01
    assert green.offload(threading.current_thread) is threading.current_thread()
    assert green.getaddrinfo("127.0.0.1", 80)
    with green.Lock():
        assert not green.Event().wait(0.01)


# -- locks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setter", ["green", "plain"])
def test_event(run, setter):
    """Set by a green thread or a plain one; waiting has an end."""
    event = green.Event()

    def wait():
        assert not event.wait(0.001)
        return event.wait(PATIENCE)

    def set_it():
        green.sleep(0.02)
        if setter == "green":
            event.set()
        else:
            threading.Thread(target=event.set).start()
        return True

    assert run(wait, wait, set_it) == [True] * 3
    assert event.wait(0)
    event.clear()
    assert not event.is_set()


def test_a_plain_thread_waits_for_a_green_one(run):
    """The other way round."""
    event, seen = green.Event(), []
    thread = threading.Thread(target=lambda: seen.append(event.wait(PATIENCE)))
    thread.start()
    run(lambda: event.set() or True)
    thread.join(PATIENCE)
    assert seen == [True]


def test_lock_is_held_by_one_and_goes_in_order(run):
    """Who waits longest is next."""
    lock, seen = green.Lock(), []

    def act(name):
        def inner():
            with lock:
                seen.append(name)
                green.sleep(0.005)
                seen.append(name)
            return True

        return inner

    run(act("a"), act("b"), act("c"))
    assert "".join(seen) == "aabbcc"
    assert not lock.locked()
    with pytest.raises(RuntimeError):
        lock.release()


def test_lock_in_time(run):
    """acquire() with a timeout, or without waiting."""
    lock = green.Lock()

    def act():
        assert lock.acquire()
        assert not lock.acquire(timeout=0.01)
        assert not lock.acquire(blocking=False)
        lock.release()
        return lock.acquire(blocking=False)

    assert run(act) == [True]


def test_an_interrupted_waiter_loses_nothing(run):
    """A waiter that gives up does not take the lock with it."""
    lock = green.Lock()

    def holder():
        with lock:
            green.sleep(0.03)
        return True

    def impatient():
        with green.timeout(0.01):
            lock.acquire()

    def patient():
        return lock.acquire(timeout=PATIENCE)

    _, outcome, got = run(holder, impatient, patient)
    assert isinstance(outcome, DeadlineExceeded)
    assert got is True


def test_lock_takes_the_standard_librarys_default(run):
    """``acquire(timeout=-1)`` waits without end."""
    lock = green.Lock()

    def act():
        lock.acquire()
        green.spawn(lambda: (green.sleep(0.01), lock.release()))
        return lock.acquire(True, -1), lock.acquire(timeout=0)

    assert run(act) == [(True, False)]


def test_semaphore_between_plain_threads_and_green_ones(run):
    """Never more than its value at once."""
    semaphore, inside, most = green.Semaphore(2), [], []

    def act():
        for _ in range(20):
            with semaphore:
                inside.append(1)
                most.append(len(inside))
                green.sleep(0.0005)
                inside.pop()
        return True

    threads = [threading.Thread(target=act) for _ in range(2)]
    for thread in threads:
        thread.start()
    run(act, act, act)
    for thread in threads:
        thread.join(PATIENCE)
    assert max(most) == 2
    with pytest.raises(ValueError, match="-1"):
        green.Semaphore(-1)


def test_queue(run):
    """First in, first out; bounded; Empty and Full in time."""
    queue = green.Queue(2)

    def producer():
        for number in range(10):
            queue.put(number)
        return True

    def consumer():
        return [queue.get() for _ in range(10)]

    assert run(producer, consumer) == [True, list(range(10))]
    assert queue.empty()
    with pytest.raises(green.Empty):
        queue.get(timeout=0.01)
    with pytest.raises(green.Empty):
        queue.get_nowait()
    queue.put_nowait(1)
    queue.put_nowait(2)
    assert queue.full()
    assert queue.qsize() == 2
    with pytest.raises(green.Full):
        queue.put(3, timeout=0.01)


REFUSED = {
    "semaphore-none": (lambda: green.Semaphore().release(0), ValueError),
    "semaphore-timeout": (lambda: green.Semaphore().acquire(False, 1), ValueError),
    "lock-timeout": (lambda: green.Lock().acquire(False, 1), ValueError),
    "lock-negative": (lambda: green.Lock().acquire(True, -2), ValueError),
    "lock-word": (lambda: green.Lock().acquire(True, "x"), TypeError),
    "queue-get": (lambda: green.Queue().get(timeout=-1), ValueError),
    "queue-put": (lambda: green.Queue(1).put(1, timeout=-1), ValueError),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_standard_library_refuses(what):
    """Arguments that make no sense to ``threading`` and ``queue``; a queue that does not wait looks at no timeout."""
    call, error = REFUSED[what]
    with pytest.raises(error):
        call()
    with pytest.raises(queue.Empty):
        green.Queue().get(block=False, timeout=-1)


def test_queue_from_a_plain_thread(run):
    """A producer elsewhere feeds a green consumer."""
    queue = green.Queue()
    thread = threading.Thread(target=lambda: [queue.put(number) for number in range(100)])
    thread.start()
    assert run(lambda: [queue.get() for _ in range(100)]) == [list(range(100))]
    thread.join(PATIENCE)


# -- time ------------------------------------------------------------------------------------------------------------


def test_timeout_ends_any_wait(run):
    """A TimeoutError that says how long; within the time it is not noticed."""

    def late():
        with green.timeout(0.02):
            green.Event().wait()

    def early():
        with green.timeout(0.02):
            pass
        green.sleep(0.04)
        return True

    outcome, unharmed = run(late, early)
    assert isinstance(outcome, DeadlineExceeded)
    assert isinstance(outcome, TimeoutError)
    assert str(outcome) == "not done within 0.02 s"
    assert unharmed is True


@pytest.mark.parametrize("seconds", [None, "1"])
def test_a_timeout_is_a_number(run, seconds):
    """Anything else is told at once."""

    def act():
        with green.timeout(seconds):
            pass

    error = run(act)[0]
    assert isinstance(error, TypeError)
    assert str(error) == f"green.timeout() takes seconds, not {seconds!r}"


def test_timeouts_nest(run):
    """The inner one may end, the outer one still counts."""

    def act():
        with green.timeout(0.05):
            with pytest.raises(DeadlineExceeded, match="0.01"), green.timeout(0.01):
                green.sleep(1)
            green.sleep(1)

    assert str(run(act)[0]) == "not done within 0.05 s"


def test_timeouts_that_pass_at_once_are_both_raised(run):
    """Neither takes the other's place, when a third one kept the hub until both had passed."""

    def act():
        with green.timeout(0.02):
            with pytest.raises(DeadlineExceeded, match="0.01"), green.timeout(0.01):
                green.spawn(time.sleep, 0.04)
                green.sleep(1)
            green.sleep(1)

    assert str(run(act)[0]) == "not done within 0.02 s"


def test_a_timeout_ends_a_connect_whatever_addresses_are_left(run, monkeypatch):
    """It is not one address that failed."""
    tried = []

    class Silent(socket.socket):
        def connect(self, place):
            tried.append(place)
            green.sleep(PATIENCE)

    places = [(socket.AF_INET, number) for number in range(3)]
    monkeypatch.setattr("harken.green._places", lambda address: (places, None))
    monkeypatch.setattr("harken._hub.Connection", Silent)

    def act():
        with green.timeout(0.02):
            green.connect(("several", 1))

    assert isinstance(run(act)[0], DeadlineExceeded)
    assert tried == [0]


# -- the outside -----------------------------------------------------------------------------------------------------


def test_offload_returns_raises_and_lets_others_run(run):
    """In a plain thread, with this green thread's context variables."""
    variable = contextvars.ContextVar("variable", default=0)

    def act():
        variable.set(5)
        assert green.offload(lambda: (green.current(), variable.get())) == (None, 5)
        with pytest.raises(ZeroDivisionError):
            green.offload(divmod, 1, 0)
        green.offload(time.sleep, 0.05)
        return time.monotonic()

    def other():
        green.sleep(0.01)
        return time.monotonic()

    offloaded, slept = run(act, other)
    assert offloaded > slept


def test_an_interrupted_offload_is_dropped(run):
    """Its thread goes on; nobody is disturbed."""
    gate = threading.Event()

    def act():
        with green.timeout(0.01):
            green.offload(gate.wait, PATIENCE)

    outcomes = run(act)
    gate.set()
    assert isinstance(outcomes[0], DeadlineExceeded)


def test_getaddrinfo(run):
    """Numbers at once, names by a thread, errors as socket has them."""
    assert run(lambda: green.getaddrinfo("localhost", 80)) == [socket.getaddrinfo("localhost", 80)]
    assert run(lambda: green.getaddrinfo("::1", 80)) == [socket.getaddrinfo("::1", 80)]
    assert isinstance(run(lambda: green.getaddrinfo("no.such.host.invalid", 80))[0], socket.gaierror)


@pytest.mark.parametrize("form", ["tcp", "pair", "unix", "name"])
def test_connect(run, form, tmp_path):
    """By URL or by pair; it waits as the handler's own connection does."""
    if form == "unix":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        address = f"unix:{tmp_path}/s"
    else:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        address = {"tcp": f"tcp://127.0.0.1:{port}", "pair": ("127.0.0.1", port), "name": ("localhost", port)}[form]

    def server():
        connection, _ = green.offload(listener.accept)
        with connection:
            connection.sendall(connection.recv(10).upper())
        return True

    def client():
        with green.connect(address, 3) as connection:
            assert connection.gettimeout() == 3
            connection.sendall(b"hello")
            return connection.recv(10)

    with listener:
        assert run(server, client) == [True, b"HELLO"]


@pytest.mark.parametrize("engine", ["thread", "green"])
def test_connect_under_tls(run, engine):
    """Of TLS 1.2 and 1.3; a certificate of an authority that is not trusted, or for another name, is refused."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusting = {version: ssl.create_default_context() for version in ("TLSv1_2", "TLSv1_3")}
    for version, each in trusting.items():
        authority.configure_trust(each)
        each.maximum_version = ssl.TLSVersion[version]

    class Greet(harken.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"hello")  # once the client has ended its part of the handshake
            while data := self.request.recv(100_000):
                self.request.sendall(data)

    with harken.background(harken.TCPServer(("127.0.0.1", 0), Greet, engine=engine, tls=context)) as server:
        port = server.server_address[1]

        def talk(version):
            with green.connect(f"tls://127.0.0.1:{port}", 5, tls=trusting[version]) as connection:
                assert isinstance(connection, ssl.SSLSocket)
                greeting = connection.recv(5)
                connection.sendall(bytes(200_000))
                size = 0
                while size < 200_000:
                    size += len(connection.recv(65536))
                return greeting, connection.gettimeout(), connection.version()

        assert run(lambda: talk("TLSv1_2"), lambda: talk("TLSv1_3")) == [
            (b"hello", 5, "TLSv1.2"),
            (b"hello", 5, "TLSv1.3"),
        ]
        refused = run(
            lambda: green.connect(f"tls://127.0.0.1:{port}", 5),
            lambda: green.connect(f"tls://localhost:{port}", 5, tls=trusting["TLSv1_3"]),
        )
        assert [type(error) for error in refused] == [ssl.SSLCertVerificationError] * 2


def test_connect_to_nobody(run):
    """The kernel's error; and what is no address is the program's fault."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    assert isinstance(run(lambda: green.connect(address, 1))[0], ConnectionRefusedError)
    for none in ("udp://127.0.0.1:1", ("127.0.0.1",), b"tcp://127.0.0.1:1", 5, None):
        assert isinstance(run(partial(green.connect, none))[0], ConfigError)
    assert isinstance(run(lambda: green.connect(f"tls://127.0.0.1:{address[1]}", 1))[0], ConnectionRefusedError)
