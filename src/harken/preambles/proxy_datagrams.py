"""The PROXY header of datagrams: one in each, before the payload; and answers that go back by way of the proxy.

A handler answers with ``socket.sendto(data, client_address)``. Behind a proxy that address is the client's, who waits
for an answer from the proxy and would not take one from us. So the address remembers the proxy that it came by, and
the socket of a server behind proxies sends there.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from harken.preambles.proxy import Proxy, trusted
from harken.preambles.proxy_header import ProxyHeader
from harken.settings import Settings

__all__ = ["DatagramProxy", "make"]


class _Behind:
    """What a client's address carries beside itself; to everybody else it is the tuple, or text, that it was."""

    proxy: ProxyHeader | None = None
    via: Any = None


class _Pair(_Behind, tuple[Any, ...]):  # noqa: SLOT001 - it carries more than a tuple
    """An address of IPv4 or IPv6."""


class _Path(_Behind, str):  # noqa: SLOT000 - the same
    """A Unix path, or none."""


class _Name(_Behind, bytes):
    """An abstract Unix address."""


_KINDS: dict[type, type[Any]] = {tuple: _Pair, str: _Path, bytes: _Name}


def make(values: Settings) -> DatagramProxy | None:
    """Return what takes the headers off a server's datagrams; None if none are to be there.

    Raises:
        ConfigError: ``proxy_from`` is missing or wrong.
    """
    return DatagramProxy(values["proxy"], Proxy(values["proxy"], trusted(values))) if values["proxy"] != "off" else None


class DatagramProxy:
    """Takes the header off each datagram of one server."""

    def __init__(self, version: str, peers: Proxy) -> None:
        """Make it.

        Args:
            version: ``v1``, ``v2`` or ``any``.
            peers: knows who may send headers.
        """
        self._version = version
        self._peers = peers

    def take(self, data: bytes, address: Any) -> tuple[bytes, Any]:
        """Return the payload of a datagram that came from ``address``, and the address of its client.

        Raises:
            PreambleError: the peer is not trusted, or there is no valid and whole header.
        """
        self._peers.admit(address)
        header, size = ProxyHeader.parse(data, self._version)
        client = header.client_address if header.forwarded else address
        kind = _KINDS.get(type(client))
        if kind is not None:  # a Unix socket without a name has None
            client = kind(client)
            client.proxy, client.via = header, address
        return data[size:], client

    def answering(self, listener: Any) -> Any:
        """Return the listener, whose answers go by way of the proxy from now on: the same object, of another class.

        Another object would need a descriptor of its own, and would hold the port when the server has closed its own.
        """
        kind: Any = type(listener)
        if not issubclass(kind, _Answering):
            listener.__class__ = _answering(kind)
        return listener


@cache
def _answering(kind: type) -> type:
    return type(kind.__name__, (_Answering, kind), {"__slots__": (), "__module__": kind.__module__})


class _Answering:
    """What a socket does otherwise when it answers clients behind proxies."""

    __slots__ = ()

    def sendto(self, data: Any, *args: Any) -> int:
        """Send to where the address came by; see ``socket.sendto``."""
        return super().sendto(data, *args[:-1], _way(args[-1]))  # type: ignore[misc,no-any-return]

    def sendmsg(self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None) -> int:
        """Send to where the address came by; see ``socket.sendmsg``."""
        return super().sendmsg(buffers, ancdata, flags, _way(address))  # type: ignore[misc,no-any-return]


def _way(address: Any) -> Any:
    if not isinstance(address, _Behind):
        return address
    if not address.via:
        raise FileNotFoundError("the proxy has no address to answer to: its socket is not bound")
    return address.via
