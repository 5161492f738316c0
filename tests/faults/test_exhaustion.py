"""A server that has run out of descriptors or threads: it neither spins nor ends, and recovers by itself."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from waiting import wait_until

import harken
from harken.engines._selector import SelectorEngine

from .kit import LOCAL, Echo, Program, connect, ends, exchange, fate, running, seeing

LIMIT = 256  # descriptors of the server
CLIENTS = 2000
OLD = 20  # clients that were there before
MOST_CPU = 0.08  # share of a core while nothing can be done; a spin takes all of one

EXHAUSTED = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
with harken.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
    server.serve_forever()
"""


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Let this process have a descriptor for each client."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < CLIENTS + 200:
        pytest.skip(f"needs a kernel that allows this process {CLIENTS + 200} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], CLIENTS + 200), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def flood(address: Any, count: int) -> Iterator[contextlib.ExitStack]:
    """Begin ``count`` connections without waiting for any; they end when the block or the stack it is given does."""
    with contextlib.ExitStack() as clients:
        for _ in range(count):
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            assert client.connect_ex(address) in (0, errno.EINPROGRESS)
        yield clients


@pytest.mark.usefixtures("many_descriptors")
def test_more_clients_than_descriptors(program: Callable[..., Program]) -> None:
    """2,000 clients against 256 descriptors: who is in is served, the CPU is idle, and it recovers when they leave."""
    started = program(EXHAUSTED, str(LIMIT))
    with contextlib.ExitStack() as leaving:
        old = [leaving.enter_context(connect(started.address)) for _ in range(OLD)]
        for client in old:
            exchange(client)
        crowd = leaving.enter_context(flood(started.address, CLIENTS))
        started.wait("paused")
        for client in old:
            exchange(client)
        before = started.cpu_seconds(), time.monotonic()
        while time.monotonic() < before[1] + 1.0:
            for client in old:
                exchange(client)
            select.select([], [], [], 0.2)
        used = (started.cpu_seconds() - before[0]) / (time.monotonic() - before[1])
        assert used < MOST_CPU, f"{used:.0%} of a core while there was nothing to do"
        crowd.close()
        with connect_at_last(started.address) as late:
            exchange(late)
        assert started.wait("resumed")["shed"] > 0
        assert len(started.of("paused")) == len(started.of("resumed")) == 1
        for client in old:
            exchange(client)
    assert started.process.poll() is None


def connect_at_last(address: Any) -> socket.socket:
    """Connect until the server lets one live."""
    found: list[socket.socket] = []

    def lives() -> bool:
        try:
            client = connect(address)
        except ConnectionResetError:
            return False
        try:
            exchange(client)
        except OSError:
            client.close()
            return False
        found.append(client)
        return True

    wait_until(lives)
    return found[0]


@pytest.mark.parametrize("settings", [{}, {"reuse_threads": True}, {"engine": "pool"}], ids=str)
def test_no_more_threads(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    """When the system starts no more threads, those connections are closed and reported, and the door pauses."""
    heard: list[str] = []

    class Server(harken.ThreadingTCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            heard.append("handle_error")

    start = threading.Thread.start
    exhausted = threading.Event()

    def start_or_not(thread: threading.Thread) -> None:
        if exhausted.is_set() and "process_request_thread" in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    names = ("opened", "closed", "handler_failed", "paused", "resumed")
    with seeing(*names) as seen, running(Server(LOCAL, Echo, **settings)) as server:
        monkeypatch.setattr(threading.Thread, "start", start_or_not)
        exhausted.set()
        for _ in range(3):
            assert fate(server.server_address) in ("closed", "reset")
        exhausted.clear()
        with connect(server.server_address) as client:
            exchange(client)
        seen.wait("closed", 4)
        assert heard == ["handle_error"] * 3
        assert len(seen.of("handler_failed")) == 3
        assert [event.reason for event in seen.of("closed")].count("handler_failed") == 3
        assert "can't start new thread" in str(seen.of("handler_failed")[0].error)
        seen.wait("resumed")
        assert [event.reason for event in seen.of("paused")] == ["can't start new thread"]
        assert len(seen.of("resumed")) == 1


def test_no_more_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """When fork fails, that connection is closed and reported, and the door pauses."""
    fork = os.fork
    errors = [BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")] * 2

    class Server(harken.ForkingTCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    def fork_or_not() -> int:
        if errors:
            raise errors.pop()
        return fork()

    monkeypatch.setattr(os, "fork", fork_or_not)
    with seeing("closed", "paused", "resumed") as seen, running(Server(LOCAL, Echo)) as server:
        for _ in range(2):
            assert fate(server.server_address) in ("closed", "reset")
        with connect(server.server_address) as client:
            exchange(client)
            client.shutdown(socket.SHUT_WR)
            assert ends(client) == "closed"
        assert [event.reason for event in seen.wait("closed", 3)].count("handler_failed") == 2
        seen.wait("resumed")
        assert [event.reason for event in seen.of("paused")] == ["EAGAIN: Resource temporarily unavailable"]


def test_who_waits_while_no_thread_can_be_started_is_lost_one_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the door is tried again one is taken, and not a burst that is lost together: the others wait on."""
    start, watch = threading.Thread.start, SelectorEngine.watch
    tries: list[Any] = []

    class Server(harken.ThreadingTCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    def start_or_not(thread: threading.Thread) -> None:
        if len(tries) < 3 and "process_request_thread" in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    def count(engine: SelectorEngine, *args: Any) -> None:
        tries.append(args)
        watch(engine, *args)

    monkeypatch.setattr(threading.Thread, "start", start_or_not)
    monkeypatch.setattr(SelectorEngine, "watch", count)
    with seeing("paused") as seen, running(Server(LOCAL, Echo)) as server, contextlib.ExitStack() as stack:
        assert fate(server.server_address) in ("closed", "reset")
        seen.wait("paused")
        waiting = [stack.enter_context(connect(server.server_address)) for _ in range(5)]
        assert ends(waiting[0]) in ("closed", "reset")
        for client in waiting[1:]:
            exchange(client)
