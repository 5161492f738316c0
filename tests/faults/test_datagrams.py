"""Datagrams that are long, cut, or whose sender has gone."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

import harken

from .kit import LOCAL, PATIENCE, running, seeing


class Answer(harken.DatagramRequestHandler):
    """Answers with the length and the first bytes of a datagram."""

    def handle(self) -> None:
        """Answer."""
        data = self.rfile.read()
        self.wfile.write(b"%d %s" % (len(data), data[:5]))


class Loud:
    """A server that lets no error pass."""

    errors: list[str]
    ended = 0

    def close_request(self, request: Any) -> None:
        """Count the handlers that have ended."""
        super().close_request(request)  # type: ignore[misc]
        self.ended += 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note it."""
        self.errors.append("handle_error")


def ask(client: socket.socket, data: bytes) -> bytes:
    """Send a datagram on a connected socket and return the answer."""
    client.send(data)
    return client.recv(65536)


@pytest.mark.parametrize(
    "kind", ["UDPServer", "ThreadingUDPServer", "PoolUDPServer", "ForkingUDPServer", "GreenUDPServer"]
)
def test_sixty_thousand_bytes_arrive_whole(kind: str) -> None:
    """A datagram of 60,000 bytes reaches its handler in one piece, and no event says otherwise."""
    with (
        seeing("truncated") as seen,
        running(getattr(harken, kind)(LOCAL, Answer)) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.settimeout(PATIENCE)
        client.connect(server.server_address)
        assert ask(client, b"first" + bytes(59_995)) == b"60000 first"
        assert ask(client, b"") == b"0 "
        assert seen == []


@pytest.mark.parametrize("kind", ["UnixDatagramServer", "ThreadingUnixDatagramServer"])
def test_a_cut_datagram_is_reported(kind: str, tmp_path: Path) -> None:
    """One longer than ``max_packet_size`` is served as far as it goes, and an event says so."""
    path = str(tmp_path / "server")
    server = getattr(harken, kind)(path, Answer, max_packet_size=100)
    with seeing("truncated") as seen, running(server), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.bind(str(tmp_path / "client"))
        client.connect(path)
        assert ask(client, b"fits!" + bytes(95)) == b"100 fits!"
        assert seen == []
        assert ask(client, b"first" + bytes(200)) == b"100 first"
        (event,) = seen.wait("truncated")
        assert event.bytes == 100
        assert "client" in str(event.peer)


@pytest.mark.parametrize("kind", ["UnixDatagramServer", "ThreadingUnixDatagramServer"])
def test_a_client_that_has_gone_is_no_error(kind: str, tmp_path: Path) -> None:
    """Answers to a Unix client that removed its path, closed it, or never had one, raise nothing."""
    path = str(tmp_path / "server")
    server_class = type("Server", (Loud, getattr(harken, kind)), {"errors": []})
    with seeing("handler_failed") as seen:
        server: Any = server_class(path, Answer)
        for leave in ("unlink", "close", "nameless"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as gone:
                own = tmp_path / leave
                if leave != "nameless":
                    gone.bind(str(own))
                gone.sendto(b"hello", path)
            if leave == "unlink":
                own.unlink()
        with running(server), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.settimeout(PATIENCE)
            client.bind(str(tmp_path / "client"))
            client.connect(path)
            assert ask(client, b"hello") == b"5 hello"
            wait_until(lambda: server.ended >= 4)  # or the others' threads would find a closed socket
    assert seen == []
    assert server_class.errors == []


def test_a_udp_client_that_has_gone_is_no_error() -> None:
    """The kernel's ICMP answer to an earlier datagram disturbs neither the loop nor the next client."""
    server_class: Any = type("Server", (Loud, harken.ThreadingUDPServer), {"errors": []})
    with seeing("paused", "handler_failed") as seen, running(server_class(LOCAL, Answer)) as server:
        for _ in range(5):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
                gone.sendto(b"hello", server.server_address)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(PATIENCE)
            client.connect(server.server_address)
            assert ask(client, b"hello") == b"5 hello"
        assert seen == []
        assert server.errors == []
