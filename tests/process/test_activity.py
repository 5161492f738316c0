"""What everybody in a process does: handlers on every engine, with their connections."""

import asyncio
import socket
import threading

import pytest

import harken
from harken.process.activity import activity

PATIENCE = 10.0  # seconds
over = threading.Event()


class Plain(harken.BaseRequestHandler):
    """Waits for its client."""

    def handle(self):
        """One piece."""
        self.request.sendall(b"x")
        self.wait_for_client()

    def wait_for_client(self):
        """Where it is found."""
        self.request.recv(1)


class Sleeper(harken.AsyncRequestHandler):
    """Waits for time, and its task for an event."""

    async def handle(self):
        """Until it is cancelled."""
        task = asyncio.create_task(self.dream(), name="dreamer")
        await self.request.sendall(b"x")
        await asyncio.sleep(0)
        await self.wait_for_time()
        task.cancel()

    async def wait_for_time(self):
        """Where it is found."""
        while not over.is_set():  # noqa: ASYNC110 - another thread sets it
            await asyncio.sleep(0.02)

    async def dream(self):
        """Where its task is found."""
        await asyncio.Event().wait()


class Awaited(harken.AsyncRequestHandler):
    """Waits for its client."""

    async def handle(self):
        """One piece."""
        await self.request.sendall(b"x")
        await self.wait_for_client()

    async def wait_for_client(self):
        """Where it is found."""
        await self.request.recv(1)


@pytest.mark.parametrize(
    ("engine", "handler", "where", "sort"),
    [
        ("inline", Plain, "wait_for_client", "thread"),
        ("thread", Plain, "wait_for_client", "thread"),
        ("pool", Plain, "wait_for_client", "thread"),
        ("green", Plain, "wait_for_client", "green"),
        ("asyncio", Plain, "wait_for_client", "thread"),
        ("asyncio", Awaited, "wait_for_client", "green"),
        ("asyncio", Sleeper, "wait_for_time", "green"),
    ],
)
def test_a_handler_is_found_where_it_waits(engine, handler, where, sort):
    """With its connection, peer and time."""
    over.clear()
    with harken.background(harken.TCPServer(("127.0.0.1", 0), handler, engine=engine)) as server:
        with socket.create_connection(server.server_address, PATIENCE) as client:
            assert client.recv(1) == b"x"
            (record,) = server._harken.connections
            found = []
            waited = threading.Event()
            while not found:  # it is on its way there
                entries = [each for each in activity([server._harken]) if sort in each]
                found = [each for each in entries if f"in {where}" in "".join(each["stack"])]
                waited.wait(0.001)
            (entry,) = found
            assert entry["connection"] == record.id
            assert entry["peer"].endswith(f":{client.getsockname()[1]}")
            assert 0 < entry["seconds"] < PATIENCE
            if handler is Sleeper:
                (dreamer,) = [each for each in activity([]) if each.get("task") == "dreamer"]
                assert "in dream" in "".join(dreamer["stack"])
            over.set()
            server.close_connection(record.id)
