"""The room: finding a transport by address, by socket, and the settings it declares."""

import socket
import socketserver
from importlib import metadata
from types import SimpleNamespace

import pytest

from harken import settings, transports
from harken.errors import ConfigError
from harken.transports import BindOptions, bind_options, for_socket, for_url, inherited, listen, tcp, tls, udp, unix

OPENED = ["tcp://127.0.0.1:0", "udp://127.0.0.1:0", "unix:{}/s", "unixgram:{}/s", "unix:@harken-room-{}"]


@pytest.mark.parametrize("url", OPENED)
def test_every_transport_keeps_the_contract(url, tmp_path):
    """What is opened is a tuned, bound listener whose url leads back to its transport and opens nothing else."""
    (listener,) = listen(url.format(tmp_path), BindOptions(reuse_port=True, nodelay=True, keepalive=True))
    with listener:
        transport = for_socket(listener)
        assert transport is for_url(listener.url)
        assert listener.url.partition(":")[0] in transport.schemes
        assert transport.url(listener) == listener.url
        assert transport.parse(listener.url)
        assert not listener.get_inheritable()


def test_every_scheme_is_in_the_table():
    """The table of schemes and the modules agree."""
    declared = {name: module.__name__ for module in (tcp, tls, udp, unix, inherited) for name in module.schemes}
    assert declared == transports.SCHEMES


@pytest.mark.parametrize(
    "url, words",
    [
        ("tpc://127.0.0.1:80", "no transport is called 'tpc'; did you mean 'tcp'?"),
        ("unx:/tmp/s", "did you mean 'unix'?"),
        ("gopher://x:1", "known are tcp, tls, udp, unix, unixgram, fd, systemd"),
        ("tls://:443?crt=a", "TLS has no option 'crt'; did you mean 'cert'?"),
        ("tls://:443?key=a", "TLS needs a certificate"),
        ("tls://:?cert=a", "no port"),
        ("127.0.0.1:8800", "did you mean 'tcp://127.0.0.1:8800'?"),
        (":8800", "did you mean 'tcp://:8800'?"),
        ("8800", "did you mean 'tcp://:8800'?"),
        ("/run/x.sock", "did you mean 'unix:/run/x.sock'?"),
        ("", "has no scheme"),
        ("tcp", "has no scheme"),
    ],
)
def test_a_wrong_address_is_refused_with_a_remedy(url, words):
    """One line names the address and what to write instead."""
    with pytest.raises(ConfigError) as caught:
        listen(url)
    assert words in str(caught.value)
    assert repr(url) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_package_can_bring_a_scheme(monkeypatch):
    """Entry points of the group harken.transports are asked for schemes that the room lacks."""
    asked = []
    brought = SimpleNamespace(parse=lambda url: url, bind=lambda place, options: [place])

    def entry_points(**wanted):
        asked.append(wanted)
        return [SimpleNamespace(load=lambda: brought)]

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    assert listen("vsock://3:5") == ["vsock://3:5"]
    assert asked == [{"group": "harken.transports", "name": "vsock"}]


@pytest.mark.parametrize(
    "family, kind, transport",
    [
        (socket.AF_INET, socket.SOCK_STREAM, tcp),
        (socket.AF_INET6, socket.SOCK_STREAM, tcp),
        (socket.AF_INET, socket.SOCK_DGRAM, udp),
        (socket.AF_UNIX, socket.SOCK_STREAM, unix),
        (socket.AF_UNIX, socket.SOCK_DGRAM, unix),
        (40, socket.SOCK_STREAM, tcp),
    ],
)
def test_a_transport_is_found_for_any_socket(family, kind, transport):
    """By family and type; families of which harken knows nothing are treated by type."""
    assert for_socket(SimpleNamespace(family=family, type=kind)) is transport


def test_addresses_of_any_shape_are_described():
    """Programs override get_request and return addresses of their own; describing them never raises."""
    for address in (None, "", "name", (), ("host",), ("h", 1, object()), (3, 1024), object(), b"x"):
        for transport in (tcp, udp, unix):
            assert str(transport.describe(SimpleNamespace(family=2), address)) is not None


class Changed(socketserver.TCPServer):
    """A server of a program that changed them, some as http.server does."""

    request_queue_size = 77
    allow_reuse_address = 1
    allow_reuse_port = True


def test_stdlib_attributes_decide_how_the_drop_in_binds():
    """A queue of 5 is nobody's wish, any other is; switches may be written as 1."""
    plain = bind_options(settings.Settings(object.__new__(socketserver.TCPServer)))
    assert plain == BindOptions(backlog=max(128, socket.SOMAXCONN), reuse_address=False)
    changed = bind_options(settings.Settings(object.__new__(Changed)))
    assert (changed.backlog, changed.reuse_address, changed.reuse_port) == (77, True, True)


def test_serve_has_production_defaults():
    """Under serve the backlog is Linux's cap and small writes go out at once."""
    options = bind_options(settings.Settings(None, profile="serve"))
    assert options == BindOptions(4096, reuse_port=False, reuse_address=True, nodelay=True, keepalive=True)


def test_datagrams_are_taken_whole_unless_a_program_says_so():
    """stdlib's 8192 counts as unset."""
    server = object.__new__(socketserver.UDPServer)
    values = settings.Settings(server)
    assert values["max_packet_size"] == 65535
    server.max_packet_size = 100
    assert values["max_packet_size"] == 100
