"""What a check may put between its clients and the handlers: a PROXY header, TLS, or both, the header first."""

from __future__ import annotations

import functools
import socket
import ssl
from typing import Any

from harken.errors import ConfigError
from harken.testing._clients import SecuredClient

__all__ = ["WIRES", "connected", "settings_of"]

WIRES = ("tls", "proxy", "proxy+tls")
"""Behind ``tcp+`` or ``unix+``: the preambles of a check's server, in their order."""

# A header that speaks for nobody, so that the peer stays who it is: HAProxy's specification, 2.1.
_HEADER = b"PROXY UNKNOWN\r\n"


def settings_of(wire: str) -> dict[str, Any]:
    """Return the settings of a server whose clients come by ``wire``; none for an empty one."""
    settings: dict[str, Any] = {}
    if "proxy" in wire:
        settings |= {"proxy": "any", "proxy_from": ["127.0.0.0/8"]}
    if "tls" in wire:
        settings["tls"] = _contexts()[0]
    return settings


def connected(client: socket.socket, wire: str) -> socket.socket:
    """Prepare a connected client. Under TLS another object takes its place, whose handshake is still to be done."""
    if "proxy" in wire:
        client.sendall(_HEADER)
    if "tls" in wire:
        return _contexts()[1].wrap_socket(client, server_hostname="localhost", do_handshake_on_connect=False)
    return client


@functools.cache
def _contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Make a certificate for this process; return the server's context and the clients'."""
    try:
        import trustme
    except ModuleNotFoundError:
        raise ConfigError("the checks under TLS make certificates by trustme: pip install trustme") from None
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    client.sslsocket_class = SecuredClient
    return server, client
