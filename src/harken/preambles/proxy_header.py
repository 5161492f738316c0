"""The header in which a proxy says for which client it connects: HAProxy's PROXY protocol, versions 1 and 2."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from harken.errors import ConfigError, PreambleError
from harken.peer import unmap
from harken.preambles import _proxy_tlv, _proxy_v1 as v1, _proxy_v2 as v2
from harken.preambles._proxy_tlv import ProxySSL

__all__ = ["HEAD_BYTES", "MAX_BYTES", "VERSIONS", "ProxyHeader", "ProxySSL", "extent"]

HEAD_BYTES = v1.MAX_BYTES
"""From this many bytes on :func:`extent` knows, of either version."""
MAX_BYTES = v2.HEAD_BYTES + 0xFFFF
"""No header is longer: its length has 16 bits."""

_SIGNATURES = {"v1": (v1.SIGNATURE,), "v2": (v2.SIGNATURE,), "any": (v1.SIGNATURE, v2.SIGNATURE)}
VERSIONS = tuple(_SIGNATURES)
"""What a server may ask for."""
_COMMANDS = ("proxy", "local")
_TRANSPORTS = ("stream", "dgram", "unspec")


def extent(head: bytes, version: str = "any") -> int | None:
    """Return how many bytes the header that ``head`` begins has; None while that cannot be told.

    While it is None, every byte of ``head`` belongs to the header.

    Args:
        head: what came first.
        version: ``v1``, ``v2`` or ``any``.

    Raises:
        PreambleError: it can be no header of that version any more.
    """
    if not any(head.startswith(known[: len(head)]) for known in _SIGNATURES[version]):
        raise PreambleError(f"no PROXY header{_instead(head, version)}")
    return v1.extent(head) if head[:1] == v1.SIGNATURE[:1] else v2.extent(head) if head else None


def _instead(head: bytes, version: str) -> str:
    for other, known in (("v1", v1.SIGNATURE), ("v2", v2.SIGNATURE)):
        if version not in (other, "any") and head.startswith(known):
            return (
                f" of version {version[1:]}, but one of version {other[1:]}: let the proxy send {version}, or allow any"
            )
    first = head[: v2.HEAD_BYTES]
    return f": the connection began with {first!r}" + (", a TLS handshake" if first.startswith(b"\x16\x03") else "")


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    r"""One PROXY header, as read by a server or to be sent by a client.

    Addresses have stdlib's shapes: ``(host, port)``, ``(host, port, 0, 0)`` for IPv6, a path, or None.

    ``ProxyHeader(("192.0.2.1", 56324), ("192.0.2.2", 443), version=1).encode()`` is
    ``b"PROXY TCP4 192.0.2.1 192.0.2.2 56324 443\r\n"``.

    Attributes:
        source: the client's address, or None when the proxy speaks for no client, or will not say for which.
        destination: the address to which the client connected, or None.
        transport: ``stream``, ``dgram`` or ``unspec``.
        version: 1 or 2.
        command: ``proxy``, or ``local`` for a connection of the proxy's own, such as a health check.
        tlvs: what version 2 says beside, each as (type, bytes), in the order in which it came.
    """

    source: Any = None
    destination: Any = None
    transport: str = "stream"
    version: int = 2
    command: str = "proxy"
    tlvs: _proxy_tlv.TLVs = ()

    @classmethod
    def make(
        cls,
        source: Any = None,
        destination: Any = None,
        *,
        transport: str = "stream",
        version: int = 2,
        alpn: bytes | None = None,
        authority: str | None = None,
        unique_id: bytes | None = None,
        ssl: ProxySSL | None = None,
        netns: str | None = None,
        checksum: bool = False,
        tlvs: Iterable[tuple[int, bytes]] = (),
    ) -> ProxyHeader:
        """Make a header to be sent, its TLVs by their names; see the properties of the same names.

        Args:
            source: the client's address.
            destination: the address to which the client connected.
            transport: ``stream`` or ``dgram``.
            version: 1 or 2.
            alpn: the protocol that the client negotiated.
            authority: the host name that the client asked for.
            unique_id: of the connection, at most 128 bytes.
            ssl: what is known of the client's TLS.
            netns: the network namespace.
            checksum: whether :meth:`encode` adds a CRC-32C.
            tlvs: others, as (type, bytes).

        Raises:
            ConfigError: a text has letters that its encoding lacks.
        """
        named: list[tuple[int, bytes | None]] = [
            (_proxy_tlv.CRC32C, bytes(4) if checksum else None),
            (_proxy_tlv.ALPN, alpn),
            (_proxy_tlv.AUTHORITY, _encoded("authority", authority, "utf-8")),
            (_proxy_tlv.UNIQUE_ID, unique_id),
            (_proxy_tlv.SSL, ssl.encode() if ssl else None),
            (_proxy_tlv.NETNS, _encoded("netns", netns, "ascii")),
        ]
        found = tuple((kind, value) for kind, value in named if value is not None)
        return cls(source, destination, transport, version, tlvs=(*found, *tlvs))

    @classmethod
    def local(cls) -> ProxyHeader:
        """Return the header of a connection that speaks for nobody else, such as a health check."""
        return cls(transport="unspec", command="local")

    @classmethod
    def parse(cls, data: bytes, version: str = "any") -> tuple[ProxyHeader, int]:
        """Read the header with which ``data`` begins.

        Args:
            data: the header and whatever follows it.
            version: ``v1``, ``v2`` or ``any``.

        Returns:
            The header, and how many bytes it has.

        Raises:
            PreambleError: there is no valid and whole header of that version.
        """
        size = extent(data, version)
        if size is None or len(data) < size:
            raise PreambleError(f"the PROXY header is cut short after {len(data)} bytes")
        header = data[:size]
        if header[:1] == v1.SIGNATURE[:1]:
            source, destination = v1.decode(header)
            return cls(source, destination, "stream" if source else "unspec", 1), size
        fields = v2.decode(header)
        return cls(fields.source, fields.destination, fields.transport, 2, fields.command, fields.tlvs), size

    def encode(self) -> bytes:
        """Return the bytes to send, at once and before any other.

        An IPv4 and an IPv6 address together are written as two of IPv6, mapped IPv4 addresses as IPv4. The scope of
        a link-local address is left out: no version has room for it.

        Raises:
            ConfigError: a field is wrong, or the version has no words for it.
        """
        if self.version not in (1, 2) or self.command not in _COMMANDS or self.transport not in _TRANSPORTS:
            raise ConfigError(
                f"{self!r}: version is 1 or 2, command {' or '.join(_COMMANDS)}, transport one of "
                f"{', '.join(_TRANSPORTS)}"
            )
        family, source, destination = _pair(self.source, self.destination)
        if self.version == 2:
            return v2.encode(v2.Fields(self.command, self.transport, source, destination, self._checked()), family)
        if self.command == "local" or self.tlvs:
            raise ConfigError("version 1 of the PROXY protocol has neither LOCAL nor TLVs; send version 2")
        return v1.encode(family if self.transport == "stream" else socket.AF_UNSPEC, source, destination)

    def bare(self) -> ProxyHeader:
        """Return the same header without TLVs."""
        return replace(self, tlvs=())

    def _checked(self) -> _proxy_tlv.TLVs:
        try:
            return _proxy_tlv.check(self.tlvs)
        except PreambleError as error:
            raise ConfigError(str(error)) from None

    @property
    def forwarded(self) -> bool:
        """Whether the connection is a client's; otherwise the real peer is the one that counts."""
        return self.command == "proxy" and self.source is not None

    @property
    def client_address(self) -> Any:
        """:attr:`source` as a handler sees it: a mapped IPv4 address as the IPv4 address that it is."""
        if isinstance(self.source, tuple) and (host := unmap(self.source[0])) != self.source[0]:
            return host, self.source[1]
        return self.source

    @property
    def family(self) -> socket.AddressFamily:
        """The address family of :attr:`source`; ``AF_UNSPEC`` if there is none."""
        return socket.AddressFamily(_family(self.source))

    def tlv(self, kind: int) -> bytes | None:
        """Return the first TLV of this type, or None."""
        return next((value for known, value in self.tlvs if known == kind), None)

    @property
    def alpn(self) -> bytes | None:
        """The protocol above, as the client and the proxy negotiated it: ``b"h2"``."""
        return self.tlv(_proxy_tlv.ALPN)

    @property
    def authority(self) -> str | None:
        """The host name that the client asked for: under TLS its SNI."""
        value = self.tlv(_proxy_tlv.AUTHORITY)
        return None if value is None else value.decode("utf-8")

    @property
    def checksum(self) -> int | None:
        """The CRC-32C that came; it was right."""
        value = self.tlv(_proxy_tlv.CRC32C)
        return None if value is None else int.from_bytes(value)

    @property
    def unique_id(self) -> bytes | None:
        """What the proxy calls the connection, to find it again in other logs."""
        return self.tlv(_proxy_tlv.UNIQUE_ID)

    @property
    def ssl(self) -> ProxySSL | None:
        """What the proxy says of the client's TLS."""
        value = self.tlv(_proxy_tlv.SSL)
        return None if value is None else ProxySSL.decode(value)

    @property
    def netns(self) -> str | None:
        """The network namespace in which the proxy took the connection."""
        value = self.tlv(_proxy_tlv.NETNS)
        return None if value is None else value.decode("ascii")


