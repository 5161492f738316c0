"""Handlers that are ``lazy``: on the green engine they start at the first bytes, and cost little until then."""

from __future__ import annotations

import gc
import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

import harken
from harken import _hub, events
from harken.idle import Onlooker

PATIENCE = 10.0  # seconds
BYTES = 614  # 0.6 KiB: what an idle lazy connection may cost
CLIENT_BYTES = 400  # and its client, a socket object of the test's that is to be closed in the end


class Lazy(harken.StreamRequestHandler):
    """Answers a line, and tells of its start."""

    lazy = True

    def setup(self) -> None:
        """Tell."""
        self.server.begun.append(self.client_address)
        super().setup()

    def handle(self) -> None:
        """Answer."""
        for line in self.rfile:
            self.wfile.write(line)


class Server(harken.GreenTCPServer):
    """Overrides nothing."""

    begun: list[Any]


class Hooked(Server):
    """Overrides a hook, and so takes the long way."""

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Welcome all."""
        return True


@pytest.fixture(params=[Server, Hooked])
def server(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A server that serves, by either way."""
    made = request.param(("127.0.0.1", 0), Lazy)
    made.begun = []
    with harken.background(made):
        yield made


def connect(server: Any) -> socket.socket:
    """Return a client."""
    return socket.create_connection(server.server_address, PATIENCE)


def test_it_starts_at_the_first_bytes(server: Any) -> None:
    """The connection is open and listed before; its handler is not there."""
    with connect(server) as client, connect(server) as other:
        wait_until(lambda: len(server.connections()) == 2)
        other.sendall(b"b\n")
        assert other.recv(10) == b"b\n"
        assert server.begun == [other.getsockname()]
        client.sendall(b"a\n")
        assert client.recv(10) == b"a\n"
        client.sendall(b"c\n")
        assert client.recv(10) == b"c\n"
        assert server.begun == [other.getsockname(), client.getsockname()]


def test_bytes_that_are_there_already(server: Any) -> None:
    """Sent before it was accepted."""
    server.suspend()
    with connect(server) as client:
        client.sendall(b"early\n")
        client.shutdown(socket.SHUT_WR)
        server.resume()
        assert client.recv(10) == b"early\n"
        assert client.recv(10) == b""


@pytest.mark.parametrize("way", ["fin", "rst", "killed"])
def test_a_connection_that_never_speaks(server: Any, way: str) -> None:
    """Its handler meets the end, and the books are balanced."""
    seen: list[str] = []
    unsubscribe = events.subscribe(lambda event: seen.append(event.reason), "closed")
    try:
        client = connect(server)
        wait_until(server.connections)
        if way == "killed":
            assert server.close_connection(server.connections()[0].id)
            assert client.recv(10) == b""
        elif way == "rst":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        wait_until(lambda: not server.connections())
        wait_until(lambda: seen)
        assert seen == [{"fin": "peer_closed", "rst": "peer_reset", "killed": "killed"}[way]]
    finally:
        unsubscribe()


def test_a_drain_cuts_those_that_never_spoke(server: Any) -> None:
    """They are waited for like others, and cut at the deadline."""
    with connect(server) as client:
        wait_until(server.connections)
        report = server.drain(0.05)
        assert (report.cut, report.left) == (1, 0)
        assert client.recv(10) == b""


def test_the_server_is_closed_while_they_wait() -> None:
    """As with any handler under way: `server_close()` waits for them if `block_on_close`, and they go on till then."""
    server: Any = Server(("127.0.0.1", 0), Lazy)
    server.begun = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with connect(server) as client:
        wait_until(server.connections)
        server.shutdown()
        thread.join(PATIENCE)
        closer = threading.Thread(target=server.server_close)
        closer.start()
        closer.join(0.1)
        assert closer.is_alive()
        client.sendall(b"late\n")
        assert client.recv(10) == b"late\n"
    closer.join(PATIENCE)
    assert not closer.is_alive()


def test_a_connection_closed_under_it(server: Any) -> None:
    """Whoever finds the socket and closes it leaves nothing behind."""
    with connect(server) as client:
        wait_until(server.connections)
        [record] = list(server._harken.connections)
        server._harken.engine._hub.call_soon_threadsafe(record.request.close)
        assert client.recv(10) == b""
        wait_until(lambda: not server.connections())
    server.shutdown()
    server.server_close()


def test_other_engines_start_it_at_once() -> None:
    """It is a promise that an engine may use, no demand."""
    server: Any = harken.ThreadingTCPServer(("127.0.0.1", 0), Lazy)
    server.begun = []
    with harken.background(server), connect(server):
        wait_until(lambda: server.begun)


@pytest.mark.skipif(_hub.kind != "compiled", reason="needs the compiled hub")
@pytest.mark.skipif("PYTHONMALLOC" in os.environ, reason="another allocator's figures")
def test_what_an_idle_one_costs() -> None:
    """Memory grows by at most 0.6 KiB a connection that has not spoken."""
    server: Any = Server(("127.0.0.1", 0), Lazy, backlog=2000)
    server.begun = []
    count = 2000
    with harken.background(server), ExitStack() as stack:

        def grow() -> None:
            before = len(server.connections())
            for _ in range(count):
                stack.enter_context(socket.socket()).connect(server.server_address)
            wait_until(lambda: len(server._harken.connections) == before + count)
            gc.collect()

        def resident() -> int:
            return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * resource.getpagesize()

        grow()  # tables take their room
        before = resident()
        grow()
        assert (resident() - before) / count < BYTES + CLIENT_BYTES
        assert server.begun == []


def test_a_drain_sees_a_lazy_handler_at_work_in_its_thread() -> None:
    """On the thread engine it is started at once; while it works, no drain takes its connection for idle."""
    working, done = threading.Event(), threading.Event()

    class Works(harken.BaseRequestHandler):
        lazy = True

        def handle(self) -> None:
            self.request.recv(1)
            working.set()
            done.wait(PATIENCE)

    server = harken.ThreadingTCPServer(("127.0.0.1", 0), Works)
    with harken.background(server), socket.create_connection(server.server_address) as client:
        client.sendall(b"x")
        assert working.wait(PATIENCE)
        (record,) = server._harken.connections
        record.started -= PATIENCE  # as if it had been open for long
        try:
            assert Onlooker().is_at_work(record)
        finally:
            done.set()
