"""What TCP and UDP share: ``HOST:PORT``, IPv4 and IPv6, and one socket for both."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

from harken.errors import ConfigError
from harken.listener import AddressInUse, BindError, Listener
from harken.peer import Peer, unmap
from harken.transports import BindOptions
from harken.transports.holder import holder

FAMILIES = (socket.AF_INET, socket.AF_INET6)
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)  # no such family in this kernel; no IPv6 address on this machine
_KINDS = {"tcp": socket.SOCK_STREAM, "tls": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}

Candidate = tuple[int, tuple[Any, ...]]


class Place(NamedTuple):
    """A parsed address. An empty host is every IPv4 and IPv6 address."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return _spell(self.scheme, self.host, self.port)


def parse(url: str) -> Place:
    """Read ``SCHEME://HOST:PORT``.

    Raises:
        ConfigError: the address is malformed.
    """
    scheme, _, rest = url.partition(":")
    if not rest.startswith("//"):
        raise ConfigError(f"{url!r} is not an address; write {scheme}://HOST:PORT")
    place, mark, query = rest[2:].partition("?")
    if mark:
        raise ConfigError(f"{url!r}: {scheme} addresses take no options, but {query!r} follows the '?'")
    host, _, port = place.removesuffix("/").rpartition(":")
    if not (port.isascii() and port.isdecimal() and len(port) < 9 and int(port) <= 65535):  # 16 bits in both
        raise ConfigError(f"{url!r} has no port from 0 to 65535; write {scheme}://HOST:PORT, with 0 for any free one")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif "://" in host:
        raise ConfigError(f"{url!r} is more than one address; name each by itself")
    elif ":" in host or "[" in host or "]" in host:
        raise ConfigError(f"{url!r}: an IPv6 address needs brackets; write {scheme}://[::1]:{port}")
    if "/" in host or "@" in host:
        raise ConfigError(f"{url!r}: {host!r} is not a host; write {scheme}://HOST:{port}")
    return Place(scheme, host, int(port))


def bind(place: Place, options: BindOptions, tune: Callable[[socket.socket, BindOptions], None]) -> list[Listener]:
    """Open a listener at ``place``, at the first of its addresses that this machine has.

    Raises:
        BindError: it cannot be had now.
        ConfigError: its host has no address.
    """
    candidates = _candidates(place)
    for family, address in candidates:
        try:
            return [_open(family, address, place, options, tune)]
        except OSError as error:
            if error.errno in _NO_IPV6 and (family, address) != candidates[-1]:
                continue
            raise _explain(place, error) from None
    raise AssertionError("a host has an address or is refused above")


def suits(place: Place, sock: socket.socket) -> bool:
    """Tell whether a socket is bound at ``place``; never at port 0, which is any."""
    if not place.port or sock.type != _KINDS[place.scheme] or sock.family not in FAMILIES:
        return False
    if sock.family == socket.AF_INET6 and bool(place.host) != sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        return False
    bound = sock.getsockname()[:2]
    return any(sock.family == family and bound == address[:2] for family, address in _candidates(place))


def _candidates(place: Place) -> list[Candidate]:
    """Return what a host stands for, in the order of trying.

    IPv4 is first where a name has both (``localhost``): that is where ``socketserver`` listens.
    """
    if not place.host:
        return [(socket.AF_INET6, ("::", place.port)), (socket.AF_INET, ("0.0.0.0", place.port))]
    try:
        found = socket.getaddrinfo(place.host, place.port, type=_KINDS[place.scheme], flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot listen on {place}: no address is known for {place.host!r} ({reason})") from None
    return sorted(((family, address) for family, _, _, _, address in found), key=lambda c: c[0] != socket.AF_INET)


def _open(
    family: int,
    address: tuple[Any, ...],
    place: Place,
    options: BindOptions,
    tune: Callable[[socket.socket, BindOptions], None],
) -> Listener:
    listener = Listener(family, _KINDS[place.scheme])
    try:
        if family == socket.AF_INET6:  # set both ways: the machine's default is net.ipv6.bindv6only
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1 if place.host else 0)
        tune(listener, options)
        listener.bind(address)
        if listener.type == socket.SOCK_STREAM:
            listener.listen(options.backlog)
        listener.url = url(place.scheme, listener)
    except BaseException:
        listener.close()
        raise
    return listener


def _explain(place: Place, error: OSError) -> BindError:
    number = error.errno or 0
    if number == errno.EADDRINUSE:
        stream = _KINDS[place.scheme] == socket.SOCK_STREAM
        who = holder("tcp" if stream else "udp", place.port)
        flag = "l" if stream else "a"
        by = f"by {who}" if who else f"(by whom: ss -{flag}np 'sport = :{place.port}')"
        return AddressInUse(f"{place} is already in use {by}; stop it, or take another port", number)
    remedy = {
        errno.EACCES: "ports below net.ipv4.ip_unprivileged_port_start (1024) need CAP_NET_BIND_SERVICE",
        errno.EADDRNOTAVAIL: "no interface of this machine has that address",
        errno.EAFNOSUPPORT: "this machine has no IPv6",
    }.get(error.errno or 0, "see bind(2)")
    return BindError(f"cannot listen on {place}: {os.strerror(number)}; {remedy}", number)


def url(scheme: str, sock: socket.socket) -> str:
    """Return where a socket is bound; one that takes IPv4 and IPv6 at once has no host, as users write it."""
    name = sock.getsockname()
    if sock.family not in FAMILIES:
        return f"{scheme}:{name}"
    host, port = name[:2]
    if sock.family == socket.AF_INET6 and host == "::":
        host = "::" if sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) else ""
    return _spell(scheme, host, port)


def _spell(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def describe(connection: socket.socket, client_address: Any) -> Peer:
    """Return the far end; never raises, since programs give addresses of shapes of their own."""
    # Not by `match`, which looks for __match_args__ on str and int in vain: dear, where limits want each peer.
    told = isinstance(client_address, (tuple, list)) and len(client_address) > 1 and isinstance(client_address[1], int)
    if not told:
        return Peer(str(client_address or ""), 0, getattr(connection, "family", 0))
    host, port = client_address[:2]
    if isinstance(host, str):
        plain = unmap(host)
        spelt = socket.AF_INET6 if ":" in plain else socket.AF_INET
        return Peer(plain, port, spelt if plain != host else getattr(connection, "family", spelt))
    if len(client_address) == 2:  # vsock(7), for one, counts its hosts
        return Peer(str(host), port, getattr(connection, "family", 0))
    return Peer(str(client_address), 0, getattr(connection, "family", 0))


def reuse_port(sock: socket.socket, options: BindOptions) -> None:
    """Set SO_REUSEPORT where it means something: Linux refuses it outside IPv4 and IPv6."""
    if options.reuse_port and sock.family in FAMILIES:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
