"""Crowds of clients that do harm, on every engine: a good client beside them is served, and the CPU is idle meanwhile.

What they leave behind is looked for after every test; see ``tests/conftest.py``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

import harken

from .kit import LOCAL, Seen, connect, exchange, receive, reset, running, seeing


class Lines(harken.StreamRequestHandler):
    """Answers each line by itself."""

    def handle(self) -> None:
        """Read lines to the end, of which there may be half of one."""
        for line in self.rfile:
            self.wfile.write(line)


class AsyncLines(harken.AsyncStreamRequestHandler):
    """The same as a coroutine."""

    async def handle(self) -> None:
        """Read lines to the end."""
        async for line in self.rfile:
            await self.wfile.write(line)


ENGINES = {
    "thread": Lines,
    "pool": Lines,
    "fork": Lines,
    "green": Lines,
    "asyncio": AsyncLines,
    "asyncio-threads": Lines,
}
CROWD = 200
FORKED = 20  # processes are dear
SPAN = 0.25  # seconds over which the CPU is looked at
IDLE_SHARE = 0.15  # of a core; a spin takes all of one, and a turn for nothing of each client more than this


@dataclass(frozen=True, slots=True)
class Way:
    """A way to do harm.

    Attributes:
        act: what the clients do.
        reasons: why such connections may be closed.
    """

    act: Callable[[list[socket.socket]], None]
    reasons: set[str]


def silent(clients: list[socket.socket]) -> None:
    """Say nothing."""


def slow(clients: list[socket.socket]) -> None:
    """Say a word of which each byte comes alone and late."""
    for byte in b"slow":
        for client in clients:
            client.send(bytes((byte,)))
        time.sleep(0.05)


def half_close(clients: list[socket.socket]) -> None:
    """End our side in the middle of a line: what was sent is answered all the same, then comes the end."""
    for client in clients:
        client.sendall(b"whole\nhalf")
        client.shutdown(socket.SHUT_WR)
    for client in clients:
        assert receive(client, 100) == b"whole\nhalf"


def reset_in_a_line(clients: list[socket.socket]) -> None:
    """Vanish in the middle of a line, without a word."""
    for client in clients:
        client.sendall(b"whole\nhalf")
    for client in clients:
        assert receive(client, 6) == b"whole\n"
        reset(client)


def fragments(clients: list[socket.socket]) -> None:
    """Send lines in pieces of a byte, each in a segment of its own."""
    for client in clients:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    for byte in b"one\ntwo\n":
        for client in clients:
            client.send(bytes((byte,)))
    for client in clients:
        assert receive(client, 8) == b"one\ntwo\n"


WAYS = {
    "silent": Way(silent, {"peer_closed"}),
    "slow": Way(slow, {"peer_closed", "peer_reset"}),  # the half of a line is answered, to nobody
    "half_close": Way(half_close, {"peer_closed"}),
    "reset_in_a_line": Way(reset_in_a_line, {"peer_reset"}),
    "fragments": Way(fragments, {"peer_closed"}),
}


@contextlib.contextmanager
def serving(name: str, crowd: int) -> Iterator[tuple[Any, Seen]]:
    """Serve a crowd; give the server and its events."""
    room = {"pool_size": crowd + 5, "max_children": crowd + 5}
    server = harken.TCPServer(LOCAL, ENGINES[name], engine=name.partition("-")[0], **room)
    with seeing("opened", "closed", "handler_failed") as seen, running(server):
        yield server, seen


def cpu_seconds() -> float:
    """Return the CPU time that this process and its children have used."""
    own = os.getpid()
    used = time.process_time()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == own:
                used += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def expect_idle() -> None:
    """Wait for a span in which next to no CPU time is used: one that spins has none.

    Raises:
        AssertionError: there was none.
    """

    def idle() -> bool:
        before = cpu_seconds()
        time.sleep(SPAN)
        return cpu_seconds() - before < IDLE_SHARE * SPAN

    wait_until(idle)


@contextlib.contextmanager
def good_client(server: Any) -> Iterator[None]:
    """Let a client be served again and again while the block runs; its own timeout bounds each answer."""
    over = threading.Event()
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            with connect(server.server_address) as client:
                while not over.wait(0.01):
                    exchange(client, b"good\n")
        except BaseException as error:
            failures.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    try:
        yield
    finally:
        over.set()
        asking.join()
    assert not failures


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_crowd_that_does_harm(engine: str, way: str) -> None:
    """The good one is served meanwhile and after, each harmful one is closed once for what it did, and none spins."""
    crowd = FORKED if engine == "fork" else CROWD
    with serving(engine, crowd) as (server, seen), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server.server_address)) for _ in range(crowd)]
        with good_client(server):
            WAYS[way].act(clients)
        expect_idle()
        stack.close()
        closed = seen.wait("closed", crowd + 1)
        assert len({event.connection for event in closed}) == len(closed) == crowd + 1
        reasons = [event.reason for event in closed]
        assert sum(reason in WAYS[way].reasons for reason in reasons) >= crowd
        assert seen.of("handler_failed") == []
        with connect(server.server_address) as late:
            exchange(late, b"late\n")
        wait_until(lambda: not server.connections())
