"""TLS on every engine: what handlers and clients see of it."""

import http.server
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest

import harken
from harken.preambles._secured import Secured

from .tls_kit import BESIDE, ENGINES, PATIENCE, plain

CURL = shutil.which("curl")
OPENSSL = shutil.which("openssl")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_request_is_an_ssl_socket(engine, serving, dial):
    """Its class, and what it says of the connection, are as in the standard library."""

    class Tell(harken.BaseRequestHandler):
        def handle(self):
            request = self.request
            assert isinstance(request, ssl.SSLSocket)
            assert isinstance(request, socket.socket)
            assert request.server_side
            assert request.fileno() >= 0
            assert request.getpeername() == self.client_address
            assert request.gettimeout() is None
            assert request.getpeercert() is None
            assert request.selected_alpn_protocol() is None
            assert request.cipher()[0] in {name for name, *_ in request.shared_ciphers()}
            assert request.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            request.sendall(request.version().encode())

    with serving(engine, Tell) as server, dial(server) as client:
        assert client.recv(100).decode() == client.version() == "TLSv1.3"


@pytest.mark.parametrize("engine", ENGINES)
def test_much_passes_both_ways_at_once(engine, serving, dial, trusting):
    """Three million bytes each way, in pieces of every size, arrive as they were sent."""
    data = bytes(range(256)) * 12000
    context = trusting()
    context.sslsocket_class = Secured
    with serving(engine) as server, dial(server, context=context) as client:
        client.share()  # between two threads, which OpenSSL's objects are not for
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        got = bytearray()
        while len(got) < len(data):
            got += client.recv(50_000)
        sender.join(PATIENCE)
        assert got == data


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_both_ends_end_properly(engine, version, serving, dial_wire, trusting, closed):
    """A client that ends its side gets the whole answer and then close_notify; nothing is cut."""

    class Late(harken.BaseRequestHandler):
        def handle(self):
            size = 0
            while data := self.request.recv(1000):
                size += len(data)
            self.request.sendall(b"%d;" % size + bytes(1_000_000))

    context = trusting()
    context.maximum_version = version
    with serving(engine, Late) as server, dial_wire(server, context) as client:
        client.send(bytes(70_000))
        client.end()
        answer = client.read_all()
        assert answer.startswith(b"70000;")
        assert len(answer) == 1_000_006
        assert closed.wait(1)[0].reason in ("peer_closed", "handler_returned")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_server_may_end_its_side_and_read_on(engine, serving, dial_wire):
    """After ``shutdown(SHUT_WR)`` the client has a proper end, and what it sends before and after that is read."""
    got = []

    class End(harken.BaseRequestHandler):
        def handle(self):
            assert self.request.recv(1) == b"1"
            self.request.sendall(b"bye")
            self.request.shutdown(socket.SHUT_WR)
            data = b""
            while more := self.request.recv(100):
                data += more
            self.server.close_connection(self.connection_id, data.decode())

    class Server(harken.TCPServer):
        def shutdown_request(self, request):
            got.append(self.connections())
            super().shutdown_request(request)

    with serving(engine, End, kind=Server) as server, dial_wire(server) as client:
        client.send(b"12")
        client.send(b"34")
        assert client.read_all() == b"bye"
        client.send(b"56")
        client.end()
        assert client.sock.recv(1) == b""


@pytest.mark.parametrize("engine", ENGINES)
def test_close_does_not_wait_for_the_peer(engine, serving, dial, closed):
    """A client that never answers close_notify, and never closes, keeps no handler."""

    class Leave(harken.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"bye")

    with serving(engine, Leave) as server, dial(server) as client:
        began = time.monotonic()
        closed.wait(1)
        assert time.monotonic() - began < PATIENCE / 2
        client.suppress_ragged_eofs = False
        assert client.recv(100) == b"bye"
        assert client.recv(100) == b""


@pytest.mark.parametrize("engine", BESIDE)
def test_a_cut_connection_never_yields_ciphertext(engine, serving, dial, closed):
    """A handler whose connection is cut reads the end, or an error, and nothing that was not said under TLS."""
    seen = []

    class Watch(harken.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"here")
            try:
                self.request.recv(100)
                data = self.request.recv(100)
            except OSError:
                data = b""
            seen.append(data)
            assert data == b""

    with serving(engine, Watch) as server, dial(server) as client:
        assert client.recv(4) == b"here"
        (info,) = server.connections()
        assert server.close_connection(info.id)
        closed.wait(1)
        assert closed.events[0].reason == "killed"
        assert server.stats()["handler_failed_total"] == 0
    assert b"".join(seen) == b""


