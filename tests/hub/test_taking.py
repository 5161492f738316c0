"""Connections taken from a listener, and their ends, as engines want them: with few calls."""

from __future__ import annotations

import os
import socket

import pytest
from greenlet import GreenletExit


@pytest.fixture
def listener():
    """A listener on the loopback."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def test_take_accepts_what_is_there(kind, listener):
    """At most so many, with their addresses; none is an empty list, whether the listener blocks or not."""
    clients = [socket.create_connection(listener.getsockname()) for _ in range(5)]
    for blocking in (True, False):
        listener.setblocking(blocking)
        taken = kind.Connection.take(listener, 2)
        assert [address for _, address in taken] == [c.getsockname() for c in clients[:2]]
        assert all(type(connection) is kind.Connection for connection, _ in taken)
        for sock in [*(connection for connection, _ in taken), *clients[:2]]:
            sock.close()
        del clients[:2]
    [(last, address)] = kind.Connection.take(listener, 100)
    assert address == clients[0].getsockname()
    assert kind.Connection.take(listener, 100) == []
    for sock in [last, *clients]:
        sock.close()


def test_take_of_no_listener(kind):
    """An OSError, as accept(2) has it."""
    with socket.socket() as sock, pytest.raises(OSError, match="Invalid argument"):
        kind.Connection.take(sock, 1)


def test_what_the_peer_did_is_known(kind, stage):
    """FIN and RST as reads and writes told of them; unknown is None. The fallback asks the kernel instead."""
    if kind.KIND != "compiled":
        assert kind.Connection.far_end is None
        return
    near, far = stage.pair()
    assert near.far_end is None
    far.sendall(b"x")
    far.shutdown(socket.SHUT_WR)
    assert stage.run(lambda: near.recv(10) + near.recv(10)) == [b"x"]
    assert near.far_end == "peer_closed"
    near.send(b"y")
    assert near.far_end is None  # it may answer by a reset
    other, peer = stage.pair()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.close()
    assert isinstance(stage.run(lambda: other.recv(10))[0], ConnectionResetError)
    assert other.far_end == "peer_reset"


@pytest.mark.parametrize("first", ["nothing", "the peer", "a copy", "us"])
def test_end_tells_the_peer(stage, first):
    """FIN goes out at once, also when somebody else holds the descriptor or the peer was first."""
    near, far = stage.pair()
    copy = -1
    if first == "the peer":
        far.shutdown(socket.SHUT_WR)
    assert stage.run(lambda: near.recv(10) if first == "the peer" else b"") == [b""]
    if first == "a copy":
        copy = os.dup(near.fileno())
    if first == "us":
        near.shutdown(socket.SHUT_WR)
    assert near.end() is True
    assert near.fileno() == -1
    assert far.recv(1) == b""
    assert near.end() is True
    if copy >= 0:
        os.close(copy)


def test_end_after_the_peer_with_a_copy_elsewhere(stage):
    """A descriptor that somebody has copied is shut, since closing ours alone would tell the peer nothing."""
    near, far = stage.pair()
    copy = os.dup(near.fileno())
    far.shutdown(socket.SHUT_WR)
    assert stage.run(lambda: near.recv(10)) == [b""]
    assert near.end() is True
    assert far.recv(1) == b""
    os.close(copy)


def test_files_outlive_end(stage):
    """The descriptor closes with the last file, but the peer is told at once."""
    near, far = stage.pair()
    file = near.makefile("rb")
    assert near.end() is False
    assert far.recv(1) == b""
    assert near.fileno() >= 0
    file.close()
    assert near.fileno() == -1


def test_a_descriptor_used_again_after_end(stage):
    """A number that comes back waits for its own events, though its predecessor was never taken out of the set."""
    for _ in range(20):
        near, far = stage.pair()
        far.sendall(b"x")

        def serve(near=near, far=far):
            got = near.recv(10)
            far.close()
            return got + near.recv(10)

        assert stage.run(serve) == [b"x"]
        assert near.end() is True


def test_a_set_holds_a_green_thread_until_it_has_ended(stage):
    """Whether it returns or raises."""
    busy, seen = set(), []

    def look():
        seen.append(set(busy))

    def fail():
        look()
        raise GreenletExit

    greens = {stage.hub.spawn_into(busy, look), stage.hub.spawn_into(busy, fail)}
    assert busy == greens
    assert stage.run(lambda: stage.hub.sleep(0)) == [None]
    assert seen[0] == greens
    assert len(seen[1]) == 1
    assert not busy


@pytest.mark.parametrize("what", ["bytes", "bytes before", "an end", "a reset", "close()", "shutdown() elsewhere"])
def test_a_lodger_is_started_once(stage, what):
    """Whatever happens first on the connection; it is kept until then."""
    near, far = stage.pair()
    started = []
    if what == "bytes before":
        far.sendall(b"x")
    stage.hub.lodge(near, started.append)
    stage.hub.step(0.01)
    assert len(started) == (what == "bytes before")
    match what:
        case "bytes":
            far.sendall(b"x")
        case "an end":
            far.close()
        case "a reset":
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            far.close()
        case "close()":
            near.close()
        case "shutdown() elsewhere":
            socket.socket.shutdown(near, socket.SHUT_RDWR)
    for _ in range(3):
        stage.hub.step(0.05)
    assert started == [near]
    if what.startswith("bytes"):
        far.sendall(b"y")
        stage.hub.step(0.01)
        assert started == [near]
        assert stage.run(lambda: near.recv(1)) == [b"x"]
        stage.hub.lodge(near, started.append)  # again, between two messages
        for _ in range(2):
            stage.hub.step(0.05)
        assert started == [near, near]


def test_a_lodger_has_the_connection_for_itself(stage):
    """Nobody else may wait to read meanwhile, and a second lodger is refused."""
    near, _ = stage.pair()
    stage.hub.lodge(near, lambda _: None)
    with pytest.raises(RuntimeError, match="already used"):
        stage.hub.lodge(near, lambda _: None)
    [outcome] = stage.run(lambda: near.recv(1))
    assert isinstance(outcome, RuntimeError)


def test_dropped_connections_tell_their_record(kind, stage, recwarn):
    """One that nobody closed tells its end when it is ended."""
    near, _ = stage.pair()

    class Record:
        told = 0
        reason = None

        def ended(self):
            self.told += 1

    record = Record()
    if not hasattr(kind.Connection, "handle"):
        assert kind.KIND == "fallback"  # there weak references tell it
        return
    near.record = record
    handle = near.handle()
    assert handle() is near
    assert near.handle() is handle
    stage._sockets.remove(near)
    del near
    assert record.told == 1
    assert handle() is None
    assert any("unclosed" in str(warning.message) for warning in recwarn)
