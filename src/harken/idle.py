"""Whether a connection is idle: nothing is under way on it, so that it may be ended without anybody missing a byte.

The kernel tells what waits in a socket's queues and when bytes last moved (ioctl, TCP_INFO). Whether the handler waits
for the client, or computes an answer, is told by the hub of green threads, and for plain threads by the system call
that the thread is in (/proc/self/task/TID/syscall of Linux): its first argument is the descriptor.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
import sys
import termios
import threading
import time
from typing import Any

from harken.connection import tcp_info
from harken.records import YOUNG_SECONDS, Record
from harken.unpatched import Socket

__all__ = ["Onlooker"]

# Seconds without a byte after which a handler that waits for its client is taken to be between two messages, rather
# than within one or in the middle of an exchange: round trips and the pauses of programs are shorter.
QUIET_SECONDS = 0.5
# The same where nobody tells whether the handler waits for its client.
QUIET_ANYWAY_SECONDS = 1.0

# struct tcp_info of linux/tcp.h
_LAST_DATA_SENT, _LAST_DATA_RECV, _BYTES_RECEIVED, _BYTES = 44, 52, 128, 136
# poll(2) of x86-64, ppoll(2) of x86-64 and of what shares asm-generic/unistd.h: the descriptors are behind a pointer.
_POLLS = {"7", "271", "73"}


class Onlooker:
    """Judges the connections of one moment.

    Args:
        loop: the thread that serves those of which no thread is known, or 0.
    """

    def __init__(self, loop: int = 0) -> None:
        self._loop = loop
        self._natives = {thread.ident: thread.native_id for thread in threading.enumerate()}
        self._natives[threading.main_thread().ident] = os.getpid()  # in a forked child too: 3.11 keeps the old id

    def is_idle(self, record: Record) -> bool:
        """Tell whether nothing is under way on a connection of this process."""
        waiting = self._rests(record)
        if waiting is False:
            return False
        quiet, spoken = _movement(record.request)
        if not spoken and time.monotonic() - record.started < YOUNG_SECONDS:
            return False
        if waiting is None:
            return quiet is not None and quiet >= QUIET_ANYWAY_SECONDS
        return quiet is None or quiet >= QUIET_SECONDS

    def is_at_work(self, record: Record) -> bool:
        """Tell whether there are bytes to be read or sent, or the handler does anything but wait for its client."""
        return self._rests(record) is False

    def _rests(self, record: Record) -> bool | None:
        """Whether nothing is queued and the handler waits for its client; None when the second is not told."""
        request = record.request
        if not isinstance(request, Socket):
            return False
        fd = Socket.fileno(request)
        if fd < 0 or _queued(fd, termios.FIONREAD) or _queued(fd, termios.TIOCOUTQ):
            return False
        return self._waits(record, request, fd)

    def _waits(self, record: Record, request: Any, fd: int) -> bool | None:
        """Whether the handler waits for bytes of its client; None when nobody knows."""
        ask = getattr(request, "waits_for", None)
        said = ask() if ask is not None else None
        if said is not None:
            return bool(said == "reading")
        native = self._natives.get(record.thread or self._loop)
        if native is None:
            # Its thread is still to begin; or the hub knows of nobody who waits there.
            begins = not record.thread and time.monotonic() - record.started < YOUNG_SECONDS
            return False if begins or ask is not None else None
        return _thread_waits(native, fd)


def _thread_waits(native: int, fd: int) -> bool | None:
    """Whether a thread of this process is in a system call on ``fd``; None when the system does not tell."""
    try:
        with open(f"/proc/self/task/{native}/syscall", encoding="ascii") as file:
            number, *arguments = file.read().split()
    except (OSError, ValueError):
        return None
    if number in _POLLS and len(arguments) > 1:
        return int(arguments[1], 16) == 1  # a socket with a timeout: Python waits for its one descriptor
    return bool(arguments) and number.isdecimal() and int(arguments[0], 16) == fd


def _queued(fd: int, which: int) -> int:
    """How many bytes wait to be read (FIONREAD), or to be taken by the peer (TIOCOUTQ); 0 where that is not told."""
    count = array.array("i", [0])
    try:
        fcntl.ioctl(fd, which, count)
    except OSError:
        return 0
    return count[0]


def _movement(request: socket.socket) -> tuple[float | None, bool]:
    """How many seconds no byte moved (None: not told), and whether one has come since the connection was made."""
    info = tcp_info(request, _BYTES)
    if len(info) < _BYTES or sys.platform != "linux":
        return None, False
    sent: int
    received: int
    total: int
    (sent,) = struct.unpack_from("=I", info, _LAST_DATA_SENT)
    (received,) = struct.unpack_from("=I", info, _LAST_DATA_RECV)
    (total,) = struct.unpack_from("=Q", info, _BYTES_RECEIVED)
    return min(sent, received) / 1000, total > 0
