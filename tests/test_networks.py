"""Lists of networks: what is in them, how they are written, and what a look-up costs."""

import ipaddress
import random
import time

import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st

from harken import ConfigError
from harken.networks import Networks

ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))


@st.composite
def networks(draw: st.DrawFn) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    address = draw(ADDRESSES)
    return ipaddress.ip_network((address, draw(st.integers(0, address.max_prefixlen))), strict=False)


def plain(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return getattr(address, "ipv4_mapped", None) or address


@hypothesis_settings(deadline=None)
@given(st.lists(networks(), max_size=8), ADDRESSES)
def test_agrees_with_ipaddress(written: list, address: ipaddress.IPv4Address) -> None:
    """An address is in the list exactly when one of its networks holds it, by the word of the standard library."""
    written = [one for one in written if plain(one.network_address) == one.network_address]
    listed = Networks.parse(str(one) for one in written)
    assert (str(address) in listed) == any(plain(address) in one for one in written)
    for one in written:
        assert str(one[0]) in listed
        assert str(one[-1]) in listed or plain(one[-1]) != one[-1]


@pytest.mark.parametrize(
    "written, inside, outside",
    [
        ("10.0.0.0/8", "10.255.255.255", "11.0.0.0"),
        ("10.0.0.0/8", "::ffff:10.1.2.3", "::ffff:11.1.2.3"),
        ("::ffff:10.0.0.0/104", "10.1.2.3", "11.1.2.3"),
        ("::ffff:192.0.2.1", "192.0.2.1", "192.0.2.2"),
        ("0.0.0.0/0", "255.1.2.3", "::1"),
        ("::/0", "2001:db8::1", "127.0.0.1"),
        ("fe80::/10", "fe80::1%eth0", "fec0::1"),
        (" 127.0.0.1 ", "127.0.0.1", "127.0.0.2"),
        ("127.0.0.0/8", "127.9.9.9", "/run/app.sock"),
        ("127.0.0.0/8", "127.0.0.1", "127.1"),
        ("127.0.0.0/8", "127.0.0.1", ""),
        ("127.0.0.0/8", "127.0.0.1", "127.0.0.1\0"),
        ("127.0.0.0/8", "127.0.0.1", "localhost"),
    ],
)
def test_what_is_in(written: str, inside: str, outside: str) -> None:
    """Networks, single addresses, mapped ones and scopes are read as operators mean them; other text is in none."""
    listed = Networks.parse([written])
    assert inside in listed
    assert outside not in listed


@pytest.mark.parametrize(
    "entry, remedy",
    [
        ("10.0.0.1/8", "write 10.0.0.0/8 for the network, or 10.0.0.1 for the one address"),
        ("2001:db8::1/32", "write 2001:db8::/32 for the network"),
        ("::ffff:10.0.0.1/104", "write 10.0.0.0/8 for the network"),
        ("10.0.0.0/33", "no prefix length from 0 to 32"),
        ("::/129", "no prefix length from 0 to 128"),
        ("::ffff:10.0.0.0/95", "no prefix length from 96 to 128"),
        ("10.0.0.0/", "no prefix length"),
        ("10.0.0.0/-1", "no prefix length"),
        ("10.0.0.0/255.0.0.0", "no prefix length"),
        ("10.0.0/8", "no IP address or network"),
        ("fe80::1%eth0", "no IP address or network"),
        ("localhost", "no IP address or network"),
        ("", "no IP address or network"),
    ],
)
def test_a_wrong_entry_is_named_with_its_remedy(entry: str, remedy: str) -> None:
    """What is no network is refused in one line that names the setting, the entry and what to write."""
    with pytest.raises(ConfigError) as caught:
        Networks.parse(["192.0.2.0/24", entry], "deny")
    message = str(caught.value)
    assert message.startswith("deny: ")
    assert repr(entry) in message
    assert remedy in message
    assert "\n" not in message


def test_how_it_shows() -> None:
    """A list says how many entries it has, whether any, and shows them as written."""
    listed = Networks.parse(["10.0.0.0/8", "::1"])
    assert len(listed) == 2
    assert bool(listed)
    assert str(listed) == "10.0.0.0/8, ::1"
    assert repr(listed) == "Networks.parse(['10.0.0.0/8', '::1'])"
    assert not Networks.parse([])
    assert "10.0.0.1" not in Networks.parse([])


def test_a_look_up_does_not_grow_with_the_list() -> None:
    """Ten thousand entries cost a look-up about what a handful of the same prefix lengths costs."""
    numbers = random.Random(4)
    lengths = (16, 20, 24, 32)

    def entries(count: int) -> list[str]:
        return [
            str(ipaddress.ip_network((numbers.getrandbits(32), lengths[i % len(lengths)]), strict=False))
            for i in range(count)
        ]

    few, many = Networks.parse(entries(8)), Networks.parse(entries(10_000))

    def cost(listed: Networks) -> float:
        begun = time.thread_time()
        for _ in range(2000):
            assert "203.0.113.77" not in listed
        return time.thread_time() - begun

    rounds = [(cost(few), cost(many)) for _ in range(7)]
    assert min(m for _, m in rounds) < 5 * min(f for f, _ in rounds)  # a scan of the list would be a thousandfold
