"""PROXY headers without sockets: to the letter of the specification, both ways, and nothing but PreambleError."""

import socket
import struct

import pytest

from harken import ConfigError, PreambleError
from harken.preambles._crc32c import crc32c
from harken.preambles.proxy_header import HEAD_BYTES, ProxyHeader, ProxySSL, extent

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
INET_BLOCK = bytes((192, 0, 2, 1, 192, 0, 2, 2)) + struct.pack("!HH", 56324, 443)
SOURCE, DESTINATION = ("192.0.2.1", 56324), ("192.0.2.2", 443)


def v2(block: bytes, command: int = 0x21, kind: int = 0x11, length: int | None = None) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, kind, len(block) if length is None else length) + block


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


# ── version 1 ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "line, source, destination",
    [
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 56324 443\r\n", SOURCE, DESTINATION),
        (b"PROXY TCP4 255.255.255.255 0.0.0.0 65535 0\r\n", ("255.255.255.255", 65535), ("0.0.0.0", 0)),
        (b"PROXY TCP6 2001:DB8::1 ::1 1 2\r\n", ("2001:db8::1", 1, 0, 0), ("::1", 2, 0, 0)),
        (b"PROXY TCP6 " + b" ".join([b":".join([b"ffff"] * 8)] * 2) + b" 65535 65535\r\n",)
        + ((":".join(["ffff"] * 8), 65535, 0, 0),) * 2,
        (
            b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:192.0.2.2 1 2\r\n",
            ("::ffff:192.0.2.1", 1, 0, 0),
            ("::ffff:192.0.2.2", 2, 0, 0),
        ),  # as HAProxy writes them
        (b"PROXY UNKNOWN\r\n", None, None),
        (b"PROXY UNKNOWN \r\n", None, None),
        (b"PROXY UNKNOWN what ever \xff\0 it says\r\n", None, None),
        (b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n", None, None),
    ],
)
def test_lines_of_version_1(line: bytes, source: object, destination: object) -> None:
    """Every form that the specification allows is read, up to 107 bytes, and what follows is not touched."""
    header, size = ProxyHeader.parse(line + b"\r\nPROXY more", "v1")
    assert (header.source, header.destination, size) == (source, destination, len(line))
    assert (header.version, header.command, header.tlvs) == (1, "proxy", ())
    assert header.transport == ("stream" if source else "unspec")
    assert header.forwarded == (source is not None)


@pytest.mark.parametrize(
    "line",
    [
        b"PROXY TCP4 192.0.2.1 192.0.2.2 56324 443\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 56324 443\r",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 56324 443\r \n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 56324 443\r\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 56324 443 \r\n",
        b"PROXY TCP4  192.0.2.1 192.0.2.2 56324 443\r\n",
        b"PROXY  TCP4 192.0.2.1 192.0.2.2 56324 443\r\n",
        b" PROXY TCP4 192.0.2.1 192.0.2.2 56324 443\r\n",
        b"PROXY\tTCP4 192.0.2.1 192.0.2.2 56324 443\r\n",
        b"proxy TCP4 192.0.2.1 192.0.2.2 56324 443\r\n",
        b"PROXY tcp4 192.0.2.1 192.0.2.2 56324 443\r\n",
        b"PROXY UDP4 192.0.2.1 192.0.2.2 56324 443\r\n",
        b"PROXY TCP4 192.0.2.01 192.0.2.2 56324 443\r\n",
        b"PROXY TCP4 192.0.2.256 192.0.2.2 56324 443\r\n",
        b"PROXY TCP4 192.0.2 192.0.2.2 56324 443\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 056324 443\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 56324 0443\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 65536 443\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 +5 443\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 5_0 443\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 -1 443\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 \xb2 443\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 443\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2 3\r\n",
        b"PROXY TCP4 ::1 ::1 1 2\r\n",
        b"PROXY TCP6 192.0.2.1 192.0.2.2 1 2\r\n",
        b"PROXY TCP6 ::1 192.0.2.2 1 2\r\n",
        b"PROXY TCP6 fe80::1%lo ::1 1 2\r\n",
        b"PROXY TCP6 1::2::3 ::1 1 2\r\n",
        b"PROXY TCP6 00001::1 ::1 1 2\r\n",
        b"PROXY TCP6 [::1] ::1 1 2\r\n",
        b"PROXY UNKNOWNS\r\n",
        b"PROXY UNKNOWN\n",
        b"PROXY UNKNOWN a\nb\r\n",
        b"PROXY UNKNOWN a\rb\r\n",
        b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n",
        b"PROXY \r\n",
        b"PROXY TCP4\r\n",
        b"\r\n",
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01",
        b"",
    ],
)
def test_anything_else_is_refused(line: bytes) -> None:
    """One letter beside the specification is enough: no bare CR or LF, no leading zero, no second space, 107 bytes."""
    for version in ("v1", "any"):
        with pytest.raises(PreambleError) as caught:
            ProxyHeader.parse(line + b"PROXY TCP4 192.0.2.1 192.0.2.2 56324 443\r\n" if line else line, version)
        assert "\n" not in str(caught.value)


