"""TCP addresses, on real sockets."""

import contextlib
import errno
import os
import socket
import struct

import pytest

from harken.errors import ConfigError
from harken.listener import AddressInUse, BindError
from harken.transports import BindOptions, _inet, listen, tcp


@pytest.fixture
def opened():
    """Open addresses that are closed with the test."""
    listeners = []

    def start(url, **options):
        (listener,) = listen(url, BindOptions(**options))
        listeners.append(listener)
        return listener

    yield start
    for listener in listeners:
        listener.close()


def meet(listener, host, family=socket.AF_INET):
    """Connect to a listener; return the accepted end's Peer."""
    port = listener.getsockname()[1]
    with socket.socket(family) as client:
        client.settimeout(5)
        client.connect((host, port))
        connection, address = listener.accept()
        with connection:
            return tcp.describe(connection, address), client.getsockname()


def test_port_zero_is_any_free_port(opened):
    """The url has the real port."""
    listener = opened("tcp://127.0.0.1:0")
    assert listener.url == f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    assert listener.getsockname()[1] > 0
    peer, client = meet(listener, "127.0.0.1")
    assert (peer.address, peer.port, peer.family) == (*client, socket.AF_INET)


def test_ipv6(opened):
    """An IPv6 address stands in brackets."""
    listener = opened("tcp://[::1]:0")
    assert listener.url == f"tcp://[::1]:{listener.getsockname()[1]}"
    peer, client = meet(listener, "::1", socket.AF_INET6)
    assert str(peer) == f"[::1]:{client[1]}"


def test_a_name_is_resolved_with_ipv4_first(opened):
    """localhost is where socketserver listens."""
    assert opened("tcp://localhost:0").url.startswith("tcp://127.")


def test_no_host_is_every_address_and_mapped_peers_are_ipv4(opened):
    """One socket takes both families."""
    listener = opened("tcp://:0")
    assert listener.url == f"tcp://:{listener.getsockname()[1]}"
    four, client = meet(listener, "127.0.0.1")
    assert (four.address, four.port, four.family) == ("127.0.0.1", client[1], socket.AF_INET)
    six, _ = meet(listener, "::1", socket.AF_INET6)
    assert (six.address, six.family) == ("::1", socket.AF_INET6)


def test_both_families_can_be_named_apart(opened):
    """[::] is IPv6 alone, so that 0.0.0.0 may have the same port."""
    for _ in range(20):  # the port is free for IPv6; for IPv4 somebody else may have it
        six = opened("tcp://[::]:0")
        assert six.url.startswith("tcp://[::]:")
        with contextlib.suppress(AddressInUse):
            four = opened(f"tcp://0.0.0.0:{six.getsockname()[1]}")
            assert four.family == socket.AF_INET
            return
    pytest.fail("20 ports that were free for [::] were in use for 0.0.0.0")


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
def test_without_ipv6_every_address_is_every_ipv4_address(opened, monkeypatch, number):
    """A machine that has no IPv6 serves what it has."""
    plain = _inet._open

    def without_ipv6(family, *rest):
        if family == socket.AF_INET6:
            raise OSError(number, os.strerror(number))
        return plain(family, *rest)

    monkeypatch.setattr(_inet, "_open", without_ipv6)
    assert opened("tcp://:0").url.startswith("tcp://0.0.0.0:")
    with pytest.raises(BindError):
        opened("tcp://[::1]:0")


def test_options_are_set_on_the_listener_and_inherited(opened):
    """TCP_NODELAY and SO_KEEPALIVE need no call for each connection."""
    listener = opened("tcp://127.0.0.1:0", nodelay=True, keepalive=True)
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    with socket.create_connection(listener.getsockname(), timeout=5):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_options_unset_leave_the_socket_as_it_is(opened):
    """None is not False, and False is not True."""
    listener = opened("tcp://127.0.0.1:0", reuse_address=False)
    assert not listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    assert not listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
    assert not listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert not listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_backlog_reaches_the_kernel(opened):
    """listen(2) gets it; TCP_INFO's tcpi_sacked is the backlog of a listening socket."""
    listener = opened("tcp://127.0.0.1:0", backlog=7)
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    assert struct.unpack_from("I", info, 28)[0] == 7


def test_a_second_server_is_refused_and_told_by_whom(opened):
    """The error is one line, an OSError with EADDRINUSE, and names the holder."""
    first = opened("tcp://127.0.0.1:0")
    with pytest.raises(AddressInUse) as caught:
        opened(first.url)
    assert caught.value.errno == errno.EADDRINUSE
    assert str(caught.value) == f"{first.url} is already in use by this process; stop it, or take another port"


def test_every_address_does_not_slip_beside_one(opened):
    """The dual-stack wildcard collides with a server on one address of the port."""
    first = opened("tcp://127.0.0.1:0")
    with pytest.raises(AddressInUse):
        opened(f"tcp://:{first.getsockname()[1]}")


def test_two_servers_may_share_a_port_when_both_say_so(opened):
    """reuse_port is asked of both."""
    first = opened("tcp://127.0.0.1:0", reuse_port=True)
    assert opened(first.url, reuse_port=True).getsockname() == first.getsockname()
    with pytest.raises(AddressInUse):
        opened(first.url)


def test_a_port_is_free_again_at_once(opened):
    """A connection in TIME_WAIT does not keep a server from restarting."""
    first = opened("tcp://127.0.0.1:0")
    with socket.create_connection(first.getsockname(), timeout=5) as client:
        connection, _ = first.accept()
        connection.close()  # this side closes first, so that TIME_WAIT is its own
        assert client.recv(1) == b""
    first.close()
    assert opened(first.url).url == first.url


def test_an_address_that_is_not_this_machines(opened):
    """The error says that no interface has it."""
    with pytest.raises(BindError, match="no interface of this machine has that address") as caught:
        opened("tcp://192.0.2.1:0")
    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_a_privileged_port(opened, monkeypatch):
    """The error says what is needed."""

    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(_inet.Listener, "bind", refused)
    with pytest.raises(BindError, match="CAP_NET_BIND_SERVICE"):
        opened("tcp://127.0.0.1:80")


@pytest.mark.parametrize(
    "url, words",
    [
        ("tcp://127.0.0.1", "no port from 0 to 65535"),
        ("tcp://127.0.0.1:", "no port"),
        ("tcp://127.0.0.1:65536", "no port from 0 to 65535"),
        ("tcp://127.0.0.1:http", "no port"),
        ("tcp://127.0.0.1:-1", "no port"),
        ("tcp://127.0.0.1:²", "no port"),
        ("tcp://::1:80", "write tcp://[::1]:80"),
        ("tcp://127.0.0.1:80?backlog=5", "take no options"),
        ("tcp://127.0.0.1:80/path", "no port"),
        ("tcp://a/b:80", "'a/b' is not a host"),
        ("tcp:127.0.0.1:80", "write tcp://HOST:PORT"),
        ("tcp://127.0.0.1:80,tcp://127.0.0.1:81", "more than one address; name each by itself"),
    ],
)
def test_malformed_addresses(opened, url, words):
    """One line names the address and the remedy."""
    with pytest.raises(ConfigError) as caught:
        opened(url)
    assert words in str(caught.value)
    assert repr(url) in str(caught.value)


def test_a_host_that_nobody_knows(opened, monkeypatch):
    """A name without an address is the operator's mistake."""

    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConfigError, match=r"no address is known for 'nowhere\.invalid'"):
        opened("tcp://nowhere.invalid:80")
