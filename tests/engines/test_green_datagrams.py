"""Datagrams on the green engine: taken and answered together, each through all the hooks."""

from __future__ import annotations

import contextvars
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from datagrams import LOCAL, PATIENCE, Echo, ask, clients, soon

import harken
from harken import _hub, events, green
from harken._hub import DOOR_BURST
from harken.engines import _datagrams, green as engine_green
from harken.serving import serving_of
from harken.stalls import Watchdog


def test_each_client_gets_its_own_answers() -> None:
    """Forty clients, half of whose handlers wait, several times over."""
    with harken.background(harken.GreenUDPServer(LOCAL, Echo)) as server, clients(server.server_address, 40) as many:
        for turn in range(5):
            began = time.monotonic()
            for number, client in enumerate(many):
                client.send(b"%s%d.%d" % (b"nw"[number % 2 :][:1], number, turn))
            for number, client in enumerate(many):
                assert client.recv(100) == b"%s%d.%d" % (b"nw"[number % 2 :][:1], number, turn)
            assert time.monotonic() - began < 20 * 0.05  # they wait together


def test_one_green_thread_serves_all_that_do_not_wait() -> None:
    """A handler that does not wait costs no green thread of its own; one that waits keeps nobody."""
    seen: list[object] = []

    class Note(Echo):
        def handle(self) -> None:
            seen.append(green.current())
            super().handle()

    with harken.background(harken.GreenUDPServer(LOCAL, Note)) as server, clients(server.server_address) as (client,):
        for _ in range(20):
            assert ask(client, b"quick") == b"quick"
        assert len(set(seen)) == 1
        client.send(b"wait")
        client.send(b"quick")
        assert [client.recv(100), client.recv(100)] == [b"quick", b"wait"]
        assert len(set(seen)) == 2


def test_the_request_holds_the_servers_own_socket() -> None:
    """``request`` is bytes and the very object ``server.socket``, which is an ordinary socket before and after."""
    found: list[Any] = []

    class Look(harken.BaseRequestHandler):
        def handle(self) -> None:
            found.append(self.request)
            self.request[1].sendto(b"seen", self.client_address)

    server = harken.GreenUDPServer(LOCAL, Look)
    sock = server.socket
    with harken.background(server), clients(server.server_address) as (client,):
        assert ask(client, b"data") == b"seen"
        assert found[0][0] == b"data"
        assert type(found[0]) is tuple
        assert found[0][1] is server.socket is sock
        assert isinstance(sock, socket.socket)
    soon(lambda: type(sock) is socket.socket)


def test_nothing_is_a_datagram_too() -> None:
    """An empty datagram is a request, and may be answered by another."""
    with harken.background(harken.GreenUDPServer(LOCAL, Echo)) as server, clients(server.server_address) as (client,):
        assert ask(client, b"") == b""


@pytest.mark.parametrize("size", [60_000, 65_507])
def test_long_datagrams_arrive_whole(size: int) -> None:
    """Up to the longest that UDP has, in both directions."""
    data = os.urandom(size)
    with harken.background(harken.GreenUDPServer(LOCAL, Echo)) as server, clients(server.server_address) as (client,):
        assert ask(client, data) == data


def test_cut_datagrams_are_told_of(tmp_path: Path) -> None:
    """Each that was longer than ``max_packet_size`` gives an event, and is served as far as it goes."""
    told: list[events.Event] = []
    unsubscribe = events.subscribe(told.append, "truncated")
    server = harken.GreenUDPServer(LOCAL, Echo, max_packet_size=10)
    with harken.background(server), clients(server.server_address) as (client,):
        for data in (b"0123456789", b"0123456789a", b"", b"0123456789ab"):
            client.send(data)
        assert [client.recv(100) for _ in range(4)] == [b"0123456789"] * 2 + [b"", b"0123456789"]
    unsubscribe()
    assert [event.bytes for event in told] == [10, 10]
    assert told[0].peer.address == "127.0.0.1"


class GreenUnixServer(harken.GreenMixIn, harken.UnixDatagramServer):
    """Datagrams on a Unix path."""


