"""The compiled hub: what arrives in one wake-up, who waits, for how long, and who closes under whom."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

compiled = pytest.importorskip("harken._hub.compiled")

PATIENCE = 10.0  # seconds that anything here may take at most


@pytest.fixture
def hub() -> Iterator[Any]:
    """Return a hub, and close it."""
    hub = compiled.Hub()
    yield hub
    hub.close()


def run(hub: Any, *functions: Callable[[], object]) -> list[Any]:
    """Run each function as a green thread; return what they returned, or the exceptions they raised."""
    results: list[Any] = [None] * len(functions)
    left = len(functions)

    def keep(place: int, function: Callable[[], object]) -> None:
        nonlocal left
        try:
            results[place] = function()
        except Exception as error:
            results[place] = error
        left -= 1

    for place, function in enumerate(functions):
        hub.spawn(keep, place, function)
    end = time.monotonic() + PATIENCE
    hub.run(lambda: left == 0 or time.monotonic() > end, lambda: 0.1, lambda: None)
    assert left == 0, "a green thread hangs"
    return results


def tcp_pair() -> tuple[Any, socket.socket]:
    """Return a Connection and a plain socket, the two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        near, _ = compiled.accept(listener)
    return near, far


def unix_pair() -> tuple[Any, socket.socket]:
    """Return a Connection and a plain socket, the two ends of a Unix stream."""
    near, far = socket.socketpair()
    return compiled.Hub.adopt(compiled.Hub(), near), far


def read_all(connection: Any, size: int = 65536) -> list[bytes]:
    """Read pieces until the end."""
    pieces = []
    while piece := connection.recv(size):
        pieces.append(piece)
    return pieces


def test_data_and_the_end_in_one_wake_up(hub: Any) -> None:
    """A short read whose event also told of FIN is not taken for the last event."""
    near, far = tcp_pair()

    def serve() -> list[bytes]:
        with near:
            return read_all(near)

    def feed() -> None:
        hub.sleep(0.02)  # it waits by now, so data and FIN come as one edge
        far.sendall(b"last")
        far.close()

    assert run(hub, serve, feed)[0] == [b"last"]


def test_the_end_before_the_first_read(hub: Any) -> None:
    """Data and FIN that came before the connection was ever registered are read."""
    near, far = tcp_pair()
    far.sendall(b"x" * 10)
    far.close()
    with near:
        assert run(hub, lambda: read_all(near))[0] == [b"x" * 10]


@pytest.mark.parametrize("waiting", [True, False], ids=["waiting", "before"])
def test_a_reset_ends_one_reader_alone(hub: Any, waiting: bool) -> None:
    """RST gives ConnectionResetError to who reads there; the others go on."""
    near, far = tcp_pair()
    other, peer = tcp_pair()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def reset() -> None:
        far.close()
        hub.sleep(0.01)
        peer.sendall(b"still here")

    if not waiting:
        far.close()
    results = run(hub, lambda: near.recv(10), lambda: other.recv(100), reset)
    assert isinstance(results[0], ConnectionResetError)
    assert results[1] == b"still here"
    for sock in (near, other, peer):
        sock.close()


def test_urgent_data_does_not_stop_a_reader(hub: Any) -> None:
    """A read stops short at the urgent mark though more is queued; the rest is read all the same."""
    near, far = tcp_pair()

    def feed() -> None:
        for _ in range(20):
            far.send(b"before")
            far.send(b"!", socket.MSG_OOB)
            far.send(b"after")
            hub.sleep(0.001)
        far.close()

    data = b"".join(run(hub, lambda: read_all(near), feed)[0])
    assert data.count(b"before") == data.count(b"after") == 20
    near.close()


def test_unix_reads_that_stop_between_writers(hub: Any) -> None:
    """With SO_PASSCRED a read stops where the writing process changes: short, but not the last."""
    near, far = unix_pair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

    def feed() -> None:
        hub.sleep(0.01)
        far.send(b"1")
        child = os.fork()
        if child == 0:
            far.send(b"2")
            os._exit(0)
        os.waitpid(child, 0)
        far.send(b"3")
        far.close()

    assert b"".join(run(hub, lambda: read_all(near), feed)[0]) == b"123"
    near.close()


