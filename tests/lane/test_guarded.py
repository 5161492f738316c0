"""Connections that compiled code takes from door to end obey limits and deadlines like all others."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from waiting import wait_until

import harken
from harken import deadlines, events
from harken.peer import Peer
from harken.serving import serving_of

from .kit import PATIENCE, Echo, connect, visit

SHORT = 0.2  # seconds of a deadline


class Turnstile:
    """A limit that lets in while it is open, and counts."""

    def __init__(self) -> None:
        self.open = True
        self.inside: list[Peer] = []
        self.come = 0

    def admit(self, peer: Peer) -> str | None:
        """Count it in."""
        if not self.open:
            return "closed today"
        self.come += 1
        self.inside.append(peer)
        return None

    def release(self, peer: Peer) -> None:
        """Count it out: the very peer that was let in."""
        self.inside.remove(peer)


def serving(**settings: Any) -> Any:
    """Return a started server; of its first connection on, compiled code may take them."""
    return harken.background(harken.GreenTCPServer(("127.0.0.1", 0), Echo, **settings))


@contextmanager
def heard(callback: Callable[[Any], object], *names: str) -> Iterator[None]:
    """Subscribe while the block runs."""
    unsubscribe = events.subscribe(callback, *names)
    try:
        yield
    finally:
        unsubscribe()


def meet_a_reset(server: Any) -> None:
    """Come, and be turned away, perhaps while connect() looks how it went."""
    with pytest.raises(ConnectionResetError), socket.create_connection(server.server_address, PATIENCE) as client:
        client.recv(1)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_connections": 1000},
        {"max_connections_per_peer": 1000, "deny": ["192.0.2.0/24"], "max_accept_rate": 1000},
        {"idle_timeout": 60.0, "write_timeout": 60.0, "lifetime": 60.0, "max_write_buffer": 1 << 20},
        {"read_timeout": 60.0, "handler_timeout": 60.0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_guards_a_server_leaves_its_connections_without_records(
    settings: dict[str, Any], closed_by_python: list[Any]
) -> None:
    """What operators set costs a short connection no more than the questions that are asked."""
    with serving(**settings) as server:
        visit(server)
        closed_by_python.clear()
        visit(server)
        assert closed_by_python == []


def test_a_limit_is_told_once_of_each_end(closed_by_python: list[Any]) -> None:
    """Whether the connection had a record or not, and whoever closed it."""
    turnstile = Turnstile()
    with serving(limits=[turnstile]) as server:
        visit(server)
        closed_by_python.clear()  # the first has a record
        for _ in range(2):
            visit(server)
        assert (turnstile.come, turnstile.inside, closed_by_python) == (3, [], [])
        known, unknown = connect(server), connect(server)
        port = known.getsockname()[1]
        (info,) = (info for info in server.connections() if info.peer.port == port)
        assert {peer.port for peer in turnstile.inside} == {port, unknown.getsockname()[1]}
        assert server.close_connection(info.id)
        wait_until(lambda: [peer.port for peer in turnstile.inside] == [unknown.getsockname()[1]])
        unknown.close()
        wait_until(lambda: not turnstile.inside)
        known.close()
        assert serving_of(server).bounds.admission.crowd.inside == 0


def test_a_handler_that_closes_its_connection_gives_its_place_back() -> None:
    """And one that raises."""
    turnstile = Turnstile()

    class Closing(harken.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1)
            self.request.close()
            raise ValueError("after that")

    with harken.background(harken.GreenTCPServer(("127.0.0.1", 0), Closing, limits=[turnstile])) as server:
        server.handle_error = lambda request, client_address: None
        for count in range(1, 4):
            with socket.create_connection(server.server_address, PATIENCE) as client:
                client.sendall(b"x")
                assert client.recv(1) == b""
            wait_until(lambda: not turnstile.inside)
            assert turnstile.come == count


def test_one_that_a_limit_refuses_is_on_record() -> None:
    """It is counted, reset, and told of with an id, as on every other way."""
    turnstile = Turnstile()
    told: list[Any] = []
    with serving(limits=[turnstile]) as server, heard(told.append, "rejected"):
        visit(server)
        turnstile.open = False
        meet_a_reset(server)
        wait_until(lambda: told and not len(serving_of(server).connections))
        assert (told[0].reason, told[0].peer.port > 0, bool(told[0].connection)) == ("closed today", True, True)
        figures = server.stats()
        assert (figures["accepted_total"], figures["open"]) == (2, 0)
        assert (figures["rejected_total"], figures["closed_total"]) == (1, {"peer_closed": 1})
        turnstile.open = True
        visit(server)


def test_a_limit_that_raises_refuses_the_connection(capsys: pytest.CaptureFixture[str]) -> None:
    """As one that says no; stderr shows why, and the server goes on."""

    class Broken(Turnstile):
        def admit(self, peer: Peer) -> str | None:
            if not self.open:
                raise ValueError("broken limit")
            return super().admit(peer)

    limit = Broken()
    with serving(limits=[limit]) as server:
        visit(server)
        limit.open = False
        meet_a_reset(server)
        assert server.stats()["rejected_by_reason"] == {"limit_failed": 1}
        limit.open = True
        visit(server)
        assert "broken limit" in capsys.readouterr().err
        assert (limit.come, limit.inside) == (2, [])
        assert serving_of(server).bounds.admission.crowd.inside == 0


def test_the_last_place_is_waited_for() -> None:
    """No more are inside than may be, and whoever leaves lets the next one in at once."""
    with serving(max_connections=3) as server:
        visit(server)
        inside = [connect(server) for _ in range(3)]
        with socket.create_connection(server.server_address, PATIENCE) as waiting:
            waiting.sendall(b"x")
            wait_until(lambda: serving_of(server).acceptor.paused)
            assert (server.stats()["open"], serving_of(server).connections.waiting) == (3, 1)
            inside.pop().close()
            assert waiting.recv(1) == b"x"
            wait_until(lambda: server.stats()["open"] == 3)
        for client in inside:
            client.close()
        wait_until(lambda: not len(serving_of(server).connections))
        assert serving_of(server).connections.waiting == 0
        assert serving_of(server).bounds.admission.crowd.inside == 0


def test_a_limit_that_is_set_later_counts_those_inside() -> None:
    """Those that came before have no ticket; they get one."""
    with serving() as server:
        visit(server)
        inside = [connect(server) for _ in range(3)]
        server.configure(max_connections=10, max_connections_per_peer=4)
        assert serving_of(server).bounds.admission.crowd.inside == 3
        inside.append(connect(server))
        meet_a_reset(server)
        for client in inside:
            client.close()
        wait_until(lambda: serving_of(server).bounds.admission.crowd.inside == 0)


@pytest.mark.parametrize("which", ["idle_timeout", "read_timeout", "lifetime", "handler_timeout"])
def test_deadlines_find_those_that_nobody_told_of(which: str) -> None:
    """All of many, which came one by one and all at once."""
    over: list[Any] = []
    with serving(**{which: SHORT}) as server, heard(over.append, "timed_out"):
        visit(server)
        clients = [connect(server) for _ in range(20)]
        ports = {client.getsockname()[1] for client in clients}
        for client in clients:
            if which == "handler_timeout":
                client.sendall(b"?")
        for client in clients:
            assert client.recv(1) == b""
            client.close()
        wait_until(lambda: ports <= {event.peer.port for event in over})
        assert {event.which for event in over} == {which}


def test_a_write_that_is_stuck_is_found() -> None:
    """Of a connection that nobody told of."""
    over: list[Any] = []

    class Pour(harken.BaseRequestHandler):
        def handle(self) -> None:
            if self.request.recv(1) == b"!":
                self.request.sendall(bytes(1 << 26))

    with harken.background(harken.GreenTCPServer(("127.0.0.1", 0), Pour, write_timeout=SHORT)) as server:
        with heard(over.append, "timed_out"):
            with socket.create_connection(server.server_address, PATIENCE) as client:
                client.sendall(b".")
                assert client.recv(1) == b""
            with socket.create_connection(server.server_address, PATIENCE) as client:
                client.sendall(b"!")
                wait_until(lambda: over)
        assert [event.which for event in over] == ["write_timeout"]


def test_nobody_looks_for_connections_that_cannot_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A while after the last one the looks end, and the next connection begins them again."""
    monkeypatch.setattr(deadlines, "EXPECTED_SECONDS", 0.05)
    for settings in ({"idle_timeout": SHORT}, {"write_timeout": SHORT}):
        with serving(**settings) as server:
            watched = serving_of(server).bounds.deadlines
            for _ in range(2):
                visit(server)
                visit(server)
                assert watched._sampling is not None
                wait_until(lambda: watched._sampling is None)  # noqa: B023 - at once


