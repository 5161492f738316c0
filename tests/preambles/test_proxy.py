"""The PROXY header before the handler: every engine, TCP and Unix, whole and in pieces, good and bad."""

import itertools
import os
import socket
import struct
import threading
import time

import pytest

import harken
from harken import ConfigError, ProxyHeader

from .kit import (
    ENGINES,
    LOCAL,
    PATIENCE,
    TRANSPORTS,
    TRUST,
    Mirror,
    Told,
    dial,
    hash_of,
    read_end,
    read_exactly,
    read_line,
    serving,
)

V1 = ProxyHeader(("192.0.2.1", 56324), ("192.0.2.2", 443), version=1)
V2 = ProxyHeader.make(("2001:db8::1", 1, 0, 0), ("2001:db8::2", 2, 0, 0), authority="a.example", checksum=True)
LONG = ProxyHeader.make(("192.0.2.9", 9), ("192.0.2.2", 443), tlvs=[(4, bytes(60_000))])  # beyond one look at it
everywhere = pytest.mark.parametrize("engine, transport", list(itertools.product(ENGINES, TRANSPORTS)))


def shown(header):
    """The line with which Mirror greets."""
    peer = f"{header.source[0]}:{header.source[1]}"
    peer = peer if header.family == socket.AF_INET else f"[{header.source[0]}]:{header.source[1]}"
    told = ProxyHeader.parse(header.encode())[0]
    return f"{header.source!r}|{peer}|{int(header.family)}|{told.bare()!r}|{hash_of(told)}\n"


@everywhere
def test_the_handler_meets_the_client_behind_the_proxy(engine, transport, tmp_path):
    """Address, peer and header are the client's; what follows the header, even glued to it, is the handler's."""
    with serving(engine, transport, tmp_path) as server:
        for header in (V1, V2, LONG):
            for glued in (b"", b"glued"):
                with dial(server) as client:
                    client.sendall(header.encode() + glued)
                    assert read_line(client) == shown(header)
                    client.sendall(b"\r\nPROXY more")
                    assert read_exactly(client, len(glued) + 12) == glued + b"\r\nPROXY more"


@everywhere
def test_a_header_may_come_byte_by_byte(engine, transport, tmp_path):
    """However a header is cut, it is read, and not a byte more; the handler's own bytes may come in the same piece."""
    with serving(engine, transport, tmp_path) as server:
        for header in (V1, V2):
            with dial(server) as client:
                if transport == "tcp":
                    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for byte in header.encode() + b"xyz":
                    client.sendall(bytes((byte,)))
                assert read_line(client) == shown(header)
                assert read_exactly(client, 3) == b"xyz"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cut", [1, 5, 6, 12, 13, 15, 16, 17, -3, -2, -1])
def test_a_header_in_two_pieces(engine, cut, tmp_path):
    """Wherever a header is parted, both parts are put together, although the second brings data."""
    with serving(engine, "tcp", tmp_path) as server:
        for header in (V1, V2):
            data = header.encode() + b"data"
            at = cut if cut > 0 else len(header.encode()) + cut
            with dial(server) as client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.sendall(data[:at])
                client.sendall(data[at:])
                assert read_line(client) == shown(header)
                assert read_exactly(client, 4) == b"data"


@everywhere
def test_local_and_unknown_keep_the_real_peer(engine, transport, tmp_path):
    """A proxy's own connection, or one whose client it does not name, shows the proxy, and its header."""
    unspec = b"\r\n\r\n\0\r\nQUIT\n\x21\0\0\3xyz"
    with serving(engine, transport, tmp_path) as server:
        for data in (ProxyHeader.local().encode(), b"PROXY UNKNOWN\r\n", unspec):
            with dial(server) as client:
                client.sendall(data)
                address, peer, _, header, _ = read_line(client).rstrip().split("|")
                own = client.getsockname()
                assert address == repr(own)
                assert peer == (
                    f"127.0.0.1:{own[1]}" if transport == "tcp" else f"unix pid {os.getpid()} uid {os.getuid()}"
                )
                assert header == repr(ProxyHeader.parse(data)[0].bare())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_client_of_any_family_may_stand_behind(engine, tmp_path):
    """Mapped IPv4 addresses are shown as IPv4, Unix paths as paths, and a UDP client's as its address."""
    with serving(engine, "tcp", tmp_path) as server:
        for header, address, peer in (
            (b"PROXY TCP6 ::ffff:192.0.2.1 ::1 5 6\r\n", ("192.0.2.1", 5), "192.0.2.1:5"),
            (ProxyHeader("/run/client", "/run/server").encode(), "/run/client", "unix /run/client"),
            (ProxyHeader(b"\0name", "").encode(), b"\0name", "unix @name"),
            (ProxyHeader("", "/run/server").encode(), "", "unix"),
            (ProxyHeader(("192.0.2.1", 5), ("192.0.2.2", 6), "dgram").encode(), ("192.0.2.1", 5), "192.0.2.1:5"),
        ):
            with dial(server) as client:
                client.sendall(header)
                told = read_line(client).split("|")
                assert told[:2] == [repr(address), peer]


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────