def test_peeking_takes_nothing(hub: Any) -> None:
    """MSG_PEEK leaves the data, however short the look."""
    near, far = tcp_pair()
    far.sendall(b"data")
    assert run(hub, lambda: (near.recv(100, socket.MSG_PEEK), near.recv(100)))[0] == (b"data", b"data")
    far.sendall(b"more")
    assert run(hub, lambda: near.recv(3, socket.MSG_WAITALL))[0] == b"mor"
    assert isinstance(run(hub, lambda: (near.recv(9), near.recv(9, socket.MSG_DONTWAIT)))[0], BlockingIOError)
    near.close()
    far.close()


def test_a_second_waiter_is_told(hub: Any) -> None:
    """Of two readers on one connection the second gets RuntimeError; the first gets the data. Writing is apart."""
    near, far = tcp_pair()
    results = run(hub, lambda: near.recv(10), lambda: near.recv(10), lambda: (hub.sleep(0.01), far.sendall(b"one")))
    assert results[0] == b"one"
    assert isinstance(results[1], RuntimeError)
    assert "already used by another green thread" in str(results[1])
    near.close()
    far.close()


def test_timeouts(hub: Any) -> None:
    """Each operation has its own time; what comes in time is no timeout, and nothing fires late."""
    near, far = tcp_pair()
    near.settimeout(0.05)

    def serve() -> tuple[bytes, float]:
        data = b""
        for _ in range(5):
            data += near.recv(10)
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="timed out"):
            near.recv(10)
        return data, time.monotonic() - began

    def feed() -> None:
        for _ in range(5):
            hub.sleep(0.03)
            far.sendall(b"x")

    data, waited = run(hub, serve, feed)[0]
    assert data == b"xxxxx"
    assert 0.05 <= waited < 1.0
    assert near.gettimeout() == near.timeout == 0.05
    near.settimeout(None)
    assert near.gettimeout() is None
    assert run(hub, lambda: near.recv(10), lambda: (hub.sleep(0.2), far.sendall(b"late")))[0] == b"late"
    near.setblocking(False)
    assert near.gettimeout() == 0.0
    assert isinstance(run(hub, lambda: near.recv(10))[0], BlockingIOError)
    near.close()
    far.close()


def test_a_shorter_timeout_after_a_longer(hub: Any) -> None:
    """The time of an earlier wait does not hold up that of a later one."""
    near, far = tcp_pair()

    def serve() -> float:
        near.settimeout(60)
        near.recv(10)
        near.settimeout(0.02)
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            near.recv(10)
        return time.monotonic() - began

    assert run(hub, serve, lambda: (hub.sleep(0.01), far.sendall(b"x")))[0] < 1.0
    near.close()
    far.close()


def test_sendall_waits_for_a_slow_reader(hub: Any) -> None:
    """More than the kernel takes arrives whole, in order."""
    near, far = tcp_pair()
    other = hub.adopt(far)
    payload = os.urandom(1 << 20) * 8

    def drain() -> bytes:
        pieces, size = [], 0
        while size < len(payload):
            pieces.append(other.recv(1 << 18))
            size += len(pieces[-1])
        return b"".join(pieces)

    assert run(hub, lambda: near.sendall(payload), drain)[1] == payload
    near.settimeout(0.05)  # nobody reads: 64 MiB are more than any kernel's buffers
    assert isinstance(run(hub, lambda: near.sendall(payload * 8))[0], TimeoutError)
    near.close()
    other.close()


@pytest.mark.parametrize("way", ["close", "detach"])
def test_closing_under_a_waiter(hub: Any, way: str) -> None:
    """Whoever waits on a connection that another green thread closes gets EBADF."""
    near, far = tcp_pair()

    def close() -> None:
        hub.sleep(0.01)
        number = getattr(near, way)()
        if number is not None:
            assert os.get_blocking(number)
            os.close(number)

    error = run(hub, lambda: near.recv(10), close)[0]
    assert isinstance(error, OSError)
    assert error.errno == errno.EBADF
    far.close()


