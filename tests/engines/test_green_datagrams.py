"""Datagrams on the green engine: taken and answered together, each through all the hooks."""

from __future__ import annotations

import contextlib
import contextvars
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import harken
from harken import events, green
from harken._hub import DOOR_BURST
from harken.engines import _datagrams

PATIENCE = 10.0  # seconds
LOCAL = ("127.0.0.1", 0)
RECVTTL = 12  # IP_RECVTTL of linux/in.h


class Echo(harken.BaseRequestHandler):
    """Sends back what comes; what begins with ``w`` after a wait."""

    def handle(self) -> None:
        """Echo."""
        data, sock = self.request
        if data.startswith(b"w"):
            green.sleep(0.05)
        sock.sendto(data, self.client_address)


@contextlib.contextmanager
def clients(address: Any, count: int = 1, family: int = socket.AF_INET) -> Iterator[list[socket.socket]]:
    """Connected datagram sockets."""
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            client = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            client.settimeout(PATIENCE)
            client.connect(address)
            made.append(client)
        yield made


def ask(client: socket.socket, data: bytes) -> bytes:
    """Send and return the answer."""
    client.send(data)
    return client.recv(65536)


def soon(condition: Callable[[], bool]) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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


@pytest.mark.parametrize("word", [b"now", b"wait"])
@pytest.mark.parametrize(
    ("family", "wildcard", "asked"),
    [
        (socket.AF_INET, "0.0.0.0", "127.0.0.7"),
        (socket.AF_INET6, "::", "::1"),
        (socket.AF_INET6, "::", "::ffff:127.0.0.7"),
    ],
)
def test_answers_come_from_the_address_that_was_asked(family: int, wildcard: str, asked: str, word: bytes) -> None:
    """On a socket bound to all addresses; a connected client takes answers from no other."""

    class Server(harken.GreenUDPServer):
        address_family = family  # type: ignore[assignment]

        def server_bind(self) -> None:
            if family == socket.AF_INET6:
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            super().server_bind()

    try:
        server = Server((wildcard, 0), Echo)
    except OSError:
        pytest.skip("needs a kernel with IPv6")
    with harken.background(server), clients((asked, server.server_address[1]), 3, family) as many:
        for client in many:
            client.send(word)
        assert [client.recv(100) for client in many] == [word] * 3


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


def test_an_answer_that_is_too_long_raises_in_its_handler() -> None:
    """What the kernel refuses at once is told to whoever sent it."""
    errors: list[BaseException] = []

    class Long(harken.BaseRequestHandler):
        def handle(self) -> None:
            try:
                self.request[1].sendto(bytes(70_000), self.client_address)
            except OSError as error:
                errors.append(error)
            with contextlib.suppress(TypeError):
                self.request[1].sendto("text", self.client_address)
            self.request[1].sendto(bytearray(b"refused"), self.client_address)

    with harken.background(harken.GreenUDPServer(LOCAL, Long)) as server, clients(server.server_address) as (client,):
        assert ask(client, b"x") == b"refused"
    assert len(errors) == 1


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
            import sys

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


