"""``testing.Faulty``: each fault shows, and nothing else."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from waiting import wait_until

import harken
from harken import events, testing
from harken.testing import Faulty


class Echo(harken.BaseRequestHandler):
    """Says how many bytes came."""

    def handle(self) -> None:
        """Say it."""
        while data := self.request.recv(100):
            self.request.sendall(b"%d " % len(data))


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection, each with a timeout."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for end in (near, far):
        end.settimeout(5)
    with near, far:
        yield near, far


def test_without_faults_it_is_a_socket(ends: Any) -> None:
    """It takes the descriptor and the timeout over, and moves bytes as they come."""
    near, far = ends
    number = near.fileno()
    with Faulty(near) as client:
        assert near.fileno() == -1
        assert (client.fileno(), client.gettimeout()) == (number, 5)
        client.sendall(b"hello")
        assert far.recv(10) == b"hello"
        far.sendall(b"world")
        assert client.recv(10) == b"world"


def test_short_reads(ends: Any) -> None:
    """One read returns no more than ``read_bytes``, by recv and through a file."""
    near, far = ends
    far.sendall(b"abcdef\nxyz\n")
    with Faulty(near, read_bytes=2) as client:
        assert client.recv(100) == b"ab"
        with client.makefile("rb", buffering=0) as raw:
            assert raw.read(100) == b"cd"
        with client.makefile("rb") as lines:
            assert lines.readline() == b"ef\n"
            assert lines.readline() == b"xyz\n"


def test_one_byte_at_a_time(ends: Any) -> None:
    """``sendall`` sends everything, in pieces of ``write_bytes``."""
    near, far = ends
    with Faulty(near, write_bytes=1) as client:
        assert client.send(b"abc") == 1
        client.sendall(b"bcd")
        client.close()
        received = b""
        while part := far.recv(100):
            received += part
        assert received == b"abcd"


def test_reset_at_a_byte(ends: Any) -> None:
    """After so many bytes both ends see a reset, the near one at every further call."""
    near, far = ends
    client = Faulty(near, reset_at=3)
    assert client.send(b"abcdef") == 3
    assert far.recv(10) == b"abc"
    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            client.send(b"d")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with pytest.raises(ConnectionResetError):
        far.recv(1)


def test_stall_at_a_byte(ends: Any) -> None:
    """After so many bytes nothing comes, although it is there, until the timeout."""
    near, far = ends
    far.sendall(b"abcdef")
    with Faulty(near, stall_at=3) as client:
        assert client.recv(10) == b"abc"
        client.settimeout(0.05)
        with pytest.raises(TimeoutError):
            client.recv(10)
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(10)


def test_a_stall_ends_when_the_socket_is_shut(ends: Any) -> None:
    """Who waits in a stalled read is woken by ``shutdown``, as a server cuts a connection."""
    near, _far = ends
    with Faulty(near, stall_at=0) as client:
        client.settimeout(None)
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(client.recv(1)), daemon=True)
        reader.start()
        client.shutdown(socket.SHUT_RDWR)
        reader.join(10)
        assert got == [b""]


@pytest.mark.parametrize("engine", ["inline", "thread", "pool", "green"])
def test_a_reset_is_the_peers_fault(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A handler that raises by it has not failed, as if a client had done it: no traceback, and no error of its own."""
    closed: list[events.Event] = []
    unsubscribe = events.subscribe(closed.append, "closed")
    with testing.serve(Echo, engine=engine) as served:
        served.server.socket = Faulty(served.server.socket, connections={"reset_at": 3})
        with served.connect() as client, pytest.raises(ConnectionResetError):
            client.sendall(b"abc")
            client.recv(10)
        wait_until(lambda: closed)
    unsubscribe()
    assert ([event.reason for event in closed], served.errors) == (["peer_reset"], [])
    assert "Traceback" not in capsys.readouterr().err


def test_connections_of_a_class_of_their_own_are_not_for_async_handlers() -> None:
    """They cannot wait in the event loop; the error says so."""

    class Task(harken.AsyncRequestHandler):
        async def handle(self) -> None:
            await self.request.recv(1)

    with testing.serve(Task) as served:
        served.server.socket = Faulty(served.server.socket, connections={"read_bytes": 1})
        with served.connect() as client:
            assert client.recv(1) == b""
        wait_until(lambda: served.errors)
    assert "must return a plain socket" in str(served.errors[0])


def test_accept_raises_what_is_listed() -> None:
    """Errors come in their order, by number or name; None and the end of the list go well."""
    with Faulty(socket.create_server(("127.0.0.1", 0)), accept=["EMFILE", None, errno.ECONNABORTED]) as listener:
        address = listener.getsockname()
        for expected in (errno.EMFILE, 0, errno.ECONNABORTED, 0):
            with socket.create_connection(address):
                try:
                    listener.accept()[0].close()
                    found = 0
                except OSError as error:
                    found = error.errno or -1
                    socket.socket.accept(listener)[0].close()
            assert found == expected


def test_connections_of_a_faulty_listener_are_faulty() -> None:
    """A running server whose listener is replaced gets connections with faults, and its handlers cope or fail."""
    with testing.serve(Echo) as served:
        served.server.socket = Faulty(served.server.socket, connections={"read_bytes": 1})
        with served.connect() as client, client.makefile("rb") as answers:
            client.sendall(b"abc")
            assert answers.read(6) == b"1 1 1 "


def test_a_handler_is_driven_byte_by_byte() -> None:
    """A client that dribbles gets the same answers."""

    class Upper(harken.StreamRequestHandler):
        def handle(self) -> None:
            for line in self.rfile:
                self.wfile.write(line.upper())

    with testing.serve(Upper) as served, Faulty(served.connect(), write_bytes=1) as client:
        client.sendall(b"slowly\n")
        assert client.recv(7, socket.MSG_WAITALL) == b"SLOWLY\n"