@pytest.mark.parametrize("engine", ["thread", "green", "green-asking", "green-fallback"])
def test_verbs_of_the_socket(engine, serving, dial):
    """recv_into, send, makefile, pending, time-outs, and not waiting, as on any TLS socket."""
    wrong = []

    class Try(harken.BaseRequestHandler):
        def handle(self):
            try:
                self.run()
            except BaseException as error:
                wrong.append(error)
                raise

        def run(self):
            request = self.request
            buffer = bytearray(10)
            assert request.recv_into(buffer, 3) == 3
            assert request.pending() == 3
            assert request.recv_into(memoryview(buffer)[3:]) == 3
            assert buffer[:6] == b"abcdef"
            assert request.pending() == 0
            assert request.recv(0) == b""
            request.settimeout(0.05)
            assert request.gettimeout() == 0.05
            with pytest.raises(TimeoutError):
                request.recv(1)
            request.setblocking(False)
            with pytest.raises(ssl.SSLWantReadError):
                request.recv(1)
            assert request.send(b"now") == 3
            request.setblocking(True)
            assert request.gettimeout() is None
            for call in (lambda: request.recv(1, socket.MSG_PEEK), lambda: request.send(b"x", 1)):
                with pytest.raises(ValueError, match="flags"):
                    call()
            with pytest.raises(NotImplementedError):
                request.sendmsg([b"x"])
            with request.makefile("rwb") as stream:
                assert stream.readline() == b"line\n"
                stream.write(b"answer\n")
            assert request.fileno() >= 0

    with serving(engine, Try) as server, dial(server) as client:
        client.sendall(b"abcdef")
        assert client.recv(3) == b"now"
        client.sendall(b"line\n")
        assert client.recv(100) == b"answer\n"
        assert client.recv(100) == b""
    assert wrong == []


@pytest.mark.parametrize("engine", ["thread", "green", "green-asking", "green-fallback"])
def test_the_end_is_read_again_and_again(engine, serving, dial):
    """A client that has said close_notify waits for ours with its side open: nobody else would end a second read."""
    told = []

    class Read(harken.StreamRequestHandler):
        def handle(self):
            told.extend(self.rfile.readline() for _ in range(3))
            told.extend((self.request.recv(1), self.request.recv_into(bytearray(1)), self.request.read(1)))

    with serving(engine, Read) as server, dial(server) as client:
        client.sendall(b"no line")
        client.unwrap()
    assert told == [b"no line", b"", b"", b"", 0, b""]


@pytest.mark.parametrize("engine", ["thread", "green", "green-asking", "green-fallback"])
def test_unwrap_goes_on_in_plain_text(engine, serving, dial):
    """After ``unwrap`` on both sides the same connection speaks without TLS."""

    class Unwrap(harken.BaseRequestHandler):
        def handle(self):
            assert self.request.recv(10) == b"tls"
            plain = self.request.unwrap()
            plain.sendall(b"plain")
            assert plain.recv(10) == b"yes"
            plain.sendall(b"end")

    with serving(engine, Unwrap) as server, dial(server) as client:
        client.sendall(b"tls")
        wire = client.unwrap()
        assert wire.recv(5) == b"plain"
        wire.sendall(b"yes")
        assert wire.recv(3) == b"end"


@pytest.mark.parametrize("engine", ["thread", "green", "green-asking", "green-fallback"])
def test_unwrap_before_all_was_read_is_an_error_that_the_client_is_told_of(engine, serving, dial_wire):
    """Data come behind our close_notify, against the rules: it has gone out all the same, and nothing is read."""
    told, over = [], threading.Event()

    class Unwrap(harken.BaseRequestHandler):
        def handle(self):
            assert self.request.recv(1) == b"."
            with pytest.raises(ssl.SSLError, match="APPLICATION_DATA_AFTER_CLOSE_NOTIFY"):
                self.request.unwrap()
            told.append(self.request.recv(10))
            harken.green.offload(over.wait, PATIENCE)

    with serving(engine, Unwrap) as server, dial_wire(server) as client:
        client.send(b".unread")
        client.send(b"unread")
        try:
            assert client.read() == b""
        finally:
            over.set()
    assert told == [b""]


