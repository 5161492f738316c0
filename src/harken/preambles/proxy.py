"""The PROXY header that comes before everything: whom the peer speaks for."""

from __future__ import annotations

import socket
from time import monotonic
from typing import Any

from harken.errors import ConfigError, PreambleError
from harken.networks import Networks
from harken.preambles import without_unix
from harken.preambles.proxy_header import HEAD_BYTES, VERSIONS, ProxyHeader, extent
from harken.settings import Settings

__all__ = ["Proxy", "make", "trusted"]


def make(values: Settings, listener: Any) -> Proxy:
    """Make the preamble of a server.

    Raises:
        ConfigError: ``proxy_from`` is missing or wrong.
    """
    return Proxy(values["proxy"], trusted(values))


def trusted(values: Settings) -> Networks:
    """Return the networks of ``proxy_from``, from which alone headers are believed.

    Raises:
        ConfigError: it is missing or wrong, or there is no such version.
    """
    if values["proxy"] not in VERSIONS:
        raise ConfigError(f"proxy = {values['proxy']!r} is no version; take one of {', '.join(VERSIONS)}")
    entries = values["proxy_from"] or ()
    if not entries:
        raise ConfigError(
            f"proxy = {values['proxy']!r} needs proxy_from: the addresses of your proxies, such as 10.0.0.0/8; "
            "others could pretend to be anybody"
        )
    return Networks.parse(without_unix(entries), "proxy_from")


class Proxy:
    """Reads the header of one connection, and not a byte more.

    A peer that is not trusted, and one that sends anything but a header of the version asked for, is refused: nobody
    guesses whether a header is there.
    """

    tells_client = True

    def __init__(self, version: str, peers: Networks) -> None:
        """Make the preamble.

        Args:
            version: ``v1``, ``v2`` or ``any``.
            peers: from where headers are believed. A Unix socket has its mode to say who may connect.
        """
        self._version = version
        self._peers = peers

    def __call__(self, connection: Any, deadline: float) -> Any:
        """Read the header; see :class:`harken.preambles.Preamble`.

        Raises:
            PreambleError: the peer is not trusted, or there is no valid header.
            TimeoutError: the header was not there in time.
            OSError: the connection broke.
        """
        self.admit(connection.getpeername())
        timeout = connection.gettimeout()
        header = self._read(connection, deadline)
        connection.settimeout(timeout)
        record = connection.record
        record.proxy = header
        if header.forwarded:
            record.spoken_for = header.client_address
        return connection

    def admit(self, address: Any) -> None:
        """Check that a peer may send headers.

        Raises:
            PreambleError: it may not.
        """
        if isinstance(address, tuple) and address[0] not in self._peers:
            raise PreambleError(
                f"{address[0]} is not in proxy_from ({len(self._peers)} networks) and may not speak for others; "
                "add it if it is a proxy of yours"
            )

    def _read(self, connection: Any, deadline: float) -> ProxyHeader:
        data = b""
        size = None
        while size is None:  # the end is not known: look before taking
            seen = _receive(connection, HEAD_BYTES, deadline, socket.MSG_PEEK)
            size = extent(data + seen, self._version)
            if not seen:
                raise PreambleError(f"the peer closed after {len(data)} bytes, before its PROXY header was whole")
            data += _receive(connection, len(seen) if size is None else min(len(seen), size - len(data)), deadline)
        while len(data) < size:
            more = _receive(connection, size - len(data), deadline)
            if not more:
                raise PreambleError(f"the peer closed after {len(data)} of the {size} bytes of its PROXY header")
            data += more
        return ProxyHeader.parse(data, self._version)[0]


def _receive(connection: Any, size: int, deadline: float, flags: int = 0) -> bytes:
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError
    connection.settimeout(left)
    return connection.recv(size, flags)  # type: ignore[no-any-return]
