"""Whatever is written for an address is a place or one clear line."""

import pytest
from hypothesis import example, given, settings as hypothesis_settings, strategies as st

from harken.errors import ConfigError
from harken.peer import unmap
from harken.transports import SCHEMES, _inet, for_url

fuzz = hypothesis_settings(max_examples=100, deadline=None)
PIECES = st.sampled_from(
    "tcp udp unix unixgram fd systemd tls :// : / // [ ] ::1 @ ? & = mode 660 user 0 65535 65536 -1 localhost "
    "127.0.0.1 %00 %3F % \0 ² .".split(" ")
)
WRITTEN = st.lists(PIECES | st.text(max_size=5), max_size=10).map("".join)
SCHEMED = st.builds("{}:{}".format, st.sampled_from(sorted(SCHEMES)), WRITTEN)


@fuzz
@given(url=WRITTEN | SCHEMED | st.text(max_size=40))
@example(url="tcp://x:" + "9" * 5000)
@example(url="fd://" + "9" * 5000)
@example(url="fd://²")
@example(url="unix:/x?mode=²")
@example(url="unix:/x?user=" + "9" * 30)
@example(url="unix:/\udcff")
@example(url="unix:/x?user=\0")
@example(url="systemd:\n")
def test_an_address_is_read_or_refused_in_one_line(url):
    """ConfigError is all that is raised, and reading touches nothing."""
    try:
        place = for_url(url).parse(url)
    except ConfigError as error:
        assert "\n" not in str(error)
        assert str(error)
    else:
        assert place is not None


@fuzz
@given(host=st.from_regex(r"[a-z0-9][a-z0-9.-]{0,20}", fullmatch=True), port=st.integers(0, 65535))
@pytest.mark.parametrize("scheme", ["tcp", "udp"])
def test_a_host_and_a_port_come_back(scheme, host, port):
    """What was read is written the same way."""
    url = f"{scheme}://{host}:{port}"
    place = _inet.parse(url)
    assert (place.scheme, place.host, place.port) == (scheme, host, port)
    assert str(place) == url


@fuzz
@given(address=st.ip_addresses(v=6), port=st.integers(0, 65535))
def test_an_ipv6_address_comes_back(address, port):
    """In its brackets."""
    url = f"tcp://[{address}]:{port}"
    place = _inet.parse(url)
    assert (place.host, place.port) == (str(address), port)
    assert str(place) == url


@fuzz
@given(port=st.integers().filter(lambda port: not 0 <= port <= 65535))
def test_no_other_port_is_taken(port):
    """Sixteen bits."""
    with pytest.raises(ConfigError, match="has no port from 0 to 65535"):
        _inet.parse(f"tcp://localhost:{port}")


@fuzz
@given(path=st.text(st.characters(exclude_characters="%?\0", exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_a_unix_path_comes_back(path):
    """Whatever stands in it."""
    url = f"unix:/{path}"
    try:
        place = for_url(url).parse(url)
    except ConfigError:
        assert path.endswith("/") or path.startswith("/")
    else:
        assert place.path in (f"/{path}", path.lstrip("/") and f"/{path.lstrip('/')}", f"/{path}"[2:])


@fuzz
@given(address=st.ip_addresses(v=4))
def test_a_mapped_peer_is_shown_as_ipv4(address):
    """In the spelling of the kernel and in any other; a plain one is left alone."""
    assert unmap(f"::ffff:{address}") == str(address)
    assert unmap(f"0:0:0:0:0:FFFF:{address}") == str(address)
    assert unmap(str(address)) == str(address)


@fuzz
@given(text=st.text(max_size=20))
def test_unmap_takes_anything(text):
    """What is no address is returned as it is."""
    shown = unmap(text)
    assert isinstance(shown, str)
    assert shown == text or "." in shown
