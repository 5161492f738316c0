"""Many clients at the same moment, clients that reset, and servers that start and stop a hundred times."""

from __future__ import annotations

import errno
import os
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import harken

from .kit import PATIENCE, Echo, Program, connect, exchange, reset, running

FULL = os.environ.get("HARKEN_SOAK") == "full"
CLIENTS = 1000
CYCLES = 100
# Where each client is a process: as many in the long run, else enough to wait for one another in the backlog.
CHILDREN = 1000 if FULL else 300
CYCLES_WITH_CHILDREN = 100 if FULL else 30
RESETS = {"ForkingTCPServer": 2000 if FULL else 200}
CROWD_SECONDS = 40.0

ANSWER = """
class Answer(harken.BaseRequestHandler):
    def handle(self):
        self.request.sendall(self.request.recv(100).upper())

with getattr(harken, sys.argv[1])(("127.0.0.1", 0), Answer) as server:
    server.serve_forever()
"""


def ask_all(address: Any, count: int) -> Counter[str]:
    """Connect ``count`` clients at once, each with a question of its own; count what became of them."""
    fates: Counter[str] = Counter()
    with selectors.DefaultSelector() as selector:
        for number in range(count):
            client = socket.socket()
            client.setblocking(False)
            assert client.connect_ex(address) in (0, errno.EINPROGRESS)
            selector.register(client, selectors.EVENT_WRITE, [number, b""])
        deadline = time.monotonic() + CROWD_SECONDS
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(1.0):
                end = _move_on(selector, key)
                if end is not None:
                    fates[end] += 1
                    selector.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]
        for key in list(selector.get_map().values()):
            fates["no answer"] += 1
            key.fileobj.close()  # type: ignore[union-attr]
    return fates


def _move_on(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> str | None:
    client: Any = key.fileobj
    number, answer = key.data
    try:
        if key.events == selectors.EVENT_WRITE:
            client.send(b"client %d" % number)
            selector.modify(client, selectors.EVENT_READ, key.data)
            return None
        if part := client.recv(100):
            key.data[1] += part
            return None
    except OSError as error:
        return errno.errorcode[error.errno]
    return "answered" if answer == b"CLIENT %d" % number else f"wrong: {answer!r}"


@pytest.mark.parametrize("kind", ["ThreadingTCPServer", "PoolTCPServer", "ForkingTCPServer"])
def test_a_thousand_clients_at_the_same_moment(program: Callable[..., Program], kind: str) -> None:
    """None is refused, none is reset, and each gets its own answer."""
    count = CHILDREN if kind == "ForkingTCPServer" else CLIENTS
    started = program(ANSWER, kind)
    assert ask_all(started.address, count) == {"answered": count}
    started.wait("closed", count)
    opened = [event["connection"] for event in started.of("opened")]
    closed = [event["connection"] for event in started.of("closed")]
    assert len(set(opened)) == len(opened) == count
    assert sorted(closed) == sorted(opened)


@pytest.mark.parametrize("kind", ["TCPServer", "ThreadingTCPServer", "PoolTCPServer", "ForkingTCPServer"])
def test_a_flood_of_resets(program: Callable[..., Program], kind: str) -> None:
    """Many connections that are reset, some with bytes under way, disturb neither old nor new clients."""
    started = program(ANSWER.replace("Answer)", "Echo)"), kind)
    if kind != "TCPServer":
        old = connect(started.address)
        exchange(old)
    for turn in range(RESETS.get(kind, 2000)):
        client = socket.create_connection(started.address, 10)
        if turn % 3:
            client.send(b"x" * turn)
        reset(client)
    if kind != "TCPServer":
        exchange(old)
        old.close()
    with connect(started.address) as late:
        exchange(late)
    assert started.process.poll() is None


@pytest.mark.parametrize("kind", ["TCPServer", "ThreadingTCPServer", "PoolTCPServer", "ForkingTCPServer"])
def test_a_hundred_cycles_on_one_port(kind: str, free_port: int) -> None:
    """Started and stopped in a row without SO_REUSEADDR, the port is free at once each time."""
    assert not getattr(harken, kind).allow_reuse_address
    for _ in range(CYCLES):
        with running(getattr(harken, kind)(("127.0.0.1", free_port), Echo)):
            pass


@pytest.mark.parametrize("kind", ["TCPServer", "ThreadingTCPServer", "PoolTCPServer", "ForkingTCPServer"])
def test_a_hundred_cycles_with_a_client_each(kind: str, free_port: int) -> None:
    """Started, used and stopped in a row, with SO_REUSEADDR for what is in TIME_WAIT."""
    for _ in range(CYCLES_WITH_CHILDREN if kind == "ForkingTCPServer" else CYCLES):
        server = getattr(harken, kind)(("127.0.0.1", free_port), Echo, allow_reuse_address=True)
        with running(server), connect(("127.0.0.1", free_port)) as client:
            exchange(client)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""


def test_cycles_in_the_background(free_port: int) -> None:
    """``background`` gives the port back as it drains and closes, each time."""
    for _ in range(20):
        server = harken.ThreadingTCPServer(("127.0.0.1", free_port), Echo, allow_reuse_address=True)
        with harken.background(server), connect(("127.0.0.1", free_port)) as client:
            exchange(client)
            client.close()


def test_port_is_free_when_close_returns_from_another_thread(free_port: int) -> None:
    """``server_close()`` alone, while the loop sleeps in its selector, leaves the port free when it returns."""
    for _ in range(10):
        server = harken.ThreadingTCPServer(("127.0.0.1", free_port), Echo)
        loop = threading.Thread(target=server.serve_forever, args=(30.0,), daemon=True)
        loop.start()
        assert server.wait_ready(PATIENCE)
        server.server_close()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", free_port))
        loop.join(PATIENCE)
        assert not loop.is_alive()
