"""Who holds a port, as far as Linux tells this process."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

__all__ = ["holder", "program"]

_STATES = {"tcp": "0A", "udp": "07"}  # include/net/tcp_states.h: TCP_LISTEN; an unconnected UDP socket is TCP_CLOSE


def holder(protocol: str, port: int) -> str:
    """Name the process that listens on a port of this machine.

    Other users' processes show their program only to root. Reads /proc, which takes milliseconds: for error messages.

    Args:
        protocol: ``tcp`` or ``udp``.
        port: the local port.

    Returns:
        ``"pid 812 (nginx)"``, ``"this process"``, or an empty string when /proc does not tell.
    """
    wanted = {f"socket:[{inode}]" for inode in _inodes(protocol, port)}
    if not wanted:
        return ""
    own = os.getpid()
    pids = sorted((int(name) for name in _names("/proc") if name.isdecimal()), key=lambda pid: pid != own)
    for pid in pids:
        if any(_target(pid, fd) in wanted for fd in _names(f"/proc/{pid}/fd")):
            return "this process" if pid == own else program(pid)
    return ""


def program(pid: int) -> str:
    """Return ``"pid 812 (nginx)"``, or the pid alone when the process has gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
        name = re.sub(r"[^\x20-\x7e]", "?", comm.read().rstrip("\n"))  # a process names itself as it likes
        return f"pid {pid} ({name})"
    return f"pid {pid}"


def _inodes(protocol: str, port: int) -> Iterator[str]:
    """Yield the inodes of the sockets on a port; proc(5), /proc/net/tcp."""
    for table in (f"/proc/net/{protocol}", f"/proc/net/{protocol}6"):
        with contextlib.suppress(OSError), open(table, encoding="ascii") as lines:
            for line in lines:
                columns = line.split()
                if columns[1].endswith(f":{port:04X}") and columns[3] == _STATES[protocol]:
                    yield columns[9]


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # another user's process, or one that has just ended
        return []


def _target(pid: int, fd: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{fd}")
    except OSError:
        return ""
