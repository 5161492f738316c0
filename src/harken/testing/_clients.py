"""Clients that live in the process of their server.

A child that an engine forks must not keep copies of them, or their FIN and RST would never go out.
"""

from __future__ import annotations

import _socket
import os
import select
import socket
import ssl
import struct
import threading
import weakref
from collections.abc import Iterator, MutableSet
from contextlib import contextmanager

from harken.preambles._secured import Secured

__all__ = ["Client", "SecuredClient", "opening", "reset", "shake"]

_open: weakref.WeakSet[socket.socket] = weakref.WeakSet()
_forking = threading.RLock()


@contextmanager
def opening() -> Iterator[MutableSet[socket.socket]]:
    """Nobody forks while the block runs; what it puts into the set that it is given is closed in forked children."""
    with _forking:
        yield _open


class _Closing:
    """A socket that is open or closed when the process forks, never between.

    Python notes that a descriptor is gone, lets other threads run, and only then calls close(2). A child that was
    forked in between would have the connection open and know nothing of it.
    """

    def close(self) -> None:
        """As ``socket.socket.close``."""
        with _forking:
            super().close()  # type: ignore[misc]


class Client(_Closing, socket.socket):
    """A client's end of a connection."""


class SecuredClient(_Closing, Secured):
    """The same under TLS; it can end its side and read on, as a plain socket can."""


def reset(client: socket.socket) -> None:
    """Close a connection so that the other end gets RST."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with _forking:
        _socket.socket.close(client)  # without TLS's goodbye
    client.close()


def shake(client: ssl.SSLSocket, patience: float) -> None:
    """Do a client's handshake in steps, between which alone the process may fork; each is waited for so many seconds.

    OpenSSL's locks are not made for fork(2): a child in which one is held by a thread that it does not have waits for
    ever in its own handshake. A thread's first handshake holds that of the random numbers for long.
    """
    client.settimeout(0)
    while True:
        try:
            with opening():
                client.do_handshake()
            break
        except ssl.SSLWantReadError:
            ready = select.select([client], [], [], patience)[0]
        except ssl.SSLWantWriteError:
            ready = select.select([], [client], [], patience)[1]
        if not ready:
            raise TimeoutError("the handshake timed out")
    client.settimeout(patience)


def _forget() -> None:
    for client in list(_open):
        _socket.socket.close(client)  # without TLS's goodbye, which would be the parent's too
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_forget)