# ── version 2 ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_addresses_of_version_2() -> None:
    """IPv4, IPv6 and Unix addresses, as streams and datagrams, come in the shapes of the socket module."""
    v6 = socket.inet_pton(socket.AF_INET6, "2001:db8::1") + bytes(15) + b"\1" + struct.pack("!HH", 1, 2)
    unix = b"/run/a.sock".ljust(108, b"\0") + b"\0abstract".ljust(108, b"\0")
    for block, family, source, destination in (
        (INET_BLOCK, socket.AF_INET, SOURCE, DESTINATION),
        (v6, socket.AF_INET6, ("2001:db8::1", 1, 0, 0), ("::1", 2, 0, 0)),
        (unix, socket.AF_UNIX, "/run/a.sock", b"\0abstract"),
        (b"/" * 108 + bytes(108), socket.AF_UNIX, "/" * 108, ""),
        (b"\0a\0b".ljust(108, b"\0") + bytes(108), socket.AF_UNIX, b"\0a\0b", ""),
    ):
        code = {socket.AF_INET: 0x10, socket.AF_INET6: 0x20, socket.AF_UNIX: 0x30}[family]
        for transport, name in ((1, "stream"), (2, "dgram")):
            data = v2(block, kind=code | transport)
            header, size = ProxyHeader.parse(data + b"rest", "v2")
            assert (header.source, header.destination) == (source, destination)
            assert (header.family, header.transport, header.version, size) == (family, name, 2, len(data))
            assert header.forwarded
            assert header.encode() == data


@pytest.mark.parametrize(
    "data",
    [
        v2(b"", command=0x20, kind=0),
        v2(INET_BLOCK, command=0x20),
        v2(b"anything at all, which is to be skipped", command=0x20, kind=0),
        v2(b"", command=0x20, kind=0xFF),
        v2(b"", kind=0),
        v2(b"xyz", kind=0),
        v2(INET_BLOCK, kind=0x10),
        v2(INET_BLOCK, kind=0x01),
        v2(bytes(0xFFFF), command=0x20, kind=0),
    ],
)
def test_local_and_unspec_speak_for_nobody(data: bytes) -> None:
    """LOCAL, whatever its block says, and an unspecified family or transport are valid and name no client."""
    header, size = ProxyHeader.parse(data + b"rest", "any")
    assert size == len(data)
    assert not header.forwarded
    assert (header.source, header.destination, header.transport) == (None, None, "unspec")
    assert header.family == socket.AF_UNSPEC


