"""The compiled hub: forks, many connections, and nothing left of any of them."""

from __future__ import annotations

import contextlib
import contextvars
import errno
import gc
import os
import resource
import socket
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from harken import tracing

try:
    import _testcapi
except ImportError:  # some distributions leave it out
    _testcapi = None

compiled = pytest.importorskip("harken._hub.compiled")

PATIENCE = 60.0  # seconds that anything here may take at most


@pytest.fixture
def hub() -> Iterator[Any]:
    """Return a hub, and close it."""
    hub = compiled.Hub()
    yield hub
    hub.close()


def run_until(hub: Any, done: Callable[[], object]) -> None:
    """Run the hub until `done`, within bounds."""
    end = time.monotonic() + PATIENCE
    hub.run(lambda: bool(done()) or time.monotonic() > end, lambda: 0.1, lambda: None)
    assert done(), "it hangs"


class Echo:
    """A listener that is watched by a hub and answers each connection in a green thread."""

    def __init__(self, hub: Any) -> None:
        self.hub = hub
        self.open = 0
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.listener.setblocking(False)
        self.address = self.listener.getsockname()
        hub.watch(self.listener, self.take)

    def take(self) -> bool:
        """Accept one connection."""
        try:
            connection, _ = compiled.accept(self.listener)
        except BlockingIOError:
            return False
        self.open += 1
        self.hub.spawn(self.serve, connection)
        return True

    def serve(self, connection: Any) -> None:
        """Echo until the end."""
        with connection:
            while data := connection.recv(4096):
                connection.sendall(data)
        self.open -= 1

    def close(self) -> None:
        """Stop listening."""
        self.hub.unwatch(self.listener)
        self.listener.close()


@pytest.fixture
def echo(hub: Any) -> Iterator[Echo]:
    """Return an echo server on the hub."""
    server = Echo(hub)
    yield server
    server.close()


def memory() -> int:
    """Return the pages that this process holds, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_no_leak_over_many_connections(hub: Any, echo: Echo) -> None:
    """After 10,000 connections, some with timeouts, some reset, nothing has grown: objects, memory, descriptors."""
    left = 0

    def client(number: int) -> None:
        nonlocal left
        with compiled.Connection(socket.AF_INET, socket.SOCK_STREAM) as connection:
            if number % 3 == 0:
                connection.settimeout(30.0)
            connection.connect(echo.address)
            if number % 50 == 0:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            else:
                connection.sendall(b"ping")
                assert connection.recv(10) == b"ping"
        left -= 1

    def round_of(count: int) -> None:
        nonlocal left
        left += count
        for number in range(count):
            hub.spawn(client, number)
        run_until(hub, lambda: left == 0 and echo.open == 0)

    # A reset may leave `serve` by an exception, which is shown: the count is kept by hand.
    plain, echo.serve = echo.serve, lambda connection: quietly(plain, connection)  # type: ignore[method-assign]

    def quietly(function: Callable[[Any], None], connection: Any) -> None:
        try:
            function(connection)
        except ConnectionResetError:
            echo.open -= 1

    for _ in range(20):
        round_of(100)
    gc.collect()
    blocks, bytes_before, fds = sys.getallocatedblocks(), memory(), len(os.listdir("/proc/self/fd"))
    references = sys.getrefcount(compiled.Connection), sys.getrefcount(hub), sys.getrefcount(None)
    for _ in range(80):
        round_of(100)
    gc.collect()
    assert abs(sys.getallocatedblocks() - blocks) < 1000  # what slots keep for the next timeout; a leak is 8,000
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # the sanitizer keeps what is freed for a while
        assert memory() - bytes_before < 2 << 20
    assert len(os.listdir("/proc/self/fd")) == fds
    assert abs(sys.getrefcount(compiled.Connection) - references[0]) < 20
    assert abs(sys.getrefcount(hub) - references[1]) < 20
    assert abs(sys.getrefcount(None) - references[2]) < 1000  # immortal from 3.12 on


def test_many_connections_at_once(hub: Any, echo: Echo) -> None:
    """Two thousand connections are open at the same time, and each has its answers."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    count, done, greeted = 2000, [], 0

    def client(number: int) -> None:
        nonlocal greeted
        with compiled.Connection(socket.AF_INET, socket.SOCK_STREAM) as connection:
            connection.connect(echo.address)
            for turn in range(3):
                message = b"%d:%d" % (number, turn)
                connection.sendall(message)
                assert connection.recv(100) == message
                if turn == 0:
                    greeted += 1
                while greeted < count:
                    hub.sleep(0.05)
        done.append(number)

    try:
        for number in range(count):
            hub.spawn(client, number)
        run_until(hub, lambda: len(done) == count and echo.open == 0)
        assert sorted(done) == list(range(count))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_dropped_without_closing(hub: Any) -> None:
    """A connection that nobody holds is collected, though it has waited in the hub, and its number serves again."""
    for _ in range(3):
        near, far = socket.socketpair()
        connection = hub.adopt(near)
        gone = weakref.ref(connection)
        got: list[bytes] = []
        hub.spawn(lambda connection=connection, got=got: got.append(connection.recv(10)))
        hub.step(0)
        far.sendall(b"x")
        del connection
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # one that is recorded keeps the connection
            run_until(hub, lambda got=got: got)
            gc.collect()
        assert gone() is None
        assert far.recv(10) == b""
        far.close()


