"""Nothing stays behind of a connection, however it ended: counted over many."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Any

import pytest

from .conftest import FULL, HOSTS, Serve, Served

# Connections before the first count (what is made once is made then), and between the counts.
WARM, MANY = (2000, 100_000) if FULL else (200, 2000)
# What may differ between two counts for other reasons than connections: caches that fill, free lists, the counting.
SLACK_BLOCKS = 400
SLACK_OBJECTS = 100
SLACK_REFERENCES = 100
MOST_THREADS = 40  # a pool of 32 starts them as they are needed
SLACK_BYTES = 2 << 20  # malloc's arenas; a leak of 100 bytes a connection is 10 MB in the long run
WAYS = ("echo", "raise", "wait", "timeout", "silent", "half", "reset", "broken", "none")


def pass_through(served: Served, number: int) -> None:
    """Use a connection in one of the ways. Many addresses take turns: a closed one keeps its port a minute."""
    way = WAYS[number % len(WAYS)]
    with served.connect(f"127.0.{number // 200 % 200}.{number % 200 + 1}") as client:
        if way in {"silent", "none"}:
            if way == "silent":
                client.shutdown(socket.SHUT_WR)
            return
        with contextlib.suppress(ConnectionError):
            client.sendall(b"echo\nhello\n" if way in {"echo", "half", "reset", "broken"} else f"{way}\n".encode())
            if way == "half":
                client.shutdown(socket.SHUT_WR)
            if way in {"echo", "half"}:
                assert client.recv(6) == b"hello\n"
            if way in {"raise", "half"}:
                assert not client.recv(1)
        if way in {"reset", "broken"}:  # broken: before the answer was read
            if way == "reset":
                client.recv(6)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def settled(served: Served) -> dict[str, Any]:
    """Count when every connection has ended."""
    served.wait_until(lambda: served.ask("census")["open"] == 0)
    census: dict[str, Any] = served.ask("census")
    return census


@pytest.mark.parametrize(
    "engine, hub, work", [(*host.values, "ends") for host in HOSTS] + [("asyncio", None, "asyncends")]
)
def test_nothing_is_left_of_a_connection(engine: str, hub: str | None, work: str, serve: Serve) -> None:
    """Descriptors, threads, objects, memory and the references to what is shared are as many afterwards as before."""
    served = serve(engine, hub, work)
    for number in range(WARM):
        pass_through(served, number)
    before = settled(served)
    count = MANY if engine != "fork" or FULL else MANY // 4  # a process each
    for number in range(count):
        pass_through(served, number)
    after = settled(served)
    assert after["descriptors"] == before["descriptors"]
    assert after["threads"] <= max(before["threads"], MOST_THREADS)
    assert after["objects"] - before["objects"] <= SLACK_OBJECTS
    assert after["blocks"] - before["blocks"] <= SLACK_BLOCKS
    assert after["rss"] - before["rss"] <= SLACK_BYTES
    grown = [new - old for new, old in zip(after["references"], before["references"], strict=True)]
    assert max(grown) <= SLACK_REFERENCES, grown
