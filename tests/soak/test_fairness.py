"""A connection that always has data keeps no other waiting: counted in what it moved, not timed."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from .conftest import FULL, HOSTS, PATIENCE, Serve, Served

QUIET = 99
ROUNDS = 20 if FULL else 1
COUNT = struct.Struct(">Q")
# Bytes that the flood may move while all the quiet ones are answered. A turn is at most TURN_BYTES (1 MiB), and 99
# events fit two waits of the hub's: some turns, far fewer than the hundred that a quiet one after the other would make.
MOST = 8 << 20
FLOOD_BYTES = 2 * MOST * ROUNDS
ON_A_HUB = [host for host in HOSTS if host.values[0] == "green"]


def join(served: Served, part: str) -> socket.socket:
    """Connect and play a part; the handler is under way when this returns."""
    client = served.connect()
    client.sendall(part.encode() + b"\n")
    assert client.recv(6) == b"ready\n"
    return client


@contextlib.contextmanager
def flooding(client: socket.socket, kind: str) -> Iterator[threading.Thread]:
    """Keep one connection busy from a thread: give this thread when the first bytes are under way."""
    begun = threading.Event()

    def pour() -> None:
        data = (b"x" * 15 + b"\n") * (1 << 13)
        with contextlib.suppress(OSError):  # the test is over
            for _ in range(FLOOD_BYTES // len(data)):
                client.sendall(data)
                begun.set()

    def drink() -> None:
        client.sendall(b"!")
        begun.set()
        taken = 0
        while taken < FLOOD_BYTES and (part := client.recv(1 << 20)):
            taken += len(part)

    thread = threading.Thread(target=drink if kind == "out" else pour)
    thread.start()
    begun.wait()
    try:
        yield thread
    finally:
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("kind", ["large", "small", "lines", "out"])
@pytest.mark.parametrize("engine, hub", ON_A_HUB)
def test_a_flood_leaves_room_for_the_quiet(engine: str, hub: str, kind: str, serve: Serve) -> None:
    """One connection floods and 99 ask once: all are answered before the flood has had more than a few turns.

    All of it is under way before the hub looks: a handler keeps it until the questions are in the sockets.
    """
    served = serve(engine, hub, "crowd")
    quiet = [join(served, "quiet") for _ in range(QUIET)]
    try:
        with join(served, kind) as loud, join(served, "block"), flooding(loud, kind) as flood:
            for _ in range(ROUNDS):
                for client in quiet:
                    client.sendall(b"?")
                before = served.ask("release")
                counts = [COUNT.unpack(client.recv(COUNT.size, socket.MSG_WAITALL))[0] for client in quiet]
                assert max(counts) - before <= MOST
            flood.join(PATIENCE * ROUNDS)
            assert not flood.is_alive(), "the flood was not taken in time"
            served.wait_until(lambda: served.ask("moved") >= FLOOD_BYTES)  # it did flood
    finally:
        for client in quiet:
            client.close()
