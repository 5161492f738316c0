"""Who is idle: nobody with bytes under way, nobody whose handler works, nobody who has only just come."""

from __future__ import annotations

import socket
import threading
import time
import types
from typing import Any

import pytest

from harken import idle
from harken.idle import Onlooker
from harken.records import YOUNG_SECONDS

PATIENCE = 10.0


class Pair:
    """A connection over TCP, a thread that may read it, and the other end."""

    def __init__(self, timeout: float | None = None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.far = socket.create_connection(listener.getsockname(), PATIENCE)
            self.near, _ = listener.accept()
        self.near.settimeout(timeout)
        self.record: Any = types.SimpleNamespace(request=self.near, thread=0, started=time.monotonic() - 60.0)
        self.thread: threading.Thread | None = None

    def read(self) -> None:
        """Let a thread wait for the client."""
        self.thread = threading.Thread(target=self.near.recv, args=(100,), daemon=True)
        self.thread.start()
        self.record.thread = self.thread.ident

    def work(self) -> threading.Event:
        """Let a thread do something else; it ends when the event is set."""
        over = threading.Event()
        self.thread = threading.Thread(target=over.wait, args=(PATIENCE,), daemon=True)
        self.thread.start()
        self.record.thread = self.thread.ident
        return over

    def close(self) -> None:
        """End both ends, and the thread."""
        self.far.close()
        if self.thread is not None:
            self.thread.join(PATIENCE)
        self.near.close()


@pytest.fixture
def pair(monkeypatch):
    """A pair that counts as quiet once nothing has moved for a moment."""
    monkeypatch.setattr(idle, "QUIET_SECONDS", 0.05)
    monkeypatch.setattr(idle, "QUIET_ANYWAY_SECONDS", 0.1)
    made = Pair()
    yield made
    made.close()


def becomes(pair: Pair, judged: bool, verb: str = "is_idle") -> bool:
    """Wait until an onlooker of the moment judges so."""
    end = time.monotonic() + PATIENCE
    while getattr(Onlooker(), verb)(pair.record) is not judged:
        assert time.monotonic() < end, f"{verb} never was {judged}"
        time.sleep(0.005)
    return True


def test_who_waits_for_its_client_is_idle(pair):
    """After a while without a byte; the thread's system call tells for what it waits."""
    pair.read()
    assert becomes(pair, True)
    assert not Onlooker().is_at_work(pair.record)


def test_with_a_timeout_too():
    """Python then waits in poll(2), for the one descriptor."""
    pair = Pair(timeout=PATIENCE)
    try:
        pair.read()
        assert becomes(pair, False, "is_at_work")
    finally:
        pair.close()


def test_who_works_is_not(pair):
    """Its thread is in another call."""
    over = pair.work()
    try:
        assert becomes(pair, True, "is_at_work")
        assert not Onlooker().is_idle(pair.record)
    finally:
        over.set()


def test_bytes_that_nobody_has_read_are_work(pair):
    """Whatever the handler waits for."""
    pair.far.sendall(b"hello")
    assert becomes(pair, True, "is_at_work")
    assert not Onlooker().is_idle(pair.record)


def test_bytes_that_the_peer_has_not_taken_are_work(pair):
    """They are in the queue."""
    pair.near.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            pair.near.send(bytes(1 << 20))
    assert Onlooker().is_at_work(pair.record)


def test_who_has_just_come_is_busy(pair):
    """Until its first byte, or a second."""
    pair.record.started = time.monotonic()
    pair.read()
    assert becomes(pair, False, "is_at_work")
    assert not Onlooker().is_idle(pair.record)
    pair.record.started -= YOUNG_SECONDS
    assert becomes(pair, True)


def test_a_connection_that_tells_by_itself_is_believed(pair, monkeypatch):
    """A hub knows of its green threads; nobody's system call is asked then."""
    said = ["reading"]
    kind = type("Telling", (socket.socket,), {"waits_for": lambda self: said[0]})
    telling = kind(pair.near.family, pair.near.type, pair.near.proto, pair.near.detach())
    pair.near = pair.record.request = telling
    assert becomes(pair, True)
    said[0] = "writing"
    assert Onlooker().is_at_work(pair.record)


def test_what_is_closed_is_not_idle(pair):
    """Nor is what is no socket."""
    pair.near.close()
    assert not Onlooker().is_idle(pair.record)
    assert not Onlooker().is_idle(types.SimpleNamespace(request=None, thread=0, started=0.0))
