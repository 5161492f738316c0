"""Certificates from files, with an eye on the files: who renews one need not restart a server."""

from __future__ import annotations

import os
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from harken import events
from harken.errors import ConfigError
from harken.paths import from_start
from harken.preambles._declaration import TLS, File
from harken.preambles._secured import Secured
from harken.preambles._validity import remarks_on
from harken.unpatched import patched

__all__ = ["Certificates"]

# Seconds between looks at the files, at a new connection; each takes some microseconds.
LOOK_SECONDS = 1.0

_VERIFY = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
# An end without close_notify is an end, as Python reads it in any case. OpenSSL 3 would send an alert too, "decode
# error": to a client that is there yet, since a drain ends what its handler reads, and there our close_notify belongs.
BARE_END = getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
# Bytes of a passphrase's file that are read: OpenSSL takes no longer one (PEM_BUFSIZE).
MAX_PASSPHRASE = 1024

# Another certificate's key, of the same kind, or of another kind: OpenSSL then finds no certificate beside it.
_NOT_THE_KEY = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")
# What OpenSSL finds wrong after it could read the key.
_NOT_THE_PASSPHRASE = (*_NOT_THE_KEY, "EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK")

Stamp = tuple[tuple[int, int, int, int] | None, ...]


class Certificates:
    """What a :class:`TLS` speaks of, loaded. Safe from any thread.

    Attributes:
        error: why the files as they are now did not load; None while they do.
    """

    def __init__(self, tls: TLS | ssl.SSLContext) -> None:
        """Load everything.

        Raises:
            ConfigError: something cannot be loaded; the message names the file.
        """
        self.error: str | None = None
        self._tls = _absolute(tls) if isinstance(tls, TLS) else None
        self._files = _files(self._tls) if self._tls is not None else ()
        self._stamp = self._look()
        self._context = _load(self._tls) if self._tls is not None else _fit(tls)
        self._next_look = time.monotonic() + LOOK_SECONDS
        self._guard = threading.Lock()

    def current(self) -> ssl.SSLContext:
        """Return the context for a new connection. Files that have changed are read anew; see :meth:`reload`."""
        now = time.monotonic()
        if now >= self._next_look and self._files and self._guard.acquire(blocking=False):
            try:
                self._next_look = now + LOOK_SECONDS
                if self._look() != self._stamp:
                    self._reload()
            finally:
                self._guard.release()
        return self._context

    def reload(self) -> bool:
        """Read all files anew, for connections to come. When they do not load, what was there stays.

        Returns:
            Whether they loaded; ``error`` says why not. The events ``reloaded`` and ``reload_failed`` tell it too.
        """
        with self._guard:
            return self._reload()

    def remarks(self) -> list[str]:
        """Say of each certificate that has expired, or will soon, that it does."""
        if self._tls is None:
            return []
        return remarks_on(file for file in (self._tls.cert, *(cert for cert, _ in self._tls.sni.values())))

    def _reload(self) -> bool:
        if self._tls is None:
            return True  # a context of the program's own is the program's to renew
        self._stamp = self._look()  # before they are read: what changes meanwhile is read again
        try:
            self._context = _load(self._tls)
        except ConfigError as error:
            self.error = str(error)
            events.emit("reload_failed", what=f"certificates ({self._files[0]})", reason=self.error)
            return False
        self.error = None
        events.emit("reloaded", what=f"certificates ({self._files[0]})")
        return True

    def _look(self) -> Stamp:
        return tuple(map(_stat, self._files))