BROKEN = {
    "plain text": b"GET / HTTP/1.1\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\0\x01\0\x01\xfc",
    "bare LF": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\n",
    "leading zero": b"PROXY TCP4 192.0.2.1 192.0.2.2 01 2\r\n",
    "too long": b"PROXY UNKNOWN " + b"x" * 200,
    "version 3": b"\r\n\r\n\0\r\nQUIT\n\x31\x11\0\x0c" + bytes(12),
    "checksum": V2.encode()[:-1] + b"?",
    "addresses": b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\4" + bytes(4),
}


@everywhere
@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_without_a_valid_header_nobody_is_served(engine, transport, data, tmp_path, capfd):
    """The connection is closed with its reason, nothing is answered and printed, and the next client is served."""
    told = Told("opened", "closed")
    with serving(engine, transport, tmp_path) as server:
        with dial(server) as client:
            client.sendall(data)
            assert read_end(client) == b""
        (closed,) = told.wait("closed")
        assert closed.reason == "preamble_failed"
        assert "PROXY" in closed.detail
        assert "\n" not in closed.detail
        assert [event.connection for event in told.wait("opened")] == [closed.connection]
        with dial(server) as client:
            client.sendall(V1.encode())
            assert read_line(client) == shown(V1)
        assert server.stats()["closed_total"]["preamble_failed"] == 1
    told.unsubscribe()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("engine", ENGINES)
def test_a_header_that_comes_too_slowly_is_late(engine, tmp_path):
    """``preamble_timeout`` counts from the start: who sends a byte now and then is closed when it is over."""
    told = Told("closed")
    with serving(engine, "tcp", tmp_path, preamble_timeout=0.3) as server, dial(server) as client:
        begun = time.monotonic()
        stop = threading.Event()

        def dribble():
            for byte in V1.encode():
                if stop.wait(0.05):
                    return
                try:
                    client.send(bytes((byte,)))
                except OSError:
                    return

        sender = threading.Thread(target=dribble)
        sender.start()
        try:
            assert read_end(client) == b""
            assert 0.25 < time.monotonic() - begun < PATIENCE / 2
        finally:
            stop.set()
            sender.join()
        (closed,) = told.wait("closed")
        assert closed.reason == "preamble_failed"
        assert "0.3 s (preamble_timeout)" in closed.detail
    told.unsubscribe()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_client_that_leaves_before_its_header_is_whole(engine, tmp_path):
    """Half a header and the end is a failed preamble, whether the client closes or resets."""
    told = Told("closed")
    with serving(engine, "tcp", tmp_path) as server:
        for number, data in enumerate((b"", b"PROXY TC", V2.encode()[:40]), 1):
            with dial(server) as client:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                assert read_end(client) == b""
            closed = told.wait("closed", number)[-1]
            assert closed.reason == "preamble_failed"
            assert f"closed after {len(data)}" in closed.detail
        with dial(server) as client:
            client.sendall(b"PROXY")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            assert told.wait("closed", 4)[-1].reason == "preamble_failed"
    told.unsubscribe()


@everywhere
def test_a_peer_outside_proxy_from_may_not_speak(engine, transport, tmp_path):
    """Its header is not even read; on a Unix socket the mode of the path says who may connect, and no network can."""
    told = Told("closed")
    with serving(engine, transport, tmp_path, proxy_from=["192.0.2.0/24"]) as server, dial(server) as client:
        client.sendall(V1.encode())
        if transport == "unix":
            assert read_line(client) == shown(V1)
        else:
            assert read_end(client) == b""
            (closed,) = told.wait("closed")
            assert closed.reason == "preamble_failed"
            assert "127.0.0.1 is not in proxy_from (1 networks)" in closed.detail
    told.unsubscribe()