@pytest.mark.parametrize(
    "data",
    [
        SIGNATURE[:-1] + b"\r" + v2(INET_BLOCK)[12:],
        v2(INET_BLOCK, command=0x11),
        v2(INET_BLOCK, command=0x31),
        v2(INET_BLOCK, command=0x22),
        v2(INET_BLOCK, command=0x2F),
        v2(INET_BLOCK, kind=0x41),
        v2(INET_BLOCK, kind=0xF0),
        v2(INET_BLOCK, kind=0x13),
        v2(INET_BLOCK[:-1]),
        v2(INET_BLOCK, kind=0x21),
        v2(INET_BLOCK, kind=0x31),
        v2(b"", kind=0x11),
        v2(INET_BLOCK, length=13),
        v2(INET_BLOCK + b"\x04"),
        v2(INET_BLOCK + b"\x04\0"),
        v2(INET_BLOCK + b"\x04\0\1"),
        v2(INET_BLOCK + b"\x04\xff\xff" + bytes(9)),
        v2(INET_BLOCK + tlv(5, bytes(129))),
        v2(INET_BLOCK + tlv(2, b"\xff")),
        v2(INET_BLOCK + tlv(0x30, "é".encode())),
        v2(INET_BLOCK + tlv(3, b"")),
        v2(INET_BLOCK + tlv(3, bytes(3))),
        v2(INET_BLOCK + tlv(3, bytes(4))),
        v2(INET_BLOCK + tlv(3, bytes(5))),
        v2(INET_BLOCK + tlv(3, bytes(4)) * 2),
        v2(tlv(3, bytes(4)), command=0x20, kind=0),
        v2(INET_BLOCK + tlv(3, bytes(4)), kind=0x10),
        v2(INET_BLOCK + tlv(0x20, b"")),
        v2(INET_BLOCK + tlv(0x20, bytes(4))),
        v2(INET_BLOCK + tlv(0x20, bytes(6))),
        v2(INET_BLOCK + tlv(0x20, bytes(5) + b"\x21\0\2a")),
        v2(INET_BLOCK + tlv(0x20, bytes(5) + tlv(0x21, b"\xff"))),
        v2(INET_BLOCK + tlv(0x20, bytes(5) + tlv(0x22, b"\xff"))),
    ],
)
def test_a_broken_header_of_version_2_is_refused(data: bytes) -> None:
    """Wrong signatures, versions, commands, families, lengths, checksums, encodings and TLVs are refused."""
    with pytest.raises(PreambleError) as caught:
        ProxyHeader.parse(data, "any")
    assert "\n" not in str(caught.value)


def test_everything_that_a_proxy_can_say() -> None:
    """Each TLV and each field of SSL is read by its name; one that harken does not know is kept as it came."""
    ssl = ProxySSL(
        7,
        0,
        version="TLSv1.3",
        common_name="Zoë",
        cipher="TLS_AES_256_GCM_SHA384",
        signature_algorithm="RSA-SHA256",
        key_algorithm="RSA2048",
        group="x25519",
        signature_scheme="rsa_pss_rsae_sha256",
        client_certificate=b"\x30\x82",
        others=((0x2F, b"new"),),
    )
    header = ProxyHeader.make(
        SOURCE,
        DESTINATION,
        alpn=b"h2",
        authority="münchen.example",
        unique_id=b"u" * 128,
        ssl=ssl,
        netns="blue",
        checksum=True,
        tlvs=[(4, b"\0\0"), (0xEA, b"\1vpce-1"), (4, b"")],
    )
    read, _ = ProxyHeader.parse(header.encode())
    assert (read.alpn, read.authority, read.unique_id, read.netns) == (b"h2", "münchen.example", b"u" * 128, "blue")
    assert read.ssl == ssl
    assert read.ssl is not None
    assert (read.ssl.tls, read.ssl.certified, read.ssl.verified) == (True, True, True)
    assert read.tlv(0xEA) == b"\1vpce-1"
    assert [kind for kind, _ in read.tlvs] == [3, 1, 2, 5, 0x20, 0x30, 4, 0xEA, 4]
    assert read.checksum
    assert ProxyHeader.parse(read.encode())[0] == read
    nothing = ProxyHeader.parse(v2(INET_BLOCK))[0]
    assert (nothing.alpn, nothing.authority, nothing.unique_id, nothing.netns, nothing.ssl, nothing.checksum) == (
        None,
    ) * 6


