"""Who gives a hub its turns: the hub itself, or another loop in which it is a guest. One file a host.

``alone``
    The hub sleeps in its own ``epoll_wait``. When a green thread needs an event loop, it moves to ``asyncio``.
``asyncio``
    An asyncio or uvloop loop watches the hub's descriptor, so that coroutines run beside green threads.
``gevent``
    The same in gevent's loop, where gevent's monkey patching is active: what it patched waits there.

A host is a class ``Host(stage)`` with ``run() -> str | None``, which gives turns until ``stage.until()`` and returns
the name of the host to move to, or None when it is over; ``move()``, which asks for such a move; and ``loop``, the
asyncio loop in which the hub is, or None.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from harken import _hub
from harken.errors import ConfigError
from harken.unpatched import original, patched

__all__ = ["Host", "Stage", "any_host", "enter", "event_loop", "first", "host_of", "leave", "loop_factory", "run"]


@dataclass(frozen=True, slots=True)
class Stage:
    """What a host runs; ``until``, ``patience`` and ``tick`` are as in ``Hub.run``.

    Attributes:
        hub: the hub.
        until: whether it is over; asked before each turn.
        patience: how long, in seconds, may be slept.
        tick: called after each turn.
        loop: the value of the setting ``loop``, asked when it is needed.
    """

    hub: Any
    until: Callable[[], bool]
    patience: Callable[[], float]
    tick: Callable[[], None]
    loop: Callable[[], str]


class Host(Protocol):
    """What each file of the room has."""

    stage: Stage
    loop: Any

    def __init__(self, stage: Stage) -> None: ...

    def run(self) -> str | None:
        """Give turns; return the name of the next host, or None."""

    def move(self) -> bool:
        """Ask that the hub move to an event loop; tell whether it will. From a green thread, which then gives way."""


class _Here(original("threading", "local")):  # type: ignore[misc]
    """The hosts of the hubs that live in this thread; mostly one. By the identity of the hub."""

    def __init__(self) -> None:
        self.hosts: dict[int, Host] = {}


_here = _Here()


def enter(host: Host) -> None:
    """``host`` gives its hub turns in this thread from now on."""
    _here.hosts[id(host.stage.hub)] = host


def leave(hub: Any) -> None:
    """``hub`` gets no more turns in this thread; it is closed."""
    _here.hosts.pop(id(hub), None)
    hub.close()


def host_of(hub: Any) -> Host | None:
    """Return the host of a hub that lives in this thread."""
    return _here.hosts.get(id(hub))


def any_host() -> Host:
    """Return the host of some hub of this thread, for code that runs beside green threads and is none.

    Raises:
        RuntimeError: no hub lives here.
    """
    for host in _here.hosts.values():
        return host
    raise RuntimeError("a connection of the engine `asyncio` can be used in its event loop alone")


def first() -> str:
    """Name the host that a hub begins with in this process."""
    return "gevent" if patched() else "alone"


def run(name: str | None, stage: Stage) -> None:
    """Give turns by the host ``name``, and by those that the hub moves to, until it is over; close the hub.

    Raises:
        BaseException: what ``tick`` or a door raised.
    """
    try:
        while name is not None:
            made: Host = importlib.import_module(f"harken._hub.hosts.{name}").Host(stage)
            enter(made)
            name = made.run()
    finally:
        leave(stage.hub)


def event_loop() -> Any:
    """Return the asyncio loop under the calling green thread, moving the hub into one if it runs alone.

    None where there can be none: in a plain thread, in gevent's loop, and in a hub that no engine runs.
    """
    hub = _hub.current()
    while (host := host_of(hub)) is not None and host.loop is None:
        if not host.move():
            return None
        hub.sleep(0)
    return None if host is None else host.loop


def loop_factory(name: str) -> Callable[[], Any]:
    """Return what makes an event loop of this name.

    Raises:
        ConfigError: uvloop is not installed.
    """
    import asyncio

    if name != "uvloop":
        return asyncio.new_event_loop
    try:
        return importlib.import_module("uvloop").new_event_loop  # type: ignore[no-any-return]
    except ImportError:
        raise ConfigError("loop='uvloop': uvloop is not installed; pip install harken[uvloop]") from None
