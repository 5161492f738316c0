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
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from harken import _hub
from harken.errors import ConfigError

__all__ = ["Host", "Stage", "event_loop", "first", "here", "loop_factory", "run"]


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

    def move(self) -> None:
        """Ask that the hub move to an event loop. From a green thread, which then waits for its next turn."""


class _Here(threading.local):
    """The host of the hub that lives in this thread."""

    host: Host | None = None


here = _Here()


def first() -> str:
    """Name the host that a hub begins with in this process."""
    monkey = sys.modules.get("gevent.monkey")
    return "gevent" if monkey is not None and monkey.is_module_patched("socket") else "alone"


def run(name: str | None, stage: Stage) -> None:
    """Give turns by the host ``name``, and by those that the hub moves to, until it is over; close the hub.

    Raises:
        BaseException: what ``tick`` or a door raised.
    """
    try:
        while name is not None:
            made: Host = importlib.import_module(f"harken._hub.hosts.{name}").Host(stage)
            here.host = made
            name = made.run()
    finally:
        here.host = None
        stage.hub.close()


def event_loop() -> Any:
    """Return the asyncio loop under the calling green thread, moving the hub into one if it runs alone.

    None where there can be none: in a plain thread, in gevent's loop, and in a hub that no engine runs.
    """
    hub = _hub.current()
    while hub is not None and here.host is not None and here.host.loop is None:
        if here.host.stage.hub is not hub or not hasattr(here.host, "move"):
            return None
        here.host.move()
        hub.sleep(0)
    return here.host.loop if hub is not None and here.host is not None else None


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
