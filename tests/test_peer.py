"""Peers, and how logs show them."""

import dataclasses
import socket
import subprocess
import sys

import pytest

from harken.peer import Credentials, Peer, unmap


@pytest.mark.parametrize(
    "peer, shown",
    [
        (Peer("127.0.0.1", 5000, socket.AF_INET), "127.0.0.1:5000"),
        (Peer("::1", 5, socket.AF_INET6), "[::1]:5"),
        (Peer("", 0, socket.AF_UNIX, credentials=Credentials(12, 0, 0)), "unix pid 12 uid 0"),
        (Peer("/tmp/client", 0, socket.AF_UNIX), "unix /tmp/client"),
        (Peer("", 0, socket.AF_UNIX), "unix"),
        (Peer("3", 1024, 40), "family 40 3 port 1024"),
    ],
)
def test_a_peer_is_shown_as_logs_want_it(peer, shown):
    """Each kind of peer has one spelling."""
    assert str(peer) == shown


@pytest.mark.parametrize(
    "host, plain",
    [
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("::FFFF:7f00:1", "127.0.0.1"),
        ("0:0:0:0:0:ffff:10.0.0.1", "10.0.0.1"),
        ("::ffff:nonsense", "::ffff:nonsense"),
        ("::1", "::1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("10.0.0.1", "10.0.0.1"),
        ("example.org", "example.org"),
        ("", ""),
    ],
)
def test_only_mapped_addresses_are_unmapped(host, plain):
    """A mapped address in any spelling becomes IPv4; everything else stays."""
    assert unmap(host) == plain


def test_a_peer_is_frozen_and_hashable():
    """Limits count by peer, so that it must not change and must be a key."""
    peer = Peer("127.0.0.1", 1, socket.AF_INET)
    with pytest.raises(dataclasses.FrozenInstanceError):
        peer.port = 2
    assert {peer: 1}[Peer("127.0.0.1", 1, socket.AF_INET)] == 1
    assert not hasattr(peer, "__dict__")


def test_the_module_is_light():
    """No module that only rare addresses need is loaded with it."""
    script = "import sys, harken.peer; print([m for m in ('ipaddress', 'urllib.parse', 'ssl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "[]"
