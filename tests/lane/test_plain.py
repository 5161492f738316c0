"""Connections that compiled code takes from door to end behave as all others, and nobody finds one of them missing."""

from __future__ import annotations

import contextvars
import gc
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from greenlet import getcurrent, greenlet
from waiting import wait_until

import harken
from harken import _hub, events, straight
from harken.serving import serving_of

from .kit import PATIENCE, Echo, connect, visit


@pytest.fixture
def server() -> Iterator[Any]:
    """A server that is past its first connection, for which Python looks whether there are deadlines."""
    with harken.background(harken.GreenTCPServer(("127.0.0.1", 0), Echo)) as started:
        visit(started)
        yield started


def serving_class(handle: Callable[[Any], None]) -> Any:
    """Return a started server of a handler that does so first, and then echoes."""

    class Handler(Echo):
        def handle(self) -> None:
            handle(self)
            super().handle()

    return harken.background(harken.GreenTCPServer(("127.0.0.1", 0), Handler))


def test_a_record_is_made_when_somebody_asks(server: Any) -> None:
    """Until then there is none; then it is one, and stays that until the end."""
    known = serving_of(server).connections
    clients = [connect(server) for _ in range(3)]
    assert (len(known), known.filed) == (3, {})
    first, second = server.connections(), server.connections()
    assert [info.id for info in first] == [info.id for info in second]
    assert len({info.id for info in first}) == 3
    assert {info.peer.port for info in first} == {client.getsockname()[1] for client in clients}
    assert len(known.filed) == 3
    for client in clients:
        client.close()
    wait_until(lambda: not len(known))
    assert server.stats()["closed_total"] == {"peer_closed": 4}


def test_those_that_end_unasked_are_counted(server: Any) -> None:
    """By reason, and with no record at all."""
    for _ in range(5):
        visit(server)
    client = connect(server)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    wait_until(lambda: not len(serving_of(server).connections))
    figures = server.stats()
    assert (figures["accepted_total"], figures["open"]) == (7, 0)
    assert figures["closed_total"] == {"peer_closed": 6, "peer_reset": 1}


def test_an_end_that_nobody_waits_for_is_no_call_of_pythons(closed_by_python: list[Any]) -> None:
    """On every version of Python; while somebody waits for ends, each is one."""
    with harken.background(harken.GreenTCPServer(("127.0.0.1", 0), Echo)) as server:
        visit(server)
        closed_by_python.clear()  # the first has a record
        for _ in range(3):
            visit(server)
        assert not closed_by_python
        known = serving_of(server).connections
        known.await_ends(1)
        visit(server)
        known.await_ends(-1)
        assert len(closed_by_python) == 1