def test_unix_datagrams(tmp_path: Path) -> None:
    """By path, abstract name and without a name; a client that has gone is its handler's to know."""
    errors: list[type] = []
    addresses: list[object] = []

    class Answer(harken.BaseRequestHandler):
        def handle(self) -> None:
            data, sock = self.request
            addresses.append(self.client_address)
            try:
                sock.sendto(data, self.client_address)
            except (OSError, TypeError) as error:
                errors.append(type(error))

    path = str(tmp_path / "server")
    own = str(tmp_path / "client")
    with (
        harken.background(GreenUnixServer(path, Answer)),
        clients(path, 4, socket.AF_UNIX) as (named, abstract, nameless, gone),
    ):
        gone.bind(str(tmp_path / "gone"))
        (tmp_path / "gone").unlink()
        gone.send(b"gone")
        nameless.send(b"nameless")
        named.bind(own)
        abstract.bind(b"\0harken-%d" % os.getpid())
        assert ask(named, b"named") == b"named"
        assert ask(abstract, b"abstract") == b"abstract"
    assert addresses == [str(tmp_path / "gone"), None, own, b"\0harken-%d" % os.getpid()]
    assert errors == [FileNotFoundError, TypeError]


def test_every_hook_is_called_in_order() -> None:
    """For each datagram of a batch, those that a program overrides, in the standard library's order."""
    calls: list[str] = []

    def noting(name: str) -> Any:
        def hook(self: Any, *args: Any) -> Any:
            calls.append(name)
            return getattr(super(Server, self), name)(*args)

        return hook

    names = (
        "get_request verify_request process_request process_request_thread finish_request shutdown_request "
        "close_request"
    ).split()

    class Server(harken.GreenUDPServer):
        pass

    for name in names[1:]:
        setattr(Server, name, noting(name))
    with harken.background(Server(LOCAL, Echo)) as server, clients(server.server_address, 3) as many:
        for client in many:
            client.send(b"x")
        for client in many:
            client.recv(10)
        assert server.stats()["accepted_total"] == 3
    assert calls == names[1:] * 3
    calls.clear()
    Server.get_request = noting("get_request")  # type: ignore[method-assign]
    with harken.background(Server(LOCAL, Echo)) as server, clients(server.server_address, 1) as (client,):
        assert ask(client, b"w") == b"w"
    assert calls == names


