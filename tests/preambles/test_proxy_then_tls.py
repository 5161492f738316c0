"""A PROXY header, and TLS after it: both preambles of one connection, in their order and under one deadline."""

import contextlib
import shutil
import socket
import ssl
import time

import pytest

import harken
from harken import ProxyHeader

from .kit import PATIENCE, TRUST, Told, dial, read_end, read_line
from .tls_kit import ENGINES

HEADER = ProxyHeader.make(("192.0.2.1", 56324), ("192.0.2.2", 443), authority="a.example", checksum=True).encode()
needs_haproxy = pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs haproxy: apt-get install haproxy")


class Tell(harken.StreamRequestHandler):
    """Says who the client is, by its header and by its certificate, and echoes lines."""

    def handle(self):
        assert isinstance(self.request, ssl.SSLSocket)
        names = self.peer.certificate and [name for _, name in self.peer.certificate["subjectAltName"]]
        self.wfile.write(f"{self.client_address}|{self.peer}|{self.peer.proxy.authority}|{names}\n".encode())
        for line in self.rfile:
            self.wfile.write(line)


TOLD = "('192.0.2.1', 56324)|192.0.2.1:56324|a.example|"


@pytest.fixture
def both(serving, pki, tmp_path):
    """Return a function that serves Tell behind proxies and TLS."""

    def serve(engine="thread", transport="tcp", handler=Tell, **settings):
        where = {"kind": harken.UnixStreamServer, "address": str(tmp_path / "s")} if transport == "unix" else {}
        settings = {"proxy": "any", "proxy_from": TRUST, "tls": harken.TLS(pki.cert), **where, **settings}
        return serving(engine, handler, **settings)

    return serve


@contextlib.contextmanager
def secured(wire, context):
    """Shake hands on a socket; at the end shut it, since a forked child has a copy of it that nobody closes."""
    with context.wrap_socket(wire, server_hostname="localhost") as client:
        yield client
        with contextlib.suppress(OSError):
            socket.socket.shutdown(client, socket.SHUT_RDWR)


def shake(client, context, before=b""):
    """Shake hands, with the first flight right behind ``before``, in one piece; return what reads and writes."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")

    def until_done(call, *args):
        nonlocal before
        while True:
            try:
                done = call(*args)
            except ssl.SSLWantReadError:
                done = None
            if outgoing.pending:
                client.sendall(before + outgoing.read())
                before = b""
            if done is not None:
                return done
            incoming.write(client.recv(65536))

    until_done(lambda: tls.do_handshake() or True)
    return lambda data: until_done(tls.write, data), lambda: until_done(tls.read, 65536)


@pytest.mark.parametrize("engine", ENGINES)
def test_who_is_refused_hears_no_goodbye(both, trusting, engine):
    """It is reset: a close_notify before that would pass for the end of an empty answer."""
    with both(engine, deny=["192.0.2.0/24"]) as server, dial(server) as wire:
        wire.sendall(HEADER)
        with secured(wire, trusting()) as client:
            client.suppress_ragged_eofs = False  # that ssl takes a reset for an end is Python's own
            with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
                client.recv(100)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_the_header_comes_before_the_handshake(both, trusting, pki, engine, transport):
    """The client is the header's, and its certificate that of the handshake; events show both."""
    told = Told("opened", "closed")
    tls = harken.TLS(pki.cert, ca=pki.ca, verify="required")
    with both(engine, transport, tls=tls) as server:
        with dial(server) as wire:
            wire.sendall(HEADER)
            with secured(wire, trusting(pki.client)) as client:
                assert read_line(client) == TOLD + "['ann@example.org']\n"
                client.sendall(b"hello\n")
                assert read_line(client) == "hello\n"
                if engine != "inline":
                    told.wait("opened")  # a child's parent is told of the client by and by
                    (open_now,) = server.connections()
                    assert open_now.peer.address == "192.0.2.1"
        closed = told.wait("closed")[0]
        assert told.wait("opened")[0].peer.address == closed.peer.address == "192.0.2.1"
        assert closed.peer.proxy.authority == "a.example"
    told.unsubscribe()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_handshake_may_come_in_the_headers_segment(both, trusting, engine):
    """Not a byte of the handshake is taken with the header."""
    with both(engine) as server, dial(server) as wire:
        write, read = shake(wire, trusting(), HEADER)
        assert read().decode() == TOLD + "None\n"
        write(b"hello\n")
        assert read() == b"hello\n"


@pytest.mark.parametrize("engine", ENGINES)
def test_each_must_be_there(both, trusting, engine):
    """Without its header, with the header inside TLS, or with plain text behind the header nobody is served."""
    told = Told("closed")
    with both(engine) as server:
        with dial(server) as wire:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                trusting().wrap_socket(wire, server_hostname="localhost")
        assert "a TLS handshake" in told.wait("closed", 1)[0].detail
        with dial(server) as wire:
            wire.sendall(HEADER + b"GET / HTTP/1.1\r\n\r\n")
            read_end(wire)
        failed = told.wait("closed", 2)[1]
        assert failed.reason == "preamble_failed"
        assert failed.peer.address == "192.0.2.1"
        with dial(server) as wire:
            wire.sendall(HEADER)
            with secured(wire, trusting()) as client:
                assert read_line(client) == TOLD + "None\n"
    told.unsubscribe()


@pytest.mark.parametrize("engine", ENGINES)
def test_both_share_one_deadline(both, engine):
    """Who sends its header in time and then nothing is closed when ``preamble_timeout`` is over."""
    told = Told("closed")
    begun = time.monotonic()
    with both(engine, preamble_timeout=0.5) as server, dial(server) as wire:
        wire.sendall(HEADER)
        read_end(wire)
        assert 0.4 < time.monotonic() - begun < PATIENCE / 2
        assert told.wait("closed")[0].reason == "preamble_failed"
    told.unsubscribe()


@needs_haproxy
@pytest.mark.parametrize("engine", ENGINES)
def test_haproxy_passes_tls_through(both, trusting, engine, tmp_path):
    """The client's handshake is with harken; HAProxy only puts the header before it."""
    from .test_haproxy import haproxy, where

    with both(engine) as server, haproxy(tmp_path, where(server), "send-proxy-v2") as door:
        with socket.create_connection(door, PATIENCE) as wire:
            own = wire.getsockname()
            with secured(wire, trusting()) as client:
                assert read_line(client) == f"{own}|127.0.0.1:{own[1]}|None|None\n"


@needs_haproxy
@pytest.mark.parametrize("version", ["send-proxy", "send-proxy-v2", "send-proxy-v2-ssl-cn"])
def test_haproxy_speaks_tls_itself(both, trusting, pki, version, tmp_path):
    """HAProxy ends the client's TLS, and speaks TLS with harken behind its header."""
    from .test_haproxy import haproxy, where

    options = f"{version} ssl ca-file {pki.ca} verifyhost localhost"
    with both("thread") as server:
        with haproxy(tmp_path, where(server), options, f"ssl crt {pki.cert}") as door:
            with socket.create_connection(door, PATIENCE) as wire:
                own = wire.getsockname()
                with secured(wire, trusting()) as client:
                    assert read_line(client) == f"{own}|127.0.0.1:{own[1]}|None|None\n"
                    client.sendall(b"hello\n")
                    assert read_line(client) == "hello\n"
