"""What is known of each connection: while it is open, and in the event that tells of its end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from waiting import wait_until

import harken

from .kit import LOCAL, Echo, connect, exchange, running, seeing


@pytest.mark.parametrize("engine", ["inline", "thread", "pool", "green"])
def test_bytes_are_counted_and_the_end_tells_them(engine: str) -> None:
    """Exactly, both ways; an open connection says for what it waits."""
    server = harken.TCPServer(LOCAL, Echo, engine=engine)
    with seeing("closed") as seen, running(server):
        with connect(server.server_address) as client:
            exchange(client, b"hello")
            exchange(client, b"again!")
            (info,) = server.connections()
            assert (info.bytes_in, info.bytes_out) == (11, 11)
            wait_until(lambda: server.connections()[0].waits_for == "reading")
        (closed,) = seen.wait("closed")
        assert (closed.bytes_in, closed.bytes_out) == (11, 11)


@pytest.mark.parametrize("kind", ["TCPServer", "UnixStreamServer"])
def test_a_forked_child_tells_what_it_counted(kind: str, tmp_path: Path) -> None:
    """At its end, to its parent, who tells the event; a child that is killed has told nothing."""
    where = LOCAL if kind == "TCPServer" else str(tmp_path / "s")
    server = getattr(harken, kind)(where, Echo, engine="fork", idle_timeout=60, read_timeout=60)
    with seeing("closed") as seen, running(server):
        for turn in range(1, 4):  # one place of memory after the other's end
            with connect(server.server_address) as client:
                for _ in range(turn):
                    exchange(client, b"hello")
            closed = seen.wait("closed", turn)[turn - 1]
            assert (closed.bytes_in, closed.bytes_out, closed.requests) == (5 * turn, 5 * turn, turn)
        with connect(server.server_address) as client:
            exchange(client, b"hello")
            (info,) = server.connections()
            assert (info.bytes_in, info.requests) == (None, None)
            os.kill(info.process, signal.SIGKILL)
            killed = seen.wait("closed", 4)[3]
            assert (killed.bytes_in, killed.requests) == (None, None)


@pytest.mark.parametrize("engine", ["inline", "thread", "pool", "green", "asyncio"])
def test_requests_are_counted_where_somebody_looks(engine: str) -> None:
    """With a timeout of a request or a read: what comes after an answer is another. Else they are not known."""
    server = harken.TCPServer(LOCAL, Echo if engine != "asyncio" else AsyncEcho, engine=engine)
    with seeing("closed") as seen, running(server):
        with connect(server.server_address) as client:
            exchange(client, b"hello")
            assert server.connections()[0].requests is None
        assert seen.wait("closed")[0].requests is None
        server.configure(handler_timeout=60)
        with connect(server.server_address) as client:
            for _ in range(3):
                exchange(client, b"hello")
            assert server.connections()[0].requests == 3
        assert seen.wait("closed", 2)[1].requests == 3


class AsyncEcho(harken.AsyncRequestHandler):
    """Sends back what it reads, as a coroutine."""

    async def handle(self) -> None:
        """Echo to the end."""
        while data := await self.request.recv(65536):
            await self.request.sendall(data)


def test_one_that_is_killed_tells_them_too() -> None:
    """The figures are those of the moment in which it was cut."""
    server = harken.TCPServer(LOCAL, Echo, engine="thread")
    with seeing("closed") as seen, running(server), connect(server.server_address) as client:
        exchange(client, b"hello")
        server.close_connection(server.connections()[0].id)
        (closed,) = seen.wait("closed")
        assert (closed.reason, closed.bytes_in, closed.bytes_out) == ("killed", 5, 5)
