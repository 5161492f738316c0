"""What a predecessor left to this process: its sockets, and with them the care for their files.

They are inherited, and named in one environment variable; ``handoff`` hands them on. Until an upgrade is ready the
files are the predecessor's: a successor that fails must leave them where they are. After ``exec`` there is no
predecessor any more, and who cannot begin takes them along.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from harken import transports
from harken.listener import Listener
from harken.process.orders import Orders
from harken.process.pidfile import PidFile
from harken.transports import BindOptions

__all__ = [
    "READY",
    "VARIABLE",
    "Entry",
    "Inherited",
    "beginning",
    "hand_on",
    "listen",
    "orders",
    "reclaim",
    "take",
    "tell_predecessor",
    "upgraded_from",
]

VARIABLE = "HARKEN_HANDOFF"
READY = b"ready\n"


class Entry(NamedTuple):
    """A socket that is handed on."""

    fd: int
    path: str | None
    """The Unix path that goes with it."""
    shared: bool
    """Whether strangers have it."""


class Inherited(NamedTuple):
    """What the predecessor left."""

    listeners: dict[str, list[Entry]]
    """By the address as it was typed, or another key."""
    pipe: int
    """Where to say that we are ready; -1 when nobody waits for that."""
    predecessor: int
    """The pid that waits, or 0."""
    pidfile: str | None
    """The file that names this process already, in which the predecessor was."""
    orders: Orders
    """What operators have ordered of the predecessor."""


_inherited: Inherited | None = None
# Unix paths that are the predecessor's until we are ready.
_promised: list[tuple[Listener, str]] = []
# Those of them at which we shall not listen.
_dropped: list[Listener] = []
# Listeners that the predecessor has as well, and nobody else, until it has gone.
_lent: list[Listener] = []


def _told() -> Inherited:
    """Read the variable once, and remove it: programs started later must not take the descriptors for theirs."""
    global _inherited
    if _inherited is None:
        told = json.loads(os.environ.pop(VARIABLE, "{}"))
        pipe = told.get("pipe", -1)
        if pipe >= 0:
            os.set_inheritable(pipe, False)
        found = {key: [Entry(*each) for each in several] for key, several in told.get("listeners", {}).items()}
        for entry in (each for several in found.values() for each in several):
            os.set_inheritable(entry.fd, False)
        _inherited = Inherited(found, pipe, told.get("pid", 0), told.get("pidfile"), told.get("orders", {}))
    return _inherited


def listen(addresses: Iterable[str], options: BindOptions, *, also: Collection[str] = ()) -> dict[str, list[Listener]]:
    """Open every address, or take over what the predecessor had there. What nobody asks for any more is closed first.

    Args:
        addresses: URLs.
        options: how to bind.
        also: keys under which something else will be taken.

    Returns:
        The listeners by the address as it was typed.

    Raises:
        ConfigError: an address is wrong; nothing stays open.
        BindError: an address cannot be had; nothing stays open.
    """
    addresses = tuple(addresses)
    kept: dict[str, list[Listener]] = {}
    opened: dict[str, list[Listener]] = {}
    try:
        for address in addresses:
            kept.setdefault(address, []).extend(take(address, address, options))
        _close_rest(also)
        for address in addresses:
            # Extended at once: an address may be given twice, and what is open must be closed if the next fails.
            opened.setdefault(address, []).extend(kept.pop(address, []) or transports.listen(address, options))
    except BaseException:
        for listener in (listener for several in (*kept.values(), *opened.values()) for listener in several):
            listener.close()
        raise
    return opened


def take(key: str, address: str | None = None, options: BindOptions | None = None) -> list[Listener]:
    """Take over what the predecessor had under ``key``, or else at the place of ``address``; nothing if neither.

    Args:
        key: what it was handed on by.
        address: a URL, which says more of it than the socket does.
        options: how it is bound.

    Raises:
        ConfigError: the address is wrong, or cannot be had as it says now; nothing stays open.
    """
    entries = _told().listeners.pop(key, None)
    changed = entries is None
    if changed and address is not None:
        entries = _at(address)
    listeners = [_adopt(*entry) for entry in entries or ()]
    try:
        for listener in listeners:
            if address is not None:
                transports.take_over(address, listener, options, changed=changed)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _at(address: str) -> list[Entry]:
    """Find what is bound where an address says, whatever it was called."""
    left = _told().listeners
    for key, entries in left.items():
        for entry in entries:
            if transports.is_bound_to(address, entry.fd):
                entries.remove(entry)
                if not entries:
                    del left[key]
                return [entry]
    return []


def _close_rest(spared: Collection[str]) -> None:
    """Close what the predecessor had and nobody asked for, with its files, which may be its own for a while yet."""
    left = _told().listeners
    for key in [key for key in left if key not in spared]:
        for entry in left.pop(key):
            listener = _adopt(*entry)
            if entry.path is not None and upgraded_from():
                _dropped.append(listener)
            else:
                listener.close()


def _adopt(fd: int, path: str | None, shared: bool) -> Listener:
    listener = Listener.adopt(fd)
    listener.shared = shared or upgraded_from() > 0
    if listener.shared is not shared:
        _lent.append(listener)
    listener.url = transports.for_socket(listener).url(listener)
    if path is not None and upgraded_from():
        _promised.append((listener, path))
    elif path is not None:
        listener.own(path)
    return listener


def orders() -> Orders:
    """Return what operators have ordered of the predecessor, and what therefore holds here."""
    return _told().orders


def upgraded_from() -> int:
    """Return the pid of the process that waits for us to be ready, or 0."""
    inherited = _told()
    return inherited.predecessor if inherited.pipe >= 0 else 0


def tell_predecessor() -> None:
    """Say that we are ready, if anybody waits for that; then it leaves."""
    global _inherited
    inherited = _told()
    if inherited.pipe < 0:
        return
    while _promised:
        listener, path = _promised.pop()
        listener.own(path)
    while _dropped:
        _dropped.pop().close()
    try:
        os.write(inherited.pipe, READY)
    except OSError:
        pass  # it has gone meanwhile; we serve all the same
    os.close(inherited.pipe)
    _inherited = inherited._replace(pipe=-1)


def reclaim() -> None:
    """What the predecessor lent us is ours alone, if it has gone. Before a drain, and before we hand it on."""
    if _lent and os.getppid() != _told().predecessor:
        while _lent:
            _lent.pop().shared = False


def hand_on(listeners: Iterable[Listener]) -> None:
    """Another program has them from now on, and answers for their files: nothing of them is ever ours alone again."""
    for listener in listeners:
        listener.disown()
    _lent.clear()


@contextmanager
def beginning() -> Iterator[None]:
    """Take along what a reload has left to this program, if the block, which begins to serve, fails.

    Nobody else would: the process that answered for the sockets' files and for the PID file was this one.
    """
    try:
        yield
    except BaseException:
        told = _told()
        if told.pipe < 0:
            _close_rest(())
            PidFile(told.pidfile).remove()
        raise
