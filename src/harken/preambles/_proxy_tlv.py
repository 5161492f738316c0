"""What a PROXY header of version 2 may say beside the addresses: type, length, value; one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from struct import Struct

from harken.errors import ConfigError, PreambleError

__all__ = [
    "ALPN",
    "AUTHORITY",
    "CRC32C",
    "NETNS",
    "SSL",
    "UNIQUE_ID",
    "ProxySSL",
    "TLVs",
    "check",
    "join",
    "split",
]

TLVs = tuple[tuple[int, bytes], ...]

ALPN, AUTHORITY, CRC32C, UNIQUE_ID, SSL, NETNS = 0x01, 0x02, 0x03, 0x05, 0x20, 0x30
MAX_UNIQUE_ID_BYTES = 128  # the specification's

_VERSION, _COMMON_NAME, _CIPHER, _SIGNATURE, _KEY, _GROUP, _SCHEME, _CERTIFICATE = range(0x21, 0x29)
_ENCODINGS = {
    **dict.fromkeys((_VERSION, _CIPHER, _SIGNATURE, _KEY, _GROUP, _SCHEME), "ascii"),
    _COMMON_NAME: "utf-8",
}

_HEAD = Struct("!BH")
_SSL_HEAD = Struct("!BI")
_MAX_VALUE = 0xFFFF


def split(block: bytes) -> TLVs:
    """Take a block apart.

    Raises:
        PreambleError: it does not end where a value ends.
    """
    found, at = [], 0
    while at < len(block):
        if len(block) - at < _HEAD.size:
            raise PreambleError(f"PROXY v2: {len(block) - at} bytes are left where a TLV needs {_HEAD.size} or more")
        kind, length = _HEAD.unpack_from(block, at)
        at += _HEAD.size
        if len(block) - at < length:
            raise PreambleError(f"PROXY v2: TLV {kind:#04x} says {length} bytes, and {len(block) - at} are left")
        found.append((kind, block[at : at + length]))
        at += length
    return tuple(found)


def join(tlvs: Iterable[tuple[int, bytes]]) -> bytes:
    """Put a block together.

    Raises:
        ConfigError: a type has no place in a byte, or a value is longer than a length can say.
    """
    parts: list[bytes] = []
    for kind, value in tlvs:
        if not 0 <= kind <= 0xFF or len(value) > _MAX_VALUE:
            raise ConfigError(
                f"TLV {kind:#04x} with {len(value)} bytes: a type is one byte, a value at most {_MAX_VALUE}"
            )
        parts += (_HEAD.pack(kind, len(value)), value)
    return b"".join(parts)


def check(tlvs: TLVs) -> TLVs:
    """Return ``tlvs`` if those that are known can be read.

    Raises:
        PreambleError: one cannot.
    """
    for kind, value in tlvs:
        if kind == UNIQUE_ID and len(value) > MAX_UNIQUE_ID_BYTES:
            raise PreambleError(f"PROXY v2: a unique id of {len(value)} bytes, above {MAX_UNIQUE_ID_BYTES}")
        if kind == AUTHORITY:
            text(value, "utf-8", "authority")
        elif kind == NETNS:
            text(value, "ascii", "netns")
        elif kind == SSL:
            ProxySSL.decode(value)
    return tlvs


def text(value: bytes, encoding: str, name: str) -> str:
    """Decode a value.

    Raises:
        PreambleError: it has another encoding than the specification says.
    """
    try:
        return value.decode(encoding)
    except UnicodeDecodeError:
        raise PreambleError(f"PROXY v2: the {name} {value[:40]!r} is not {encoding.upper()}") from None


@dataclass(frozen=True, slots=True)
class ProxySSL:
    """What a proxy says about the TLS connection between it and the client.

    Attributes:
        client: the specification's bits: 1 TLS was used, 2 a certificate came over this connection, 4 over its session.
        verify: 0 if the certificate, given that there is one, was verified; see :attr:`verified`.
        version: of TLS, as ``"TLSv1.3"``.
        common_name: of the client's certificate.
        cipher: the cipher's name.
        signature_algorithm: by which the proxy's own certificate is signed, as ``"RSA-SHA256"``.
        key_algorithm: of the proxy's own certificate, as ``"RSA2048"``.
        group: of the key exchange, as ``"secp256r1"``.
        signature_scheme: by which the proxy signed the handshake, as ``"rsa_pss_rsae_sha256"``.
        client_certificate: the client's certificate in DER.
        others: sub-fields of which harken knows nothing, as (type, bytes).
    """

    client: int = 0
    verify: int = 1
    version: str | None = None
    common_name: str | None = None
    cipher: str | None = None
    signature_algorithm: str | None = None
    key_algorithm: str | None = None
    group: str | None = None
    signature_scheme: str | None = None
    client_certificate: bytes | None = None
    others: TLVs = ()

    @property
    def tls(self) -> bool:
        """Whether the client spoke TLS with the proxy."""
        return bool(self.client & 1)

    @property
    def certified(self) -> bool:
        """Whether the client gave a certificate, over this connection or earlier in its TLS session."""
        return bool(self.client & 6)

    @property
    def verified(self) -> bool:
        """Whether the client gave a certificate, and the proxy verified it."""
        return self.certified and self.verify == 0

    @classmethod
    def decode(cls, value: bytes) -> ProxySSL:
        """Read the value of the TLV; of a sub-field that comes twice the first holds.

        Raises:
            PreambleError: it is malformed.
        """
        if len(value) < _SSL_HEAD.size:
            raise PreambleError(f"PROXY v2: the SSL TLV has {len(value)} bytes, below {_SSL_HEAD.size}")
        client, verify = _SSL_HEAD.unpack_from(value)
        known: dict[str, str | bytes] = {}
        others = []
        for kind, field in split(value[_SSL_HEAD.size :]):
            name = _SUBFIELDS.get(kind)
            if name is None or name in known:
                others.append((kind, field))
            else:
                encoding = _ENCODINGS.get(kind)
                known[name] = text(field, encoding, f"SSL {name}") if encoding else field
        return cls(client, verify, others=tuple(others), **known)  # type: ignore[arg-type]

    def encode(self) -> bytes:
        """Write the value of the TLV.

        Raises:
            ConfigError: a field has letters that its encoding lacks, or a number its place has no room for.
        """
        if not (0 <= self.client <= 0xFF and 0 <= self.verify <= 0xFFFF_FFFF):
            raise ConfigError(f"client = {self.client} must fit one byte and verify = {self.verify} four")
        fields: list[tuple[int, bytes]] = []
        for kind, name in _SUBFIELDS.items():
            value = getattr(self, name)
            if value is not None:
                try:
                    fields.append((kind, value.encode(_ENCODINGS[kind]) if isinstance(value, str) else value))
                except UnicodeEncodeError:
                    raise ConfigError(f"{name} = {value!r} is not {_ENCODINGS[kind].upper()}") from None
        return _SSL_HEAD.pack(self.client, self.verify) + join([*fields, *self.others])


_SUBFIELDS = {
    _VERSION: "version",
    _COMMON_NAME: "common_name",
    _CIPHER: "cipher",
    _SIGNATURE: "signature_algorithm",
    _KEY: "key_algorithm",
    _GROUP: "group",
    _SCHEME: "signature_scheme",
    _CERTIFICATE: "client_certificate",
}
