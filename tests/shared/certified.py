"""A client under TLS that trusts one authority."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator
from typing import Any

PATIENCE = 20.0  # seconds


@contextlib.contextmanager
def trusting(port: int, authority: Any) -> Iterator[ssl.SSLSocket]:
    """Connect under TLS, and see that the certificate is one of the authority's."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as plain:
        with context.wrap_socket(plain, server_hostname="localhost") as client:
            yield client