@pytest.mark.parametrize("wanted, sent", [("v1", V2), ("v2", V1)])
def test_only_the_version_asked_for_is_taken(wanted, sent, tmp_path):
    """A server of one version refuses the other, and says so."""
    told = Told("closed")
    with serving("thread", "tcp", tmp_path, proxy=wanted) as server, dial(server) as client:
        client.sendall(sent.encode())
        assert read_end(client) == b""
        assert f"let the proxy send {wanted}" in told.wait("closed")[0].detail
    told.unsubscribe()


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"proxy": "v1"}, "needs proxy_from"),
        ({"proxy": "any", "proxy_from": []}, "needs proxy_from"),
        ({"proxy": "v2", "proxy_from": ["10.0.0.0/33"]}, "proxy_from = .* '10.0.0.0/33' has no prefix"),
        ({"proxy": "v2", "proxy_from": ["proxy.example"]}, "proxy_from = .* 'proxy.example' is no IP address"),
        ({"proxy": "v2", "proxy_from": [3232235776]}, "proxy_from = .* as text"),
        ({"proxy": "v3", "proxy_from": TRUST}, "v3"),
        ({"proxy": "a.module:Name", "proxy_from": TRUST}, "'a.module:Name' is no version"),
    ],
)
@pytest.mark.parametrize("kind", [harken.TCPServer, harken.UDPServer])
def test_wrong_settings_are_told_at_the_start(kind, settings, message):
    """A server that would believe anybody, or whose list is wrong, is not made; nothing stays open."""
    with pytest.raises(ConfigError, match=message):
        kind(LOCAL, Mirror, **settings)


def test_lists_are_written_in_every_way(tmp_path):
    """``proxy_from`` takes lists and, from flags and variables, words with commas; Unix peers may be named too."""
    for written in ("127.0.0.0/8, ::1", ("127.0.0.1",), ["unix:", "127.0.0.1"]):
        with serving("thread", "tcp", tmp_path, proxy_from=written) as server, dial(server) as client:
            client.sendall(V1.encode())
            assert read_line(client) == shown(V1)
    with serving("thread", "unix", tmp_path, proxy_from="unix:") as server, dial(server) as client:
        client.sendall(V1.encode())
        assert read_line(client) == shown(V1)


def test_a_listener_of_both_families_knows_its_proxies():
    """Where IPv4 peers come mapped into IPv6 they are found in ``proxy_from`` by the address that they have."""
    from harken import testing

    with testing.serve(Mirror, "tcp://:0", proxy="any", proxy_from=["127.0.0.1"]) as served:
        with socket.create_connection(("127.0.0.1", served.address[1]), PATIENCE) as client:
            client.sendall(V1.encode())
            assert read_line(client) == shown(V1)
    with testing.serve(Mirror, "tcp://:0", proxy="any", proxy_from=["::1"]) as served:
        with socket.create_connection(("127.0.0.1", served.address[1]), PATIENCE) as client:
            client.sendall(V1.encode())
            assert read_end(client) == b""


def test_off_is_off(tmp_path):
    """Without ``proxy`` a header is data like any other, and whoever sends it stays who it is."""

    class Echo(harken.BaseRequestHandler):
        def handle(self):
            assert self.peer.proxy is None
            self.request.sendall(self.request.recv(100))

    with serving("thread", "tcp", tmp_path, Echo, proxy="off") as server, dial(server) as client:
        client.sendall(V1.encode())
        assert read_end(client) == V1.encode()


# ── who else is told ─────────────────────────────────────────────────────────────────────────────────────────────────


@everywhere
def test_events_and_connections_show_the_client(engine, transport, tmp_path):
    """``opened``, ``closed`` and ``connections()`` name the client behind the proxy, by its header."""
    told = Told("opened", "closed")
    with serving(engine, transport, tmp_path) as server:
        with dial(server) as client:
            client.sendall(V2.encode())
            assert read_line(client) == shown(V2)
            (opened,) = told.wait("opened")
            (open_now,) = server.connections()
            assert opened.connection == open_now.id
            for peer in (opened.peer, open_now.peer):
                assert (peer.address, peer.port, peer.family) == ("2001:db8::1", 1, socket.AF_INET6)
                assert peer.proxy.authority == "a.example"
                assert peer.credentials is None
        (closed,) = told.wait("closed")
        assert closed.peer == opened.peer
        assert closed.connection == opened.connection
        assert closed.reason in ("handler_returned", "peer_closed")
        assert len(told.wait("opened")) == 1
    told.unsubscribe()


def test_a_child_tells_its_parent_the_addresses_of_the_longest_header(tmp_path):
    """What does not fit one message of a child is left out of the parent's events; whose connection it is, never."""
    told = Told("opened", "closed")
    with serving("fork", "tcp", tmp_path) as server, dial(server) as client:
        client.sendall(LONG.encode())
        assert read_line(client) == shown(LONG)
        (opened,) = told.wait("opened")
        assert (opened.peer.address, opened.peer.port) == ("192.0.2.9", 9)
        assert opened.peer.proxy == LONG.bare()
        client.shutdown(socket.SHUT_RDWR)
        assert told.wait("closed")[0].peer == opened.peer
    told.unsubscribe()


