"""Connections under TLS go straight where no hook is overridden; nobody can tell, till one overrides."""

from __future__ import annotations

import socket
import ssl
import threading

import pytest
from waiting import wait_until

import harken
from harken import events, straight
from harken.serving import serving_of

from .tls_kit import PATIENCE, Echo, plain

ENGINES = ("thread", "pool", "green", "green-asking", "green-fallback")
TOLD = ("accepted", "opened", "rejected", "preamble_failed", "handler_failed", "closed")
WAYS = ("returns", "raises", "closes", "keeps a file", "is killed", "speaks no TLS", "goes away")


class Roundabout(harken.TCPServer):
    """A server with a hook of its own, which does nothing: its connections go by all the others."""

    def verify_request(self, request, client_address):
        """Let everybody in."""
        return True


class ByHand(harken.BaseRequestHandler):
    """Ends as its client asks for by the first word."""

    kept = []

    def handle(self):
        """Read the word, and do it."""
        way = self.request.recv(100).decode()
        match way:
            case "raises":
                raise ValueError("a fault")
            case "closes":
                self.request.close()
            case "keeps a file":
                self.kept.append(self.request.makefile("rb"))
            case "is killed":
                self.server.close_connection(self.connection_id, "enough")


@pytest.fixture
def told():
    """What was told of connections during the test."""
    seen = []
    end = events.subscribe(seen.append, *TOLD)
    yield seen
    end()


def visit(server, way, dial):
    """Be a client of ``ByHand``."""
    if way in ("speaks no TLS", "goes away"):
        with plain(server) as client:
            if way == "speaks no TLS":
                client.sendall(b"GET / HTTP/1.0\r\n\r\n")
                client.recv(100)
        return
    with dial(server) as client:
        client.sendall(way.encode())
        if way == "keeps a file":
            wait_until(lambda: ByHand.kept)
            assert len(server.connections()) == 1
            ByHand.kept.pop().close()
        assert client.recv(1) == b""


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", WAYS)
def test_the_straight_way_tells_what_the_hooks_tell(engine, way, serving, dial, told, capfd):
    """However a connection ends: the same events in the same order, of the same peer, for the same reason."""
    stories = []
    for kind, direct in ((harken.TCPServer, True), (Roundabout, False)):
        told.clear()
        with serving(engine, ByHand, kind=kind) as server:
            assert straight.is_straight(serving_of(server)) is direct
            visit(server, way, dial)
            wait_until(lambda: told and told[-1].name == "closed")
            assert not server.connections()
            figures = server.stats()
        assert len({event.connection for event in told}) == 1
        assert len({event.peer.port for event in told}) == 1
        story = [(event.name, event.reason, getattr(event, "detail", None)) for event in told]
        stories.append((story, figures["closed_total"], figures["handler_failed_total"]))
        assert ("a fault" in capfd.readouterr().err) is (way == "raises")
    assert stories[0] == stories[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_limits_hold_before_the_handshake(engine, serving, dial, told):
    """A client that a limit refuses is told by a reset, and costs no handshake."""
    with serving(engine, Echo, max_connections_per_peer=1) as server, dial(server) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        with pytest.raises(ConnectionError), plain(server) as second:  # it may come as early as in connect()
            second.sendall(b"\x16")
            second.recv(1)
    assert [event.reason for event in told if event.name == "rejected"] == ["max_connections_per_peer"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_drain_ends_in_order_what_was_not_read(engine, serving, dial):
    """What a client has sent and no handler reads is read off, so that no reset overtakes the answer and the end."""
    go = threading.Event()

    class Late(harken.BaseRequestHandler):
        def handle(self):
            self.request.recv(1)
            harken.green.offload(go.wait, PATIENCE)
            self.request.sendall(b"bye")

    with serving(engine, Late) as server, dial(server) as client:
        client.sendall(b"1")
        client.sendall(bytes(100_000))
        drain = threading.Thread(target=server.drain, args=(PATIENCE,))
        drain.start()
        wait_until(lambda: serving_of(server).draining)
        go.set()
        client.suppress_ragged_eofs = False
        assert client.recv(100) == b"bye"
        assert client.recv(100) == b""
        drain.join(PATIENCE)


def test_a_client_behind_a_proxy_goes_by_the_hooks(serving):
    """Who it is nobody knows before the preamble has run; ``verify_request`` waits for that."""
    with serving("green", proxy="v2", proxy_from=["127.0.0.0/8"]) as server:
        assert not straight.is_straight(serving_of(server))


@pytest.mark.parametrize("engine", ["thread", "green"])
def test_a_context_with_a_class_of_its_own(engine, pki, serving, dial, closed):
    """Sockets of a program's own class are closed by the hooks, which take any."""

    class Own(ssl.SSLSocket):
        pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.cert)
    context.sslsocket_class = Own
    with serving(engine, Echo, tls=context) as server, dial(server) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        socket.socket.shutdown(client, socket.SHUT_WR)
        assert closed.wait(1)[0].reason == "peer_closed"
        assert not server.connections()
