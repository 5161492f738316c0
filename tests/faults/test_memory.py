"""Peers that never read, and lines that never end: memory stays bounded, and those peers are closed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from waiting import wait_until

import harken
from harken import buffers

from .kit import LOCAL, PATIENCE, Seen, connect, ends, exchange, receive, running, seeing

PAYLOAD = bytes(50_000_000)
PIECE = bytes(65536)
CLIENTS = 20
MIB = 1 << 20


class Flood(harken.BaseRequestHandler):
    """Sends more than any kernel buffers; to a polite client an echo."""

    def handle(self) -> None:
        """Send it."""
        while data := self.request.recv(100):
            self.request.sendall(PAYLOAD if data == b"flood" else data)


class AsyncFlood(harken.AsyncRequestHandler):
    """The same as a coroutine."""

    async def handle(self) -> None:
        """Send it."""
        while data := await self.request.recv(100):
            await self.request.sendall(PAYLOAD if data == b"flood" else data)


class WritingFlood(harken.AsyncStreamRequestHandler):
    """The same by ``wfile``, whose writes nobody awaits: in pieces, or at once."""

    async def handle(self) -> None:
        """Write it."""
        while data := await self.rfile.read(100):
            if data == b"flood":
                for _ in range(len(PAYLOAD) // len(PIECE)):
                    self.wfile.write(PIECE)
            else:
                self.wfile.write(PAYLOAD if data == b"whole" else data)


class OtherTask(harken.AsyncStreamRequestHandler):
    """Writes in a task beside, which cannot be kept waiting."""

    async def handle(self) -> None:
        """Let it write until it is told that the connection has ended."""

        async def flood() -> None:
            for _ in range(len(PAYLOAD) // len(PIECE)):
                self.wfile.write(PIECE)
                await asyncio.sleep(0)

        await self.rfile.read(100)
        await asyncio.create_task(flood())
        await self.rfile.read(100)


class Lines(harken.StreamRequestHandler):
    """Answers each line by its length."""

    def handle(self) -> None:
        """Read lines."""
        for line in self.rfile:
            self.wfile.write(b"%d\n" % len(line))


class AsyncLines(harken.AsyncStreamRequestHandler):
    """The same as a coroutine, which looks for the end by ``readuntil``."""

    async def handle(self) -> None:
        """Read lines."""
        with contextlib.suppress(asyncio.IncompleteReadError):
            while line := await self.rfile.readuntil(b"\n"):
                await self.wfile.write(b"%d\n" % len(line))


@contextlib.contextmanager
def serving(engine: str, handler: Any, **settings: Any) -> Iterator[tuple[Any, Seen]]:
    """Serve; give the server and its events."""
    server = harken.TCPServer(LOCAL, handler, engine=engine, **settings)
    with seeing("opened", "closed", "memory_exceeded", "memory_recovered", "handler_failed") as seen, running(server):
        yield server, seen


def client_of(server: Any) -> socket.socket:
    """Return a client."""
    return connect(server.server_address)


def resident() -> int:
    """Return the bytes of memory that this process has."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@contextlib.contextmanager
def growth() -> Iterator[list[int]]:
    """Watch this process's memory; when the block ends, the list has the most by which it grew."""
    gc.collect()
    before, most, over = resident(), [0], threading.Event()

    def look() -> None:
        while not over.wait(0.005):
            most[0] = max(most[0], resident() - before)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()


FLOODS = [
    ("inline", Flood, b"flood"),
    ("thread", Flood, b"flood"),
    ("pool", Flood, b"flood"),
    ("fork", Flood, b"flood"),
    ("green", Flood, b"flood"),
    ("asyncio", Flood, b"flood"),
    ("asyncio", AsyncFlood, b"flood"),
    ("asyncio", WritingFlood, b"flood"),
    ("asyncio", WritingFlood, b"whole"),
]


@pytest.mark.parametrize("engine, handler, word", FLOODS)
def test_peers_that_never_read(engine: str, handler: Any, word: bytes) -> None:
    """Twenty of them, with 50 MB to come for each: little is held, a good client is served, and they are closed."""
    count = 3 if engine == "inline" else CLIENTS
    settings = {"write_timeout": 0.5, "max_write_buffer": MIB, "pool_size": count + 5}
    with serving(engine, handler, **settings) as (server, seen), contextlib.ExitStack() as crowd:
        with growth() as grown:
            for _ in range(count):
                client = crowd.enter_context(client_of(server))
                crowd.callback(hang_up, client)
                client.sendall(word)
            if engine != "inline":
                with client_of(server) as good:
                    exchange(good)
                    hang_up(good)
            seen.wait("closed", count + (engine != "inline"))
        reasons = [event.reason for event in seen.of("closed")]
        assert reasons.count("write_timeout") == count
        assert seen.of("handler_failed") == []
        # A mebibyte each, what sends it, and as much again for threads' stacks and the interpreter.
        assert grown[0] < count * 3 * MIB


