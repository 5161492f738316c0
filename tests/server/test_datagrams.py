"""Servers of datagrams: whole ones, cut ones, and the size that may change."""

import socket

import pytest

import harken
from harken.server import UDPServer

from .kit import LOCAL, PATIENCE, named, serving


class Echo(harken.BaseRequestHandler):
    """Answers datagrams."""

    def handle(self):
        data, sock = self.request
        sock.sendto(data, self.client_address)


@pytest.mark.parametrize("kind", ["UDPServer", "ThreadingUDPServer", "PoolUDPServer", "ForkingUDPServer"])
@pytest.mark.parametrize("size", [0, 9000, 65507])
def test_datagrams_come_whole(kind, size):
    """Empty ones too, and up to the largest that UDP can carry."""
    with serving(getattr(harken, kind)(LOCAL, Echo)) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.sendto(bytes(size), server.server_address)
        assert client.recv(70000) == bytes(size)


def test_a_truncated_datagram_is_told(told):
    """The handler gets its beginning, and an event says so."""

    class Small(UDPServer):
        max_packet_size = 10

    with serving(Small(LOCAL, Echo)) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.sendto(b"0123456789abc", server.server_address)
        assert client.recv(100) == b"0123456789"
    (event,) = named(told, "truncated")
    assert (event.bytes, event.peer.address) == (10, "127.0.0.1")


def test_max_packet_size_may_change_on_the_instance():
    """python-osc and others set it after construction."""
    with serving(UDPServer(LOCAL, Echo)) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        for size in (5, 7, 3):
            server.max_packet_size = size
            client.sendto(b"0123456789", server.server_address)
            assert len(client.recv(100)) == size
