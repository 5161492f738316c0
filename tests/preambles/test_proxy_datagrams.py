"""A PROXY header in every datagram: taken off, believed from proxies alone, and answered by way of the proxy."""

import contextlib
import socket

import pytest

import harken
from harken import ProxyHeader

from .kit import ENGINES, LOCAL, PATIENCE, TRUST, Told

CLIENT, SERVER = ("192.0.2.1", 56324), ("192.0.2.2", 53)
HEADER = ProxyHeader.make(CLIENT, SERVER, transport="dgram", authority="a.example")


class Tell(harken.BaseRequestHandler):
    """Answers with who asked and what, as handlers of the standard library do."""

    def handle(self):
        data, sock = self.request
        assert isinstance(sock, socket.socket)
        told = f"{self.client_address!r}|{self.peer}|{self.peer.proxy and self.peer.proxy.authority}|".encode()
        sock.sendto(told + data, self.client_address)


class Upper(harken.DatagramRequestHandler):
    """Answers by ``wfile``."""

    def handle(self):
        self.wfile.write(self.rfile.read().upper())


@contextlib.contextmanager
def asking(server):
    """Give the proxy's socket."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as proxy:
        proxy.settimeout(PATIENCE)
        proxy.connect(server.server_address)
        yield proxy


def serving(engine, handler=Tell, **settings):
    settings = {"proxy": "any", "proxy_from": TRUST, **settings}
    return harken.background(harken.UDPServer(LOCAL, handler, engine=engine, **settings))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_client_is_shown_and_the_proxy_answered(engine):
    """The handler sees the payload and the client; what it sends to the client goes to the proxy, without a header."""
    with serving(engine) as server, asking(server) as proxy:
        for number in range(3):
            proxy.send(HEADER.encode() + b"question %d" % number)
            assert proxy.recv(1000) == f"{CLIENT!r}|192.0.2.1:56324|a.example|question {number}".encode()
        proxy.send(ProxyHeader(("2001:db8::1", 5), ("::1", 6), "dgram").encode())
        assert proxy.recv(1000) == b"('2001:db8::1', 5, 0, 0)|[2001:db8::1]:5|None|"


@pytest.mark.parametrize("engine", ENGINES)
def test_answers_by_wfile_go_by_way_of_the_proxy(engine):
    """A DatagramRequestHandler needs no change either."""
    with serving(engine, Upper) as server, asking(server) as proxy:
        proxy.send(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nquestion\r\n")
        assert proxy.recv(1000) == b"QUESTION\r\n"


class AsyncUpper(harken.AsyncRequestHandler):
    """Answers by coroutines."""

    async def handle(self):
        data, sock = self.request
        sock.sendto(f"{self.client_address[0]} ".encode() + data.upper(), self.client_address)


def test_coroutines_answer_by_way_of_the_proxy():
    """A handler with ``async def handle`` sees the client and reaches the proxy."""
    with serving("asyncio", AsyncUpper) as server, asking(server) as proxy:
        proxy.send(HEADER.encode() + b"question")
        assert proxy.recv(1000) == b"192.0.2.1 QUESTION"


def test_two_proxies_are_told_apart():
    """The same client by way of two proxies is answered where each question came from."""
    with serving("thread") as server, asking(server) as one, asking(server) as other:
        for proxy in (one, other, one):
            proxy.send(HEADER.encode() + b"x")
        for proxy in (one, other, one):
            assert proxy.recv(1000).endswith(b"|x")


def test_the_proxys_own_datagrams_show_the_proxy():
    """LOCAL and UNKNOWN keep the real peer, and its header is there."""
    with serving("thread") as server, asking(server) as proxy:
        host, port = proxy.getsockname()
        for header in (ProxyHeader.local(), ProxyHeader(version=1)):
            proxy.send(header.encode() + b"hi")
            assert proxy.recv(1000) == f"{(host, port)!r}|{host}:{port}|None|hi".encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"question",
        HEADER.encode()[:-1],
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\n",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x12\0\0",
    ],
)
def test_a_datagram_without_a_whole_header_is_dropped_and_counted(data):
    """The bad one is told as rejected and counted; the good one after it is served."""
    told = Told("rejected", "accepted")
    with serving("thread") as server, asking(server) as proxy:
        proxy.send(data)
        (rejected,) = told.wait("rejected")
        assert rejected.reason == "preamble_failed"
        assert "PROXY" in rejected.detail
        assert rejected.peer.port == proxy.getsockname()[1]
        proxy.send(HEADER.encode() + b"good")
        assert proxy.recv(1000).endswith(b"|good")
        assert len(told.wait("accepted")) == 1
        assert told.wait("accepted")[0].peer.address == "192.0.2.1"
        assert server.stats()["rejected_total"] == 1
    told.unsubscribe()


def test_a_stranger_may_not_speak_for_others():
    """Datagrams from outside ``proxy_from`` are dropped, header or not."""
    told = Told("rejected")
    with serving("thread", proxy_from=["192.0.2.0/24"]) as server, asking(server) as proxy:
        proxy.send(HEADER.encode() + b"x")
        assert "127.0.0.1 is not in proxy_from" in told.wait("rejected")[0].detail
        assert server.stats()["accepted_total"] == 0
    told.unsubscribe()


def test_unix_datagrams_have_headers_too(tmp_path):
    """A Unix datagram socket is answered by its path, and a proxy without one cannot be."""
    server = harken.UnixDatagramServer(str(tmp_path / "s"), Upper, proxy="v2", proxy_from=["unix:"])
    with harken.background(server), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as proxy:
        proxy.settimeout(PATIENCE)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unnamed:
            unnamed.sendto(HEADER.encode() + b"lost", server.server_address)  # nowhere to answer, which is no error
        proxy.connect(server.server_address)
        proxy.bind(str(tmp_path / "proxy"))
        for header in (HEADER, ProxyHeader("/run/client", "/run/s", "dgram"), ProxyHeader(b"\0c", "", "dgram")):
            proxy.send(header.encode() + b"found")
            assert proxy.recv(100) == b"FOUND"


def test_the_socket_stays_the_same_object():
    """Programs compare ``server.socket``; it is a socket still, sends elsewhere as ever, and closes its port."""
    with serving("inline") as server, asking(server) as proxy:
        before = server.socket
        proxy.send(HEADER.encode())
        proxy.recv(1000)
        assert server.socket is before
        before.sendto(b"plain", proxy.getsockname())
        assert proxy.recv(100) == b"plain"
        before.sendmsg([b"in ", b"parts"], [], 0, proxy.getsockname())
        assert proxy.recv(100) == b"in parts"
        address = server.server_address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
        again.bind(address)
