"""The handshake of TLS by OpenSSL, on the server's side: what servers that want TLS import."""

from __future__ import annotations

import socket
import ssl
from time import monotonic
from typing import TYPE_CHECKING, Any

from harken._hub import is_connection
from harken.errors import PreambleError
from harken.preambles._hubbed import Hubbed
from harken.preambles._secured import SSLSocket
from harken.preambles._words import HANDSHAKE, of_error, of_plain_text

if TYPE_CHECKING:
    from harken.preambles._certificates import Certificates

__all__ = ["Handshake", "inherits_nodelay", "secure"]

WORD = 8  # the longest word of HTTP, to be named
FIRST = 16384  # a ClientHello, and more than one: the rest is received later
LEAST = 0.001  # seconds that a wait may take when the time is over: 0 would not wait at all
_BEGINNING = bytes((HANDSHAKE,))

# Of any context, as a plain number: its property makes an enum of it.
_verify_mode_of = ssl.SSLContext.__base__.verify_mode.__get__  # type: ignore[union-attr]


class Handshake:
    """The preamble.

    Attributes:
        certificates: with which it speaks.
        mode: as in :class:`harken.TLS`.
        nodelay: whether connections do not have TCP_NODELAY from their listener, and shall have it.
    """

    tells_client = False

    def __init__(self, certificates: Certificates, mode: str, *, nodelay: bool = True) -> None:
        self.certificates = certificates
        self.mode = mode
        self.nodelay = nodelay

    def __call__(self, connection: Any, deadline: float) -> Any:
        """Do the handshake; see :class:`harken.preambles.Preamble`. A program's own TLS socket stays as it is."""
        if self.mode == "starttls" or isinstance(connection, (ssl.SSLSocket, SSLSocket)):
            return connection
        if self.mode == "always" and is_connection(connection):
            return self._take(connection, deadline)
        first = _look(connection, deadline)
        if first[:1] == _BEGINNING:
            return secure(connection, self.certificates.current(), deadline, nodelay=self.nodelay)
        if first and self.mode == "optional":
            return connection
        raise PreambleError(of_plain_text(first))

    def _take(self, connection: Any, deadline: float) -> Any:
        """The same for a connection of a hub's that must speak TLS: its first bytes need not be looked at twice."""
        timeout = connection.gettimeout()
        connection.settimeout(max(LEAST, deadline - monotonic()))
        first = connection.recv(FIRST)
        connection.settimeout(timeout)
        if first[:1] != _BEGINNING:
            raise PreambleError(of_plain_text(first[:WORD]))
        context = self.certificates.current()
        made = Hubbed.over(connection, context, first)
        return _begin(made, connection, context, deadline, nodelay=self.nodelay)

    def reload(self) -> bool:
        """Read the certificates anew; see :meth:`Certificates.reload`."""
        return self.certificates.reload()

    def remarks(self) -> list[str]:
        """What is about to be wrong with the certificates, a line each."""
        return self.certificates.remarks()

    def refresh(self) -> None:
        """Read certificates that have changed: a child would learn of them in vain."""
        self.certificates.current()


def _look(connection: Any, deadline: float) -> bytes:
    """Return the first bytes, which stay where they are."""
    timeout = connection.gettimeout()
    connection.settimeout(max(LEAST, deadline - monotonic()))
    first: bytes = connection.recv(WORD, socket.MSG_PEEK)
    connection.settimeout(timeout)
    return first


def inherits_nodelay(listener: Any) -> bool:
    """Set TCP_NODELAY on a listener, whose connections inherit it, once for all; tell whether that could be done."""
    try:
        set_nodelay(listener)
    except (OSError, AttributeError):  # a Unix socket has no such thing; a test's double is none
        return False
    return True


def set_nodelay(sock: Any) -> None:
    """Set TCP_NODELAY: what is written in pieces would be held up for up to 40 ms behind what ends a handshake."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def secure(connection: Any, context: ssl.SSLContext, deadline: float, *, nodelay: bool = True) -> Any:
    """Put a connection under TLS, as the server; its record moves.

    Args:
        connection: a socket, of a hub or blocking; it is used up.
        context: with a certificate.
        deadline: by ``time.monotonic()``.
        nodelay: whether to set TCP_NODELAY, where there is such a thing.

    Returns:
        An ``ssl.SSLSocket`` with the timeout of ``connection``.

    Raises:
        OSError: the peer failed; ``error.connection`` is to be closed.
    """
    if is_connection(connection):
        made: Any = Hubbed.over(connection, context)
    elif isinstance(connection, Hubbed):
        made = connection.anew(context)
    else:
        made = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
    return _begin(made, connection, context, deadline, nodelay=nodelay)


def secure_client(connection: Any, context: ssl.SSLContext | None, name: str, deadline: float | None) -> Any:
    """Put a hub's connection under TLS, as the client of the server ``name``.

    Args:
        connection: it is used up when this returns, and else the caller's to close.
        context: None: one that trusts the system's authorities, and checks the name.
        name: the host that was connected to.
        deadline: by ``time.monotonic()``; None: none.

    Raises:
        OSError: the handshake failed (``ssl.SSLError``), or was not done in time.
    """
    made = Hubbed.over(connection, context or ssl.create_default_context(), client_of=name)
    set_nodelay(made)
    made.shake_as_client(deadline)
    return made


def _begin(made: Any, connection: Any, context: ssl.SSLContext, deadline: float, *, nodelay: bool) -> Any:
    """Let ``made`` go on in the place of ``connection``, and do its handshake; see :func:`secure`."""
    # The type is asked: gevent's socket, which is used up, answers by an error.
    record = getattr(connection, "record", None) if hasattr(type(connection), "record") else None
    if record is not None:
        record.move(made)
    try:
        if nodelay and made.family != getattr(socket, "AF_UNIX", None):
            set_nodelay(made)
        if type(made) is Hubbed:
            made.shake(deadline)
        else:
            _shake(made, deadline)
    except ssl.SSLError as error:
        failure = PreambleError(of_error(error))
        failure.connection = made
        raise failure from error
    except OSError as error:
        error.connection = made  # type: ignore[attr-defined]
        raise
    if record is not None and _verify_mode_of(context):
        record.certificate = made.getpeercert() or None
    return made


def _shake(made: ssl.SSLSocket, deadline: float) -> None:
    timeout = made.gettimeout()
    made.settimeout(max(LEAST, deadline - monotonic()))
    made.do_handshake()
    made.settimeout(timeout)