class Picky(harken.TCPServer):
    """Refuses one client by its address."""

    def verify_request(self, request, client_address):
        return client_address[0] != "192.0.2.1"


@pytest.mark.parametrize("engine", ENGINES)
def test_verify_request_judges_the_client(engine, tmp_path):
    """The hook comes after the header, with the client's address; whom it refuses is counted and told as ever."""
    told = Told("rejected", "closed")
    server = Picky(LOCAL, Mirror, engine=engine, proxy="any", proxy_from=TRUST)
    with harken.background(server):
        with dial(server) as client:
            client.sendall(V1.encode())
            assert read_end(client) == b""
        assert told.wait("rejected")[0].reason == "verify_request"
        assert told.wait("rejected")[0].peer.address == "192.0.2.1"
        assert told.wait("closed")[0].reason == "rejected"
        assert server.stats()["rejected_total"] == 1
        with dial(server) as client:
            client.sendall(V2.encode())
            assert read_line(client) == shown(V2)
    told.unsubscribe()


class AsyncMirror(harken.AsyncRequestHandler):
    """As Mirror, by coroutines."""

    async def handle(self):
        header = self.peer.proxy
        told = f"{self.client_address!r}|{self.peer}|{int(self.peer.family)}|{header.bare()!r}|{hash_of(header)}\n"
        await self.request.sendall(told.encode())
        while data := await self.request.recv(65536):
            await self.request.sendall(data)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_handlers_of_coroutines_meet_the_client_too(transport, tmp_path):
    """The header is read before ``async def handle``, in pieces too; a bad one, or none in time, closes."""
    told = Told("closed")
    with serving("asyncio", transport, tmp_path, AsyncMirror, preamble_timeout=0.5) as server:
        for header in (V1, V2, LONG):
            with dial(server) as client:
                data = header.encode() + b"data"
                client.sendall(data[:20])
                client.sendall(data[20:])
                assert read_line(client) == shown(header)
                assert read_exactly(client, 4) == b"data"
        told.wait("closed", 3)
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"PROXY TCP4 "):
            with dial(server) as client:
                client.sendall(data)
                assert read_end(client) == b""
        assert [event.reason for event in told.wait("closed", 5)[3:]] == ["preamble_failed"] * 2
    told.unsubscribe()


class Bypass(harken.AsyncTCPServer):
    """A server whose hook would hand connections over before their header was read."""

    def process_request(self, request, client_address):
        self.RequestHandlerClass(request, client_address, self)


@pytest.mark.parametrize("handler", [Mirror, AsyncMirror])
def test_no_handler_goes_around_the_header(handler, capfd):
    """A handler refuses a connection whose header was not read, whichever hook gave it."""
    server = Bypass(LOCAL, handler, proxy="any", proxy_from=TRUST)
    with harken.background(server), dial(server) as client:
        client.sendall(V1.encode())
        assert read_end(client) == b""
        assert server.stats()["handler_failed_total"] == 1
    assert "whose preambles (TLS, PROXY) have not run" in capfd.readouterr().err


HUB_PROGRAM = """
import socket, sys
import harken
from harken import _hub

class Tell(harken.StreamRequestHandler):
    def handle(self):
        self.wfile.write(f"{self.client_address[0]} {self.rfile.readline()!r}".encode())

server = harken.GreenTCPServer(("127.0.0.1", 0), Tell, proxy="any", proxy_from=["127.0.0.1"])
with harken.background(server):
    for cut in range(1, 48):
        with socket.create_connection(server.server_address, 10) as client:
            data = b"PROXY TCP4 192.0.2.1 192.0.2.2 56324 443\\r\\nhello\\n"
            client.sendall(data[:cut])
            client.sendall(data[cut:])
            answer = b""
            while more := client.recv(100):
                answer += more
            assert answer == b"192.0.2.1 b'hello\\\\n'", answer
print(_hub.kind)
"""


@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_both_hubs_read_headers(kind, run_program):
    """Green threads wait for the header in the hub in C and in the one in Python alike, before a rfile."""
    process = run_program("-c", HUB_PROGRAM, env={"HARKEN_HUB": kind})
    out, err = process.communicate(timeout=30)
    if "is not installed" in err or "ImportError" in err:
        pytest.skip("the hub in C was not built: install gcc and python3-dev")
    assert (out.strip(), err) == (kind, "")
