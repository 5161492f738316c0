"""Children of the fork engine, other children of the program, and what a kill -9 leaves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

import harken

from .kit import LOCAL, Echo, Program, connect, ends, exchange, running, seeing

FORKING = """
with harken.ForkingTCPServer(("127.0.0.1", 0), Echo, allow_reuse_address=True) as server:
    server.serve_forever()
"""


@pytest.fixture
def server() -> Any:
    """A fork server that is not serving yet."""
    return harken.ForkingTCPServer(LOCAL, Echo)


def is_zombie(pid: int) -> bool:
    """Tell whether a process has ended and nobody has asked for its status."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def use(server: Any) -> None:
    """Let a child serve one connection from start to end."""
    with connect(server.server_address) as client:
        exchange(client)
        client.shutdown(socket.SHUT_WR)
        assert ends(client) == "closed"


def test_other_children_are_not_reaped(server: Any) -> None:
    """A child that the program started by itself keeps its exit status, however many handlers come and go."""
    other = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
    wait_until(lambda: is_zombie(other.pid))
    with seeing("closed") as seen, running(server):
        for _ in range(5):
            use(server)
        seen.wait("closed", 5)
        assert is_zombie(other.pid)
    assert other.wait() == 7


def test_no_zombie_stays_on_an_idle_server(server: Any) -> None:
    """Children are reaped when they end, without waiting for another connection."""
    with seeing("closed") as seen, running(server):
        for _ in range(3):
            use(server)
        seen.wait("closed", 3)
        assert not server.active_children
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)


def test_a_killed_child_closes_its_connection_once(server: Any) -> None:
    """kill -9 of a handler's process: its client reads the end, one ``closed``, and the next client is served."""
    with seeing("opened", "closed") as seen, running(server):
        with connect(server.server_address) as client:
            exchange(client)
            (info,) = server.connections()
            assert info.process != os.getpid()
            os.kill(info.process, signal.SIGKILL)
            assert ends(client) in ("closed", "reset")
            (closed,) = seen.wait("closed")
            assert closed.connection == info.id
            assert closed.reason == "handler_failed"
        use(server)
        seen.wait("closed", 2)
        assert len(seen.of("closed")) == len(seen.of("opened")) == 2
        assert server.connections() == []


def test_a_killed_parent_leaves_the_port_free(program: Callable[..., Program]) -> None:
    """kill -9 of the server while a child serves: the child goes on, and another server gets the port."""
    started = program(FORKING)
    with connect(started.address) as client:
        exchange(client)
        started.send(signal.SIGKILL)
        started.process.wait(10)
        exchange(client, b"still there")
        successor = harken.ThreadingTCPServer(started.address, Echo, allow_reuse_address=True)
        with running(successor), connect(started.address) as other:
            exchange(other)
        exchange(client, b"and still")


def test_a_child_has_no_listener(server: Any) -> None:
    """In a handler's process the server's socket is closed, so that it cannot hold the port."""

    class Tell(harken.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"%d\n" % self.server.socket.fileno())

    server.RequestHandlerClass = Tell
    with running(server), connect(server.server_address) as client:
        assert client.recv(100) == b"-1\n"


def test_a_handler_that_exits_hard_ends_its_child_alone() -> None:
    """``os._exit``, ``sys.exit`` and an abort in a handler end one connection, and the parent serves on."""

    class Quit(harken.BaseRequestHandler):
        def handle(self) -> None:
            match self.request.recv(1):
                case b"e":
                    os._exit(5)
                case b"s":
                    sys.exit(6)
                case b"k":
                    os.kill(os.getpid(), signal.SIGKILL)
            self.request.sendall(b"well")

    with seeing("closed") as seen, running(harken.ForkingTCPServer(LOCAL, Quit)) as server:
        for word in (b"e", b"s", b"k"):
            with connect(server.server_address) as client:
                client.sendall(word)
                assert ends(client) in ("closed", "reset")
        with connect(server.server_address) as client:
            client.sendall(b"w")
            assert client.recv(10) == b"well"
        assert len(seen.wait("closed", 4)) == 4
