"""``allow`` and ``deny``."""

import socket
import time

import pytest

from harken.errors import ConfigError
from harken.limits.addresses import Addresses
from harken.peer import Peer
from harken.settings import Settings

V4 = Peer("10.1.2.3", 5000, socket.AF_INET)
V6 = Peer("2001:db8::5", 5000, socket.AF_INET6)
UNIX = Peer("", 0, socket.AF_UNIX)
PORTLESS = Peer("10.1.2.3", 0, socket.AF_INET)  # as a proxy may tell of a client


@pytest.mark.parametrize(
    "allow, deny, peer, reason",
    [
        (None, None, V4, None),
        (["10.0.0.0/8"], None, V4, None),
        (["10.0.0.0/8"], None, V6, "allow"),
        ([], None, V4, "allow"),
        (None, ["10.1.0.0/16"], V4, "deny"),
        (None, ["10.1.0.0/16"], V6, None),
        (["10.0.0.0/8"], ["10.1.2.3"], V4, "deny"),
        (["2001:db8::/32"], None, V6, None),
        (["10.0.0.0/8"], None, UNIX, None),
        (["192.0.2.0/24"], None, PORTLESS, "allow"),
    ],
)
def test_who_may_come_in(allow, deny, peer, reason):
    """Deny wins; a list that is there and empty allows nobody; Unix sockets are not judged."""
    assert Addresses(allow, deny).admit(peer) == reason


def test_ten_thousand_entries_are_looked_up_in_microseconds():
    """The time of a look-up does not grow with the list."""
    entries = [f"10.{number >> 8 & 255}.{number & 255}.0/24" for number in range(10_000)]
    limit = Addresses(None, entries)
    far = Peer("192.0.2.1", 1, socket.AF_INET)
    began = time.perf_counter()
    for _ in range(1000):
        limit.admit(far)
    assert time.perf_counter() - began < 0.5  # a walk through the list takes a thousand times as long


@pytest.mark.parametrize("entry", ["10.0.0.300", "office", "10.0.0.1/8"])
def test_a_wrong_entry_is_refused_by_name(entry):
    """At the keyword already, and the message says which setting, and which entry."""
    with pytest.raises(ConfigError, match=rf"^deny = .*keyword argument.* is wrong: '{entry}' "):
        Settings(None, {"deny": ["192.0.2.0/24", entry]})


def test_lists_are_read_from_text():
    """As a flag or a variable gives them."""
    assert Settings(None, {"allow": "10.0.0.0/8, ::1"})["allow"] == ("10.0.0.0/8", "::1")
    assert Settings(None, {"allow": "none"})["allow"] is None
