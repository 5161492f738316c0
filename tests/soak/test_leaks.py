"""Nothing stays behind of a connection, however it ended: counted over many."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from pathlib import Path
from typing import Any

import pytest
import trustme

from harken.deadlines import FEW

from .conftest import FULL, HOSTS, Serve, Served

# Connections before the first count (what is made once is made then), and between the counts.
WARM, MANY = (2000, 100_000) if FULL else (200, 2000)
# What may differ between two counts for other reasons than connections: caches that fill, free lists, the counting.
SLACK_BLOCKS = 400
SLACK_OBJECTS = 100
SLACK_REFERENCES = 100
THREAD_OBJECTS = 30  # of each thread of a pool that was started in between: its Thread with locks and arguments
RECORD_OBJECTS, RECORD_BLOCKS = 4, 16  # of each record: it, its dictionary, ticket, and place among the deadlines
MOST_THREADS = 40  # a pool of 32 starts them as they are needed
SLACK_BYTES = 2 << 20  # malloc's arenas; a leak of 100 bytes a connection is 10 MB in the long run
# A green server without settings serves by compiled code alone, from the door to the end (where that is built). With
# limits and deadlines each connection is admitted, recorded and watched; under TLS something comes before its handler.
GUARDED = {
    "max_connections": 1000,
    "max_connections_per_peer": 1000,
    "max_memory_bytes": 1 << 30,
    "idle_timeout": 60.0,
    "read_timeout": 60.0,
    "handler_timeout": 60.0,
}
WAYS = ("echo", "raise", "wait", "timeout", "silent", "half", "reset", "broken", "none")


def half_close(client: socket.socket) -> None:
    """Say that nothing more will come; an SSLSocket's own shutdown() would take the TLS away, too."""
    socket.socket.shutdown(client, socket.SHUT_WR)


def pass_through(served: Served, number: int, tls: ssl.SSLContext | None = None) -> None:
    """Use a connection in one of the ways. Many addresses take turns: a closed one keeps its port a minute."""
    way = WAYS[number % len(WAYS)]
    client = served.connect(f"127.0.{number // 200 % 200}.{number % 200 + 1}")
    if tls is not None and way != "none":
        client = tls.wrap_socket(client, server_hostname="localhost")
    with client:
        if way in {"silent", "none"}:
            if way == "silent":
                half_close(client)
            return
        with contextlib.suppress(ConnectionError):
            client.sendall(b"echo\nhello\n" if way in {"echo", "half", "reset", "broken"} else f"{way}\n".encode())
            if way == "half":
                half_close(client)
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


def check(served: Served, many: int, tls: ssl.SSLContext | None = None, kept: int = 0) -> None:
    """Count what the server holds before so many connections and after; so many records of ended ones may be kept."""
    for number in range(WARM):
        pass_through(served, number, tls)
    before = settled(served)
    for number in range(many):
        pass_through(served, number, tls)
    after = settled(served)
    grown = [new - old for new, old in zip(after["references"], before["references"], strict=True)]
    print(many, {name: (before[name], after[name]) for name in before if name != "references"}, "references", grown)
    assert after["descriptors"] == before["descriptors"]
    assert after["threads"] <= max(before["threads"], MOST_THREADS)
    threads = max(after["threads"] - before["threads"], 0)
    slack = threads * THREAD_OBJECTS + kept * RECORD_OBJECTS
    assert after["objects"] - before["objects"] <= SLACK_OBJECTS + slack
    assert after["blocks"] - before["blocks"] <= SLACK_BLOCKS + kept * RECORD_BLOCKS
    assert after["rss"] - before["rss"] <= SLACK_BYTES
    assert max(grown) <= SLACK_REFERENCES + kept, grown


@pytest.mark.parametrize(
    "engine, hub, work", [(*host.values, "ends") for host in HOSTS] + [("asyncio", None, "asyncends")]
)
def test_nothing_is_left_of_a_connection(engine: str, hub: str | None, work: str, serve: Serve) -> None:
    """Descriptors, threads, objects, memory and the references to what is shared are as many afterwards as before."""
    check(serve(engine, hub, work), MANY if engine != "fork" or FULL else MANY // 8)  # a process each


GREEN = [host for host in HOSTS if host.values[0] == "green"]


@pytest.mark.parametrize("engine, hub", GREEN)
def test_nothing_is_left_of_one_that_is_guarded(engine: str, hub: str | None, serve: Serve) -> None:
    """By limits and deadlines, none of which it meets."""
    check(serve(engine, hub, "ends", **GUARDED), MANY, kept=2 * FEW)


@pytest.mark.parametrize("engine, hub", GREEN)
def test_nothing_is_left_of_one_under_tls(engine: str, hub: str | None, serve: Serve, tmp_path: Path) -> None:
    """Nor of a handshake that the client breaks off."""
    authority = trustme.CA()
    pem = tmp_path / "server.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(pem)
    tls = ssl.create_default_context()
    authority.configure_trust(tls)
    many = MANY if FULL else MANY // 4  # a handshake costs both sides
    check(serve(engine, hub, "ends", tls_cert=str(pem), tls_key=str(pem)), many, tls)