def test_a_write_beyond_the_bound_waits_for_the_client() -> None:
    """A client that reads gets all of it, in order, although nobody awaits the writes."""
    with (
        serving("asyncio", WritingFlood, max_write_buffer=MIB) as (server, _),
        client_of(server) as client,
    ):
        with growth() as grown:
            client.sendall(b"flood")
            left = len(PAYLOAD) // len(PIECE) * len(PIECE)
            while left:
                part = client.recv(MIB)
                assert part
                left -= len(part)
        exchange(client)
        assert grown[0] < 16 * MIB


def test_a_task_beside_cannot_go_beyond_the_bound() -> None:
    """What it writes to a client that does not read ends the connection, and it is said why."""
    with (
        serving("asyncio", OtherTask, max_write_buffer=MIB) as (server, seen),
        client_of(server) as client,
    ):
        client.sendall(b"go")
        (closed,) = seen.wait("closed")
        assert (closed.reason, closed.detail) == ("shed", "max_write_buffer")
        assert ends(client) == "reset"


def hang_up(client: socket.socket) -> None:
    """End a connection although forked children hold copies of this test's sockets."""
    with contextlib.suppress(OSError):
        client.shutdown(socket.SHUT_RDWR)


def send_until_shut(client: socket.socket) -> None:
    """Send a line that never ends, until the connection does."""
    with contextlib.suppress(OSError):
        for _ in range(250):
            client.sendall(b"x" * 65536)


@pytest.mark.parametrize("engine, handler", [("green", Lines), ("asyncio", AsyncLines)])
def test_lines_that_never_end(engine: str, handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget is kept: those lines are read on no more, then closed, and a good client beside them is served."""
    monkeypatch.setattr(buffers, "PATIENCE_SECONDS", 0.2)
    budget = 4 * MIB
    with serving(engine, handler, max_memory_bytes=budget) as (server, seen), contextlib.ExitStack() as crowd:
        clients = [crowd.enter_context(client_of(server)) for _ in range(8)]
        senders = [threading.Thread(target=send_until_shut, args=(client,), daemon=True) for client in clients]
        with growth() as grown, client_of(server) as good:
            for sender in senders:
                sender.start()
            (exceeded,) = seen.wait("memory_exceeded")
            good.sendall(b"four\n")
            assert receive(good, 2) == b"5\n"
            seen.wait("memory_recovered")
            good.sendall(b"four\n")
            assert receive(good, 2) == b"5\n"
            wait_until(lambda: "shed" in {event.reason for event in seen.of("closed")})
            for client in clients:
                hang_up(client)
            for sender in senders:
                sender.join(PATIENCE)
        assert exceeded.limit == budget
        assert exceeded.held > budget
        assert grown[0] < 6 * budget  # a doubling of each that grows, and what was just let go
        wait_until(lambda: not server.connections())
        assert server.stats()["buffered_bytes"] == 0


def test_writers_beyond_the_budget_are_shed() -> None:
    """Where each may hold much and all together not: the largest go after a second, and the others go on."""
    settings = {"max_write_buffer": 64 * MIB, "max_memory_bytes": 24 * MIB}
    with serving("asyncio", WritingFlood, **settings) as (server, seen), contextlib.ExitStack() as crowd:
        with growth() as grown:
            for _ in range(6):
                crowd.enter_context(client_of(server)).sendall(b"flood")
            seen.wait("memory_exceeded")
            seen.wait("memory_recovered")
        assert {(event.reason, event.detail) for event in seen.wait("closed")} == {("shed", "max_memory_bytes")}
        assert len(seen.of("closed")) < 6
        assert grown[0] < 4 * 24 * MIB
        with client_of(server) as good:
            exchange(good)


def test_the_budget_is_changed_on_the_running_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """None holds nobody; a number holds those that are open."""
    monkeypatch.setattr(buffers, "PATIENCE_SECONDS", 600.0)  # nobody is closed meanwhile
    with serving("green", Lines) as (server, seen), client_of(server) as client:
        client.sendall(b"x" * (4 * MIB) + b"\n")
        assert receive(client, 8) == b"4194305\n"
        assert server.stats()["buffered_bytes"] == 0
        server.configure(max_memory_bytes=MIB)
        sending = threading.Thread(target=client.sendall, args=(b"x" * (4 * MIB),))
        sending.start()  # the server reads on only when it may
        assert seen.wait("memory_exceeded")[0].limit == MIB
        server.configure(max_memory_bytes=None)
        seen.wait("memory_recovered")
        sending.join()
        client.sendall(b"\n")
        assert receive(client, 8) == b"4194305\n"