def test_closing_from_another_thread(hub: Any) -> None:
    """Another OS thread closes: the waiter gets EBADF at once; it shuts: the waiter reads the end."""
    near, far = tcp_pair()
    other, peer = tcp_pair()
    threads = [
        threading.Timer(0.05, near.close),
        threading.Timer(0.05, lambda: socket.socket.shutdown(other, socket.SHUT_RDWR)),
    ]
    for thread in threads:
        thread.start()
    error, data = run(hub, lambda: near.recv(10), lambda: other.recv(10))
    assert isinstance(error, OSError)
    assert data == b""
    for thread in threads:
        thread.join()
    for sock in (far, other, peer):
        sock.close()


def test_a_number_that_is_used_again(hub: Any) -> None:
    """Events of a closed descriptor do not reach the connection that got its number."""
    first, far = tcp_pair()
    run(hub, lambda: far.sendall(b"x"), lambda: first.recv(10), lambda: hub.sleep(0))
    number = first.fileno()
    far.sendall(b"unread")
    first.close()
    far.close()
    second, peer = tcp_pair()
    assert number in (second.fileno(), peer.fileno())
    assert isinstance(run(hub, lambda: (second.settimeout(0.05), second.recv(10)))[0], TimeoutError)
    second.close()
    peer.close()


def test_in_a_plain_thread_it_blocks() -> None:
    """Without a hub a Connection is a blocking socket, with timeouts."""
    near, far = tcp_pair()
    far.sendall(b"x")
    assert near.recv(10) == b"x"
    near.settimeout(0.02)
    with pytest.raises(TimeoutError, match="timed out"):
        near.recv(10)
    near.settimeout(None)
    timer = threading.Timer(0.02, far.sendall, (b"later",))
    timer.start()
    assert near.recv(10) == b"later"
    timer.join()
    near.close()
    far.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        near.recv(10)


def test_waiting_for_any_descriptor(hub: Any) -> None:
    """`wait` takes pipes, plain sockets and files, and tells of timeouts and second waiters."""
    readable, writable = os.pipe()
    try:
        results = run(
            hub,
            lambda: hub.wait(readable),
            lambda: hub.wait(readable),
            lambda: hub.wait(writable, write=True),
            lambda: (hub.sleep(0.02), os.write(writable, b"x")),
        )
        assert results[0] is None
        assert isinstance(results[1], RuntimeError)
        assert results[2] is None
        os.read(readable, 1)
        assert isinstance(run(hub, lambda: hub.wait(readable, timeout=0.02))[0], TimeoutError)
        with open(__file__) as file:
            assert run(hub, lambda: hub.wait(file.fileno()))[0] is None
        error = run(hub, lambda: hub.wait(999_999))[0]
        assert isinstance(error, OSError)
        assert error.errno == errno.EBADF
    finally:
        os.close(readable)
        os.close(writable)


def test_a_flood_leaves_room_for_others(hub: Any) -> None:
    """A connection that always has data gives way again and again."""
    near, far = unix_pair()
    flooding = hub.adopt(far)
    quiet, peer = tcp_pair()
    turns = 0

    def flood() -> None:
        while not done:
            flooding.sendall(b"x" * 100)

    def drink() -> None:
        nonlocal turns
        while near.recv(50):
            turns += 1

    def ask() -> float:
        worst = 0.0
        for _ in range(50):
            began = time.monotonic()
            peer.sendall(b"x")
            quiet.recv(10)
            worst = max(worst, time.monotonic() - began)
        done.append(True)
        flooding.close()
        return worst

    done: list[bool] = []
    worst = run(hub, flood, drink, ask)[2]
    assert turns > 50
    assert worst < 0.5
    for sock in (near, quiet, peer):
        sock.close()