def test_no_certificate_is_never_verified() -> None:
    """A ``verify`` of 0 means something only beside a certificate: HAProxy sends 0 without one, too."""
    assert not ProxySSL(client=1, verify=0).verified
    assert ProxySSL(client=5, verify=0).verified
    assert not ProxySSL(client=5, verify=18).verified
    assert not ProxySSL().tls


def test_the_checksum_is_that_of_the_specification() -> None:
    """CRC-32C of the known vectors, over the whole header with zeros in its place; any flipped bit is noticed."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"") == 0
    data = bytearray(ProxyHeader.make(SOURCE, DESTINATION, checksum=True, authority="a.example").encode())
    assert data[28:31] == b"\x03\0\4"
    assert crc32c(bytes(data[:31] + bytes(4) + data[35:])) == int.from_bytes(data[31:35])
    for at in range(31, len(data)):
        for bit in range(8):
            data[at] ^= 1 << bit
            with pytest.raises(PreambleError):
                ProxyHeader.parse(bytes(data))
            data[at] ^= 1 << bit


# ── which version, and how much to read ──────────────────────────────────────────────────────────────────────────────


def test_a_version_that_is_not_allowed_is_named() -> None:
    """A server that takes one version refuses the other, and says which came."""
    line = b"PROXY TCP4 192.0.2.1 192.0.2.2 56324 443\r\n"
    with pytest.raises(PreambleError, match="of version 2, but one of version 1: let the proxy send v2"):
        ProxyHeader.parse(line, "v2")
    with pytest.raises(PreambleError, match="of version 1, but one of version 2"):
        ProxyHeader.parse(v2(INET_BLOCK), "v1")
    with pytest.raises(PreambleError, match="a TLS handshake"):
        ProxyHeader.parse(b"\x16\x03\x01\0\xc8", "any")


@pytest.mark.parametrize("data", [b"PROXY TCP6 2001:db8::1 ::1 1 2\r\n", v2(INET_BLOCK + tlv(4, bytes(300)))])
def test_no_byte_is_asked_for_that_is_not_the_headers(data: bytes) -> None:
    """While the length is unknown all that came is the header's, so that a reader never takes a byte too many."""
    sizes = [extent(data[:cut]) for cut in range(len(data) + 1)]
    known = [cut for cut, size in enumerate(sizes) if size is not None]
    assert {size for size in sizes if size is not None} == {len(data)}
    assert known == list(range(known[0], len(data) + 1))
    assert known[0] <= min(len(data), HEAD_BYTES)
    assert extent(data + b"whatever follows") == len(data)


@pytest.mark.parametrize(
    "head", [b"G", b"PROXZ", b"PROXY\t", b"\r\n\r\r", SIGNATURE + b"\x11", SIGNATURE + b"\x2f", b"PROXY \n", b"P" * 200]
)
def test_what_cannot_become_a_header_is_refused_at_once(head: bytes) -> None:
    """The first wrong byte ends it, without waiting for more."""
    with pytest.raises(PreambleError):
        extent(head)


# ── sending ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_headers_to_send() -> None:
    """Headers are written as the specification shows them."""
    assert ProxyHeader(SOURCE, DESTINATION, version=1).encode() == b"PROXY TCP4 192.0.2.1 192.0.2.2 56324 443\r\n"
    assert ProxyHeader(("::1", 1, 0, 0), ("::2", 2), version=1).encode() == b"PROXY TCP6 ::1 ::2 1 2\r\n"
    assert ProxyHeader(version=1).encode() == b"PROXY UNKNOWN\r\n"
    assert ProxyHeader("/a", "/b", version=1).encode() == b"PROXY UNKNOWN\r\n"
    assert ProxyHeader(SOURCE, DESTINATION, transport="dgram", version=1).encode() == b"PROXY UNKNOWN\r\n"
    assert ProxyHeader(SOURCE, DESTINATION).encode() == v2(INET_BLOCK)
    assert ProxyHeader.local().encode() == v2(b"", command=0x20, kind=0)
    assert ProxyHeader().encode() == v2(b"", kind=0)


