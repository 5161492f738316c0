"""TLS over TCP: ``tls://HOST:PORT?cert=FILE&key=FILE``.

Without ``cert`` the certificate is that of the settings. The other words are those of :class:`harken.TLS`: ``ca``,
``verify``, ``alpn``, ``min_version``, ``password``, ``mode``; what they do not say the settings do, but for the mode,
which is ``always``. Everything else is as in ``tcp://``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from harken.errors import ConfigError
from harken.transports import BindOptions, _inet, tcp

if TYPE_CHECKING:
    import socket

    from harken.listener import Listener
    from harken.preambles.tls import TLS

__all__ = ["bind", "parse", "schemes", "suits", "take_over"]

schemes = ("tls",)


class TLSPlace(NamedTuple):
    """A parsed address, and how TLS is spoken there; None leaves that to the settings."""

    place: _inet.Place
    tls: TLS | None

    def __str__(self) -> str:
        return str(self.place)


def parse(url: str) -> TLSPlace:
    """Read ``tls://HOST:PORT?cert=FILE&key=FILE``.

    Raises:
        ConfigError: the address is malformed, or its options are.
    """
    from harken.preambles.tls import TLS

    bare, mark, query = url.partition("?")
    shown = bare if "password=" in query else url  # somebody may have written the passphrase itself there
    try:
        return TLSPlace(_inet.parse(bare), TLS.parse(query) if mark else None)
    except ConfigError as error:
        raise ConfigError(f"{shown!r}: {str(error).removeprefix(repr(bare)).lstrip(': ')}") from None


def bind(place: TLSPlace, options: BindOptions) -> list[Listener]:
    """Open a listening socket, as ``tcp://`` does; certificates are read when a server takes it up."""
    listeners = _inet.bind(place.place, options, tcp.tune)
    for listener in listeners:
        listener.tls = place.tls or True
    return listeners


def suits(place: TLSPlace, sock: socket.socket) -> bool:
    """Tell whether a socket is bound there."""
    return _inet.suits(place.place, sock)


def take_over(place: TLSPlace, listener: Listener, *, changed: bool) -> None:
    """Speak TLS on a socket that was handed on, which knows nothing of it."""
    listener.tls = place.tls or True
    listener.url = _inet.url(place.place.scheme, listener)
