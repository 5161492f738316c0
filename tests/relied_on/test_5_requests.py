"""What handlers may do with a request: it is a plain socket of its own, and outlives much."""

from __future__ import annotations

import array
import fcntl
import io
import os
import select
import socket
import ssl
import struct
import subprocess
import sys
import threading
from typing import Any
from unittest import mock

import pytest
import trustme
from waiting import wait_until

from .kit import LOCAL, PATIENCE, ask, connect, echo_handler, join, read_all, run, serving


def stream_handler(impl: Any, body: Any, **attributes: Any) -> Any:
    """A StreamRequestHandler whose `handle` is ``body(self)``."""
    return type("Handler", (impl.StreamRequestHandler,), {"handle": body, **attributes})


@pytest.fixture(params=["TCPServer", "ThreadingTCPServer"])
def kind(request: pytest.FixtureRequest, impl: Any) -> Any:
    """The plain and the threading server class."""
    return getattr(impl, request.param)


# --- the socket -------------------------------------------------------------------------------------------------------


def test_request_is_a_plain_blocking_socket(impl: Any, kind: Any) -> None:
    """`isinstance(request, socket.socket)`, blocking, no timeout, non-inheritable, with both names."""
    seen = []

    def handle(self: Any) -> None:
        request = self.request
        seen.append((isinstance(request, socket.socket), request.getblocking(), request.gettimeout()))
        seen.append((os.get_inheritable(request.fileno()), request.getpeername() == self.client_address))
        seen.append((request.getsockname() == self.server.server_address, type(self.client_address)))

    with serving(kind(LOCAL, stream_handler(impl, handle))) as server:
        assert ask(server.server_address, b"") == b""
        assert not server.socket.get_inheritable()
    assert seen == [(True, True, None), (False, True), (True, tuple)]


