"""PROXY headers, generated and broken: what is sent is what is read, and nothing but PreambleError is ever raised."""

import socket
import struct

from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st

from harken import PreambleError
from harken.preambles.proxy_header import MAX_BYTES, ProxyHeader, ProxySSL

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
fuzz = hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def v2(block: bytes, command: int, kind: int) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, kind, len(block)) + block


PORTS = st.integers(0, 65535)
V4 = st.tuples(st.ip_addresses(v=4).map(str), PORTS)
V6 = st.tuples(
    st.ip_addresses(v=6)
    .filter(lambda a: a.ipv4_mapped is None)
    .map(lambda a: socket.inet_ntop(socket.AF_INET6, a.packed)),
    PORTS,
    st.just(0),
    st.just(0),
)
PATHS = st.one_of(
    st.just(""),
    st.text("/ab.é~", min_size=1, max_size=54),
    st.binary(min_size=1, max_size=100).map(lambda name: b"\0" + name.replace(b"\0", b"x")),
)
TLVS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([1, 4, 0xE0, 0xEA, 0xFF]), st.binary(max_size=300)),
        st.tuples(st.just(2), st.text("aé€.", max_size=40).map(str.encode)),
        st.tuples(st.just(5), st.binary(max_size=128)),
    ),
    max_size=5,
).map(tuple)
ASCII = st.none() | st.text("TLSv1.3-_\0", max_size=30)
SSLS = st.builds(
    ProxySSL,
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
    version=ASCII,
    common_name=st.none() | st.text("Zoë €", max_size=30),
    cipher=ASCII,
    group=ASCII,
    client_certificate=st.none() | st.binary(max_size=300),
    others=st.lists(st.tuples(st.just(0x7F), st.binary(max_size=9)), max_size=2).map(tuple),
)


@st.composite
def headers(draw: st.DrawFn) -> ProxyHeader:
    version = draw(st.sampled_from([1, 2]))
    addresses = draw(st.sampled_from([V4, V6] if version == 1 else [V4, V6, PATHS]))
    made = ProxyHeader(draw(addresses), draw(addresses), version=version)
    if version == 1:
        return made
    ssl = draw(st.none() | SSLS)
    extra = draw(TLVS) + (((0x20, ssl.encode()),) if ssl else ())
    transport = draw(st.sampled_from(["stream", "dgram"]))
    return ProxyHeader.make(
        made.source, made.destination, transport=transport, checksum=draw(st.booleans()), tlvs=extra
    )


def same(one: ProxyHeader, other: ProxyHeader) -> bool:
    def told(header: ProxyHeader) -> tuple:
        rest = tuple(pair for pair in header.tlvs if pair[0] != 3)
        return header.source, header.destination, header.transport, header.version, header.command, rest

    return told(one) == told(other)


@given(headers(), st.binary(max_size=40))
@fuzz
def test_what_is_sent_is_what_is_read(header: ProxyHeader, rest: bytes) -> None:
    """Every header comes back as it was sent, whatever follows it, and its length is exact."""
    data = header.encode()
    read, size = ProxyHeader.parse(data + rest, f"v{header.version}")
    assert size == len(data) <= MAX_BYTES
    assert same(read, header)
    assert read.encode() == data
    assert read.ssl is None or read.ssl.encode() == header.ssl.encode()


@given(headers(), st.data())
@fuzz
def test_a_broken_header_raises_nothing_else(header: ProxyHeader, data: st.DataObject) -> None:
    """Cut, flipped, swollen or spliced, a header is read or refused with PreambleError, and never more than it has."""
    whole = bytearray(header.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole)))
        match data.draw(st.sampled_from(["cut", "flip", "insert", "drop"])):
            case "cut":
                del whole[at:]
            case "flip" if at < len(whole):
                whole[at] = data.draw(st.integers(0, 255))
            case "insert":
                whole[at:at] = data.draw(st.binary(max_size=8))
            case _:
                del whole[at : at + 1]
    check_robust(bytes(whole))


@given(
    st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=300).map(lambda rest: b"PROXY " + rest),
        st.binary(max_size=300).map(lambda rest: SIGNATURE + rest),
        st.tuples(
            st.sampled_from([0x20, 0x21]), st.sampled_from([0, 1, 0x11, 0x12, 0x21, 0x31]), st.binary(max_size=300)
        ).map(lambda parts: v2(parts[2], parts[0], parts[1])),
        st.from_regex(rb"PROXY (TCP4|TCP6|UNKNOWN) [0-9a-f.:]{1,40} [0-9a-f.:]{1,40} [0-9]{1,6} [0-9]{1,6}\r\n"),
    )
)
@fuzz
def test_no_input_raises_anything_but_preamble_error(data: bytes) -> None:
    """Whatever comes, the answer is a header or PreambleError, and each property of a header can be had."""
    check_robust(data)


def check_robust(data: bytes) -> None:
    for version in ("v1", "v2", "any"):
        try:
            header, size = ProxyHeader.parse(data, version)
        except PreambleError as error:
            assert "\n" not in str(error)
            continue
        assert 0 < size <= len(data)
        assert version in ("any", f"v{header.version}")
        for name in ("alpn", "authority", "checksum", "unique_id", "ssl", "netns", "family", "forwarded"):
            getattr(header, name)
        read, _ = ProxyHeader.parse(header.encode())
        assert read.forwarded == header.forwarded