def _encoded(name: str, value: str | None, encoding: str) -> bytes | None:
    try:
        return None if value is None else value.encode(encoding)
    except UnicodeEncodeError:
        raise ConfigError(f"{name} = {value!r} is not {encoding.upper()}") from None


def _family(address: Any) -> int:
    if isinstance(address, (str, bytes)):
        return socket.AF_UNIX
    if isinstance(address, tuple) and address:
        return socket.AF_INET6 if ":" in str(address[0]) else socket.AF_INET
    return socket.AF_UNSPEC


def _pair(source: Any, destination: Any) -> tuple[int, Any, Any]:
    """Bring two addresses to one family."""
    pair = [_plain(address) for address in (source, destination)]
    families = {_family(address) for address in pair}
    if families == {socket.AF_INET, socket.AF_INET6}:
        pair = [a if ":" in a[0] else ("::ffff:" + a[0], a[1]) for a in pair]
        families = {socket.AF_INET6}
    if len(families) != 1:
        raise ConfigError(
            f"a PROXY header cannot go from {source!r} to {destination!r}: give two addresses of one kind"
        )
    return families.pop(), *pair


def _plain(address: Any) -> Any:
    if address is None:
        return None
    if isinstance(address, (str, bytes)):
        raw = os.fsencode(address)
        if b"\0" in raw and not raw.startswith(b"\0"):  # an abstract name may have any bytes
            raise ConfigError(f"{address!r} is no Unix path: it has a null byte within")
        return address
    try:
        host, port = unmap(address[0]), int(address[1])
        plain, _, scope = host.partition("%")
        socket.inet_pton(socket.AF_INET6 if ":" in plain else socket.AF_INET, plain)
        if not 0 <= port <= 0xFFFF or (scope and ":" not in plain):
            raise ValueError
    except (OSError, ValueError, TypeError, IndexError):
        raise ConfigError(f"{address!r} is no address in numbers with a port from 0 to 65535") from None
    return plain, port
