"""TLS in the middle of a connection, and TLS beside plain text on one port."""

import socket
import ssl
import threading

import pytest

import harken
from harken.errors import LifecycleError

from .tls_kit import BESIDE, ENGINES, LOCAL, PATIENCE, plain


class Lines(harken.StreamRequestHandler):
    """Answers each line with how it came; ``STARTTLS`` begins TLS."""

    def handle(self):
        while line := self.rfile.readline():
            if line == b"STARTTLS\n":
                self.wfile.write(b"go\n")
                request = self.start_tls()
                assert request is self.request is self.connection
                assert isinstance(request, ssl.SSLSocket)
            else:
                how = self.request.version() if isinstance(self.request, ssl.SSLSocket) else "plain"
                self.wfile.write(how.encode() + b" " + line)


def ask(client, line):
    """Send a line, and return the line that comes back."""
    client.sendall(line)
    answer = b""
    while not answer.endswith(b"\n"):
        more = client.recv(1)
        if not more:
            break
        answer += more
    return answer


@pytest.fixture
def starttls(pki):
    """A TLS that waits for the handler."""
    return harken.TLS(pki.cert, mode="starttls")


@pytest.mark.parametrize("engine", ENGINES)
def test_starttls(engine, starttls, serving, trusting, closed):
    """Plain before, TLS after, on the same connection, which ends properly and is one in the books."""
    with serving(engine, Lines, tls=starttls) as server, plain(server) as sock:
        assert ask(sock, b"hello\n") == b"plain hello\n"
        assert ask(sock, b"STARTTLS\n") == b"go\n"
        with trusting().wrap_socket(sock, server_hostname="localhost") as client:
            assert ask(client, b"hello\n") == b"TLSv1.3 hello\n"
            assert len(server.connections()) == 1
            client.unwrap().shutdown(socket.SHUT_WR)
        (event,) = closed.wait(1)
        assert event.reason in ("peer_closed", "handler_returned")
        assert server.connections() == []


@pytest.mark.parametrize("engine", BESIDE)
def test_starttls_once_more_after_unwrap(engine, starttls, serving, trusting, closed):
    """Plain text between two times of TLS; who waits for the second to say something keeps no other client waiting."""

    class Twice(harken.BaseRequestHandler):
        def handle(self):
            for _ in range(2):
                self.start_tls()
                self.request.sendall(self.request.recv(10))
                self.request.unwrap().sendall(b"plain")

    def shake(sock):
        return trusting().wrap_socket(sock.dup(), server_hostname="localhost")

    with serving(engine, Twice, tls=starttls) as server, plain(server) as sock, plain(server) as other:
        for again in (False, True):
            with shake(sock) as client:
                if again:
                    with shake(other) as beside:
                        assert ask(beside, b"first\n") == b"first\n"
                assert ask(client, b"hello\n") == b"hello\n"
                assert client.unwrap().recv(5) == b"plain"
        assert closed.wait(1)[0].reason in ("peer_closed", "handler_returned")


@pytest.mark.parametrize("engine", ENGINES)
def test_plain_text_behind_the_request_for_tls_is_refused(engine, starttls, serving, closed, capfd):
    """What somebody in between injected is never taken for something said under TLS."""
    with serving(engine, Lines, tls=starttls) as server, plain(server) as sock:
        assert ask(sock, b"STARTTLS\nEVIL\n") == b"go\n"
        assert sock.recv(100) == b""
        (event,) = closed.wait(1)
        assert event.reason == "preamble_failed"
        if engine != "fork":
            assert event.detail == "5 bytes of plain text followed the request for TLS"
        assert server.stats()["handler_failed_total"] == 0
    printed = capfd.readouterr().err
    assert "Traceback" not in printed


@pytest.mark.parametrize("engine", ["thread", "green", "green-asking", "green-fallback"])
def test_plain_text_in_a_segment_of_its_own_fails_the_handshake(engine, starttls, serving, closed):
    """Injected a moment later, it meets OpenSSL."""
    with serving(engine, Lines, tls=starttls) as server, plain(server) as sock:
        assert ask(sock, b"STARTTLS\n") == b"go\n"
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        while sock.recv(100):
            pass
        assert closed.failures(1) == ["plain HTTP on the TLS port"]


