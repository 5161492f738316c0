"""TLS by OpenSSL: the handshake, before the handler or when the handler asks for it.

This module is light; what needs ``ssl`` is imported when a server wants TLS.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from harken.preambles._declaration import TLS, declared

if TYPE_CHECKING:
    import ssl

    from harken.preambles._certificates import Certificates
    from harken.preambles._handshake import Handshake
    from harken.settings import Settings

__all__ = ["TLS", "certificates_of", "make"]

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
    """Make the preamble; see :class:`harken.preambles.Module`.

    All that a handshake needs is imported here: before the first, when no descriptor may be left to read a module by.
    """
    from harken.preambles._handshake import Handshake, inherits_nodelay

    tls = declared(values, listener)
    certificates = certificates_of(tls)
    nodelay = values["nodelay"] is not False and not inherits_nodelay(listener)
    mode = tls.mode if isinstance(tls, TLS) else values["tls_mode"] if getattr(listener, "tls", None) is None else None
    return Handshake(certificates, mode or "always", nodelay=nodelay)
