"""What happens beyond the bounds of the pool and fork engines, under each policy."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import harken

from .kit import LOCAL, PATIENCE, Echo, Seen, connect, ends, exchange, fate, is_silent, receive, running, seeing


@contextlib.contextmanager
def full_pool(**settings: Any) -> Iterator[tuple[Any, Seen, socket.socket, socket.socket]]:
    """Give a pool server with one handler busy and one connection queued: server, events, and those two clients."""
    server = harken.PoolTCPServer(LOCAL, Echo, pool_size=1, pool_queue=1, **settings)
    with seeing("opened", "closed", "paused", "resumed", "rejected") as seen, running(server):
        with connect(server.server_address) as busy, connect(server.server_address) as queued:
            exchange(busy)
            seen.wait("opened", 2)
            yield server, seen, busy, queued


def test_wait_leaves_connections_in_the_backlog() -> None:
    """``wait``: nobody is refused, and each is served when its turn comes; one event each way."""
    with full_pool() as (server, seen, busy, queued), connect(server.server_address) as third:
        third.sendall(b"hello")
        assert is_silent(third)
        assert len(seen.of("opened")) == 2
        assert len(seen.wait("paused")) == 1
        busy.close()
        exchange(queued)
        queued.close()
        assert receive(third, 5) == b"hello"
        assert len(seen.wait("resumed")) == 1
        assert seen.of("rejected") == []


def test_reset_refuses_at_once() -> None:
    """``reset``: the connection beyond is reset, those within are served on, and later ones too."""
    with full_pool(overload="reset") as (server, seen, busy, queued):
        assert fate(server.server_address) == "reset"
        assert seen.wait("rejected")[0].reason == "overload"
        exchange(busy)
        busy.close()
        exchange(queued)
        with connect(server.server_address) as later:
            queued.close()
            exchange(later)


def test_reply_says_why() -> None:
    """``reply``: the connection beyond gets the reply and its end."""
    with full_pool(overload="reply", overload_reply=b"come back later\n") as (server, seen, busy, _queued):
        with connect(server.server_address) as third:
            assert receive(third, 100) == b"come back later\n"
        assert len(seen.wait("rejected")) == 1
        exchange(busy)


def test_reply_reaches_a_client_that_has_written() -> None:
    """``reply``: the reply is not lost to a reset when the client's request lies unread."""
    with full_pool(overload="reply", overload_reply=b"come back later\n") as (server, seen, _busy, _queued):
        with connect(server.server_address) as third:
            third.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert len(seen.wait("rejected")) == 1
            assert receive(third, 100) == b"come back later\n"


def test_shed_closes_the_longest_idle() -> None:
    """``shed``: room is made by the connection that was idle longest, and the new one is served."""
    server = harken.PoolTCPServer(LOCAL, Echo, pool_size=2, pool_queue=0, overload="shed")
    with seeing("opened", "closed") as seen, running(server):
        with connect(server.server_address) as idle, connect(server.server_address) as lively:
            exchange(idle)
            exchange(lively)
            deadline = time.monotonic() + 0.3  # the kernel counts idle time in milliseconds
            while time.monotonic() < deadline:
                exchange(lively)
            with connect(server.server_address) as third:
                exchange(third)
                assert ends(idle) in ("closed", "reset")
                exchange(lively)
            assert seen.wait("closed")[0].reason == "shed"
            assert seen.of("closed")[0].connection == seen.of("opened")[0].connection


def test_a_larger_pool_takes_whoever_waits() -> None:
    """``configure(pool_size=…)`` on a full pool lets those in who wait in the backlog."""
    with full_pool() as (server, seen, _busy, queued), connect(server.server_address) as third:
        third.sendall(b"hello")
        assert seen.wait("paused")
        server.configure(pool_size=3)
        exchange(queued)
        assert receive(third, 5) == b"hello"


@contextlib.contextmanager
def all_children() -> Iterator[tuple[Any, Seen, socket.socket]]:
    """Give a fork server whose only child is busy: server, events, and the child's client."""

    class Server(harken.ForkingTCPServer):
        max_children = 1

    with seeing("opened", "closed", "paused", "resumed") as seen, running(Server(LOCAL, Echo)) as server:
        with connect(server.server_address) as busy:
            exchange(busy)
            yield server, seen, busy


def test_shutdown_at_max_children() -> None:
    """At ``max_children``, with somebody waiting, the loop is not blocked: ``shutdown()`` returns at once."""
    with all_children() as (server, seen, busy), connect(server.server_address) as second:
        assert seen.wait("paused")
        began = time.monotonic()
        stopper = threading.Thread(target=server.shutdown, daemon=True)
        stopper.start()
        stopper.join(PATIENCE)
        assert not stopper.is_alive()
        assert time.monotonic() - began < 3.0
        exchange(busy)
        second.close()
        busy.shutdown(socket.SHUT_WR)


def test_a_free_slot_is_used_at_once() -> None:
    """When the child ends, the connection that waited is served, without waiting for the loop's next turn."""
    with all_children() as (server, seen, busy), connect(server.server_address) as second:
        second.sendall(b"hello")
        assert seen.wait("paused")
        began = time.monotonic()
        busy.shutdown(socket.SHUT_WR)
        assert receive(second, 5) == b"hello"
        assert time.monotonic() - began < 5.0
        assert len(seen.wait("resumed")) == 1
        second.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("policy", ["reset", "reply"])
def test_policies_hold_for_children(policy: str) -> None:
    """``overload`` speaks of ``max_children`` as it does of the pool."""

    class Server(harken.ForkingTCPServer):
        max_children = 1
        overload = policy
        overload_reply = b"busy\n"

    with running(Server(LOCAL, Echo)) as server, connect(server.server_address) as busy:
        exchange(busy)
        assert fate(server.server_address) == ("reset" if policy == "reset" else "closed")
        busy.shutdown(socket.SHUT_WR)