def test_those_that_have_ended_are_weeded_out() -> None:
    """However many came whose deadline is far away."""
    with serving(lifetime=60.0) as server:
        watched = serving_of(server).bounds.deadlines
        stays = connect(server)
        for _ in range(3 * deadlines.FEW):
            with connect(server):
                assert len(server.connections()) >= 2  # which makes their records
        assert len(watched._heap) <= deadlines.FEW
        (info,) = (info for info in server.connections() if info.peer.port == stays.getsockname()[1])
        assert any(record.id == info.id for _, _, record in watched._heap)
        stays.close()


def test_two_servers_share_the_places_that_are_left(make_pair: Callable[..., tuple[Any, Any]]) -> None:
    """Near the limit nobody lets in without looking."""
    one, other = make_pair(max_connections=100)
    visit(one)
    visit(other)
    admission = serving_of(one).bounds.admission
    assert admission is serving_of(other).bounds.admission
    assert admission.spare(1000) == 0
    inside = [connect(server) for server in (one, other) for _ in range(50)]
    assert admission.full
    for client in inside:
        client.close()
    wait_until(lambda: admission.crowd.inside == 0)


@pytest.fixture
def make_pair(request: pytest.FixtureRequest) -> Callable[..., tuple[Any, Any]]:
    """Two started servers over which the limits of the first hold."""

    def make(**settings: Any) -> tuple[Any, Any]:
        made = [harken.GreenTCPServer(("127.0.0.1", 0), Echo, **settings) for _ in range(2)]
        serving_of(made[1]).bounds.share(serving_of(made[0]).bounds)
        threads = [threading.Thread(target=server.serve_forever) for server in made]
        for server, thread in zip(made, threads, strict=True):
            thread.start()
            request.addfinalizer(server.server_close)
            request.addfinalizer(thread.join)
            request.addfinalizer(server.shutdown)
            assert serving_of(server).ready.wait(PATIENCE)
        return made[0], made[1]

    return make
