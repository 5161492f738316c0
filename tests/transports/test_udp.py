"""UDP addresses, on real sockets."""

import socket

import pytest

from harken.listener import AddressInUse
from harken.transports import BindOptions, listen, udp


def exchange(listener, host, family=socket.AF_INET):
    """Send a datagram to a listener; return its Peer and the sender's address."""
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        client.sendto(b"x" * 60000, (host, listener.getsockname()[1]))
        listener.settimeout(5)
        data, address = listener.recvfrom(65535)
        assert len(data) == 60000
        listener.sendto(b"answer", address)
        assert client.recv(100) == b"answer"
        return udp.describe(listener, address), client.getsockname()


def test_datagrams_come_in_and_answers_go_out():
    """The url has the real port, the peer is the sender."""
    (listener,) = listen("udp://127.0.0.1:0")
    with listener:
        assert listener.url == f"udp://127.0.0.1:{listener.getsockname()[1]}"
        assert listener.type == socket.SOCK_DGRAM
        peer, sender = exchange(listener, "127.0.0.1")
        assert str(peer) == f"127.0.0.1:{sender[1]}"


def test_no_host_is_both_families():
    """A sender over IPv4 is shown as such."""
    (listener,) = listen("udp://:0")
    with listener:
        peer, sender = exchange(listener, "127.0.0.1")
        assert (peer.address, peer.port, peer.family) == ("127.0.0.1", sender[1], socket.AF_INET)
        peer, _ = exchange(listener, "::1", socket.AF_INET6)
        assert peer.address == "::1"


def test_a_second_server_is_refused_though_addresses_may_be_reused():
    """With SO_REUSEADDR Linux would give the second server the first one's datagrams."""
    (first,) = listen("udp://127.0.0.1:0", BindOptions(reuse_address=True))
    with first:
        with pytest.raises(AddressInUse, match="in use by this process"):
            listen(first.url, BindOptions(reuse_address=True))
        assert not first.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)


def test_two_servers_may_share_a_port_when_both_say_so():
    """reuse_port works for datagrams too."""
    (first,) = listen("udp://127.0.0.1:0", BindOptions(reuse_port=True))
    with first:
        (second,) = listen(first.url, BindOptions(reuse_port=True))
        second.close()