def test_a_refused_datagram_gets_no_handler() -> None:
    """``verify_request`` refuses some of a batch; they count as rejected."""

    class Picky(harken.GreenUDPServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            return bool(request[0] != b"no")

    with harken.background(Picky(LOCAL, Echo)) as server, clients(server.server_address) as (client,):
        for data in (b"no", b"yes", b"no", b"yes"):
            client.send(data)
        assert [client.recv(10), client.recv(10)] == [b"yes", b"yes"]
        assert server.stats()["rejected_total"] == 2


def test_observers_hear_of_each() -> None:
    """``accepted`` and ``opened`` come for every datagram while somebody listens."""
    heard: list[tuple[str, str]] = []
    unsubscribe = events.subscribe(lambda event: heard.append((event.name, event.peer.address)), "accepted", "opened")
    with harken.background(harken.GreenUDPServer(LOCAL, Echo)) as server, clients(server.server_address) as (client,):
        assert ask(client, b"a") == b"a"
        unsubscribe()
        assert ask(client, b"b") == b"b"
        assert server.stats()["accepted_total"] == 2
    assert heard == [("accepted", "127.0.0.1"), ("opened", "127.0.0.1")]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_handler_that_raises_disturbs_nobody() -> None:
    """It is ``handle_error``'s, with the exception at hand; SystemExit ends that handler alone."""
    errors: list[object] = []

    class Server(harken.GreenUDPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:

            errors.append((type(sys.exc_info()[1]), request[0]))

    class Fail(Echo):
        def handle(self) -> None:
            if self.request[0] == b"raise":
                raise ValueError("raised on purpose")
            if self.request[0] == b"exit":
                raise SystemExit(3)
            super().handle()

    with harken.background(Server(LOCAL, Fail)) as server, clients(server.server_address) as (client,):
        for data in (b"raise", b"exit", b"fine"):
            client.send(data)
        assert client.recv(10) == b"fine"
        assert server.stats()["handler_failed_total"] == 1
    assert errors == [(ValueError, b"raise")]


class Left(Echo):
    """A handler that leaves its green thread to be resumed by somebody, and later ones that wait and end a wait."""

    known: list[Any]
    waits: list[Any]

    def handle(self) -> None:
        """Note, wait, or echo."""
        hub, me = _hub.current(), green.current()
        if self.request[0] == b"note":
            self.known[:] = [hub, me]
        elif self.request[0] == b"wait":
            self.waits.append(me)
            hub.park()
        elif self.waits:
            hub.unpark(self.waits.pop())
        super().handle()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("how", ["throw", "unpark"])
def test_an_idle_green_thread_may_be_resumed_by_somebody(how: str) -> None:
    """A timeout that a handler has left behind, say: datagrams are served as before."""
    resumed = threading.Event()
    Left.known, Left.waits = [], []

    def resume(hub: Any, me: Any) -> None:
        getattr(hub, how)(me, TimeoutError("left behind"))
        hub.call_soon(resumed.set)

    with harken.background(harken.GreenUDPServer(LOCAL, Left)) as server, clients(server.server_address) as (client,):
        assert ask(client, b"note") == b"note"
        Left.known[0].call_soon_threadsafe(resume, *Left.known)
        assert resumed.wait(PATIENCE)
        client.send(b"wait")
        soon(lambda: Left.waits)
        client.send(b"end")
        assert {client.recv(10), client.recv(10)} == {b"wait", b"end"}
        assert ask(client, b"more") == b"more"


def test_an_idle_green_thread_that_is_about_to_be_resumed_keeps_nobody_waiting() -> None:
    """Somebody asks for that in the very turn that takes the datagram."""
    Left.known, Left.waits = [], []

    with harken.background(harken.GreenUDPServer(LOCAL, Left)) as server, clients(server.server_address) as (client,):
        assert ask(client, b"note") == b"note"
        hub, me = Left.known

        def send() -> None:
            hub.call_soon(hub.unpark, me)
            client.send(b"taken")

        hub.call_soon_threadsafe(send)
        assert client.recv(10) == b"taken"
        assert ask(client, b"more") == b"more"


class Kept:
    """Holds handlers until a test lets them go."""

    def __init__(self) -> None:
        self.inside = self.most = 0
        self.gate = green.Event()

    def handler(self) -> type[harken.BaseRequestHandler]:
        """Return a handler class that waits for the gate."""
        kept = self

        class Wait(harken.BaseRequestHandler):
            def handle(self) -> None:
                kept.inside += 1
                kept.most = max(kept.most, kept.inside)
                kept.gate.wait()
                kept.inside -= 1
                self.request[1].sendto(self.request[0], self.client_address)

        return Wait

    def async_handler(self) -> type[harken.BaseRequestHandler]:
        """Return the same, as a coroutine."""
        wait = self.handler().handle

        class Wait(harken.AsyncRequestHandler):
            async def handle(self) -> None:
                wait(self)

        return Wait


@pytest.mark.parametrize("kind", [harken.GreenUDPServer, harken.AsyncUDPServer])
def test_a_flood_of_handlers_that_wait_is_bounded(
    monkeypatch: pytest.MonkeyPatch, kind: type[harken.UDPServer]
) -> None:
    """Beyond the bound datagrams stay in the kernel, and are served when there is room."""
    monkeypatch.setattr(_datagrams, "MOST_WAITING", 5)
    heard: list[str] = []
    paused = threading.Event()

    def note(event: events.Event) -> None:
        heard.append(event.name)
        paused.set()

    unsubscribe = events.subscribe(note, "paused", "resumed")
    kept = Kept()
    server = kind(LOCAL, kept.async_handler() if kind is harken.AsyncUDPServer else kept.handler())
    with harken.background(server), clients(server.server_address) as (client,):
        for number in range(150):
            client.send(b"%d" % number)
        assert paused.wait(PATIENCE)
        kept.gate.set()
        assert {client.recv(10) for _ in range(150)} == {b"%d" % number for number in range(150)}
    unsubscribe()
    assert kept.most < 5 + DOOR_BURST + 32
    assert heard[:2] == ["paused", "resumed"]


def test_closing_waits_for_handlers_that_wait() -> None:
    """``server_close()`` returns when a waiting datagram handler has ended, and one may call it itself."""
    ended = threading.Event()

    class Slow(harken.BaseRequestHandler):
        def handle(self) -> None:
            self.request[1].sendto(b"begun", self.client_address)
            green.sleep(0.3)
            ended.set()

    server = harken.GreenUDPServer(LOCAL, Slow)
    with harken.background(server), clients(server.server_address) as (client,):
        assert ask(client, b"x") == b"begun"
        server.shutdown()
        server.server_close()
        assert ended.is_set()


def test_handlers_that_wait_end_with_the_process_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine gives its socket up before they are interrupted: nothing is said of that."""
    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    kept = Kept()
    server = harken.GreenUDPServer(LOCAL, kept.handler())
    server.daemon_threads = True
    with server, clients(server.server_address) as (client,):
        loop = threading.Thread(target=server.serve_forever, daemon=True)
        loop.start()
        client.send(b"waits")
        soon(lambda: kept.inside)
        serving_of(server).engine.at_exit()
        loop.join(PATIENCE)
    assert not loop.is_alive()
    assert said == []


def test_each_handler_has_a_context_of_its_own() -> None:
    """Context variables that one sets are unseen by the next in the same green thread."""
    variable: contextvars.ContextVar[bytes] = contextvars.ContextVar("variable", default=b"unset")

    class Note(harken.BaseRequestHandler):
        def handle(self) -> None:
            before = variable.get()
            variable.set(self.request[0])
            self.request[1].sendto(before, self.client_address)

    with harken.background(harken.GreenUDPServer(LOCAL, Note)) as server, clients(server.server_address) as (client,):
        assert [ask(client, b"a"), ask(client, b"b")] == [b"unset", b"unset"]


def test_serves_again_after_shutdown() -> None:
    """What came between two loops is served by the second, on a socket that is an ordinary one meanwhile."""
    server = harken.GreenUDPServer(LOCAL, Echo)
    with clients(server.server_address) as (client,):
        client.send(b"first")
        for word in (b"first", b"later", b"latest"):
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            assert client.recv(10) == word
            assert ask(client, b"hello") == b"hello"
            server.shutdown()
            thread.join(PATIENCE)
            soon(lambda: type(server.socket) is socket.socket)  # when the hub has gone
            client.send(b"later" if word == b"first" else b"latest")
    server.server_close()


def test_a_hub_that_is_slow_to_end_keeps_nothing_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread may end long after the next loop has begun, on a busy machine."""
    leave, stop = threading.Event(), Watchdog.stop

    def late(watchdog: Watchdog) -> None:
        assert leave.wait(PATIENCE)
        stop(watchdog)

    monkeypatch.setattr(engine_green, "LEAVE_SECONDS", 0.01)
    monkeypatch.setattr(Watchdog, "stop", late)
    server = harken.GreenUDPServer(LOCAL, Echo)
    with clients(server.server_address) as (client,):
        hubs = []
        for word in (b"first", b"later"):
            loop = threading.Thread(target=server.serve_forever)
            loop.start()
            client.send(word)
            assert client.recv(10) == word
            if hubs:
                leave.set()
                hubs[0].join(PATIENCE)
                assert ask(client, b"hello") == b"hello"
            hubs = [each for each in threading.enumerate() if each.name.startswith("harken-green")]
            server.shutdown()
            loop.join(PATIENCE)
    server.server_close()


def test_datagrams_beside_connections(tmp_path: Path) -> None:
    """One worker serves TCP and several datagram addresses on one hub."""

    class Both(harken.BaseRequestHandler):
        def handle(self) -> None:
            if isinstance(self.request, tuple):
                self.request[1].sendto(self.request[0], self.client_address)
            else:
                self.request.sendall(self.request.recv(100))

    from harken import testing

    with testing.serve(Both, "tcp://127.0.0.1:0", "udp://127.0.0.1:0", "udp://127.0.0.1:0", engine="green") as served:
        stream, *datagrams = (server.server_address for server in served.servers)
        for address in datagrams:
            with clients(address) as (client,):
                assert ask(client, b"hello") == b"hello"
        with socket.create_connection(stream, PATIENCE) as connection:
            connection.sendall(b"hello")
            assert connection.recv(10) == b"hello"


def test_a_hook_that_is_overridden_meanwhile_is_heeded() -> None:
    """While datagrams come without a pause; also an observer, and the server's suspension."""

    class Server(harken.GreenUDPServer):
        pass

    heard: list[str] = []
    with harken.background(Server(LOCAL, Echo)) as server, clients(server.server_address) as (client,):
        assert [ask(client, b"%d" % number) for number in range(200)] == [b"%d" % number for number in range(200)]
        unsubscribe = events.subscribe(lambda event: heard.append(event.name), "opened")
        soon(lambda: ask(client, b"x") == b"x" and heard != [])
        unsubscribe()
        refused: list[object] = []
        Server.verify_request = lambda self, *args: refused.append(args) or True  # type: ignore[assignment, func-returns-value]
        soon(lambda: ask(client, b"x") == b"x" and refused != [])
        del Server.verify_request
        assert [ask(client, b"y") for _ in range(100)] == [b"y"] * 100
        server.suspend()
        client.send(b"suspended")
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(10)
        client.settimeout(PATIENCE)
        server.resume()
        assert client.recv(10) == b"suspended"
