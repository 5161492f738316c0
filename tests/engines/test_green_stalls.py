"""The green engine's watchdog: handlers that keep the hub are told of, with their connection."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import harken
from harken import events

STALL = 0.3  # seconds
PATIENCE = 10.0
LOCAL = ("127.0.0.1", 0)


class Sleepy(harken.BaseRequestHandler):
    """Keeps the hub for each byte, and answers."""

    def handle(self) -> None:
        """Sleep and answer."""
        while data := self.request.recv(1):
            if data == b"s":
                time.sleep(STALL)  # the stall
            self.request.sendall(data)


LINE = next(
    number for number, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.endswith("# the stall")
)


class Ear:
    """Hears events of one name, and lets a test wait for them."""

    def __init__(self, name: str) -> None:
        self.heard: list[events.Event] = []
        self._news = threading.Condition()
        self.unsubscribe = events.subscribe(self._note, name)

    def _note(self, event: events.Event) -> None:
        with self._news:
            self.heard.append(event)
            self._news.notify_all()

    def wait(self, count: int) -> list[events.Event]:
        """Return what was heard once it is so many."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.heard) >= count, PATIENCE), self.heard
        return self.heard


@pytest.fixture
def stalled() -> Iterator[Ear]:
    """Hears ``stalled``."""
    ear = Ear("stalled")
    yield ear
    ear.unsubscribe()


def ask(server: harken.BaseServer, data: bytes) -> bytes:
    """Send one byte at a time, and return the answers."""
    with socket.create_connection(server.server_address, PATIENCE) as client:  # type: ignore[attr-defined]
        answers = b""
        for byte in data:
            client.sendall(bytes([byte]))
            answers += client.recv(1)
    deadline = time.monotonic() + PATIENCE
    while server.connections():  # the answer is sent from within what stalls
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return answers


def test_tells_whose_handler_it_was(stalled: Ear) -> None:
    """The event names place, server, connection and peer; ``stats()`` counts by place."""
    server = harken.GreenTCPServer(LOCAL, Sleepy, stall_after=0.1)
    opened = Ear("opened")
    with harken.background(server):
        assert ask(server, b"qs") == b"qs"
        told = stalled.wait(1)[0]
        counted = server.stats()["stalled_total"]
    opened.unsubscribe()
    assert (told.file, told.line, told.function) == (__file__, LINE, "handle")
    assert told.server is server
    assert told.connection == opened.heard[0].connection is not None
    assert told.peer.address == "127.0.0.1"
    assert counted == {f"{__file__}:{LINE}": 1}


def test_is_off_in_drop_in_classes(stalled: Ear) -> None:
    """Unless asked, nothing is told of, and nothing is counted."""
    with harken.background(harken.GreenTCPServer(LOCAL, Sleepy)) as server:
        assert ask(server, b"s") == b"s"
        assert server.stats()["stalled_total"] == {}
    assert stalled.heard == []


def test_can_be_switched_while_serving(stalled: Ear) -> None:
    """``configure(stall_after=…)`` holds from the next stall on."""
    with harken.background(harken.GreenTCPServer(LOCAL, Sleepy)) as server:
        assert ask(server, b"s") == b"s"
        server.configure(stall_after=0.1)
        assert ask(server, b"s") == b"s"
        stalled.wait(1)
        server.configure(stall_after=None)
        assert ask(server, b"s") == b"s"
    assert len(stalled.heard) == 1


def test_ends_with_the_hub() -> None:
    """No watchdog outlives its server."""
    with harken.background(harken.GreenTCPServer(LOCAL, Sleepy, stall_after=0.1)) as server:
        assert ask(server, b"q") == b"q"
        assert [thread.name for thread in threading.enumerate()].count("harken-watchdog") == 1
    server.server_close()
    deadline = time.monotonic() + PATIENCE
    while "harken-watchdog" in [thread.name for thread in threading.enumerate()]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_forked_child_has_its_own(stalled: Ear) -> None:
    """A child that serves by itself is watched again, and its parent's watchdog is not disturbed."""

    def serve_in_child() -> int:
        ear = Ear("stalled")
        with harken.background(harken.GreenTCPServer(LOCAL, Sleepy, stall_after=0.1)) as server:
            ask(server, b"s")
            return 0 if len(ear.wait(1)) == 1 else 1

    with harken.background(harken.GreenTCPServer(LOCAL, Sleepy, stall_after=0.1)) as server:
        assert ask(server, b"s") == b"s"
        pid = os.fork()
        if pid == 0:
            status = 2
            try:
                status = serve_in_child()
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert ask(server, b"s") == b"s"
        stalled.wait(2)


def test_tells_of_hooks_too(stalled: Ear) -> None:
    """What a hook of the server does in the loop keeps everybody just as well; it has no connection."""

    class Slow(harken.GreenTCPServer):
        def verify_request(self, request: object, client_address: object) -> bool:
            time.sleep(STALL)
            return True

    with harken.background(Slow(LOCAL, Sleepy, stall_after=0.1)) as server:
        assert ask(server, b"q") == b"q"
        told = stalled.wait(1)[0]
    assert told.function == "verify_request"
    assert told.file == __file__


class Lines(harken.StreamRequestHandler):
    """Answers a line, and then computes on for a second before it reads the next."""

    def handle(self) -> None:
        """Answer and compute."""
        for line in self.rfile:
            self.wfile.write(line)
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                pass


def test_an_answer_does_not_wait_for_what_comes_after_it() -> None:
    """What a handler wrote while more requests are unread goes out although it computes on; also in drop-in classes."""
    with harken.background(harken.GreenTCPServer(LOCAL, Lines)) as server:
        with socket.create_connection(server.server_address, PATIENCE) as client:
            began = time.monotonic()
            client.sendall(b"one\ntwo\n")
            assert client.recv(100) == b"one\n"
            assert time.monotonic() - began < 0.7


def test_finds_a_coroutine_too(stalled: Ear) -> None:
    """On the engine asyncio, ``async def handle`` that blocks is told of by its own line and connection."""

    class Async(harken.AsyncStreamRequestHandler):
        async def handle(self) -> None:
            line = await self.rfile.readline()
            time.sleep(STALL)  # noqa: ASYNC251 - it is what is tested
            await self.wfile.write(line)

    with harken.background(harken.AsyncTCPServer(LOCAL, Async, stall_after=0.1)) as server:
        with socket.create_connection(server.server_address, PATIENCE) as client:
            client.sendall(b"hello\n")
            assert client.recv(100) == b"hello\n"
        told = stalled.wait(1)[0]
        assert (told.file, told.function) == (__file__, "handle")
        assert told.connection is not None
        assert server.stats()["stalled_total"] == {told.place: 1}
