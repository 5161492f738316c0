"""Whether a Unix path is free, taken, or left by a dead server; and taking the last.

A socket file outlives its server, and bind(2) refuses any path that exists. So a starter must remove a dead file, and
must never remove a live one. Two things make a live one look dead: the server has bound but does not listen yet
(connect(2) is refused), and another starter that has just replaced the dead file, between our look and our unlink.
Against the first, the kernel's list of bound sockets is asked as well as the path. Against the second, looking and
unlinking happen under a lock on the *folder*: flock(2) works on folders, ends with its process, and leaves no file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple

from harken.listener import AddressInUse, BindError
from harken.transports.holder import program

__all__ = ["Finding", "alone", "claim", "look", "refuse"]

LOCK_SECONDS = 5.0  # a holder needs milliseconds; past this somebody else locks the folder for reasons of his own
_LOCK_POLL_SECONDS = 0.01


class Finding(NamedTuple):
    """What stands at a path: ``free``, ``dead``, ``live`` or ``foreign`` (no socket); and who, when it lives."""

    state: str
    holder: str = ""


def claim(path: str | bytes | os.PathLike[str]) -> None:
    """Remove the socket file that a dead server left, before a plain ``socket.bind(path)``.

    A live server's file, and anything that is no socket, is left for ``bind`` to refuse (EADDRINUSE). Never raises.
    """
    try:
        name = os.fsdecode(path)
    except TypeError:  # bind() says what is wrong with it
        return
    if not name or name.startswith("\0") or not os.path.lexists(name):
        return
    with contextlib.suppress(OSError), alone(os.path.dirname(name)):
        if look(name).state == "dead":
            os.unlink(name)


@contextlib.contextmanager
def alone(folder: str) -> Iterator[None]:
    """Keep other starters out of a folder.

    A folder that may be written but not read cannot be locked; there one goes on without.

    Raises:
        BindError: another process held the lock for :data:`LOCK_SECONDS`.
    """
    try:
        fd = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        _lock(fd, folder or ".")
        yield
    finally:
        with contextlib.suppress(OSError):  # explicitly: a child forked meanwhile holds the same lock
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _lock(fd: int, folder: str) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                held = f"another process has locked the folder {folder!r} for {LOCK_SECONDS:g} s"
                raise BindError(f"{held}; end it, or take a path in another folder", errno.EAGAIN) from None
            time.sleep(_LOCK_POLL_SECONDS)
        except OSError:  # a file system without locks
            return


def look(path: str) -> Finding:
    """Find out what stands at a path; a live server sees a connection that is closed at once, if anything."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return Finding("free")
    if not stat.S_ISSOCK(mode):
        return Finding("foreign")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except FileNotFoundError:
            return Finding("free")
        except ConnectionRefusedError:
            return Finding("live" if _is_bound(path) else "dead")
        except OSError:  # EPROTOTYPE: a datagram server; EAGAIN: its backlog is full; EACCES: not ours to judge
            return Finding("live")
        return Finding("live", _listener(probe))


def _listener(probe: socket.socket) -> str:
    """Name the process that called listen(2), from SO_PEERCRED of a connection to it (unix(7))."""
    pid = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[0]
    if pid == os.getpid():
        return "this process"
    return program(pid) if pid else ""


def _is_bound(path: str) -> bool:
    """Ask /proc/net/unix whether a socket of this machine is bound to the path, by either spelling of it."""
    spellings = {os.fsencode(path), os.fsencode(os.path.abspath(path))}
    try:
        with open("/proc/net/unix", "rb") as table:
            # Num RefCount Protocol Flags Type St Inode Path; an unnamed socket has no eighth column.
            rows = (line.rstrip(b"\n").split(maxsplit=7) for line in table)
            return any(len(row) == 8 and row[7] in spellings for row in rows)
    except OSError:
        return False


def refuse(path: str, found: Finding) -> None:
    """Raise what a path that is not free deserves.

    Raises:
        AddressInUse: a live server, or a file of another kind, is there.
    """
    if found.state == "live":
        by = f"served by {found.holder}" if found.holder else "in use by a live server"
        raise AddressInUse(f"{path!r} is already {by}; stop it, or take another path", errno.EADDRINUSE)
    if found.state == "foreign":
        raise AddressInUse(f"{path!r} exists and is not a socket; move it away, or take another path", errno.EADDRINUSE)