def test_addresses_of_two_families_meet_in_the_wider_one() -> None:
    """A mapped address is written as IPv4, IPv4 beside IPv6 as a mapped one, and a scope, which has no room, not."""
    mapped = ("::ffff:192.0.2.2", 443, 0, 0)
    assert ProxyHeader(SOURCE, mapped).encode() == v2(INET_BLOCK)
    mixed = ProxyHeader(SOURCE, ("::1", 1, 0, 0), version=1).encode()
    assert mixed == b"PROXY TCP6 ::ffff:192.0.2.1 ::1 56324 1\r\n"
    scoped = ProxyHeader(("fe80::1%lo", 1, 0, 1), ("::1", 1), version=1).encode()
    assert scoped == b"PROXY TCP6 fe80::1 ::1 1 1\r\n"


@pytest.mark.parametrize(
    "header",
    [
        ProxyHeader(SOURCE, None),
        ProxyHeader(SOURCE, "/path"),
        ProxyHeader(("localhost", 1), DESTINATION),
        ProxyHeader(("192.0.2.1", 65536), DESTINATION),
        ProxyHeader(("192.0.2.1", -1), DESTINATION),
        ProxyHeader(("192.0.2.1",), DESTINATION),
        ProxyHeader(("192.0.2.1", "x"), DESTINATION),
        ProxyHeader((None, 1), DESTINATION),
        ProxyHeader(("192.0.2.1%lo", 1), DESTINATION),
        ProxyHeader("/" * 109, "/"),
        ProxyHeader("/a\0b", "/"),
        ProxyHeader(SOURCE, DESTINATION, version=3),
        ProxyHeader(SOURCE, DESTINATION, command="LOCAL"),
        ProxyHeader(SOURCE, DESTINATION, transport="tcp"),
        ProxyHeader(SOURCE, DESTINATION, version=1, tlvs=((1, b"h2"),)),
        ProxyHeader(version=1, command="local"),
        ProxyHeader(SOURCE, DESTINATION, tlvs=((1, bytes(65536)),)),
        ProxyHeader(SOURCE, DESTINATION, tlvs=((1, bytes(65530)),)),
        ProxyHeader(SOURCE, DESTINATION, tlvs=((256, b""),)),
        ProxyHeader(SOURCE, DESTINATION, tlvs=((5, bytes(129)),)),
        ProxyHeader(SOURCE, DESTINATION, tlvs=((2, b"\xff"),)),
        ProxyHeader(SOURCE, DESTINATION, tlvs=((3, b""), (3, b""))),
    ],
)
def test_what_cannot_be_said_is_refused(header: ProxyHeader) -> None:
    """A header that no receiver could read is not sent: the caller is told which value is wrong."""
    with pytest.raises(ConfigError):
        header.encode()


def test_texts_that_cannot_be_encoded_are_named() -> None:
    """Values that have no form in the header are refused by name."""
    with pytest.raises(ConfigError, match="netns = 'é'"):
        ProxyHeader.make(SOURCE, DESTINATION, netns="é")
    with pytest.raises(ConfigError, match="authority"):
        ProxyHeader.make(SOURCE, DESTINATION, authority="\udc80")
    with pytest.raises(ConfigError, match="cipher = 'é'"):
        ProxySSL(cipher="é").encode()
    with pytest.raises(ConfigError, match="client = 256"):
        ProxySSL(client=256).encode()
