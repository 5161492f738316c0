"""The wire: accepted connections are real sockets, and each tells its record once when it closes."""

import contextlib
import multiprocessing
import os
import select
import socket
import time

import pytest

from harken.connection import Connection, accept, peer_fault, shut
from harken.records import Registry

PATIENCE = 5.0  # seconds


@pytest.fixture
def closed():
    """The records of connections that have told that they closed."""
    return []


@pytest.fixture
def books(closed):
    """A registry that notes in ``closed`` what it is told."""
    return Registry(lambda request, address: None, closed.append, None)


@pytest.fixture
def pair():
    """An accepted connection, its address and its client."""
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        client = stack.enter_context(socket.create_connection(listener.getsockname(), PATIENCE))
        taken, address = accept(listener)
        stack.enter_context(taken)
        yield taken, address, client


# ── accept ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_accept_returns_is_a_blocking_socket(pair):
    """A ``socket.socket`` of the listener's family and type, with the address that accept(2) gave."""
    taken, address, client = pair
    assert isinstance(taken, socket.socket)
    assert type(taken) is Connection
    assert (taken.family, taken.type) == (socket.AF_INET, socket.SOCK_STREAM)
    assert taken.gettimeout() is None
    assert address == client.getsockname()
    assert not taken.get_inheritable()


def test_no_method_that_moves_data_is_overridden():
    """Reads and writes cost what they cost on a plain socket."""
    own = {name for name in vars(Connection) if callable(getattr(Connection, name))}
    assert own - {"__module__", "__doc__"} <= {"take", "end", "fileno", "_real_close", "__reduce_ex__"}
    assert not hasattr(Connection.__new__(Connection), "__dict__")


def test_a_listener_with_an_accept_of_its_own_answers_for_itself():
    """A TLS listener or a test's double is not read past."""

    class Double(socket.socket):
        def accept(self):
            return "its", "own"

    with Double() as listener:
        assert accept(listener) == ("its", "own")


def test_the_default_timeout_of_the_program_is_obeyed():
    """socket.setdefaulttimeout() holds for accepted sockets, as with stdlib."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        socket.setdefaulttimeout(7)
        try:
            taken, _ = accept(listener)
        finally:
            socket.setdefaulttimeout(None)
        with taken:
            assert taken.gettimeout() == 7


def test_a_listeners_timeout_is_not_handed_on():
    """Paste sets a timeout on its listener; handlers get blocking sockets all the same."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        listener.settimeout(PATIENCE)
        taken, _ = accept(listener)
        with taken:
            assert taken.gettimeout() is None
            assert os.get_blocking(taken.fileno())


def test_an_empty_queue_raises_as_accept_does():
    """A non-blocking listener without a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            accept(listener)


# ── closing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_makefile_keeps_it_open(books, closed, pair):
    """As with a plain socket, the last of the two to close ends the connection."""
    taken, address, client = pair
    books.add(taken, address)
    file = taken.makefile("wb", 0)
    taken.close()
    assert closed == []
    file.write(b"still here")
    assert client.recv(100) == b"still here"
    file.close()
    assert len(closed) == 1
    assert client.recv(100) == b""


def test_a_dup_is_a_socket_of_its_own(books, closed, pair):
    """The duplicate goes on when the original closes, and tells nothing when it closes itself."""
    taken, address, client = pair
    books.add(taken, address)
    with taken.dup() as copy:
        taken.close()
        assert len(closed) == 1
        copy.sendall(b"still here")
        assert client.recv(100) == b"still here"
    assert len(closed) == 1
    assert client.recv(100) == b""


def test_a_detached_descriptor_lives_on(books, closed, pair):
    """detach() gives the descriptor away; closing the empty socket ends the record and not the wire."""
    taken, address, client = pair
    books.add(taken, address)
    with socket.socket(fileno=taken.detach()) as other:
        taken.close()
        assert len(closed) == 1
        other.sendall(b"still here")
        assert client.recv(100) == b"still here"


# ── from outside ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_peer_fault_of_what_is_no_open_socket():
    """Nothing can be said, and nothing is raised."""
    closed = socket.socket()
    closed.close()
    assert peer_fault(closed) is None
    assert peer_fault(object()) is None
    assert peer_fault((b"data", None)) is None


def test_looking_for_the_peers_end_never_waits():
    """Not even on a socket with a timeout, for which Python waits before it asks the kernel."""
    left, right = socket.socketpair()
    with left, right:
        left.settimeout(30.0)
        began = time.monotonic()
        assert peer_fault(left) is None
        assert time.monotonic() - began < 5
        assert left.gettimeout() == 30.0
        right.close()
        assert peer_fault(left) == "peer_closed"


def test_shut_never_raises():
    """On a closed socket, an unconnected one, or no socket at all."""
    plain = socket.socket()
    shut(plain)
    plain.close()
    shut(plain)
    shut(None)
    shut((b"data", None))


def test_poll_and_select_take_it(pair):
    """It has a descriptor like any socket."""
    taken, _, client = pair
    client.sendall(b"x")
    assert select.select([taken], [], [], PATIENCE)[0] == [taken]


# ── to another process ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.no_leak_check  # multiprocessing keeps its resource tracker for the life of the process
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_it_travels_to_a_process_of_multiprocessing(books, closed, pair, method):
    """``Process(args=(request,))`` works as with a plain socket, under spawn too."""
    taken, address, client = pair
    books.add(taken, address)
    process = multiprocessing.get_context(method).Process(target=socket.socket.sendall, args=(taken, b"from afar"))
    process.start()
    taken.close()
    assert client.recv(100) == b"from afar"
    process.join(PATIENCE)
    assert process.exitcode == 0
    process.close()
    assert len(closed) == 1


def test_it_travels_through_a_pipe(books, closed, pair):
    """A queue or pipe of multiprocessing takes it, and the other end gets a socket with the same wire."""
    taken, address, client = pair
    books.add(taken, address)
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        ours.send(taken)
        with theirs.recv() as copy:
            taken.close()
            assert copy.family == socket.AF_INET
            copy.sendall(b"still here")
            assert client.recv(100) == b"still here"
    assert len(closed) == 1
    from multiprocessing import resource_sharer

    resource_sharer.stop()