def test_closing_the_hub_ends_what_is_left() -> None:
    """`close` runs the `finally` blocks of parked green threads; a hub that is dropped gives its descriptors back."""
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    hub: Any = compiled.Hub()
    near, far = socket.socketpair()
    connection: Any = hub.adopt(near)
    ended: list[str] = []

    def wait(way: str, function: Callable[[], object]) -> None:
        try:
            function()
        finally:
            ended.append(way)

    hub.spawn(wait, "recv", lambda: connection.recv(10))
    hub.spawn(wait, "park", hub.park)
    hub.spawn(wait, "sleep", lambda: hub.sleep(60))
    hub.step(0)
    assert ended == []
    hub.close()
    assert sorted(ended) == ["park", "recv", "sleep"]
    hub.wake()
    hub.close()
    with pytest.raises(RuntimeError, match="closed"):
        hub.step(0)
    connection.close()
    far.close()
    gone = weakref.ref(hub)
    hub = connection = None
    gc.collect()
    assert gone() is None
    assert len(os.listdir("/proc/self/fd")) == before


def wait_for(child: int) -> int:
    """Return the exit status of a child, which ends within bounds."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")


def test_a_green_thread_forks(hub: Any, echo: Echo) -> None:
    """In the child it goes on and waits by poll(); the process ends with it; the parent misses no event."""
    results: list[object] = []

    def fork() -> None:
        near, far = socket.socketpair()
        connection = hub.adopt(near)
        with compiled.Connection(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.connect(echo.address)
            client.sendall(b"before")
            assert client.recv(100) == b"before"
            child = os.fork()
            if child == 0:
                connection.sendall(b"from the child")
                assert connection.fileno() >= 0
                hub.sleep(0.01)
                connection.settimeout(0.05)
                try:
                    connection.recv(1)
                except TimeoutError:
                    return  # ends the child, with status 0
                os._exit(3)
            for turn in range(50):
                client.sendall(b"%d" % turn)
                assert client.recv(100) == b"%d" % turn
                hub.sleep(0.001)
            results.append(far.recv(100))
            results.append(wait_for(child))
        connection.close()
        far.close()

    hub.spawn(fork)
    run_until(hub, lambda: len(results) == 2)
    assert results == [b"from the child", 0]


def test_a_hub_made_before_a_fork_runs_in_the_child(hub: Any) -> None:
    """A child gets descriptors of its own, and its hub serves; nothing of the parent's is watched there."""
    listener = socket.create_server(("127.0.0.1", 0))
    hub.watch(listener, lambda: os._exit(4))
    child = os.fork()
    if child == 0:
        try:
            near, far = socket.socketpair()
            connection, got = hub.adopt(near), []
            socket.create_connection(listener.getsockname())
            hub.spawn(lambda: got.append(connection.recv(10)))
            hub.spawn(lambda: (hub.sleep(0.02), far.sendall(b"x")))
            run_until(hub, lambda: got)
            os._exit(0 if got == [b"x"] else 5)
        finally:
            os._exit(6)
    assert wait_for(child) == 0
    hub.unwatch(listener)
    listener.close()