@pytest.mark.parametrize("engine", ["TCPServer", "ThreadingTCPServer", "GreenTCPServer"])
def test_a_class_in_the_place_of_socket_makes_the_requests(
    impl: Any, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs that count bytes, or go by a proxy, set `socket.socket`; accepted connections are of that class, too."""

    class Counting(socket.socket):
        sent = 0

        def sendall(self, data: Any, *flags: int) -> None:
            Counting.sent += len(data)
            super().sendall(data, *flags)

    monkeypatch.setattr(socket, "socket", Counting)
    server = getattr(impl, engine, impl.ThreadingTCPServer)(LOCAL, echo_handler(impl))
    server.daemon_threads = True
    with serving(server), connect(server.server_address) as client:
        Counting.send(client, b"twelve bytes")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"twelve bytes"
        assert Counting.sent == 12


def test_select_on_request_and_rfile(impl: Any, kind: Any) -> None:
    """A handler may select on its request, its unbuffered rfile and the descriptor, and use fcntl on it."""

    def handle(self: Any) -> None:
        assert select.select([self.request], [], [], PATIENCE)[0]
        assert select.select([self.rfile], [], [], PATIENCE)[0]
        assert self.rfile.fileno() == self.wfile.fileno() == self.request.fileno()
        waiting = array.array("i", [0])
        fcntl.ioctl(self.rfile.fileno(), 0x541B, waiting)  # FIONREAD
        assert not fcntl.fcntl(self.rfile.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK
        self.wfile.write(b"%d %s" % (waiting[0], self.rfile.readline()))

    with serving(kind(LOCAL, stream_handler(impl, handle, rbufsize=0))) as server:
        assert ask(server.server_address) == b"6 hello\n"


def test_descriptor_given_to_a_child_process(impl: Any, kind: Any) -> None:
    """With rbufsize = 0 nothing is read ahead: a CGI child on the descriptors reads the body and writes the answer."""

    def handle(self: Any) -> None:
        self.rfile.readline()
        subprocess.run(["cat"], stdin=self.rfile.fileno(), stdout=self.wfile.fileno(), check=True, timeout=PATIENCE)

    with serving(kind(LOCAL, stream_handler(impl, handle, rbufsize=0))) as server:
        assert ask(server.server_address, b"header\nbody of it") == b"body of it"


def test_socket_verbs(impl: Any, kind: Any) -> None:
    """makefile, recv beside rfile, settimeout, setblocking, SO_LINGER, dup, recv_into, sendmsg, sendfile work."""

    def handle(self: Any) -> None:
        request = self.request
        with request.makefile("rwb") as both:
            assert both.readline() == b"one\n"
            both.write(b"1")
            both.flush()
        request.sendall(b"?")
        assert request.recv(4) == b"two\n"
        request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 5))
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        request.settimeout(0.01)
        with pytest.raises(TimeoutError):
            request.recv(1)
        request.setblocking(False)
        with pytest.raises(BlockingIOError):
            request.recv(1)
        request.setblocking(True)
        with request.dup() as copy:
            copy.sendall(b"2")
        request.sendmsg([b"3", b"4"])
        with open(__file__, "rb") as file:
            assert request.sendfile(file, count=3) == 3
        buffer = bytearray(6)
        assert request.recv_into(buffer) == 6
        request.sendall(bytes(buffer))

    with serving(kind(LOCAL, stream_handler(impl, handle))) as server, connect(server.server_address) as client:
        client.sendall(b"one\n")
        assert client.recv(1) == b"1"
        assert client.recv(1) == b"?"
        client.sendall(b"two\n")
        got = b""
        while len(got) < 6:
            got += client.recv(100)
        assert got == b'234"""'
        client.sendall(b"three\n")
        assert read_all(client) == b"three\n"


def test_recv_mixed_with_rfile(impl: Any, kind: Any) -> None:
    """hl7apy: `rfile.readline()` with rbufsize 0, then `request.recv`."""

    def handle(self: Any) -> None:
        line = self.rfile.readline()
        self.wfile.write(line + self.request.recv(100))

    with serving(kind(LOCAL, stream_handler(impl, handle, rbufsize=0))) as server:
        assert ask(server.server_address, b"a\nb") == b"a\nb"


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "end",
    [
        lambda self: self.request.close(),
        lambda self: self.rfile.close(),
        lambda self: self.wfile.close(),
        lambda self: (self.rfile.close(), self.wfile.close(), self.request.close()),
        lambda self: (self.request.shutdown(socket.SHUT_RDWR), self.request.close()),
        lambda self: self.finish(),
        lambda self: os.close(self.request.detach()),
    ],
    ids=["request", "rfile", "wfile", "all", "shutdown", "finish", "detach"],
)
def test_handler_that_closes_by_itself(impl: Any, kind: Any, end: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """A handler may close request, rfile or wfile, or detach the socket: the end is silent, and the server goes on."""

    def handle(self: Any) -> None:
        self.request.sendall(b"bye")
        end(self)

    with serving(kind(LOCAL, stream_handler(impl, handle))) as server:
        for _ in range(2):
            with connect(server.server_address) as client:
                assert read_all(client) == b"bye"
    assert capfd.readouterr() == ("", "")


def test_handler_closed_from_another_thread(impl: Any) -> None:
    """websocket-server: `handler.finish(); handler.connection.close()` from another thread, while the handler works."""
    handlers: list[Any] = []
    gate = threading.Event()

    def handle(self: Any) -> None:
        handlers.append(self)
        gate.wait(PATIENCE)

    with serving(impl.ThreadingTCPServer(LOCAL, stream_handler(impl, handle))) as server:
        with connect(server.server_address) as client:
            wait_until(lambda: handlers)
            handlers[0].finish()
            handlers[0].connection.shutdown(socket.SHUT_RDWR)
            handlers[0].connection.close()
            assert client.recv(1) == b""
            gate.set()
        handlers.clear()
        gate.set()
        ask(server.server_address, b"")


def test_handler_that_wraps_its_request_in_tls(impl: Any, kind: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """STARTTLS: a handler wraps `self.request` in the middle, which detaches it; the end is silent."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)

    def handle(self: Any) -> None:
        assert self.rfile.readline() == b"STARTTLS\n"
        with context.wrap_socket(self.request, server_side=True) as secure:
            secure.sendall(secure.recv(100).upper())

    with serving(kind(LOCAL, stream_handler(impl, handle, rbufsize=0))) as server:
        raw = connect(server.server_address)
        raw.sendall(b"STARTTLS\n")
        with trust.wrap_socket(raw, server_hostname="localhost") as client:
            client.sendall(b"secret")
            assert client.recv(100) == b"SECRET"
    assert capfd.readouterr() == ("", "")


def test_shutdown_request_on_a_closed_socket_is_silent(impl: Any) -> None:
    """`shutdown_request` and `close_request` on a closed or detached socket, and twice, raise nothing."""
    with impl.TCPServer(LOCAL, None) as server:
        ours, theirs = socket.socketpair()
        server.shutdown_request(ours)
        server.shutdown_request(ours)
        server.close_request(ours)
        os.close(theirs.detach())
        server.shutdown_request(theirs)


def test_connection_outlives_its_handler(impl: Any) -> None:
    """A thread of the program's keeps reading after the handler's return, shutdown_request not called (flask-sock)."""
    results: list[bytes] = []
    threads: list[threading.Thread] = []

    def receive(request: socket.socket) -> None:
        with request:
            while data := request.recv(100):
                results.append(data)
                request.sendall(data.upper())

    class Keep(impl.ThreadingTCPServer):
        def process_request_thread(self, request: Any, client_address: Any) -> None:
            self.finish_request(request, client_address)

    def handle(self: Any) -> None:
        threads.append(run(receive, self.request))

    with serving(Keep(LOCAL, stream_handler(impl, handle))) as server, connect(server.server_address) as client:
        for word in (b"one", b"two"):
            client.sendall(word)
            assert client.recv(100) == word.upper()
        client.shutdown(socket.SHUT_WR)
        wait_until(lambda: threads)
        join(threads[0])
    assert results == [b"one", b"two"]


def test_client_sees_the_end_though_a_duplicate_lives(impl: Any, kind: Any) -> None:
    """`shutdown_request` shuts the sending side, so a dup() that still lives does not hold the end back."""
    copies = []

    def handle(self: Any) -> None:
        copies.append(self.request.dup())
        self.wfile.write(b"done")

    with serving(kind(LOCAL, stream_handler(impl, handle))) as server:
        assert ask(server.server_address, b"") == b"done"
    copies[0].close()


def test_client_sees_the_end_though_a_child_process_lives(impl: Any) -> None:
    """The same with a child process that inherited the connection."""
    children = []

    def handle(self: Any) -> None:
        self.request.set_inheritable(True)
        children.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False))
        self.wfile.write(b"done")

    with serving(impl.ThreadingTCPServer(LOCAL, stream_handler(impl, handle))) as server:
        assert ask(server.server_address, b"") == b"done"
        children[0].communicate(b"\n", timeout=PATIENCE)


def test_writing_after_the_peers_half_close(impl: Any, kind: Any) -> None:
    """After EOF on rfile a handler may go on writing, and the client gets all of it."""

    def handle(self: Any) -> None:
        got = self.rfile.read()
        for _ in range(3):
            self.wfile.write(got)
        self.wfile.write(bytes(1 << 20))

    with serving(kind(LOCAL, stream_handler(impl, handle))) as server:
        answer = ask(server.server_address, b"abc")
    assert answer == b"abc" * 3 + bytes(1 << 20)


def test_the_end_after_both_have_ended_is_no_reset(impl: Any, kind: Any) -> None:
    """A handler that leaves some of a half-closed client's bytes unread gives it the answer and the end."""

    def handle(self: Any) -> None:
        self.wfile.write(self.request.recv(1))
        wait_until(lambda: self.request.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 8)  # CLOSE_WAIT

    with serving(kind(LOCAL, stream_handler(impl, handle))) as server:
        assert ask(server.server_address, b"unread") == b"u"


# --- rfile and wfile --------------------------------------------------------------------------------------------------


def test_wfile_buffered_when_asked(impl: Any, kind: Any) -> None:
    """With wbufsize != 0 writes wait in wfile, and `finish` flushes them."""
    state = []

    def handle(self: Any) -> None:
        self.wfile.write(b"buffered")
        state.append(select.select([client], [], [], 0.05)[0])

    with serving(kind(LOCAL, stream_handler(impl, handle, wbufsize=-1))) as server:
        with socket.socket() as client:
            client.settimeout(PATIENCE)
            client.connect(server.server_address)
            assert read_all(client) == b"buffered"
    assert state == [[]]


def test_wfile_unbuffered_by_default(impl: Any, kind: Any) -> None:
    """By default a write is on the wire before the handler goes on."""
    arrived = threading.Event()

    def handle(self: Any) -> None:
        assert self.wfile.write(b"now") == 3
        assert arrived.wait(PATIENCE)

    with serving(kind(LOCAL, stream_handler(impl, handle))) as server, connect(server.server_address) as client:
        assert client.recv(100) == b"now"
        arrived.set()


def test_answer_written_in_finish(impl: Any, kind: Any) -> None:
    """fastcgi: a handler writes its answer in `finish`, before calling the base's."""

    class Late(impl.StreamRequestHandler):
        def finish(self) -> None:
            self.wfile.write(b"in finish")
            super().finish()

    with serving(kind(LOCAL, Late)) as server:
        assert ask(server.server_address, b"") == b"in finish"


def test_finish_runs_when_handle_raises_and_not_when_setup_does(impl: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """`finish` follows `handle` that raised; after `setup` that raised neither runs."""
    calls: list[str] = []

    def handler(where: str) -> Any:
        class Handler(impl.BaseRequestHandler):
            def setup(self) -> None:
                calls.append("setup")
                if where == "setup":
                    raise ValueError

            def handle(self) -> None:
                calls.append("handle")
                raise ValueError

            def finish(self) -> None:
                calls.append("finish")

        return Handler

    for where, expected in (("setup", ["setup"]), ("handle", ["setup", "handle", "finish"])):
        calls.clear()
        with serving(impl.ThreadingTCPServer(LOCAL, handler(where))) as server:
            assert ask(server.server_address, b"") == b""
        assert calls == expected
    assert capfd.readouterr().err.count("\nValueError\n") == 2


def test_flush_error_in_finish_is_silent(impl: Any) -> None:
    """A socket error while `finish` flushes is swallowed, and both files are closed."""
    ours, theirs = socket.socketpair()

    def handle(self: Any) -> None:
        self.wfile.write(b"x")
        theirs.close()

    with ours:
        handler = stream_handler(impl, handle, wbufsize=-1)
        with mock.patch.object(socket.SocketIO, "write", side_effect=BrokenPipeError):
            try:
                made = handler(ours, "peer", None)
            except BrokenPipeError:
                made = None  # stdlib's wfile.close() flushes once more
    assert made is None or (made.wfile.closed and made.rfile.closed)


def test_handler_settings_take_effect(impl: Any) -> None:
    """`timeout`, `disable_nagle_algorithm` and `rbufsize` of a handler class are applied in `setup`."""
    seen = []

    def handle(self: Any) -> None:
        nodelay = bool(self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        seen.append((self.connection.gettimeout(), nodelay, isinstance(self.rfile, io.BufferedReader)))

    for attributes in ({}, {"timeout": 5, "disable_nagle_algorithm": True, "rbufsize": 0}):
        with serving(impl.TCPServer(LOCAL, stream_handler(impl, handle, **attributes))) as server:
            ask(server.server_address, b"")
    assert seen == [(None, False, True), (5.0, True, False)]


class FakeSocket:
    """The least that unit tests give a StreamRequestHandler."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.sent = bytearray()

    def makefile(self, mode: str, _size: int = -1) -> io.BytesIO:
        return io.BytesIO(self.data)

    def sendall(self, data: bytes) -> None:
        self.sent += data


def test_stream_handler_on_a_fake_socket(impl: Any) -> None:
    """`Handler(fake, ('1.2.3.4', 5), None)` needs makefile and sendall of its request, no server and no more."""
    fake = FakeSocket(b"line\nrest")
    handler = stream_handler(impl, lambda self: self.wfile.write(self.rfile.readline()))(fake, ("1.2.3.4", 5), None)
    assert bytes(fake.sent) == b"line\n"
    assert handler.client_address == ("1.2.3.4", 5)
    assert handler.server is None
    assert handler.request is handler.connection is fake


def test_handlers_on_mocks(impl: Any) -> None:
    """Handlers are made of Mocks alone, and attributes of theirs are as in stdlib."""
    handler = impl.BaseRequestHandler(mock.sentinel.request, mock.sentinel.address, mock.sentinel.server)
    assert (handler.request, handler.client_address, handler.server) == (
        mock.sentinel.request,
        mock.sentinel.address,
        mock.sentinel.server,
    )
    assert handler.setup() is handler.handle() is handler.finish() is None
    request = mock.MagicMock()
    request.makefile.return_value = io.BytesIO(b"x")
    impl.StreamRequestHandler(request, ("1.2.3.4", 5), mock.MagicMock())
    request.makefile.assert_called_once_with("rb", -1)


def test_handler_made_without_init(impl: Any) -> None:
    """`Handler.__new__(Handler)` with attributes planted by a test can run `handle`."""
    handler_class = stream_handler(impl, lambda self: self.wfile.write(self.rfile.readline()))
    handler = handler_class.__new__(handler_class)
    handler.rfile, handler.wfile = io.BytesIO(b"planted\n"), io.BytesIO()
    handler.handle()
    assert handler.wfile.getvalue() == b"planted\n"


# --- addresses --------------------------------------------------------------------------------------------------------


def test_client_address_is_what_accept_gave(impl: Any, tmp_path: Any) -> None:
    """A pair for IPv4, four for IPv6, an empty string for an unbound Unix client."""
    seen = []

    def handle(self: Any) -> None:
        seen.append(self.client_address)

    six = type("Six", (impl.TCPServer,), {"address_family": socket.AF_INET6})
    with serving(impl.TCPServer(LOCAL, stream_handler(impl, handle))) as server:
        with connect(server.server_address) as client:
            four_name = client.getsockname()
            read_all(client)
    with serving(six(("::1", 0), stream_handler(impl, handle))) as server:
        with connect(server.server_address) as client:
            six_name = client.getsockname()
            read_all(client)
    with serving(impl.UnixStreamServer(str(tmp_path / "s"), stream_handler(impl, handle))) as server:
        ask(server.server_address, b"")
    assert seen == [four_name, six_name, ""]
    assert [len(address) for address in seen] == [2, 4, 0]


def test_unbound_unix_stream_address_with_a_name(impl: Any, tmp_path: Any) -> None:
    """A bound Unix client is told by its path."""
    seen = []
    handler = stream_handler(impl, lambda self: seen.append(self.client_address))
    with serving(impl.ThreadingUnixStreamServer(str(tmp_path / "s"), handler)) as server:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.bind(str(tmp_path / "c"))
            client.connect(server.server_address)
            assert client.recv(1) == b""
    assert seen == [str(tmp_path / "c")]