def test_a_write_that_is_cut_short_ends_the_writing(serving, dial):
    """On a hub a record may be half sent when the time-out strikes: nothing may be written behind it."""
    errors = []

    class Push(harken.BaseRequestHandler):
        def handle(self):
            self.request.settimeout(0.2)
            for _ in range(2):
                try:
                    self.request.sendall(bytes(50_000_000))
                except OSError as error:
                    errors.append(error)

    with serving("green", Push) as server, dial(server) as client:
        deadline = time.monotonic() + PATIENCE
        while len(errors) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        first, second = errors
        assert isinstance(first, TimeoutError)
        assert "cut short" in str(second)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            while client.recv(1 << 20):
                pass
            raise ConnectionError("ended")


def test_two_green_threads_may_share_a_connection(serving, dial):
    """One reads while the other writes; a second writer is refused as on a plain connection."""
    found = []

    class Share(harken.BaseRequestHandler):
        def handle(self):
            reader = harken.green.spawn(lambda: found.append(self.request.recv(100)))
            harken.green.sleep(0.05)
            writer = harken.green.spawn(self.request.sendall, bytes(20_000_000))
            harken.green.sleep(0.05)
            with pytest.raises(RuntimeError, match="already used"):
                self.request.sendall(b"x")
            self.server.ready = True
            reader.join()
            writer.join()
            self.request.sendall(b"done")

    with serving("green", Share) as server, dial(server) as client:
        client.sendall(b"meanwhile")
        end = time.monotonic() + 20
        while not getattr(server, "ready", False):  # until then nobody reads, so that the writer waits
            assert time.monotonic() < end
            time.sleep(0.01)
        size = 0
        last = b""
        while data := client.recv(1 << 20):
            size, last = size + len(data), data
        assert last.endswith(b"done")
        assert size == 20_000_004
    assert found == [b"meanwhile"]


@pytest.mark.parametrize("engine", ["inline", "thread", "green"])
@pytest.mark.skipif(CURL is None, reason="curl is not installed")
def test_curl_reads_from_http_server(engine, pki, serving, tmp_path):
    """``http.server``'s handler, unchanged, is an https server."""
    (tmp_path / "page").write_bytes(b"a page " * 50_000)

    class Files(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *args):
            pass

    with serving(engine, Files) as server:
        url = f"https://localhost:{server.server_address[1]}/page"
        command = [CURL, "-sS", "--cacert", pki.ca, "--http1.1", "-o", tmp_path / "a", url, "-o", tmp_path / "b", url]
        subprocess.run(command, check=True, timeout=PATIENCE)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"a page " * 50_000


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.skipif(OPENSSL is None, reason="openssl is not installed")
def test_openssl_speaks_to_it(engine, pki, serving):
    """``openssl s_client`` verifies the chain, sends a line, gets it back and sees the end."""
    with serving(engine) as server:
        command = [OPENSSL, "s_client", "-CAfile", pki.ca, "-verify_return_error", "-quiet", "-no_ign_eof"]
        command += ["-connect", f"127.0.0.1:{server.server_address[1]}"]
        done = subprocess.run(command, input=b"hello\n", capture_output=True, timeout=PATIENCE, check=False)
    assert b"verify return:1" in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr


def test_a_programs_own_tls_is_left_alone(pki, serving, dial):
    """A ``get_request`` that returns an SSL socket is served as before, and not twice under TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.cert)

    class Own(harken.TCPServer):
        def get_request(self):
            request, address = super().get_request()
            return context.wrap_socket(request, server_side=True), address

    with serving("thread", kind=Own) as server, dial(server) as client:
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"


def test_a_context_of_the_programs_own_may_be_given(pki, serving, dial):
    """``tls`` takes an ``ssl.SSLContext``, whatever it is set to."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.cert)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    for engine in ("thread", "green"):
        with serving(engine, tls=context) as server, dial(server) as client:
            assert client.version() == "TLSv1.2"
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"


@pytest.mark.parametrize("engine", BESIDE)
def test_silent_clients_delay_nobody(engine, serving, dial, closed):
    """Clients that connect and say nothing are each in their own handshake, in ``connections()``, and can be cut."""
    count = 20
    with serving(engine, pool_size=30, preamble_timeout=60.0) as server:
        silent = [plain(server) for _ in range(count)]
        for each in silent:
            each.__enter__()
        with dial(server) as client:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
            for info in server.connections():
                server.close_connection(info.id, "shutdown")
        for each in silent:
            each.__exit__(None, None, None)
        assert {event.reason for event in closed.wait(count + 1)} <= {"shutdown", "handler_returned", "peer_closed"}