def test_signals_are_handled_while_the_hub_sleeps(hub: Any) -> None:
    """A handler runs within milliseconds, and what it raises leaves `run`; the hub can be run again."""
    seen: list[float] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(time.monotonic()))
    try:
        timer = threading.Timer(0.05, signal.raise_signal, (signal.SIGUSR1,))
        timer.start()
        began = time.monotonic()
        hub.run(lambda: bool(seen), lambda: PATIENCE, lambda: None)
        timer.join()
        assert len(seen) == 1
        assert time.monotonic() - began < PATIENCE / 2  # it is asked again when the handler has run

        def refuse(*_: object) -> None:
            raise LookupError("told to stop")

        signal.signal(signal.SIGUSR1, refuse)
        child = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        child.start()
        with pytest.raises(LookupError, match="told to stop"):
            hub.run(lambda: False, lambda: PATIENCE, lambda: None)
        child.join()
        assert run(hub, lambda: 7) == [7]
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_collection_in_between(hub: Any) -> None:
    """The collector runs while green threads are parked, at each step of a connection's life."""

    def serve(near: Any) -> bytes:
        near.ring = [near]
        gc.collect()
        data = near.recv(10)
        gc.collect()
        near.sendall(data)
        near.close()
        return bytes(data)

    class Ringed(compiled.Connection):  # type: ignore[misc,name-defined]
        """With a dict, so that it can hold itself."""

    pairs = [socket.socketpair() for _ in range(8)]
    for _, far in pairs:
        far.sendall(b"x")
    functions = []
    for near, _ in pairs:
        ringed = Ringed(near.family, near.type, near.proto, near.detach())
        functions.append(lambda ringed=ringed: serve(ringed))
    del near, ringed
    assert run(hub, *functions) == [b"x"] * 8
    functions.clear()
    gc.collect()
    assert [far.recv(10) for _, far in pairs] == [b"x"] * 8
    for _, far in pairs:
        far.close()


@contextlib.contextmanager
def aside(prepare: Callable[[Any], object], asked: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Run a hub in a thread that is not the main one, where green threads may ask the epoll set for it."""
    ready = threading.Event()
    made: list[Any] = []
    stopped: list[bool] = []

    def until() -> bool:
        asked()
        return bool(stopped)

    def serve() -> None:
        hub = compiled.Hub()
        prepare(hub)
        made.append(hub)
        ready.set()
        hub.run(until, lambda: 60.0, lambda: None)
        hub.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(PATIENCE)
    try:
        yield
    finally:
        stopped.append(True)
        made[0].wake()
        thread.join(PATIENCE)


def test_what_a_waiting_green_thread_fetches_is_not_lost() -> None:
    """It asks the epoll set in the loop's place; where a door comes first the loop goes on with the same events."""
    pairs = [tcp_pair() for _ in range(3)]
    silent, _silent = tcp_pair()
    door, knocker = socket.socketpair()
    got: list[bytes] = []
    opened, sent = threading.Event(), threading.Event()
    over = threading.Semaphore(0)

    def read(connection: Any) -> None:
        while data := connection.recv(10):
            got.append(data)
            over.release()

    def prepare(hub: Any) -> None:
        def wait_for_nothing() -> None:
            opened.set()
            sent.wait(PATIENCE)  # all comes while the loop is kept
            with contextlib.suppress(TimeoutError):
                hub.wait(silent, timeout=0.01)
            over.release()

        def open_door() -> None:
            if door.recv(1) == b"!":
                hub.spawn(wait_for_nothing)  # the last that is due in its turn

        hub.watch(door, open_door)
        for connection, _ in pairs:
            hub.spawn(read, connection)

    with aside(prepare):
        for _ in range(30):
            opened.clear()
            sent.clear()
            knocker.send(b"!")
            assert opened.wait(PATIENCE)
            knocker.send(b"?")
            for _, far in pairs:
                far.send(b"x")
            sent.set()
            for _ in (*pairs, silent):
                assert over.acquire(timeout=PATIENCE)
        for _, far in pairs:
            far.close()
    for sock in (*(near for near, _ in pairs), silent, _silent, door, knocker):
        sock.close()
    assert len(got) == 90


def test_one_connection_alone_costs_no_turn_of_the_loop() -> None:
    """The green thread that waits is the one that asks for events: the caller of run() is not asked again."""
    asked: list[bool] = []
    connection, far = tcp_pair()

    def echo() -> None:
        while data := connection.recv(10):
            connection.sendall(data)

    def talk(times: int) -> None:
        for _ in range(times):
            far.send(b"x")
            assert far.recv(1) == b"x"

    far.settimeout(PATIENCE)
    with aside(lambda hub: hub.spawn(echo), lambda: asked.append(True)):
        talk(3)
        before = len(asked)
        talk(100)
        assert len(asked) == before
        far.close()
    connection.close()