def test_a_hub_that_goes_leaves_its_thread() -> None:
    """Also where nobody has said so: what is used there afterwards asks no hub that is gone."""
    gone = weakref.ref(kept := compiled.Hub())
    kept.occupy(True)
    kept.close()
    del kept
    assert gone() is None
    assert compiled.current() is None
    near, far = socket.socketpair()
    with compiled.Connection(near.family, near.type, near.proto, near.detach()) as connection, far:
        connection.sendall(b"x")
        assert far.recv(10) == b"x"


def test_context_variables_are_copied(hub: Any) -> None:
    """A green thread starts in a copy of its maker's context; what it sets is seen by nobody else."""
    name = contextvars.ContextVar("name", default="nobody")
    seen: list[str] = []

    def show() -> None:
        seen.append(name.get())
        name.set("changed")
        hub.sleep(0)
        seen.append(name.get())

    token = name.set("maker")
    hub.spawn(show)
    name.reset(token)
    hub.spawn(show)
    run_until(hub, lambda: len(seen) == 4)
    assert seen == ["maker", "nobody", "changed", "changed"]
    assert name.get() == "nobody"


def test_addresses_are_those_of_the_socket_module(hub: Any, tmp_path: Any) -> None:
    """`accept` gives the peer as socket.accept() does, and a connection that a program cannot tell from another."""
    for family, address in [
        (socket.AF_INET, ("127.0.0.1", 0)),
        (socket.AF_INET6, ("::1", 0)),
        (socket.AF_UNIX, str(tmp_path / "a")),
    ]:
        with socket.socket(family) as listener:
            try:
                listener.bind(address)
            except OSError:
                continue  # a machine without IPv6
            listener.listen()
            with socket.socket(family) as client, socket.socket(family) as named:
                if family == socket.AF_UNIX:
                    named.bind(f"\0harken-test-{os.getpid()}")
                for each in (client, named):
                    each.connect(listener.getsockname())
                    connection, peer = compiled.accept(listener)
                    with connection:
                        assert peer == each.getsockname()
                        assert (connection.family, connection.type, connection.proto) == (family, listener.type, 0)
                        assert isinstance(connection, socket.socket)
                        assert os.get_blocking(connection.fileno())
                        assert connection.gettimeout() is None
                        with connection.makefile("rb") as file:
                            each.sendall(b"line\n")
                            assert file.readline() == b"line\n"
                        with connection.dup() as twin:
                            twin.settimeout(0.01)
                            assert isinstance(twin, compiled.Connection)
                            with pytest.raises(TimeoutError):
                                twin.recv(1)
                    assert connection.fileno() == -1


def test_files_are_sent(hub: Any, tmp_path: Any) -> None:
    """`sendfile` sends what is asked of a file, waits when it must, and leaves the file where it stopped."""
    payload = os.urandom(1 << 20)
    path = tmp_path / "payload"
    path.write_bytes(payload)
    near, far = socket.socketpair()
    sender, receiver = hub.adopt(near), hub.adopt(far)
    results: list[object] = []

    def send() -> None:
        with path.open("rb") as file:
            results.append(sender.sendfile(file))
            results.append(sender.sendfile(file, 10, 20))
            results.append(file.tell())
        sender.close()

    def receive() -> None:
        pieces = []
        while piece := receiver.recv(10_000):
            pieces.append(piece)
        results.append(b"".join(pieces))

    hub.spawn(send)
    hub.spawn(receive)
    run_until(hub, lambda: len(results) == 4)
    assert results == [len(payload), 20, 30, payload + payload[10:30]]
    receiver.close()


