"""What bounds a server's connections: made where a setting wants it, and following what is changed."""

import socket

import pytest

import harken
from harken.serving import serving_of

LOCAL = ("127.0.0.1", 0)
PATIENCE = 10.0  # seconds


class Greet(harken.BaseRequestHandler):
    """Greets and waits for the client to go."""

    def handle(self):
        self.request.sendall(b"hi")
        self.request.recv(1)


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"max_connections": 1}, "admission"),
        ({"idle_timeout": 60}, "deadlines"),
        ({"max_memory_bytes": 1 << 20}, "buffers"),
    ],
    ids=["admission", "deadlines", "buffers"],
)
class TestOne:
    """One bound, by a setting that wants it."""

    def test_only_what_is_wanted_is_made(self, setting, name):
        """What is not bounded costs nothing."""
        with harken.TCPServer(LOCAL, Greet, **setting) as server:
            bounds = serving_of(server).bounds
            made = {each for each in ("admission", "deadlines", "buffers") if getattr(bounds, each) is not None}
        assert made == {name}

    def test_a_setting_that_comes_later_makes_it(self, setting, name):
        """While the server serves, though it was looked for and not wanted before."""
        with harken.ThreadingTCPServer(LOCAL, Greet) as server, harken.background(server):
            bounds = serving_of(server).bounds
            assert getattr(bounds, name) is None
            server.configure(**setting)
            made = getattr(bounds, name)
            assert made is not None
            server.configure(**dict.fromkeys(setting, 2))
            assert getattr(bounds, name) is made

    def test_what_is_shared_is_the_others(self, setting, name):
        """Limits and memory are of both servers together; a deadline is of one connection, and each has its own."""
        with harken.TCPServer(LOCAL, Greet, **setting) as one, harken.TCPServer(LOCAL, Greet, **setting) as other:
            serving_of(other).bounds.share(serving_of(one).bounds)
            mine, theirs = (getattr(serving_of(server).bounds, name) for server in (other, one))
        assert (mine is theirs) == (name != "deadlines")


def test_nothing_watches_a_server_that_never_served():
    """Settings may be changed before the first connection, and the server closed then."""
    with harken.ThreadingTCPServer(LOCAL, Greet) as server:
        server.configure(idle_timeout=60, max_memory_bytes=1 << 20)
        assert serving_of(server).bounds.deadlines is not None


def test_nothing_watches_when_nobody_is_left():
    """The threads of deadlines and memory end with the server; the suite looks for them after each test."""
    with harken.ThreadingTCPServer(LOCAL, Greet, idle_timeout=60, max_memory_bytes=1 << 20) as server:
        with harken.background(server), socket.create_connection(server.server_address, PATIENCE) as client:
            assert client.recv(2) == b"hi"
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
