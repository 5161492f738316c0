"""Peers that answer no more, as a machine that lost its network: the kernel gives them up, and that is their end."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

import harken
from harken.transports._filters import drop_all

from .kit import LOCAL, connect, exchange, running, seeing

pytestmark = pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel gives up after minutes")


class Echo(harken.BaseRequestHandler):
    """Answers a word, and once more when the test says so, to a peer that is given up soon."""

    def handle(self) -> None:
        """Send, and wait for more."""
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 50)  # ms; by default many minutes
        self.request.sendall(self.request.recv(100))
        self.server.vanished.wait()
        self.request.sendall(b"more")
        self.request.recv(100)


class AsyncEcho(harken.AsyncRequestHandler):
    """The same as a coroutine."""

    async def handle(self) -> None:
        """Send, and wait for more."""
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 50)
        await self.request.sendall(await self.request.recv(100))
        await asyncio.to_thread(self.server.vanished.wait)
        await self.request.sendall(b"more")
        await self.request.recv(100)


class Server(harken.TCPServer):
    """One whose handlers learn when the peer has vanished."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.vanished = threading.Event()
        super().__init__(*args, **settings)


@pytest.mark.parametrize("engine", ["inline", "thread", "pool", "green", "asyncio"])
def test_a_peer_that_vanished_is_no_failure_of_the_handler(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its connection is closed and counted as the peer's end; no traceback is printed."""
    server = Server(LOCAL, AsyncEcho if engine == "asyncio" else Echo, engine=engine)
    with seeing("closed", "handler_failed") as seen, running(server), connect(server.server_address) as client:
        exchange(client)
        assert drop_all(client)
        server.vanished.set()
        (closed,) = seen.wait("closed")
        assert (closed.reason, seen.of("handler_failed")) == ("peer_reset", [])
    assert "Traceback" not in capsys.readouterr().err
