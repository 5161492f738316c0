"""A server that is full: each answer to the next client."""

import contextlib
import threading

import pytest
from waiting import wait_until

import harken
from harken import intake

from .kit import LOCAL, PATIENCE, Upper, ask, connect, named, serving


def full_pool(**settings):
    """Return a pool server with one thread, no queue."""
    return harken.PoolTCPServer(LOCAL, Upper, pool_size=1, pool_queue=0, **settings)


def test_overload_reset(told):
    """With the pool full the next client is reset, and the first goes on."""
    with serving(full_pool(overload="reset")) as server, connect(server) as first:
        assert ask(first) == b"HELLO"
        with pytest.raises(ConnectionResetError), connect(server) as second:  # connect() itself may be reset
            second.recv(1)
        assert ask(first) == b"HELLO"
        wait_until(lambda: server.stats()["rejected_total"] == 1)
        assert server.stats()["accepted_total"] == 2, "one that is refused was taken from the kernel, too"
    (refused,) = named(told, "rejected")
    assert refused.reason == "overload"
    assert refused.connection in [event.connection for event in named(told, "accepted")]


def test_overload_reply():
    """With the pool full the next client gets the reply and the end."""
    with serving(full_pool(overload="reply", overload_reply=b"busy\n")) as server, connect(server) as first:
        assert ask(first) == b"HELLO"
        with connect(server) as second:
            assert second.recv(100) == b"busy\n"
            assert second.recv(100) == b""


def test_overload_shed(told):
    """The longest idle client makes room for the next."""
    with serving(full_pool(overload="shed")) as server, connect(server) as first:
        assert ask(first) == b"HELLO"
        with connect(server) as second:
            assert ask(second) == b"HELLO"
            assert first.recv(1) == b""
    assert "shed" in [event.reason for event in named(told, "closed")]


def test_who_waits_in_the_queue_is_not_shed():
    """However long: it has no thread that would be free then."""
    with serving(harken.PoolTCPServer(LOCAL, Upper, pool_size=1, pool_queue=1, overload="shed")) as server:
        with connect(server) as first:
            assert ask(first) == b"HELLO"
            with connect(server) as second:
                wait_until(lambda: len(server.connections()) == 2)
                assert ask(first) == b"HELLO"
                with connect(server):
                    assert first.recv(1) == b""
                    assert ask(second) == b"HELLO"


def test_another_is_shed_when_the_first_does_not_go(monkeypatch):
    """Its handler may be slow to notice."""
    go_on = threading.Event()

    class Slow(Upper):
        def handle(self):
            super().handle()
            go_on.wait(PATIENCE)

    monkeypatch.setattr(intake, "SHED_SECONDS", 0.05)
    server = harken.PoolTCPServer(LOCAL, Slow, pool_size=2, pool_queue=0, overload="shed")
    with serving(server, poll_interval=30), connect(server) as first, connect(server) as second:
        try:
            assert [ask(first), ask(second)] == [b"HELLO"] * 2
            with connect(server):
                assert [first.recv(1), second.recv(1)] == [b""] * 2
        finally:
            go_on.set()


def test_overload_wait(told):
    """By default the next client waits in the backlog; one event when that begins and one when it ends."""
    with serving(full_pool()) as server, connect(server) as first:
        assert ask(first) == b"HELLO"
        with connect(server) as second:
            second.sendall(b"second")
            wait_until(lambda: named(told, "paused"))
            assert server.stats()["accepted_total"] == 1
            first.close()
            assert second.recv(100) == b"SECOND"
    assert len(named(told, "paused")) == len(named(told, "resumed")) == 1


def test_another_policy_holds_for_who_waits_already(told):
    """With the pool full; no thread has to become free before it does."""
    with serving(full_pool(), poll_interval=30) as server, connect(server) as first:
        assert ask(first) == b"HELLO"
        with connect(server) as second:
            wait_until(lambda: named(told, "paused"))
            server.configure(overload="reply", overload_reply=b"busy\n")
            assert second.recv(100) == b"busy\n"


def test_a_hook_that_fails_for_one_that_is_turned_away_ends_no_loop():
    """``close_request`` is the program's; what it raises goes to ``handle_error``, as for all others."""
    failed = threading.Event()

    class Server(harken.PoolTCPServer):
        def close_request(self, request):
            super().close_request(request)
            if threading.current_thread().name == "loop":
                raise ZeroDivisionError

        def handle_error(self, request, client_address):
            failed.set()

    server = Server(LOCAL, Upper, pool_size=1, pool_queue=0, overload="reset")
    loop = threading.Thread(target=server.serve_forever, name="loop")
    loop.start()
    assert server.wait_ready(PATIENCE)
    with connect(server) as first:
        assert ask(first) == b"HELLO"
        with contextlib.suppress(ConnectionResetError), connect(server) as second:
            second.recv(1)
        assert failed.wait(PATIENCE)
        assert ask(first) == b"HELLO"
    assert loop.is_alive()
    server.shutdown()
    loop.join(PATIENCE)
    server.server_close()
