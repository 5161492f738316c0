"""``max_connections_per_peer``: what counts as one client, and its bound."""

import socket
import threading

import pytest

from harken.limits.peers import MaxConnectionsPerPeer
from harken.peer import Credentials, Peer


def v4(address):
    """A client over IPv4."""
    return Peer(address, 5000, socket.AF_INET)


def v6(address):
    """A client over IPv6."""
    return Peer(address, 5000, socket.AF_INET6)


def local(uid, address=""):
    """A client on a Unix socket, which may have bound its own."""
    return Peer(address, 0, socket.AF_UNIX, credentials=Credentials(1, uid, uid))


def test_each_client_has_places_of_its_own():
    """One that has used up its own does not keep others out."""
    limit = MaxConnectionsPerPeer(2)
    assert [limit.admit(v4("192.0.2.1")) for _ in range(3)] == [None, None, "max_connections_per_peer"]
    assert limit.admit(v4("192.0.2.2")) is None
    limit.release(v4("192.0.2.1"))
    assert limit.admit(v4("192.0.2.1")) is None


@pytest.mark.parametrize(
    "first, second, same",
    [
        (v6("2001:db8::1"), v6("2001:db8::ffff:2"), True),
        (v6("2001:db8::1"), v6("2001:db8:0:1::1"), False),
        (v6("fe80::1%lo"), v6("fe80::2"), True),
        (v4("192.0.2.1"), v4("192.0.2.2"), False),
        (local(1000), local(1000), True),
        (local(1000), local(1001), False),
        (local(1000, "@one"), local(1000, "@two"), True),
        (local(1000, "@one"), local(1001, "@one"), False),
    ],
    ids=str,
)
def test_who_counts_as_one_client(first, second, same):
    """An IPv4 address, a /64 of IPv6, a user on a Unix socket."""
    limit = MaxConnectionsPerPeer(1)
    assert limit.admit(first) is None
    assert (limit.admit(second) is not None) is same


def test_nothing_is_kept_of_clients_that_have_left():
    """A server that runs for years does not remember each address that ever came."""
    limit = MaxConnectionsPerPeer(1)
    for number in range(1000):
        peer = v4(f"10.0.{number >> 8}.{number & 255}")
        assert limit.admit(peer) is None
        limit.release(peer)
    assert limit.clients == 0


def test_it_is_exact_under_threads():
    """One thread admits, as a loop does, while others release: nobody is lost or counted twice."""
    limit = MaxConnectionsPerPeer(4)
    peer = v4("192.0.2.1")
    places = threading.Semaphore(0)
    admitted = 0
    over = threading.Event()

    def leave():
        while places.acquire(timeout=10):
            if over.is_set():
                return
            limit.release(peer)

    threads = [threading.Thread(target=leave) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20_000):
        if limit.admit(peer) is None:
            admitted += 1
            places.release()
    while limit.clients:
        pass
    over.set()
    places.release(4)
    for thread in threads:
        thread.join()
    assert admitted >= 4
    assert [limit.admit(peer) for _ in range(5)].count(None) == 4
