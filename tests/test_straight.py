"""Servers that override no hook go straight through, on threads and green ones; nobody can tell, till one overrides."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
from waiting import wait_until

import harken
from harken import events, straight
from harken.acceptor import MAX_ACCEPT
from harken.admission import Admission
from harken.serving import serving_of

PATIENCE = 10.0  # seconds
HOOKS = [
    "get_request",
    "verify_request",
    "process_request",
    "process_request_thread",
    "finish_request",
    "shutdown_request",
    "close_request",
    "service_actions",
]


KINDS = [harken.ThreadingTCPServer, harken.GreenTCPServer]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def server_class(request: pytest.FixtureRequest) -> Any:
    """A server class whose engine takes connections many at a time."""
    return request.param


class Echo(harken.BaseRequestHandler):
    """Sends back what comes."""

    def handle(self) -> None:
        """Echo."""
        while data := self.request.recv(1000):
            self.request.sendall(data)


def ask(server: Any) -> bytes:
    """Send something, end, and return the answer."""
    with socket.create_connection(server.server_address, PATIENCE) as client:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        got = b""
        while part := client.recv(100):
            got += part
        return got


def note(seen: list[str], name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that notes that it was called."""

    def hook(*args: Any) -> Any:
        seen.append(name)
        return plain(*args)

    return hook


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("where", ["subclass", "patched class", "instance"])
def test_every_hook_that_is_overridden_is_called(
    server_class: Any, name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a subclass, on the class while it serves, and on the instance."""
    seen: list[str] = []

    class Server(server_class):
        pass

    if where == "subclass":
        setattr(Server, name, note(seen, name, getattr(server_class, name)))
    with harken.background(Server(("127.0.0.1", 0), Echo)) as server:
        if where != "subclass":
            assert straight.is_straight(serving_of(server))
            assert ask(server) == b"hello"
            assert not seen
        if where == "patched class":
            monkeypatch.setattr(Server, name, note(seen, name, getattr(Server, name)), raising=False)
        elif where == "instance":
            setattr(server, name, note(seen, name, getattr(server, name)))
        assert not straight.is_straight(serving_of(server))
        assert ask(server) == b"hello"
        wait_until(lambda: seen)


def test_a_hook_patched_in_harkens_own_class(server_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Monitors patch `socketserver.TCPServer` itself."""
    seen: list[str] = []
    monkeypatch.setattr(harken.TCPServer, "close_request", note(seen, "closed", harken.TCPServer.close_request))
    with harken.background(server_class(("127.0.0.1", 0), Echo)) as server:
        assert ask(server) == b"hello"
        wait_until(lambda: seen)


def test_events_and_figures_are_the_same(server_class: Any) -> None:
    """accepted, opened and closed once each, with the reason; the figures agree."""
    seen: list[tuple[str, str, Any]] = []
    end = events.subscribe(
        lambda event: seen.append((event.name, event.connection, event.reason)), "accepted", "opened", "closed"
    )
    try:
        with harken.background(server_class(("127.0.0.1", 0), Echo)) as server:
            assert ask(server) == b"hello"
            wait_until(lambda: len(seen) == 3)
            identity = seen[0][1]
            assert seen == [
                ("accepted", identity, None),
                ("opened", identity, None),
                ("closed", identity, "peer_closed"),
            ]
            figures = server.stats()
            assert (figures["accepted_total"], figures["open"]) == (1, 0)
            assert figures["closed_total"] == {"peer_closed": 1}
    finally:
        end()


@pytest.mark.parametrize("way", ["returns", "raises", "closes", "detaches", "keeps a file", "is reset"])
def test_however_a_handler_ends(server_class: Any, way: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The connection is closed and struck off, for the right reason."""
    kept: list[Any] = []

    class Handler(harken.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(5)
            match way:
                case "raises":
                    raise ValueError("a fault")
                case "closes":
                    self.request.close()
                case "detaches":
                    socket.socket(fileno=self.request.detach()).close()
                case "keeps a file":
                    kept.append(self.request.makefile("rb"))
                case "is reset":
                    self.request.recv(1)

    with harken.background(server_class(("127.0.0.1", 0), Handler)) as server:
        client = socket.create_connection(server.server_address, PATIENCE)
        client.sendall(b"hello")
        if way == "is reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
        else:
            assert client.recv(1) == b""
        if way == "keeps a file":
            assert len(server.connections()) == 1
            kept.pop().close()
        wait_until(lambda: not server.connections())
        client.close()
        reason = {"raises": "handler_failed", "is reset": "peer_reset"}.get(way, "handler_returned")
        wait_until(lambda: server.stats()["closed_total"] == {reason: 1})
    assert ("a fault" in capsys.readouterr().err) == (way == "raises")


def test_a_burst_is_served_whole(server_class: Any) -> None:
    """More connections at once than are taken in one turn."""
    with harken.background(server_class(("127.0.0.1", 0), Echo, backlog=400)) as server:
        server.suspend()
        clients = [socket.create_connection(server.server_address, PATIENCE) for _ in range(200)]
        server.resume()
        for client in clients:
            client.sendall(b"x")
        for client in clients:
            assert client.recv(10) == b"x"
            client.close()
        wait_until(lambda: not server.connections())


def test_a_burst_of_just_what_is_taken_at_once_does_not_block_the_loop(server_class: Any) -> None:
    """The door is empty then, and a listener of socketserver's kind would wait in accept() for the next client."""
    server = server_class(("127.0.0.1", 0), Echo, backlog=400)
    with harken.background(server):
        server.suspend()
        clients = [socket.create_connection(server.server_address, PATIENCE) for _ in range(MAX_ACCEPT)]
        server.resume()
        for client in clients:
            client.sendall(b"x")
        assert [client.recv(10) for client in clients] == [b"x"] * MAX_ACCEPT
        stopper = threading.Thread(target=server.shutdown, daemon=True)
        stopper.start()
        stopper.join(PATIENCE)
        blocked = stopper.is_alive()
        if blocked:
            clients.append(socket.create_connection(server.server_address, PATIENCE))  # lets it go
        for client in clients:
            client.close()
    assert not blocked


def test_the_default_timeout_holds_for_accepted_connections(server_class: Any) -> None:
    """As with socketserver: `socket.setdefaulttimeout`."""
    seen: list[Any] = []

    class Handler(harken.BaseRequestHandler):
        def handle(self) -> None:
            seen.append(self.request.gettimeout())
            self.request.recv(100)  # what is left unread would turn the end into a reset

    before = socket.getdefaulttimeout()
    try:
        with harken.background(server_class(("127.0.0.1", 0), Handler)) as server:
            socket.setdefaulttimeout(7.0)
            assert ask(server) == b""
    finally:
        socket.setdefaulttimeout(before)
    assert seen == [7.0]


def test_limits_and_deadlines_hold_on_the_straight_way(server_class: Any) -> None:
    """They do not leave it; whoever is refused is told of in the usual order, and every place is given back once."""
    seen: list[str] = []

    class Greeter(Echo):
        def setup(self) -> None:
            self.request.sendall(b"in")

    server = server_class(
        ("127.0.0.1", 0), Greeter, max_connections=2, overload="reply", overload_reply=b"full", idle_timeout=60
    )
    events_seen = events.subscribe(lambda event: seen.append(event.name), "accepted", "opened", "rejected", "closed")
    try:
        with harken.background(server):
            serving = serving_of(server)
            admission = serving.bounds.admission
            assert admission is not None
            assert straight.is_straight(serving)
            for _ in range(5):
                clients = [socket.create_connection(server.server_address, PATIENCE) for _ in range(2)]
                assert [client.recv(10) for client in clients] == [b"in", b"in"]
                with socket.create_connection(server.server_address, PATIENCE) as third:
                    assert third.recv(10) == b"full"
                assert admission.crowd.inside == 2
                for client in clients:
                    client.close()
                wait_until(lambda: not serving.connections)
                assert admission.crowd.inside == 0
            wait_until(lambda: seen.count("closed") == 10)
    finally:
        events_seen()
    assert [name for name in seen if name != "closed"] == [*(["accepted", "opened"] * 2 + ["accepted", "rejected"]) * 5]


def test_a_burst_takes_no_more_than_the_limit_leaves_room_for(server_class: Any) -> None:
    """Those beyond stay in the backlog until a place is free, and are all served."""

    class Once(harken.BaseRequestHandler):
        def handle(self) -> None:
            data = self.request.recv(100)
            assert admission.crowd.inside <= 3
            self.request.sendall(data)

    server = server_class(("127.0.0.1", 0), Once, max_connections=3)
    clients = [socket.create_connection(server.server_address, PATIENCE) for _ in range(5)]
    with harken.background(server):
        found = serving_of(server).bounds.admission
        assert found is not None
        admission = found
        for client in clients:
            client.sendall(b"hello")
        assert [client.recv(100) for client in clients] == [b"hello"] * 5
        wait_until(lambda: admission.crowd.inside == 0)
    for client in clients:
        client.close()
    assert server.stats()["rejected_total"] == 0
    assert server.stats()["handler_failed_total"] == 0


def test_who_takes_the_last_place_makes_nobody_leave(server_class: Any) -> None:
    """With ``overload=shed`` somebody has to go only when the next one waits."""
    server = server_class(("127.0.0.1", 0), Echo, max_connections=2, overload="shed")
    clients: list[socket.socket] = []
    with harken.background(server):
        for _ in range(2):
            clients.append(socket.create_connection(server.server_address, PATIENCE))
            for client in clients:
                client.sendall(b"hello")
                assert client.recv(100) == b"hello"
        clients.append(socket.create_connection(server.server_address, PATIENCE))
        clients[2].sendall(b"hello")
        assert clients[2].recv(100) == b"hello"
        for client in clients:
            client.close()
    assert server.stats()["closed_total"]["shed"] == 1


def test_nobody_is_taken_when_the_last_places_were_filled_in_this_moment(
    server_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another process, after this one has looked: they wait in the backlog, and come in later."""
    asked: list[int] = []
    plain = Admission.places

    def places(admission: Admission, most: int) -> int:
        asked.append(most)
        return 0 if len(asked) == 1 else plain(admission, most)

    monkeypatch.setattr(Admission, "places", places)
    end = events.subscribe(lambda event: None, "accepted")  # or green threads go another way
    try:
        server = server_class(("127.0.0.1", 0), Echo, max_connections=1)
        clients = [socket.create_connection(server.server_address, PATIENCE) for _ in range(3)]
        for client in clients:
            client.sendall(b"hello")
        with harken.background(server):
            for client in clients:
                with client:
                    assert client.recv(100) == b"hello"
            assert asked
    finally:
        end()


def test_a_listener_that_accepts_in_its_own_way_is_asked(server_class: Any) -> None:
    """A TLS socket, a test's double: not every listener is a plain socket."""

    class Door(socket.socket):
        asked = 0

        def accept(self) -> tuple[socket.socket, Any]:
            self.asked += 1
            return super().accept()

    with server_class(("127.0.0.1", 0), Echo) as server:
        plain = server.socket
        server.socket = Door(fileno=plain.detach())
        with harken.background(server):
            assert not straight.is_straight(serving_of(server))
            assert ask(server) == b"hello"
            assert server.socket.asked == 1


def test_the_threads_that_are_waited_for_can_be_read() -> None:
    """`server._threads`, and the thread's name, as monitors of socketserver programs read them."""
    seen: list[Any] = []

    class Handler(harken.BaseRequestHandler):
        def handle(self) -> None:
            seen.extend((threading.current_thread(), threading.current_thread() in self.server._threads))
            self.request.recv(5)

    with harken.background(harken.ThreadingTCPServer(("127.0.0.1", 0), Handler)) as server:
        assert straight.is_straight(serving_of(server))
        ask(server)
        assert "process_request_thread" in seen[0].name
        assert seen[1]


def test_a_thread_that_cannot_be_started_costs_its_connection_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is closed, told of by `handle_error`, and the next is served."""
    with harken.background(harken.ThreadingTCPServer(("127.0.0.1", 0), Echo)) as server:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with socket.create_connection(server.server_address, PATIENCE) as client:
                assert client.recv(10) == b""
        assert ask(server) == b"hello"
        wait_until(lambda: not server.connections())
    assert "no more threads" in capsys.readouterr().err


def refuse(thread: threading.Thread) -> None:
    """Fail as the system does at its bound."""
    raise RuntimeError("no more threads")


@pytest.mark.parametrize("engine", ["thread", "pool", "green", "asyncio", "inline"])
def test_a_server_without_a_socket_is_not_asked_for_one(engine: str) -> None:
    """BaseServer with hooks of its own: what is readable need be no listener."""
    served: list[Any] = []
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    class Note(harken.BaseRequestHandler):
        def handle(self) -> None:
            served.append((self.request, self.client_address))

    class Letters(harken.ThreadingMixIn, harken.BaseServer):
        def fileno(self) -> int:
            return near.fileno()

        def get_request(self) -> Any:
            return near.recv(10), ("me", 0)

    with near, far:
        server = Letters(("nowhere", 1), Note, engine=engine)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        far.send(b"one")
        wait_until(lambda: len(served) == 1)
        far.send(b"two")
        wait_until(lambda: len(served) == 2)
        server.shutdown()
        thread.join(PATIENCE)
        server.server_close()
    assert served == [(b"one", ("me", 0)), (b"two", ("me", 0))]


class Contested(socket.socket):
    """A listener of several servers: before its second accept another one takes who was found waiting."""

    accepts = 0
    elsewhere: list[Any]

    def _accept(self) -> Any:
        self.accepts += 1
        if self.accepts == 2:
            self.elsewhere.append(super()._accept())  # type: ignore[misc]
        return super()._accept()  # type: ignore[misc]


def test_who_was_taken_need_not_wait_for_an_accept_that_does() -> None:
    """As with one listener for several servers, of threads or processes: the loop may wait, the handlers do not."""
    server = harken.ThreadingTCPServer(("127.0.0.1", 0), Echo)
    server.daemon_threads = True
    server.socket = door = Contested(fileno=server.socket.detach())
    door.elsewhere = []
    first, second = (socket.create_connection(server.server_address, PATIENCE) for _ in range(2))
    loop = threading.Thread(target=server.serve_forever, daemon=True)
    with first, second:
        loop.start()
        first.sendall(b"hello")
        assert first.recv(100) == b"hello"
        wait_until(lambda: door.elsewhere)
    server._BaseServer__shutdown_request = True
    socket.create_connection(server.server_address, PATIENCE).close()  # the accept that waits
    loop.join(PATIENCE)
    server.server_close()
    for fd, _ in door.elsewhere:
        socket.close(fd)
