"""Async handlers on the hub in C and on the one in Python."""

from __future__ import annotations

import pytest

FALLBACK = """
import asyncio, socket
import harken
seen = []

class Handler(harken.AsyncStreamRequestHandler):
    async def handle(self):
        async for line in self.rfile:
            try:
                async with asyncio.timeout(0.02):
                    await self.rfile.readline()
            except TimeoutError:
                pass
            async with asyncio.TaskGroup() as group:
                other = group.create_task(self.rfile.readexactly(3))
                group.create_task(self.request.sendall(b"more?"))
            self.wfile.write(line)
            await self.wfile.write(other.result())
            await self.wfile.drain()
            asyncio.get_running_loop().call_later(0.01, asyncio.current_task().cancel)
            try:
                await self.request.recv(1)
            except asyncio.CancelledError:
                seen.append(asyncio.current_task().uncancel())

with harken.background(harken.AsyncTCPServer(("127.0.0.1", 0), Handler)) as server:
    with socket.create_connection(server.server_address, 10) as client:
        client.sendall(b"line\\n")
        assert client.recv(5) == b"more?"
        client.sendall(b"abc")
        got = b""
        while len(got) < 8:
            got += client.recv(8)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
from harken import _hub
print(_hub.kind, got, seen)
"""


LONG_TURN = """
import asyncio, socket
import harken
seen = []

class Handler(harken.AsyncStreamRequestHandler):
    async def handle(self):
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        turned = asyncio.get_running_loop().create_task(asyncio.sleep(0))
        for _ in range(100):
            self.wfile.write(bytes(30000))
        seen.append(asyncio.current_task() is not None)
        seen.append(turned.done())
        await self.wfile.drain()

with harken.background(harken.AsyncTCPServer(("127.0.0.1", 0), Handler)) as server:
    with socket.create_connection(server.server_address, 10) as client:
        got = 0
        while part := client.recv(65536):
            got += len(part)
from harken import _hub
print(_hub.kind, got, seen)
"""


@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_write_gives_no_turn_away(run_program, kind):
    """However much is written: the task goes on, as one that has not awaited anything does."""
    out, errors = run_program("-c", LONG_TURN, env={"HARKEN_HUB": kind}).communicate(timeout=40)
    assert out == f"{kind} 3000000 [True, False]\n", errors


@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_both_hubs_do_the_same(run_program, kind):
    """Timeouts, other tasks, cancelling, on the hub in C and on the one in Python."""
    out, errors = run_program("-c", FALLBACK, env={"HARKEN_HUB": kind}).communicate(timeout=40)
    assert out == f"{kind} b'line\\nabc' [0]\n", errors


DRIBBLE = """
import contextlib, socket, threading
import harken
from harken import events
closed = threading.Event()
reasons = []

def note(event):
    reasons.append(event.reason)
    closed.set()

class Handler(harken.AsyncStreamRequestHandler):
    async def handle(self):
        await self.rfile.readline()

events.subscribe(note, "closed")
with harken.background(harken.AsyncTCPServer(("127.0.0.1", 0), Handler, read_timeout=0.3)) as server:
    with socket.create_connection(server.server_address, 10) as client:
        for _ in range(400):
            with contextlib.suppress(OSError):
                client.sendall(b".")
            if closed.wait(0.02):
                break
        from harken import _hub
        print(_hub.kind, reasons)
"""


@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_a_line_that_dribbles_in_is_one_read(run_program, kind):
    """``read_timeout`` ends it, however often something comes."""
    out, errors = run_program("-c", DRIBBLE, env={"HARKEN_HUB": kind}).communicate(timeout=40)
    assert out == f"{kind} ['read_timeout']\n", errors


CANCELLED_WRITE = """
import asyncio, socket, sys, threading
import harken
BOUND = max(1 << 20, int(sys.argv[1]))
FIRST, BIG = b"-" * int(sys.argv[1]), b"".join(b"%07d\\n" % number for number in range(2_000_000))
seen, go = [], threading.Event()

class Handler(harken.AsyncStreamRequestHandler):
    async def handle(self):
        self.wfile.write(FIRST)
        try:
            async with asyncio.timeout(0.1):
                await self.wfile.write(BIG)
        except TimeoutError:
            seen.append("cancelled")
        go.set()
        await self.wfile.write(b"END")

server = harken.AsyncTCPServer(("127.0.0.1", 0), Handler, max_write_buffer=BOUND)
with harken.background(server), socket.create_connection(server.server_address, 10) as client:
    go.wait(10)
    got = bytearray()
    while part := client.recv(1 << 20):
        got += part
from harken import _hub
print(_hub.kind, seen, len(got), got == FIRST + BIG + b"END")
"""


@pytest.mark.parametrize("ahead", [0, 12_000_000], ids=["next", "behind"])
@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_a_cancelled_write_is_sent_all_the_same(run_program, kind, ahead):
    """Beyond what may be held too, in its turn, and what is written next comes behind it."""
    process = run_program("-c", CANCELLED_WRITE, str(ahead), env={"HARKEN_HUB": kind})
    out, errors = process.communicate(timeout=40)
    assert out == f"{kind} ['cancelled'] {16_000_003 + ahead} True\n", errors


JOINED = """
import socket
import harken
from harken import _hub

class Handler(harken.AsyncStreamRequestHandler):
    async def handle(self):
        while head := await self.rfile.readline():
            body = await self.rfile.readexactly(int(head))
            self.wfile.write(body + await self.rfile.read(1))

with harken.background(harken.AsyncTCPServer(("127.0.0.1", 0), Handler, {settings})) as server:
    with socket.create_connection(server.server_address, 10) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(b"3\\nabc.2\\nde.1\\nf.")
        print(_hub.kind, client.recv(100))
"""


@pytest.mark.parametrize("settings", ["", "read_timeout=10"])
@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_answers_are_joined_whatever_reads_a_request_takes(run_program, kind, settings):
    """Also where deadlines watch each read: what lies here is read without sending what was answered before."""
    out, errors = run_program("-c", JOINED.format(settings=settings), env={"HARKEN_HUB": kind}).communicate(timeout=40)
    assert out == f"{kind} b'abc.de.f.'\n", errors
