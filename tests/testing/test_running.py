"""``testing.serve`` and ``testing.connect``: handlers under test, on a free port and on none."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

import pytest
from waiting import wait_until

import harken
from harken import events, testing
from harken.process.worker import Worker


class Upper(harken.StreamRequestHandler):
    """Answers each line in capitals."""

    def handle(self) -> None:
        """Answer."""
        for line in self.rfile:
            self.wfile.write(line.upper())


class Failing(harken.BaseRequestHandler):
    """Raises on the first byte."""

    def handle(self) -> None:
        """Raise."""
        self.request.recv(1)
        raise ValueError("on purpose")


@pytest.mark.parametrize("engine", ["inline", "thread", "pool", "fork"])
def test_serve_gives_a_running_server(engine: str) -> None:
    """The server is reachable at ``address`` as soon as the block begins, on each engine, and not after it."""
    with testing.serve(Upper, engine=engine) as served:
        with served.connect() as client, client.makefile("rb") as lines:
            client.sendall(b"hello\n")
            assert lines.readline() == b"HELLO\n"
            client.shutdown(socket.SHUT_WR)
        host, port = served.address
        assert served.url == f"tcp://{host}:{port}"
        assert served.server.stats()["engine"] == engine
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port)).close()


def test_serve_on_several_addresses(tmp_path: Any) -> None:
    """Addresses are URLs, and each has a server."""
    path = tmp_path / "upper.sock"
    with testing.serve(Upper, "tcp://127.0.0.1:0", f"unix:{path}") as served:
        assert served.urls[1] == f"unix:{path}"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"hi\n")
            assert client.recv(10) == b"HI\n"
    assert not path.exists()


@pytest.mark.parametrize("engine", ["inline", "thread", "pool", "fork"])
def test_leaving_serve_cuts_who_is_connected(engine: str) -> None:
    """A client that stays does not hold the test up."""
    with testing.serve(Upper, engine=engine) as served:
        client = served.connect()
        client.sendall(b"hello\n")
        assert client.recv(10) == b"HELLO\n"
    with client:
        assert client.recv(1) == b""


def test_serve_keeps_what_handlers_raised() -> None:
    """``errors`` has the exceptions, so that a test can look."""
    failed = threading.Event()
    with testing.serve(Failing) as served:
        unsubscribe = events.subscribe(lambda _event: failed.set(), "closed")
        with served.connect() as client:
            client.sendall(b"x")
            assert client.recv(1) == b""
            assert failed.wait(10)
        unsubscribe()
        assert [str(error) for error in served.errors] == ["on purpose"]


def test_serve_refuses_a_wrong_setting() -> None:
    """Settings are checked as everywhere, and nothing stays open."""
    with pytest.raises(harken.ConfigError, match="pool_size"), testing.serve(Upper, pool_siez=3):
        pytest.fail("it was taken")


def test_connect_needs_no_port() -> None:
    """The handler talks to the client over a socket pair, and sees the address it is told."""

    class Tell(harken.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(f"{self.client_address} {self.connection_id is not None} {self.draining}".encode())

    with testing.connect(Tell, client_address=("192.0.2.1", 7)) as client:
        assert client.recv(100) == b"('192.0.2.1', 7) True False"
        assert client.recv(100) == b""


def test_what_keeps_a_server_from_serving_is_told_at_once() -> None:
    """Also where it is found out only when the loop begins."""
    with pytest.raises(harken.ConfigError, match="cannot load 'no.such:Limit'"):
        with testing.serve(Upper, limits=["no.such:Limit"]):
            pytest.fail("it serves")


@pytest.mark.parametrize("engine", ["inline", "thread", "pool", "fork", "green"])
def test_the_loop_turns_when_the_block_begins(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a listener may be replaced: while doors begin to be watched it would have no descriptor for a moment."""
    turns = []
    tick = Worker._tick

    def count(worker: Worker) -> None:
        turns.append(worker)
        tick(worker)

    monkeypatch.setattr(Worker, "_tick", count)
    with testing.serve(Upper, engine=engine):
        assert turns


def test_what_ends_a_server_early_is_raised_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would only be seen on stderr, if at all."""
    broken = threading.Event()
    tick = Worker._tick

    def break_down(worker: Worker) -> None:
        tick(worker)
        if broken.is_set():
            raise RuntimeError("on purpose")

    monkeypatch.setattr(Worker, "_tick", break_down)
    with pytest.raises(RuntimeError, match="on purpose"):
        with testing.serve(Upper) as served:
            broken.set()
            served.server.serving.wake()
            wait_until(lambda: not served.server.wait_ready(0))


@pytest.mark.parametrize(
    ("address", "told"),
    [
        (("192.0.2.1", 7), "192.0.2.1 7 AF_INET 192.0.2.1:7"),
        (("2001:db8::1", 7, 0, 0), "2001:db8::1 7 AF_INET6 [2001:db8::1]:7"),
        ("/run/client", f"/run/client 0 AF_UNIX unix pid {os.getpid()} uid {os.getuid()} /run/client"),
    ],
    ids=["IPv4", "IPv6", "Unix"],
)
def test_the_peer_is_the_client_that_was_asked_for(address: object, told: str) -> None:
    """Not the socket pair that stands in for its connection."""

    class Tell(harken.BaseRequestHandler):
        def handle(self) -> None:
            peer = self.peer
            self.request.sendall(f"{peer.address} {peer.port} {socket.AddressFamily(peer.family).name} {peer}".encode())

    with testing.connect(Tell, client_address=address) as client:
        assert client.recv(200).decode() == told


def test_connect_serves_stream_handlers_with_files() -> None:
    """``rfile`` and ``wfile`` work, and a file of the client's that is still open keeps nobody waiting."""
    with testing.connect(Upper) as client:
        lines = client.makefile("rb")
        client.sendall(b"one\ntwo\n")
        assert [lines.readline(), lines.readline()] == [b"ONE\n", b"TWO\n"]
    lines.close()