def test_who_comes_soon_is_let_in_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every version of Python: server and handler class are seen to be as they were."""
    asked = 0
    take_by = straight._take_by

    def note(*args: Any) -> bool | None:
        nonlocal asked
        server = args[1].server
        before = server.stats()["accepted_total"]
        more = take_by(*args)
        asked += server.stats()["accepted_total"] - before
        return more

    monkeypatch.setattr(straight, "_take_by", note)
    with harken.background(harken.GreenTCPServer(("127.0.0.1", 0), Echo)) as server:
        visit(server)
        asked, come = 0, server.stats()["accepted_total"]

        def unasked() -> bool:
            visit(server)
            return asked < server.stats()["accepted_total"] - come

        wait_until(unasked)


def test_nobody_is_looked_for_who_was_let_in_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """A green thread that waits while the loop is at the door does not bring it the door again."""
    found = []
    take_by = straight._take_by

    def note(*args: Any) -> bool | None:
        server = args[1].server
        before = server.stats()["accepted_total"]
        more = take_by(*args)
        found.append(server.stats()["accepted_total"] - before)
        return more

    monkeypatch.setattr(straight, "_take_by", note)
    with harken.background(harken.GreenTCPServer(("127.0.0.1", 0), Echo)) as server:
        for _ in range(20):
            visit(server)
        assert found
        assert 0 not in found


def test_a_handler_that_returns_first_is_the_reason() -> None:
    """The kernel is asked where no read has told of the peer's end."""

    class Once(harken.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(self.request.recv(1))

    with harken.background(harken.GreenTCPServer(("127.0.0.1", 0), Once)) as server:
        for _ in range(3):
            client = connect(server)
            assert client.recv(1) == b""
            client.close()
        wait_until(lambda: server.stats()["closed_total"] == {"handler_returned": 3})


def test_one_can_be_closed_by_its_id(server: Any) -> None:
    """It is found although nobody had asked for it."""
    client = connect(server)
    (info,) = server.connections()
    server.close_connection(info.id)
    assert client.recv(1) == b""
    client.close()
    wait_until(lambda: server.stats()["closed_total"].get("killed") == 1)


def test_who_subscribes_is_told_of_the_next_one(server: Any) -> None:
    """Even at once after a connection that nobody was told of."""
    seen: list[str] = []
    visit(server)
    end = events.subscribe(lambda event: seen.append(event.name), "accepted", "opened", "closed")
    try:
        visit(server)
        wait_until(lambda: "closed" in seen)
    finally:
        end()
    assert seen == ["accepted", "opened", "closed"]


def test_an_end_is_told_of_to_who_subscribed_meanwhile(server: Any) -> None:
    """The connection had come before."""
    seen: list[Any] = []
    client = connect(server)
    end = events.subscribe(seen.append, "closed")
    try:
        port = client.getsockname()[1]
        client.close()
        wait_until(lambda: seen)
    finally:
        end()
    assert (seen[0].reason, seen[0].peer.port) == ("peer_closed", port)


def test_green_threads_are_used_again() -> None:
    """One after the other the same serves."""
    seen: list[int] = []
    with serving_class(lambda _: seen.append(id(getcurrent()))) as server:
        for _ in range(6):
            visit(server)
    assert len(set(seen[1:])) == 1


@pytest.mark.parametrize("how", ["kept", "referred to weakly", "given an attribute"])
def test_one_that_somebody_knows_is_used_no_more(how: str) -> None:
    """Who holds it could throw something into it, or take it for its first connection's: it ends, as a thread does."""
    known: list[Any] = []

    def note(_: Any) -> None:
        if not known:
            green: Any = getcurrent()
            if how == "given an attribute":
                green.mine = True
            known.append(weakref.ref(green) if how == "referred to weakly" else green)
        else:
            found = known[0]() if how == "referred to weakly" else known[0]
            known.append(found is getcurrent())
            if how == "given an attribute":
                known[0] = found = None

    with serving_class(note) as server:
        for _ in range(3):
            visit(server)
        assert known[1:] == [False, False]
        if how == "kept":
            wait_until(lambda: known[0].dead)


def test_each_connection_has_a_context_of_its_own() -> None:
    """What one handler sets the next one does not find."""
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
    seen: list[int] = []

    def note(_: Any) -> None:
        seen.append(variable.get())
        variable.set(7)

    with serving_class(note) as server:
        for _ in range(4):
            visit(server)
    assert seen == [0, 0, 0, 0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [ValueError("a fault"), SystemExit(3)])
def test_a_handler_that_raises_ends_alone(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    """Its connection is closed, and the same green thread serves the next."""

    def fail(handler: Any) -> None:
        if handler.request.recv(1) == b"!":
            raise error
        handler.request.sendall(b"x")

    with serving_class(fail) as server:
        for _ in range(2):
            with socket.create_connection(server.server_address, PATIENCE) as client:
                client.sendall(b"!")
                assert client.recv(1) == b""
        connect(server).close()
        wait_until(lambda: not len(serving_of(server).connections))
    assert ("a fault" in capsys.readouterr().err) == isinstance(error, ValueError)


def test_nobody_is_lost_while_others_ask(server: Any) -> None:
    """Records are made by other threads while connections come and go: each ends once, and none stays."""
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            server.connections()

    before = server.stats()["accepted_total"]
    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    try:
        for _ in range(150):
            connect(server).close()
    finally:
        over.set()
        for thread in asking:
            thread.join()
    wait_until(lambda: not len(serving_of(server).connections))
    figures = server.stats()
    assert figures["accepted_total"] - before == 150
    assert sum(figures["closed_total"].values()) == figures["accepted_total"]
    assert not server.connections()


def test_a_drain_counts_them(server: Any) -> None:
    """Those that nobody had asked for leave, and are reported."""
    clients = [connect(server) for _ in range(3)]
    report = server.drain(5)
    assert (report.left, report.cut) == (3, 0)
    for client in clients:
        assert client.recv(1) == b""
        client.close()


def test_a_paused_door_forgets_nobody(server: Any) -> None:
    """Each time the door is watched anew another lane begins; what the one before had goes on."""
    client = connect(server)
    for _ in range(3):
        server.suspend()
        server.resume()
        visit_beside(server, 1)
    assert len(server.connections()) == 1
    client.close()
    wait_until(lambda: not len(serving_of(server).connections))
    assert server.stats()["closed_total"] == {"peer_closed": 5}
    assert len(serving_of(server).connections.lanes) <= 2  # those that are closed and empty go


def visit_beside(server: Any, others: int) -> None:
    """Come and leave, where others stay."""
    connect(server).close()
    wait_until(lambda: len(serving_of(server).connections) == others)


def living() -> set[int]:
    """Return the green threads that have not ended."""
    gc.collect()
    found = [each for each in gc.get_objects() if isinstance(each, greenlet) and each.parent is not None]
    return {id(each) for each in found if not each.dead}


def test_resting_green_threads_end_with_their_server() -> None:
    """None is left behind."""
    before = living()
    with serving_class(lambda _: None) as server:
        clients = [connect(server) for _ in range(5)]
        for client in clients:
            client.close()
        wait_until(lambda: not len(serving_of(server).connections))
    assert living() <= before


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_one_that_was_let_in_and_not_served_goes_with_its_hub() -> None:
    """What ends the hub comes first in the turn that takes the connection: the client reads the end."""

    class Breaks(Echo):
        def handle(self) -> None:
            server: Any = self.server
            if not server.breaks:
                return super().handle()
            server.late = socket.create_connection(server.server_address, PATIENCE)  # and one attribute more: no trust
            _hub.current().call_soon(sys.exit)
            return None

    def serve() -> None:
        with pytest.raises(SystemExit):
            server.serve_forever()

    server: Any = harken.GreenTCPServer(("127.0.0.1", 0), Breaks)
    with server:
        server.breaks = False
        serves = threading.Thread(target=serve)
        serves.start()
        visit(server)
        server.breaks = True
        with socket.create_connection(server.server_address, PATIENCE):
            serves.join(PATIENCE)
            assert not serves.is_alive()
        with server.late:
            assert server.late.recv(1) == b""
        wait_until(lambda: not len(serving_of(server).connections))
