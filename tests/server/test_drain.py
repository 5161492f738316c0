"""``drain()``: the port is free at once, who is served may finish, and a report tells of the rest."""

import contextlib
import threading
import time

import pytest
from waiting import wait_until

import harken
from harken.errors import LifecycleError
from harken.server import TCPServer

from .kit import LOCAL, PATIENCE, Upper, ask, connect, in_thread, named, serving


def test_a_drain_waits_for_open_connections(told):
    """The port is free at once, and the connection ends by itself."""
    with serving(harken.ThreadingTCPServer(LOCAL, Upper)) as server:
        client = connect(server)
        ask(client)
        timer = threading.Timer(0.05, client.close)
        timer.start()
        report = in_thread(server.drain, PATIENCE)
        timer.join()
    assert (report.finished, report.left, report.cut, report.connections) == (1, 0, 0, [])
    assert 0 < report.seconds < PATIENCE
    assert [event.open for event in named(told, "draining")] == [1]
    assert named(told, "drained")[0].report is report


@pytest.mark.parametrize("kind", ["ThreadingTCPServer", "PoolTCPServer", "ForkingTCPServer"])
def test_a_drain_cuts_what_is_left_at_its_deadline(kind, told):
    """The report tells whom, and the reason is ``drain_deadline``."""
    with serving(getattr(harken, kind)(LOCAL, Upper)) as server, connect(server) as client:
        ask(client)
        (info,) = server.connections()
        report = in_thread(server.drain, 0.05)
        with contextlib.suppress(ConnectionError):
            assert client.recv(1) == b""
    assert (report.finished, report.left, report.cut) == (0, 0, 1)
    assert [cut.id for cut in report.connections] == [info.id]
    assert [event.reason for event in named(told, "closed")] == ["drain_deadline"]


def test_a_drain_frees_the_port_at_once():
    """Before the connections have ended."""
    server = harken.ThreadingTCPServer(LOCAL, Upper)
    with serving(server), connect(server) as client:
        ask(client)
        drain = threading.Thread(target=server.drain, args=(PATIENCE,), daemon=True)
        drain.start()
        wait_until(lambda: server.socket.fileno() < 0)
        with pytest.raises(ConnectionRefusedError):
            connect(server)
        assert ask(client) == b"HELLO"
        client.close()
        drain.join(PATIENCE)
        assert not drain.is_alive()


def test_a_drain_of_a_server_that_is_idle():
    """Nothing to wait for, and a drained server does not serve again."""
    with TCPServer(LOCAL, Upper) as server:
        report = in_thread(server.drain, PATIENCE)
        assert (report.finished, report.cut, report.left) == (0, 0, 0)
        assert report.seconds < PATIENCE / 2
        with pytest.raises(LifecycleError):
            server.serve_forever()


def test_a_handler_sees_that_its_server_drains():
    """``self.draining`` turns true, so that a handler can come to its end."""

    class Patient(harken.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"serving")
            wait_until(lambda: self.draining)
            self.request.sendall(b" draining")

    with serving(harken.ThreadingTCPServer(LOCAL, Patient)) as server, connect(server) as client:
        assert client.recv(100) == b"serving"
        report = in_thread(server.drain, PATIENCE)
        assert client.recv(100) == b" draining"
    assert report.finished == 1


def test_a_handler_may_drain_its_server():
    """A verb that may be called from a handler does not wait for that handler."""

    class Draining(harken.BaseRequestHandler):
        def handle(self):
            report = self.server.drain(1.0)
            self.request.sendall(f"{report.cut}".encode())

    began = time.monotonic()
    with serving(harken.ThreadingTCPServer(LOCAL, Draining)) as server, connect(server) as client:
        assert client.recv(100) == b"0"
    assert time.monotonic() - began < 1.0
