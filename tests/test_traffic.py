"""What the kernel tells of a connection."""

import socket

import pytest

from harken.traffic import moved, queued, traffic, unread
from harken.unpatched import Socket

PATIENCE = 10.0


@pytest.fixture
def pair():
    """Both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname(), PATIENCE)
        near, _ = listener.accept()
    with near, far:
        yield near, far


def test_bytes_are_counted_both_ways(pair):
    """Exactly, and a FIN is no byte."""
    near, far = pair
    far.sendall(b"x" * 1000)
    near.sendall(b"y" * 300)
    assert far.recv(300, socket.MSG_WAITALL) == b"y" * 300
    assert near.recv(1000, socket.MSG_WAITALL) == b"x" * 1000
    far.shutdown(socket.SHUT_WR)
    assert near.recv(1) == b""
    told = traffic(near)
    assert (told.received, told.sent, told.out) == (1000, 300, 300)


def test_a_fin_that_comes_while_the_kernel_is_asked_is_no_byte(pair):
    """The kernel reads the state first, and counts then."""
    near, far = pair

    class Late(Socket):
        def getsockopt(self, level, name, size):
            info = super().getsockopt(level, name, size)
            if far.fileno() < 0:
                return info
            far.close()
            assert self.recv(1) == b""
            return info[:1] + super().getsockopt(level, name, size)[1:]

    far.sendall(b"x" * 5)
    assert near.recv(10) == b"x" * 5
    with Late(fileno=near.detach()) as late:
        assert moved(late) == (5, 0)
        assert traffic(late).received == 5


def test_what_a_peer_does_not_take_is_seen(pair):
    """The queue holds it; what the peer's kernel has is told apart from what was sent."""
    near, far = pair
    near.setblocking(False)
    sent = 0
    while True:
        try:
            sent += near.send(bytes(65536))
        except BlockingIOError:
            break
    told = traffic(near)
    assert told.sent == sent
    assert queued(near) > 0
    assert told.acked < sent
    assert unread(far) > 0


def test_where_the_kernel_does_not_tell():
    """Unix sockets have no counters, a closed socket nothing at all, and other objects neither."""
    near, far = socket.socketpair()
    with near, far:
        assert traffic(near) is None
        far.sendall(b"abc")
        assert unread(near) == 3
        near.sendall(b"x")
        assert queued(near) > 0
    assert traffic(near) is None
    assert queued(near) == unread(near) == 0
    assert traffic(object()) is None
    assert queued(object()) == 0
