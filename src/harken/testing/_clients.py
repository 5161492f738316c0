"""Clients that live in the process of their server.

A child that an engine forks must not keep copies of them, or their FIN and RST would never go out.
"""

from __future__ import annotations

import _socket
import os
import socket
import threading
import weakref
from collections.abc import Iterator, MutableSet
from contextlib import contextmanager

__all__ = ["opening"]

_open: weakref.WeakSet[socket.socket] = weakref.WeakSet()
_forking = threading.RLock()


@contextmanager
def opening() -> Iterator[MutableSet[socket.socket]]:
    """Nobody forks while the block runs; what it puts into the set that it is given is closed in forked children."""
    with _forking:
        yield _open


def _forget() -> None:
    for client in list(_open):
        _socket.socket.close(client)  # without TLS's goodbye, which would be the parent's too
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_forget)
