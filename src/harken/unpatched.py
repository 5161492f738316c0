"""Sockets, polls and threads as the kernel has them: what gevent's monkey patching replaced, numbers below enums."""

from __future__ import annotations

import _socket
import importlib
import sys
from collections.abc import Callable
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any

__all__ = ["NativeThread", "Socket", "family_of", "kind_of", "original", "patched", "proto_of", "rebased"]


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


class NativeThread:
    """A thread of the system's, which the interpreter does not wait for; where gevent's are greenlets, too.

    What it calls may use gevent: that gives it a loop of its own.
    """

    def __init__(self, target: Callable[[], object]) -> None:
        """Make a thread that calls ``target`` once it is started."""
        self._target = target
        self._ident = 0
        self._running = original("_thread", "allocate_lock")()

    def start(self) -> None:
        """Begin."""
        self._running.acquire()
        self._ident = original("_thread", "start_new_thread")(self._run, ())

    def _run(self) -> None:
        try:
            self._target()
        finally:
            try:
                _drop_loop()
            finally:
                self._running.release()

    def join(self, seconds: float) -> None:
        """Wait for its end, at most so long, and keep all of gevent's greenlets waiting; in it, return at once."""
        if self._ident != original("_thread", "get_ident")() and self._running.acquire(timeout=seconds):
            self._running.release()


def _drop_loop() -> None:
    """Give back the loop that gevent has made for this thread, if it has: nobody else will."""
    hub = importlib.import_module("gevent._hub_local").get_hub_if_exists()
    if hub is not None:
        hub.destroy(destroy_loop=True)


def rebased(kind: type, base: type) -> type:
    """Return a class that has what ``kind`` itself defines, over another base; ``super()`` in it is of that."""
    cell = CellType()

    def again(value: Any) -> Any:
        if isinstance(value, (classmethod, staticmethod)):
            return type(value)(again(value.__func__))
        if isinstance(value, property):
            return property(again(value.fget), again(value.fset), again(value.fdel), value.__doc__)
        if not isinstance(value, FunctionType) or "__class__" not in value.__code__.co_freevars:
            return value
        names = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        closure = tuple(cell if name == "__class__" else old for name, old in names)
        made = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
        made.__kwdefaults__, made.__doc__ = value.__kwdefaults__, value.__doc__
        return made

    own = {name: again(value) for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    cell.cell_contents = made = type(kind.__name__, (base,), own)
    return made


if TYPE_CHECKING:
    from socket import socket as Socket  # noqa: N812 - the class, under a name of its own
else:
    Socket = original("socket", "socket")

# Of any socket: plain numbers, which socket.socket's properties make enums of at thirty times the cost.
family_of = _socket.socket.family.__get__
kind_of = _socket.socket.type.__get__
proto_of = _socket.socket.proto.__get__
