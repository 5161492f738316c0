"""Sockets and polls as the kernel has them: what gevent's monkey patching replaced, and the numbers below the enums."""

from __future__ import annotations

import _socket
import importlib
import sys
from typing import TYPE_CHECKING, Any

__all__ = ["Socket", "family_of", "kind_of", "original", "patched", "proto_of"]


def patched() -> bool:
    """Whether gevent's monkey patching is active in this process."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("socket"))


def original(module: str, name: str) -> Any:
    """Return what a module of the standard library had under this name before gevent patched it, if it did."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched(module):
        return monkey.get_original(module, name)
    return getattr(importlib.import_module(module), name)


if TYPE_CHECKING:
    from socket import socket as Socket  # noqa: N812 - the class, under a name of its own
else:
    Socket = original("socket", "socket")

# Of any socket: plain numbers, which socket.socket's properties make enums of at thirty times the cost.
family_of = _socket.socket.family.__get__
kind_of = _socket.socket.type.__get__
proto_of = _socket.socket.proto.__get__