def test_leaving_connect_raises_what_the_handler_raised() -> None:
    """A test cannot overlook that its handler failed; ``error`` has it for one that expects it."""
    with pytest.raises(ValueError, match="on purpose"), testing.connect(Failing) as client:
        client.sendall(b"x")
        assert client.recv(1) == b""
    assert isinstance(client.error, ValueError)


def test_a_client_whose_connection_ended_by_the_handler_s_failure_is_told_of_that() -> None:
    """What the handler left unread resets the connection: that reset would hide the failure."""
    with pytest.raises(ValueError, match="on purpose"), testing.connect(Failing) as client:
        client.sendall(b"xx")
        raise ConnectionResetError("as recv() does, unless it is quicker")


def test_leaving_connect_raises_what_is_no_exception_either() -> None:
    """As ``pytest.fail()`` in a handler raises; SystemExit ends the connection alone."""

    class Judging(harken.BaseRequestHandler):
        def handle(self) -> None:
            if self.request.recv(4) == b"fail":
                pytest.fail("as the handler found")
            raise SystemExit(3)

    with pytest.raises(pytest.fail.Exception, match="as the handler found"), testing.connect(Judging) as client:
        client.sendall(b"fail")
        assert client.recv(1) == b""
    with testing.connect(Judging) as client:
        client.sendall(b"exit")
        assert client.recv(1) == b""


def test_a_failed_assertion_is_told_what_the_handler_raised() -> None:
    """The test fails by its own words, and says why."""
    with pytest.raises(AssertionError) as caught, testing.connect(Failing) as client:
        client.sendall(b"x")
        raise AssertionError("no answer")
    (note,) = caught.value.__notes__
    assert note.startswith("The handler had raised:\nTraceback")
    assert note.endswith("ValueError: on purpose")


def test_connect_says_where_async_handlers_go() -> None:
    """It has no event loop for them."""

    class Async(harken.AsyncRequestHandler):
        async def handle(self) -> None:
            await self.request.sendall(b"x")

    with pytest.raises(harken.ConfigError, match=r"Async is async, and connect\(\) has no event loop"):
        testing.connect(Async)


def test_a_client_that_leaves_is_no_error() -> None:
    """That the client went away while the handler wrote is not the handler's failure."""

    class Endless(harken.BaseRequestHandler):
        def handle(self) -> None:
            while True:
                self.request.sendall(bytes(65536))

    with testing.connect(Endless) as client:
        client.recv(10)
    assert client.error is None


def test_a_handler_that_does_not_end_is_told() -> None:
    """Closing waits for the handler, and not for ever."""
    release = threading.Event()

    class Stuck(harken.BaseRequestHandler):
        def handle(self) -> None:
            release.wait(10)

    client = testing.connect(Stuck)
    client._patience = 0.1
    thread = client._thread
    assert thread is not None
    with pytest.raises(harken.LifecycleError, match=r"still ran 0\.1 s"):
        client.close()
    release.set()
    thread.join(10)


class WhoAsks(harken.BaseRequestHandler):
    """Says who the client is."""

    def handle(self) -> None:
        """Say it."""
        proxy = self.peer.proxy
        assert proxy is not None
        self.request.sendall(f"{self.client_address} {self.peer} {proxy.authority}".encode())


PROXY = harken.ProxyHeader.make(("192.0.2.1", 56324), ("192.0.2.2", 443), authority="a.example")
CLIENT = b"('192.0.2.1', 56324) 192.0.2.1:56324 a.example"


@pytest.mark.parametrize("engine", ["inline", "thread", "pool", "fork", "green"])
def test_a_client_may_come_by_a_proxy(engine: str) -> None:
    """``connect(proxy=…)`` sends the header first, as a proxy would."""
    with testing.serve(WhoAsks, engine=engine, proxy="v2", proxy_from=["127.0.0.1"]) as served:
        with served.connect(proxy=PROXY) as client:
            assert client.recv(100) == CLIENT


def test_a_portless_client_may_come_by_a_proxy() -> None:
    """The handler sees the client of the header, without a server's settings."""
    with testing.connect(WhoAsks, proxy=PROXY) as client:
        assert client.recv(100) == CLIENT


def test_a_header_that_cannot_be_sent_opens_nothing() -> None:
    """The mistake is told to the test, and no socket is left."""
    wrong = harken.ProxyHeader(("localhost", 1), ("192.0.2.1", 1))
    with pytest.raises(harken.ConfigError, match="localhost"):
        testing.connect(WhoAsks, proxy=wrong)
    with testing.serve(WhoAsks, proxy="v2", proxy_from=["127.0.0.1"]) as served:
        with pytest.raises(harken.ConfigError, match="localhost"):
            served.connect(proxy=wrong)