def test_a_flood_of_handlers_that_wait_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound datagrams stay in the kernel, and are served when there is room."""
    monkeypatch.setattr(_datagrams, "MOST_WAITING", 5)
    heard: list[str] = []
    paused = threading.Event()

    def note(event: events.Event) -> None:
        heard.append(event.name)
        paused.set()

    unsubscribe = events.subscribe(note, "paused", "resumed")
    kept = Kept()
    server = harken.GreenUDPServer(LOCAL, kept.handler())
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


def test_an_answer_does_not_wait_for_what_comes_after_it() -> None:
    """What was answered goes out although the handler computes on."""

    class Busy(harken.BaseRequestHandler):
        def handle(self) -> None:
            self.request[1].sendto(b"answer", self.client_address)
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                pass

    with harken.background(harken.GreenUDPServer(LOCAL, Busy)) as server, clients(server.server_address) as (client,):
        began = time.monotonic()
        assert ask(client, b"x") == b"answer"
        assert time.monotonic() - began < 0.7


def test_what_is_sent_elsewhere_keeps_its_place() -> None:
    """Answers and messages to others leave in the order in which they were sent."""
    with socket.socket(type=socket.SOCK_DGRAM) as other:
        other.bind(LOCAL)
        other.settimeout(PATIENCE)

        class Tell(harken.BaseRequestHandler):
            def handle(self) -> None:
                sock = self.request[1]
                sock.sendto(b"1", self.client_address)
                sock.sendto(b"2", 0, self.client_address)
                sock.sendto(b"3", (*self.client_address,))
                sock.sendto(self.request[0], other.getsockname())
                sock.sendto(b"4", self.client_address)
                with sock.dup() as double:
                    double.sendto(b"5", self.client_address)

        server = harken.GreenUDPServer(LOCAL, Tell)
        with harken.background(server), clients(server.server_address) as (client,):
            client.send(b"hello")
            assert [client.recv(10) for _ in range(5)] == [b"1", b"2", b"3", b"4", b"5"]
            assert other.recv(10) == b"hello"


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


def test_a_handler_that_forks_answers_once() -> None:
    """What was answered before the fork is the parent's to send; the child's own answers come from the child."""

    class Fork(harken.BaseRequestHandler):
        def handle(self) -> None:
            data, sock = self.request
            sock.sendto(b"before", self.client_address)
            pid = os.fork()
            if pid == 0:
                sock.sendto(b"child", self.client_address)
                return
            os.waitpid(pid, 0)
            sock.sendto(b"parent", self.client_address)

    with harken.background(harken.GreenUDPServer(LOCAL, Fork)) as server, clients(server.server_address) as (client,):
        client.send(b"x")
        assert sorted(client.recv(10) for _ in range(3)) == [b"before", b"child", b"parent"]
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(10)


ENDS = {
    "_exit": lambda: os._exit(7),
    "kill": lambda: os.kill(os.getpid(), 9),
    "exec": lambda: os.execv(sys.executable, [sys.executable, "-c", "raise SystemExit(7)"]),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_an_order_to_end_is_confirmed(end: Callable[[], None]) -> None:
    """What a handler has answered is on its way before it ends or replaces the process."""

    class Obey(harken.BaseRequestHandler):
        def handle(self) -> None:
            self.request[1].sendto(b"as you say", self.client_address)
            end()

    with harken.GreenUDPServer(LOCAL, Obey) as server, clients(server.server_address) as (client,):
        pid = os.fork()
        if pid == 0:
            server.serve_forever()
            os._exit(1)
        client.send(b"end")
        assert client.recv(20) == b"as you say"
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (7, -9)


def test_several_answers_to_the_last_of_a_batch_join() -> None:
    """Its first goes at once, whatever comes; the others together, in their order."""

    class Count(harken.BaseRequestHandler):
        def handle(self) -> None:
            for number in range(100):
                self.request[1].sendto(b"%d" % number, self.client_address)

    with harken.background(harken.GreenUDPServer(LOCAL, Count)) as server, clients(server.server_address) as (client,):
        client.send(b"x")
        assert [int(client.recv(10)) for _ in range(100)] == list(range(100))


def test_a_socket_with_a_sendto_of_its_own_keeps_it() -> None:
    """A program's socket class is not gone around."""
    sent: list[bytes] = []

    class Noting(socket.socket):
        def sendto(self, *args: Any) -> int:
            sent.append(args[0])
            return super().sendto(*args)

    server = harken.GreenUDPServer(LOCAL, Echo, bind_and_activate=False)
    server.socket.close()
    server.socket = Noting(socket.AF_INET, socket.SOCK_DGRAM)
    server.server_bind()
    with harken.background(server), clients(server.server_address) as (client,):
        assert ask(client, b"hello") == b"hello"
    assert sent == [b"hello"]


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


class _NoPort:
    """Sends datagrams from port 0, to which nothing can be answered."""

    def __init__(self, server: Any) -> None:
        self._port = server.server_address[1]
        try:
            self._sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
        except PermissionError:
            pytest.skip("needs CAP_NET_RAW")

    def send(self, data: bytes) -> None:
        """Send one."""
        self._sock.sendto(struct.pack("!HHHH", 0, self._port, 8 + len(data), 0) + data, ("127.0.0.1", 0))

    def close(self) -> None:
        """Send no more."""
        self._sock.close()


