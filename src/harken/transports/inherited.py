"""Sockets that another process opened: ``fd://3``, ``fd://NAME`` and ``systemd:``.

The protocol is that of sd_listen_fds(3): descriptors from 3 on, LISTEN_FDS of them, for the process LISTEN_PID, with
the names LISTEN_FDNAMES (joined by colons). What was passed is noted once, and the variables are then removed, so that
programs started later do not take the descriptors for theirs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import weakref
from typing import NamedTuple

from harken import transports
from harken.errors import ConfigError, nearest
from harken.listener import Listener
from harken.transports import BindOptions

__all__ = ["Passed", "bind", "parse", "passed", "schemes"]

schemes = ("fd", "systemd")

MOST_DIGITS = 10  # of a C int
_FIRST = 3  # SD_LISTEN_FDS_START of sd_listen_fds(3)
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
_UNNAMED = "unknown"  # what sd_listen_fds_with_names(3) calls a descriptor without a name


class Passed(NamedTuple):
    """One descriptor that was passed, and the inode of its socket, by which a number used anew is told apart."""

    fd: int
    name: str
    inode: int


class Place(NamedTuple):
    """A parsed address: a number, a name, or neither for all that was passed."""

    url: str
    fd: int = -1
    name: str = ""


_noted: list[Passed] = []
_adopted: weakref.WeakSet[Listener] = weakref.WeakSet()


def parse(url: str) -> Place:
    """Read ``fd://3``, ``fd://NAME`` or ``systemd:``.

    Raises:
        ConfigError: the address is malformed.
    """
    scheme, _, rest = url.partition(":")
    what = rest.removeprefix("//")
    if scheme == "systemd":
        if what:
            raise ConfigError(f"{url!r}: systemd: takes all that was passed; write {f'fd://{what}'!r} for one of them")
        return Place(url)
    if not what or not rest.startswith("//") or "/" in what or "?" in what:
        raise ConfigError(f"{url!r} names no descriptor; write fd://3, or fd://NAME as in FileDescriptorName=")
    if what.isascii() and what.isdecimal():
        if len(what) > MOST_DIGITS:
            raise ConfigError(f"{url!r}: no descriptor has a number as large as that")
        return Place(url, fd=int(what))
    return Place(url, name=what)


def bind(place: Place, options: BindOptions) -> list[Listener]:
    """Take over what was passed. Of ``options`` only what can change on an open socket applies.

    Raises:
        ConfigError: nothing was passed, it was passed to another process, or it is no socket that listens.
    """
    opened: list[Listener] = []
    try:
        for fd in _chosen(place):
            listener = _take(fd)
            opened.append(listener)
            transports.adjust(listener, options)
    except BaseException:
        for listener in opened:
            listener.close()
        raise
    return opened


def _chosen(place: Place) -> list[int]:
    known = passed()
    if place.fd >= 0:
        return [place.fd]
    if not known:
        raise ConfigError(
            f"{place.url!r}: no socket was passed to this process (LISTEN_FDS is not set, or 0); start it from a "
            ".socket unit"
        )
    names = sorted({each.name for each in known})
    chosen = [each.fd for each in known if each.name == place.name or not place.name]
    if not chosen:
        close = nearest(place.name, names) or "; known are " + ", ".join(map(repr, names))
        raise ConfigError(f"{place.url!r}: no passed socket is called {place.name!r}{close}")
    return chosen


def _take(fd: int) -> Listener:
    """Adopt a descriptor; one that another listener has already is duplicated, so that each closes its own."""
    for each in _noted:
        if each.fd == fd and _inode(fd) != each.inode:
            raise ConfigError(f"fd {fd} was passed to this process and closed since; it cannot be opened again")
    if any(listener.fileno() == fd for listener in _adopted):
        duplicate = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST)
        listener = Listener.adopt(duplicate)
    else:
        listener = Listener.adopt(fd)
    _adopted.add(listener)
    return listener


def passed() -> tuple[Passed, ...]:
    """Return what was passed to this process; the first call notes it and removes the variables.

    Raises:
        ConfigError: the variables are there, but for another process or malformed.
    """
    if "LISTEN_FDS" in os.environ:
        _noted[:] = _read()
        for variable in _VARIABLES:
            os.environ.pop(variable, None)
    return tuple(_noted)


def _read() -> list[Passed]:
    owner, number = os.environ.get("LISTEN_PID", ""), os.environ["LISTEN_FDS"]
    if not number.isdecimal():
        raise ConfigError(f"LISTEN_FDS is {number!r}, not a number of descriptors")
    if len(number) > MOST_DIGITS or int(number) > os.sysconf("SC_OPEN_MAX") > 0:
        raise ConfigError(f"LISTEN_FDS is {number}, more descriptors than a process may have")
    if owner != str(os.getpid()):
        raise ConfigError(
            f"the passed sockets are for pid {owner or 'unknown'} (LISTEN_PID), and this is pid {os.getpid()}; "
            "let that process exec this one"
        )
    fds = range(_FIRST, _FIRST + int(number))
    names = os.environ.get("LISTEN_FDNAMES", "").split(":") if "LISTEN_FDNAMES" in os.environ else []
    if names and len(names) != len(fds):
        raise ConfigError(f"LISTEN_FDNAMES has {len(names)} names for {len(fds)} descriptors")
    found = []
    for position, fd in enumerate(fds):
        with contextlib.suppress(OSError):  # Listener.adopt says what is wrong with it
            os.set_inheritable(fd, False)
        found.append(Passed(fd, names[position] if names else _UNNAMED, _inode(fd)))
    return found


def _inode(fd: int) -> int:
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return -1
