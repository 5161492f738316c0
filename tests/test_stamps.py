"""Connections that stamp: when calls began, where requests begin, what has moved."""

import io
import socket
import threading
import time
import types

import pytest

from harken import _hub
from harken._hub import fallback
from harken.connection import Connection
from harken.stamps import Stamps, plain_kind, stamp

PATIENCE = 10.0
REGISTRY = types.SimpleNamespace(strike=lambda record: None)


@pytest.fixture
def pair():
    """A connection that stamps, its record, and the other end."""
    near, far = socket.socketpair()
    connection = Connection(near.family, near.type, near.proto, near.detach())
    record = types.SimpleNamespace(stamps=None, reason="test", successor=None, _registry=REGISTRY)
    connection.record = record
    stamp(connection, record)
    with connection, far:
        yield connection, record.stamps, far


def test_what_is_sent_as_far_as_there_is_room_is_an_answer():
    """``try_send`` of the hub in Python, by which async handlers write."""
    near, far = socket.socketpair()
    with _hub.adopt(near, fallback.Connection) as connection, far:
        record = types.SimpleNamespace(stamps=None, reason="test", successor=None, _registry=REGISTRY)
        connection.record = record
        stamp(connection, record)
        assert connection.try_send(b"abc") == 3
        assert (record.stamps.answered, record.stamps.sent, record.stamps.writing) == (True, 3, 0.0)


def test_its_class_changes_in_nothing_else(pair):
    """It is a Connection by name and by isinstance, and stamping twice changes nothing."""
    connection, stamps, _ = pair
    assert isinstance(connection, Connection)
    assert type(connection).__name__ == "Connection"
    assert plain_kind(type(connection)) is Connection
    kind = type(connection)
    stamp(connection, connection.record)
    assert type(connection) is kind
    assert connection.record.stamps is stamps


def test_a_duplicate_is_no_connection_of_the_servers(pair):
    """It works as any socket, and stamps nothing."""
    connection, stamps, far = pair
    far.sendall(b"one\ntwo\n")
    with connection.dup() as double, double.makefile("rb") as file:
        assert file.readline() == b"one\n"
        assert double.send(b"three") == 5
        double.sendall(b"four")
    assert far.recv(10) == b"threefour"
    assert (stamps.received, stamps.sent) == (0, 0)


@pytest.mark.parametrize(
    "read",
    [
        lambda sock: sock.recv(10),
        lambda sock: sock.recv_into(bytearray(10)),
        lambda sock: sock.recvfrom(10),
        lambda sock: sock.recvmsg(10),
        lambda sock: sock.recvmsg_into([bytearray(10)]),
    ],
)
def test_reads_are_stamped(pair, read):
    """While one waits it says since when; after it the bytes are counted and a request has begun."""
    connection, stamps, far = pair
    reader = threading.Thread(target=read, args=(connection,))
    began = time.monotonic()
    reader.start()
    while not stamps.reading:
        assert time.monotonic() < began + PATIENCE
    assert stamps.reading >= began
    assert stamps.first == 0.0
    far.sendall(b"abc")
    reader.join(PATIENCE)
    assert stamps.reading == 0.0
    assert (stamps.received, stamps.sent) == (3, 0)
    assert stamps.first >= began


@pytest.mark.parametrize(
    "write",
    [
        lambda sock: sock.send(b"abc"),
        lambda sock: sock.sendall(memoryview(b"abc")),
        lambda sock: sock.sendmsg([b"a", b"bc"]),
    ],
)
def test_writes_are_counted_and_answer_the_request(pair, write):
    """The next call that reads begins another."""
    connection, stamps, far = pair
    far.sendall(b"x")
    connection.recv(1)
    first = stamps.first
    write(connection)
    assert stamps.sent == 3
    assert stamps.first == first
    far.sendall(b"y")
    connection.recv(1)
    assert stamps.first > first


def test_a_call_of_a_file_is_one(pair):
    """A line that comes in pieces is one read; what lies in the buffer after an answer is a request that has come."""
    connection, stamps, far = pair
    with connection.makefile("rb") as rfile:
        assert isinstance(rfile, io.BufferedReader)
        lines = []
        reader = threading.Thread(target=lambda: lines.append(rfile.readline()))
        reader.start()
        seen = set()
        for byte in b"abc\nde\n":
            while not stamps.reading and reader.is_alive():
                pass
            seen.add(stamps.reading)
            far.send(bytes([byte]))
        reader.join(PATIENCE)
        assert lines == [b"abc\n"]
        assert len(seen - {0.0}) == 1
        connection.sendall(b"answer")
        first = stamps.first
        assert rfile.readline() == b"de\n"
        assert stamps.first > first


@pytest.mark.parametrize("hub", list(_hub.kinds().values()), ids=list(_hub.kinds()))
def test_the_hubs_connections_stamp(hub):
    """The compiled one by itself, the other one as any."""
    near, far = socket.socketpair()
    connection = hub.Connection(near.family, near.type, near.proto, near.detach())
    record = types.SimpleNamespace(stamps=None, reason="test", successor=None, _registry=REGISTRY)
    connection.record = record
    stamp(connection, record)

    def stamps():
        return Stamps.of(connection.stamps()) if hasattr(connection, "stamps") else record.stamps

    with connection, far:
        reader = threading.Thread(target=connection.recv, args=(10,))
        began = time.monotonic()
        reader.start()
        while not stamps().reading:
            assert time.monotonic() < began + PATIENCE
        assert began <= stamps().reading <= time.monotonic()
        far.sendall(b"abc")
        reader.join(PATIENCE)
        assert stamps().reading == 0.0
        assert (stamps().received, stamps().sent) == (3, 0)
        first = stamps().first
        assert first >= began
        assert stamps().moved >= first
        connection.sendall(b"de")
        assert stamps().sent == 2
        far.sendall(b"x")
        connection.recv(1)
        assert stamps().first > first
