"""Lists of networks, as operators write them, and whether an address is in one."""

from __future__ import annotations

import socket
from collections.abc import Iterable

from harken.errors import ConfigError

__all__ = ["Networks"]

_MAPPED_BITS = 0xFFFF << 32  # RFC 4291, 2.5.5.2: ::ffff:0:0/96 holds the IPv4 addresses seen through IPv6 sockets
_V4_BITS = 32
_V6_BITS = 128

_Network = tuple[int, int, int]  # bits of an address of the family, shift that leaves the prefix, the prefix


class Networks:
    """A set of IPv4 and IPv6 networks.

    A look-up costs one probe of a set for each *length* of prefix that occurs, whatever the number of networks.
    Immutable, so any thread may ask.
    """

    __slots__ = ("_entries", "_prefixes")

    def __init__(self, networks: Iterable[_Network], entries: tuple[str, ...]) -> None:
        gathered: dict[int, dict[int, set[int]]] = {_V4_BITS: {}, _V6_BITS: {}}
        for bits, shift, prefix in networks:
            gathered[bits].setdefault(shift, set()).add(prefix)
        # Widest first: the networks of operators hold more clients than their single addresses.
        self._prefixes = {
            bits: tuple((shift, frozenset(found[shift])) for shift in sorted(found, reverse=True))
            for bits, found in gathered.items()
        }
        self._entries = entries

    @classmethod
    def parse(cls, entries: Iterable[str], name: str = "networks") -> Networks:
        """Read a list such as ``["10.0.0.0/8", "::1", "2001:db8::/32"]``.

        Args:
            entries: addresses, and networks in CIDR notation; a mapped IPv4 network is taken for the IPv4 one.
            name: the setting, for the message.

        Raises:
            ConfigError: an entry is no network, or has bits beyond its prefix.
        """
        texts = tuple(entries)
        return cls((_network(text, name) for text in texts), texts)

    def __contains__(self, address: object) -> bool:
        """Tell whether an address, in numbers, is in one of the networks; False for what is no IP address."""
        found = _address(address) if isinstance(address, str) else None
        if found is None:
            return False
        bits, value = found
        for shift, prefixes in self._prefixes[bits]:  # noqa: SIM110 - any() would cost three calls for each connection
            if value >> shift in prefixes:
                return True
        return False

    def __bool__(self) -> bool:
        """Whether there is any network."""
        return bool(self._entries)

    def __len__(self) -> int:
        """How many entries were given."""
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Networks.parse({list(self._entries)!r})"

    def __str__(self) -> str:
        """Return the entries as they were written."""
        return ", ".join(self._entries)


def _address(text: str) -> tuple[int, int] | None:
    """Read an address in numbers: how many bits it has, and its value. A mapped one counts as IPv4."""
    try:
        if ":" not in text:
            return _V4_BITS, int.from_bytes(socket.inet_pton(socket.AF_INET, text))
        value = int.from_bytes(socket.inet_pton(socket.AF_INET6, text.partition("%")[0]))  # "%": a link-local's scope
    except (OSError, ValueError):  # ValueError: a NUL in the text, or a letter beyond ASCII
        return None
    if value >> _V4_BITS == _MAPPED_BITS >> _V4_BITS:
        return _V4_BITS, value & 0xFFFF_FFFF
    return _V6_BITS, value


def _network(entry: str, name: str) -> _Network:
    text, slash, length = entry.strip().partition("/")
    found = _address(text) if "%" not in text else None
    if found is None:
        raise ConfigError(f"{name}: {entry!r} is no IP address or network; write 192.0.2.0/24, 2001:db8::/32 or ::1")
    bits, value = found
    written = _V6_BITS if ":" in text else _V4_BITS
    least = written - bits  # of a mapped network, the /96 that only says "IPv4"
    if not slash:
        return bits, 0, value
    if not (length.isascii() and length.isdecimal() and len(length) < 4 and least <= int(length) <= written):
        raise ConfigError(f"{name}: {entry!r} has no prefix length from {least} to {written} after the '/'")
    shift = written - int(length)
    if value >> shift << shift != value:
        mask = ~((1 << shift) - 1)
        base = socket.inet_ntop(
            socket.AF_INET if bits == _V4_BITS else socket.AF_INET6, (value & mask).to_bytes(bits // 8)
        )
        raise ConfigError(
            f"{name}: {entry!r} has bits beyond its prefix; write {base}/{bits - shift} for the network, "
            f"or {text} for the one address"
        )
    return bits, shift, value >> shift