def _stat(path: str) -> tuple[int, int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _absolute(tls: TLS) -> TLS:
    """Return it with absolute paths: a server may change its directory before the files change."""

    def place(file: Any) -> Any:
        return from_start(file) if isinstance(file, (str, os.PathLike)) else file

    sni = {name: (place(cert), place(key)) for name, (cert, key) in tls.sni.items()}
    password: Any = place(tls.password)
    return replace(tls, cert=place(tls.cert), key=place(tls.key), ca=place(tls.ca), password=password, sni=sni)


def _files(tls: TLS) -> tuple[str, ...]:
    named = [tls.cert, tls.key, tls.ca, *(file for pair in tls.sni.values() for file in pair)]
    if isinstance(tls.password, str):
        named.append(tls.password)
    return tuple(os.fspath(file) for file in named if file is not None)


def _load(tls: TLS) -> ssl.SSLContext:
    """Make a context.

    Raises:
        ConfigError: something cannot be loaded.
    """
    password = _passphrase(tls)
    context = _context(tls, tls.cert, tls.key, password)
    if tls.sni:
        others = {name: _context(tls, cert, key, password) for name, (cert, key) in tls.sni.items()}
        context.sni_callback = _chooser(others)
    return context


def _context(tls: TLS, cert: File, key: File | None, password: Callable[[], str | bytes]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _take_class(context)
    context.minimum_version = _VERSIONS[tls.min_version]
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE | BARE_END
    context.num_tickets = 1  # enough to come back once; OpenSSL makes two of them
    if tls.alpn:
        try:
            context.set_alpn_protocols(list(tls.alpn))
        except (ssl.SSLError, UnicodeError) as error:
            raise ConfigError(f"TLS alpn={list(tls.alpn)!r}: a protocol's name is 1 to 255 ASCII bytes") from error
    if tls.ca is not None:
        _load_authorities(context, tls.ca)
    context.verify_mode = _VERIFY[str(tls.verify)]
    _load_pair(context, cert, key, password)
    return context


def _load_pair(context: ssl.SSLContext, cert: File, key: File | None, password: Callable[[], str | bytes]) -> None:
    for file, what in ((cert, "certificate"), (key, "key")):
        if file is not None:
            _expect_readable(file, what)
    asked = False

    def ask() -> str | bytes:
        nonlocal asked
        asked = True
        return password()

    try:
        context.load_cert_chain(cert, key, ask)
    except ssl.SSLError as error:
        wrong = _why(error, cert, key)
        if asked and error.reason not in _NOT_THE_PASSPHRASE:
            wrong = f"TLS key {_name(key or cert)}: the passphrase is wrong (tls_password)"
        raise ConfigError(wrong) from None
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"TLS key {_name(key or cert)}: the passphrase is no text of at most {MAX_PASSPHRASE} bytes"
        ) from None


def _why(error: ssl.SSLError, cert: File, key: File | None) -> str:
    reason = error.reason or ""
    if reason in _NOT_THE_KEY:
        return f"TLS key {_name(key or cert)} is not the key of the certificate {_name(cert)}"
    if reason in ("EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"):
        return f"TLS certificate {_name(cert)} is too weak for OpenSSL: {reason.lower().replace('_', ' ')}"
    for wrong in _not_pem(cert, key):
        return wrong
    return f"TLS certificate {_name(cert)} cannot be loaded: {reason.lower().replace('_', ' ') or 'no PEM'}"


def _not_pem(cert: File, key: File | None) -> list[str]:
    """Say which file holds nothing of what it should."""
    found = []
    if not _holds(cert, b"CERTIFICATE-----"):
        found.append(f"TLS certificate {_name(cert)} holds no certificate in PEM")
    if not _holds(key or cert, b"PRIVATE KEY-----"):
        hint = "" if key else "; name its file by key="
        found.append(f"TLS key {_name(key or cert)} holds no private key in PEM{hint}")
    return found


def _holds(file: File, mark: bytes) -> bool:
    with open(file, "rb") as stream:
        return mark in stream.read(1 << 20)  # far more than chains are long


def _load_authorities(context: ssl.SSLContext, ca: File) -> None:
    _expect_readable(ca, "ca")
    try:
        if os.path.isdir(ca):
            context.load_verify_locations(capath=ca)
        else:
            context.load_verify_locations(cafile=ca)
    except ssl.SSLError:
        raise ConfigError(f"TLS ca {_name(ca)} holds no certificate in PEM") from None


def _expect_readable(file: File, what: str) -> None:
    try:
        if not os.path.isdir(file) or what != "ca":
            with open(file, "rb"):
                pass
    except OSError as error:
        raise ConfigError(f"TLS {what} {_name(file)} cannot be read: {error.strerror}") from None


def _name(file: File) -> str:
    return repr(os.fspath(file))


def _passphrase(tls: TLS) -> Callable[[], str | bytes]:
    """Return a function that OpenSSL may ask. It is asked only for encrypted keys; the terminal never is."""

    def ask() -> str | bytes:
        password: Any = tls.password
        if password is None:
            raise ConfigError(f"TLS key {_name(tls.key or tls.cert)} is encrypted: set tls_password")
        if callable(password):
            return _call(password)
        if isinstance(password, bytes):
            return password
        return _first_line(password)

    return ask


def _call(password: Callable[[], str | bytes]) -> str | bytes:
    try:
        return password()
    except Exception as error:
        raise ConfigError(f"tls_password: the function raised {type(error).__name__}") from error


def _first_line(file: str) -> bytes:
    """Return the first line. The path is not told: it may be the passphrase, written where its file belongs."""
    try:
        with open(file, "rb") as stream:
            return stream.readline(MAX_PASSPHRASE + 2).rstrip(b"\r\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no path"
        raise ConfigError(f"tls_password cannot be read ({reason}): it is a file that holds the passphrase") from None


def _chooser(others: dict[str, ssl.SSLContext]) -> Callable[[Any, str | None, ssl.SSLContext], None]:
    """Return what chooses the certificate by the name that a client asks for."""

    def choose(connection: Any, name: str | None, _context: ssl.SSLContext) -> None:
        if name is None:
            return
        name = name.lower().rstrip(".")
        found = others.get(name) or others.get("*." + name.partition(".")[2])
        if found is not None:
            connection.context = found

    return choose


def _fit(context: Any) -> ssl.SSLContext:
    """Prepare a context of the program's own; all but the class of its sockets and BARE_END stays the program's.

    Raises:
        ConfigError: it is for clients.
    """
    if context.protocol == ssl.PROTOCOL_TLS_CLIENT:
        raise ConfigError(
            "tls: this ssl.SSLContext is for clients; make one by ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)"
        )
    if context.sslsocket_class is ssl.SSLSocket:
        _take_class(context)
        context.options |= BARE_END
    return context  # type: ignore[no-any-return]


def _take_class(context: Any) -> None:
    """Let a context make our sockets, unless gevent has patched the process: then those on threads are gevent's."""
    if not patched():
        context.sslsocket_class = Secured