def test_a_closed_hub_says_that_it_watches_nothing():
    """Rather than nothing at all."""
    hub = compiled.Hub()
    hub.close()
    with socket.socket() as door, pytest.raises(RuntimeError, match="this hub is closed"):
        hub.watch(door, print)


def crowded_pair() -> tuple[Any, socket.socket]:
    """Return a Connection and the socket at its end, between which little finds room."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        far = stack.enter_context(socket.socket())
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        far.settimeout(PATIENCE)
        far.connect(listener.getsockname())
        near, _ = compiled.accept(listener)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        stack.pop_all()
    return near, far


def test_whoever_follows_a_connection_may_close_it(hub, monkeypatch):
    """While the rest of its answers is sent: whoever sends it is told."""
    near, far = crowded_pair()
    told: list[Any] = []

    def follow(connection, sent, data, size):
        if sent and connection.fileno() >= 0:
            os.close(connection.detach())

    def serve():
        reader = near.open_reader()
        writer = near.open_writer(reader)
        reader.readline()
        writer.write(bytes(60000))  # joined, since more requests lie there
        with pytest.raises(OSError) as failure:
            writer.flush()
        told.append(failure.value.errno)

    def client():
        while near.waits_for() != "writing":
            hub.sleep(0.001)
        near.trace(True)
        while not told:
            with contextlib.suppress(BlockingIOError):
                far.recv(10000, socket.MSG_DONTWAIT)
            hub.sleep(0.001)

    monkeypatch.setattr(tracing, "tell", follow)
    with far:
        far.sendall(b"one\nmore\n")
        hub.spawn(serve)
        hub.spawn(client)
        run_until(hub, lambda: told)
    assert told == [errno.EBADF]


@pytest.mark.skipif(_testcapi is None, reason="this Python cannot be made to run out of memory")
class TestWithoutMemory:
    """One allocation fails in a call: it raises, or is done; no green thread is lost."""

    @staticmethod
    def failing(nth: int, function: Callable[..., object], *args: Any) -> object:
        """Call it, and let the n-th allocation fail."""
        try:
            _testcapi.set_nomemory(nth, nth + 1)
            return function(*args)
        except MemoryError:
            return MemoryError
        finally:
            _testcapi.remove_mem_hooks()

    @pytest.mark.parametrize("nth", range(4))
    def test_what_could_not_be_raised_can_be_raised_again(self, hub, nth):
        """A green thread that nothing was thrown into waits on, and can be woken."""
        raised: list[BaseException] = []
        green = hub.spawn(self.park, hub, raised)

        def throw():
            error = LookupError()
            for _ in range(64):  # the queue is full
                hub.call_soon(int)
            if self.failing(nth, hub.throw, green, error) is MemoryError:
                assert hub.throw(green, error)

        hub.call_soon(hub.spawn, throw)
        run_until(hub, lambda: raised)
        assert [type(error) for error in raised] == [LookupError]

    @staticmethod
    def park(hub: Any, raised: list[BaseException]) -> None:
        """Wait for an exception."""
        try:
            hub.park()
        except LookupError as error:
            raised.append(error)

    @pytest.mark.parametrize("nth", range(4))
    def test_closing_a_connection_ends_the_wait_for_it(self, hub, nth):
        """Although there is no memory for the exception that says so."""
        near, far = socket.socketpair()
        near = hub.adopt(near)
        told: list[int | None] = []

        def wait():
            try:
                near.recv(1)
            except OSError as error:
                told.append(error.errno)

        def close():
            self.failing(nth, near._real_close)
            near.close()

        hub.spawn(wait)
        hub.call_soon(hub.call_soon, close)
        with far:
            run_until(hub, lambda: told)
        assert told == [errno.EBADF]