@pytest.mark.parametrize("word", [b"late", b"now"])
def test_what_is_told_of_an_unsent_answer_may_wait(word: bytes) -> None:
    """``handle_error`` runs in a green thread, also for an answer that the kernel refused after its handler."""
    errors: list[object] = []

    class Server(harken.GreenUDPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            import sys

            green.sleep(0.001)
            errors.append((request[0], client_address[1], type(sys.exc_info()[1])))

    class Late(Echo):
        def handle(self) -> None:
            super().handle()
            if self.request[0] == b"late":
                time.sleep(0.02)  # more than a tick of the clock: answers are sent between two handlers

    with (
        harken.background(Server(LOCAL, Late)) as server,
        clients(server.server_address) as (client,),
        contextlib.closing(_NoPort(server)) as nobody,
    ):
        for turn in range(5):
            nobody.send(word)
            for number in range(5):
                client.send(b"%d.%d" % (turn, number))
            nobody.send(word)
            assert [client.recv(10) for _ in range(5)] == [b"%d.%d" % (turn, number) for number in range(5)]
        soon(lambda: len(errors) == 10)
    assert set(errors) == {(word, 0, OSError)}


@pytest.mark.parametrize("how", ["server_close", "close", "detach"])
def test_an_answer_leaves_before_its_socket_is_closed(how: str) -> None:
    """By its own handler, which may end the server; and the loop ends."""
    errors: list[object] = []

    class Server(harken.GreenUDPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            errors.append(request)

    class Last(harken.BaseRequestHandler):
        def handle(self) -> None:
            sock = self.request[1]
            sock.sendto(b"bye", self.client_address)
            if how == "server_close":
                self.server.server_close()
            elif how == "close":
                sock.close()
            else:
                os.close(sock.detach())
            with pytest.raises(OSError, match="Bad file descriptor"):
                sock.sendto(b"more", self.client_address)
            self.server.shutdown()

    server = Server(LOCAL, Last)
    thread = threading.Thread(target=server.serve_forever)
    with clients(server.server_address) as (client,):
        thread.start()
        assert ask(client, b"quit") == b"bye"
        thread.join(PATIENCE)
        assert not thread.is_alive()
    server.server_close()
    assert not errors


def test_an_option_holds_for_what_is_answered_after_it() -> None:
    """The answer before it has left with what held then."""

    class Mark(harken.BaseRequestHandler):
        def handle(self) -> None:
            data, sock = self.request
            before = sock.getsockopt(socket.IPPROTO_IP, socket.IP_TTL)
            for ttl in (before, 7, before):
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
                sock.sendto(data, self.client_address)

    def ttl_of_next(client: socket.socket) -> int:
        _, ancillary, _, _ = client.recvmsg(10, 100)
        return next(int.from_bytes(data, sys.byteorder) for _, kind, data in ancillary if kind == socket.IP_TTL)

    server = harken.GreenUDPServer(LOCAL, Mark)
    with harken.background(server), clients(server.server_address) as (client,):
        client.setsockopt(socket.IPPROTO_IP, RECVTTL, 1)
        client.send(b"?")
        found = [ttl_of_next(client) for _ in range(3)]
    assert found[1] == 7
    assert found[0] == found[2] != 7


@pytest.mark.parametrize("word", [b"now", b"wait"])
@pytest.mark.parametrize("how", ["flags", "message", "bare message"])
def test_other_ways_to_answer_keep_place_and_address(how: str, word: bytes) -> None:
    """With flags, and by ``sendmsg``: after what was answered before, from the address that was asked."""

    class Tell(harken.BaseRequestHandler):
        def handle(self) -> None:
            data, sock = self.request
            if data == b"wait":
                green.sleep(0.01)
            sock.sendto(b"1", self.client_address)
            if how == "flags":
                assert sock.sendto(b"two", 0, self.client_address) == 3
            elif how == "message":
                assert sock.sendmsg(iter([b"t", b"wo"]), [], socket.MSG_DONTWAIT, self.client_address) == 3
            else:
                assert sock.sendmsg([b"two"], (), 0, self.client_address) == 3
            with pytest.raises(OSError, match="ddress"):
                sock.sendmsg([b"to nobody"])
            with pytest.raises(TypeError):
                sock.sendmsg()
            sock.sendto(b"3", self.client_address)

    server = harken.GreenUDPServer(("0.0.0.0", 0), Tell)
    with harken.background(server), clients(("127.0.0.7", server.server_address[1])) as (client,):
        client.send(word)
        assert [client.recv(10) for _ in range(3)] == [b"1", b"two", b"3"]
