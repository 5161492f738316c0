"""``suspend()`` and ``resume()``: who comes meanwhile waits in the backlog."""

import socket

import pytest
from waiting import wait_until

import harken
from harken.errors import LifecycleError
from harken.server import TCPServer

from .kit import LOCAL, PATIENCE, Upper, ask, connect, serving


def expect_no_answer_before_resume(server, client):
    """Who has asked a suspended server is answered when that goes on."""
    client.settimeout(0.1)
    with pytest.raises(TimeoutError):
        client.recv(1)
    server.resume()
    client.settimeout(PATIENCE)
    assert client.recv(100) == b"HELLO"


def test_suspended_connections_wait_in_the_backlog():
    """Open ones go on; resume() takes the waiting ones."""
    with serving(harken.ThreadingTCPServer(LOCAL, Upper)) as server, connect(server) as before:
        assert ask(before) == b"HELLO"
        server.suspend()
        assert server.stats()["state"] == "suspended"
        with connect(server) as waiting:
            waiting.sendall(b"hello")
            assert ask(before) == b"HELLO"
            expect_no_answer_before_resume(server, waiting)


def test_suspending_twice_is_harmless_and_resuming_is_not():
    """resume() of a server that serves is a mistake and says so."""
    with serving(TCPServer(LOCAL, Upper)) as server:
        server.suspend()
        server.suspend()
        server.resume()
        with pytest.raises(LifecycleError, match=r"cannot resume a server that is serving; call suspend\(\) first"):
            server.resume()


def test_suspending_what_does_not_serve_says_so():
    """With the remedy."""
    with TCPServer(LOCAL, Upper) as server, pytest.raises(LifecycleError, match=r"call serve_forever\(\) first"):
        server.suspend()


def test_a_suspended_server_shuts_down():
    """And serves again afterwards."""
    server = TCPServer(LOCAL, Upper)
    with serving(server):
        server.suspend()
        server.shutdown()
    server = TCPServer(LOCAL, Upper)
    with serving(server), connect(server) as client:
        assert ask(client) == b"HELLO"
        client.shutdown(socket.SHUT_WR)


def test_room_in_the_pool_does_not_end_a_suspension():
    """The pool was full and gets room while the server is suspended: nobody is accepted until resume()."""
    server = harken.PoolTCPServer(LOCAL, Upper, pool_size=1, pool_queue=0)
    with serving(server, poll_interval=0.01), connect(server) as first:
        assert ask(first) == b"HELLO"
        with connect(server) as second:
            wait_until(lambda: server.stats()["paused"])
            server.suspend()
            first.close()
            wait_until(lambda: server.stats()["closed_total"])
            second.sendall(b"hello")
            expect_no_answer_before_resume(server, second)