@pytest.mark.parametrize("engine", ["thread", "fork", "green"])
def test_a_handler_without_files(engine, pki, serving, trusting):
    """``BaseRequestHandler`` too, with a TLS or a context of the handler's own, and only once."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.cert)

    for given in (harken.TLS(pki.cert), context):

        class Upgrade(harken.BaseRequestHandler):
            def handle(self, given=given):
                self.start_tls(given)
                try:
                    self.start_tls(given)
                except LifecycleError as error:
                    self.request.sendall(str(error).encode())

        with harken.background(harken.TCPServer(LOCAL, Upgrade, engine=engine)) as server, plain(server) as sock:
            with trusting().wrap_socket(sock, server_hostname="localhost") as client:
                assert client.recv(1000) == b"start_tls(): the connection is under TLS already"
                assert client.recv(1) == b""


def test_without_a_certificate_it_cannot_be(serving):
    """The message says what to do."""
    wrong = []

    class Upgrade(harken.BaseRequestHandler):
        def handle(self):
            try:
                self.start_tls()
            except LifecycleError as error:
                wrong.append(str(error))

    with harken.background(harken.ThreadingTCPServer(LOCAL, Upgrade)) as server, plain(server) as sock:
        assert sock.recv(1) == b""
    assert "has no certificate" in wrong[0]


@pytest.mark.parametrize("engine", ["thread", "green"])
def test_a_silent_peer_is_given_up(engine, starttls, serving, closed):
    """``preamble_timeout`` holds here too."""
    with serving(engine, Lines, tls=starttls, preamble_timeout=0.3) as server, plain(server) as sock:
        assert ask(sock, b"STARTTLS\n") == b"go\n"
        assert sock.recv(1) == b""
        assert closed.failures(1) == ["the peer was not ready within 0.3 s (preamble_timeout)"]


@pytest.mark.parametrize("engine", ["thread", "green"])
def test_a_cut_after_starttls_reaches_the_handler(engine, starttls, serving, trusting, closed):
    """``close_connection`` finds what the connection has become."""
    with serving(engine, Lines, tls=starttls) as server, plain(server) as sock:
        assert ask(sock, b"STARTTLS\n") == b"go\n"
        client = trusting().wrap_socket(sock, server_hostname="localhost")
        with client:
            assert ask(client, b"x\n") == b"TLSv1.3 x\n"
            (info,) = server.connections()
            assert server.close_connection(info.id)
            assert closed.wait(1)[0].reason == "killed"


@pytest.mark.parametrize("engine", ENGINES)
def test_tls_and_plain_text_on_one_port(engine, pki, serving, dial):
    """The first byte tells them apart; a client that says nothing is neither."""
    with serving(engine, Lines, tls=harken.TLS(pki.cert, mode="optional"), preamble_timeout=1.0) as server:
        with plain(server) as client:
            assert ask(client, b"hello\n") == b"plain hello\n"
        with dial(server) as client:
            assert ask(client, b"hello\n") == b"TLSv1.3 hello\n"


@pytest.mark.parametrize("engine", [engine for engine in BESIDE if engine != "fork"])
def test_many_at_once(engine, starttls, serving, trusting):
    """Clients that change to TLS at the same time do not get into each other's way."""
    wrong = []

    def run(server):
        try:
            with plain(server) as sock:
                assert ask(sock, b"STARTTLS\n") == b"go\n"
                with trusting().wrap_socket(sock, server_hostname="localhost") as client:
                    for _ in range(20):
                        assert ask(client, b"hello\n") == b"TLSv1.3 hello\n"
        except BaseException as error:
            wrong.append(error)

    with serving(engine, Lines, tls=starttls) as server:
        threads = [threading.Thread(target=run, args=(server,)) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert wrong == []
