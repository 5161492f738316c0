"""TLS by OpenSSL: the handshake, before the handler or when the handler asks for it.

This module is light; what needs ``ssl`` is imported when a server wants TLS.
"""

from __future__ import annotations

import importlib
import socket
import weakref
from time import monotonic
from typing import TYPE_CHECKING, Any

from harken.errors import PreambleError
from harken.preambles._declaration import TLS, declared

if TYPE_CHECKING:
    import ssl

    from harken.preambles._certificates import Certificates
    from harken.settings import Settings

__all__ = ["TLS", "Handshake", "certificates_of", "make", "secure"]

# What a handshake imports: before the first, since no descriptor may be left then to read a module by.
_NEEDED = ("harken._hub", "harken.preambles._words", "harken.preambles._certificates", "harken.preambles._hubbed")

WORD = 8  # the longest word of HTTP, to be named
FIRST = 16384  # a ClientHello, and more than one: the rest is received later

_made: weakref.WeakKeyDictionary[TLS, Certificates] = weakref.WeakKeyDictionary()


def certificates_of(tls: TLS | ssl.SSLContext) -> Certificates:
    """Return the certificates that ``tls`` speaks of, loaded once for all who share it.

    Raises:
        ConfigError: one cannot be read, or is no certificate, or its key is another's.
    """
    from harken.preambles._certificates import Certificates

    if not isinstance(tls, TLS):
        return Certificates(tls)
    if tls not in _made:
        _made[tls] = Certificates(tls)
    return _made[tls]


def make(values: Settings, listener: Any) -> Handshake:
    """Make the preamble; see :class:`harken.preambles.Module`."""
    for module in _NEEDED:
        importlib.import_module(module)
    tls = declared(values, listener)
    return Handshake(certificates_of(tls), getattr(tls, "mode", "always"), nodelay=values["nodelay"] is not False)


class Handshake:
    """The preamble.

    Attributes:
        certificates: with which it speaks.
        mode: as in :class:`TLS`.
    """

    tells_client = False

    def __init__(self, certificates: Certificates, mode: str, *, nodelay: bool = True) -> None:
        self.certificates = certificates
        self.mode = mode
        self.nodelay = nodelay

    def __call__(self, connection: Any, deadline: float) -> Any:
        """Do the handshake; see :class:`harken.preambles.Preamble`. A program's own TLS socket stays as it is."""
        import ssl

        from harken.preambles._words import HANDSHAKE, of_plain_text

        if self.mode == "starttls" or isinstance(connection, ssl.SSLSocket):
            return connection
        first, taken = self._begin(connection, deadline)
        if first[:1] == bytes((HANDSHAKE,)):
            return secure(connection, self.certificates.current(), deadline, nodelay=self.nodelay, taken=taken)
        if first and self.mode == "optional":
            return connection
        raise PreambleError(of_plain_text(first[:WORD]))

    def _begin(self, connection: Any, deadline: float) -> tuple[bytes, bytes]:
        """Return the first bytes, and those of them that were taken out of the connection: all, where that can be."""
        from harken._hub import is_connection

        timeout = connection.gettimeout()
        connection.settimeout(left(deadline))
        if self.mode == "always" and is_connection(connection):
            first = taken = connection.recv(FIRST)
        else:
            first, taken = connection.recv(WORD, socket.MSG_PEEK), b""
        connection.settimeout(timeout)
        return first, taken

    def reload(self) -> bool:
        """Read the certificates anew; see :meth:`Certificates.reload`."""
        return self.certificates.reload()

    def remarks(self) -> list[str]:
        """What is about to be wrong with the certificates, a line each."""
        return self.certificates.remarks()

    def refresh(self) -> None:
        """Read certificates that have changed: a child would learn of them in vain."""
        self.certificates.current()


def left(deadline: float) -> float:
    """Return the seconds that are left, at least a moment: 0 would not wait at all."""
    return max(0.001, deadline - monotonic())


def secure(
    connection: Any, context: ssl.SSLContext, deadline: float, *, nodelay: bool = True, taken: bytes = b""
) -> Any:
    """Put a connection under TLS, as the server; its record moves.

    Args:
        connection: a socket, of a hub or blocking; it is used up.
        context: with a certificate.
        deadline: by ``time.monotonic()``.
        nodelay: whether to set TCP_NODELAY: the tickets that end a handshake would hold the first answer up by 40 ms.
        taken: what was received already, of a hub's connection.

    Returns:
        An ``ssl.SSLSocket`` with the timeout of ``connection``.

    Raises:
        OSError: the peer failed; ``error.connection`` is to be closed.
    """
    import ssl

    from harken.preambles._words import of_error

    record, timeout = getattr(connection, "record", None), connection.gettimeout()
    made = _wrap(connection, context, taken)
    if record is not None:
        record.move(made)
    try:
        if nodelay and made.family != getattr(socket, "AF_UNIX", None):
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.settimeout(left(deadline))
        made.do_handshake()
        made.settimeout(timeout)
    except ssl.SSLError as error:
        failure = PreambleError(of_error(error))
        failure.connection = made
        raise failure from error
    except OSError as error:
        error.connection = made  # type: ignore[attr-defined]
        raise
    if record is not None and context.verify_mode != ssl.CERT_NONE:
        record.certificate = made.getpeercert() or None
    return made


def _wrap(connection: Any, context: ssl.SSLContext, taken: bytes) -> Any:
    from harken import _hub

    if _hub.is_connection(connection):
        from harken.preambles._hubbed import Hubbed

        return Hubbed.over(connection, context, taken)
    return context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
