"""The far end of a connection, as the kernel sees it or a trusted proxy tells it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from harken.preambles.proxy_header import ProxyHeader

__all__ = ["Credentials", "Peer", "behind", "unmap"]

_MAPPED = "::ffff:"  # RFC 4291, 2.5.5.2: an IPv4 address seen through an IPv6 socket


class Credentials(NamedTuple):
    """Who connected to a Unix socket, as the kernel vouches for it: the process that called connect(2)."""

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Peer:
    """The far end of one connection or datagram; behind a proxy that says for whom it speaks, that client.

    Attributes:
        address: IPv4 or IPv6 address in numbers (a mapped one as IPv4), or the peer's Unix path, often empty.
        port: its port; 0 where there is none.
        family: the address family of ``address``.
        proxy: the PROXY header that came first, or None; unless it speaks for a client, the proxy is the peer.
        certificate: the peer's TLS certificate as ``ssl.SSLSocket.getpeercert`` gives it, or None.
        credentials: the peer's process on a Unix stream socket; None if it speaks for another.
    """

    address: str
    port: int
    family: socket.AddressFamily | int
    proxy: ProxyHeader | None = None
    certificate: dict[str, Any] | None = None
    credentials: Credentials | None = None

    def __str__(self) -> str:
        """Return the peer as logs show it: ``127.0.0.1:5000``, ``[::1]:5``, ``unix pid 12 uid 0``."""
        if self.family == socket.AF_INET:
            return f"{self.address}:{self.port}"
        if self.family == socket.AF_INET6:
            return f"[{self.address}]:{self.port}"
        words = [getattr(self.family, "name", f"family {self.family}").removeprefix("AF_").lower()]
        if self.credentials:
            words.append(f"pid {self.credentials.pid} uid {self.credentials.uid}")
        if self.address:
            words.append(self.address)
        if self.port:
            words.append(f"port {self.port}")
        return " ".join(words)


def behind(peer: Peer, header: ProxyHeader) -> Peer:
    """Return the client for which ``peer`` speaks; ``peer`` itself, with the header, when it speaks for nobody."""
    client = header.client_address if header.forwarded else None
    match client:
        case None:
            return replace(peer, proxy=header)
        case (str(host), int(port), *_):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return Peer(host, port, family, header, peer.certificate)
    path = os.fsdecode(client)
    shown = "@" + path[1:] if path.startswith("\0") else path
    return Peer(shown, 0, header.family, header, peer.certificate)


def unmap(host: str) -> str:
    """Return ``::ffff:127.0.0.1`` as ``127.0.0.1``, in every spelling; any other text as it is."""
    if ":" not in host or not host.lower().startswith((_MAPPED, "0")):
        return host
    if host.startswith(_MAPPED) and "." in host:  # the spelling of inet_ntop(3), thus of accept(2)
        return host[len(_MAPPED) :]
    import ipaddress

    try:
        mapped = ipaddress.IPv6Address(host).ipv4_mapped
    except ValueError:
        return host
    return str(mapped) if mapped else host
