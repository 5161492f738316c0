"""What the running green thread has written and not sent: the answers to a pipeline, joined."""

from __future__ import annotations

import _socket
import _thread
import errno
import os
import socket
import time
from typing import Any

from harken._hub.wire import PIECE_SHIFT, wait
from harken.tracing import tell_call

__all__ = ["MOST", "Pending", "flush_of", "flush_to_leave"]

MOST = 65536  # bytes that are joined: as the compiled hub's buffer
_send = _socket.socket.send
_DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)


class Pending:
    """One is enough for a hub: it is sent before the green thread gives up its turn, so that others have none.

    Attributes:
        sock: the connection that it is for, or None.
    """

    __slots__ = ("_data", "_guard", "_waits", "sock")

    def __init__(self) -> None:
        self.sock: Any = None
        self._waits = False  # it is no hub's any more, but what a peer has yet to take
        self._data = bytearray()
        self._guard = _thread.allocate_lock()  # against flush_nowait() in another thread

    def join(self, sock: Any, data: Any, size: int) -> None:
        """Add ``size`` bytes for ``sock``."""
        if self.sock is not None and (self.sock is not sock or len(self._data) + size > MOST):
            self.flush()
        if self.sock is None:
            flush_of(sock)  # what others have joined for it, or wait to send
        with self._guard:
            self.sock = sock
            self._data += data
        sock._wire.pending = self

    def flush(self) -> None:
        """Send it; this may wait, and raise what sending raises. Whoever writes on meanwhile sends it first."""
        if self.sock is None or self._send_some():
            return
        if self._waits:
            self._send_all()
            return
        rest = Pending()  # others use this one while we wait
        with self._guard:
            if self.sock is None:
                return
            rest.sock, rest._data, rest._waits = self.sock, self._data, True
            rest.sock._wire.pending = rest
            self.sock, self._data = None, bytearray()
        rest._send_all()

    def _send_all(self) -> None:
        timeout = None if self.sock is None else self.sock.gettimeout()
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._send_some() and (sock := self.sock) is not None:
            if timeout == 0.0:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            wait(sock._wire, True, None if deadline is None else max(0.0, deadline - time.monotonic()))

    def _send_some(self) -> bool:
        """Send what can be sent without waiting; tell whether that is all."""
        try:
            self._send()
        except BlockingIOError:
            pass
        except BaseException:
            self.sock, self._data = None, bytearray()
            raise
        return self.sock is None

    def flush_nowait(self) -> int:
        """Send what can be sent without waiting, whatever thread this is; return how many bytes.

        An error is left for the green thread to meet.
        """
        try:
            return self._send()
        except OSError:
            return 0

    def _send(self) -> int:
        with self._guard:
            sock, data = self.sock, bytes(self._data)
            if sock is None or not data:
                self.sock = None
                return 0
            sent: int = _send(sock, data, _DONTWAIT)
            del self._data[:sent]
            if not self._data:
                self.sock = None
        sock._wire.spent += 1 + (sent >> PIECE_SHIFT)
        if sock._wire.traced:
            tell_call(sock, "send", (data,), sent)
        return sent


def flush_of(sock: Any) -> None:
    """Before ``sock`` is used in another way: what was written goes first."""
    pending = sock._wire.pending
    if pending is not None and pending.sock is sock:
        pending.flush()


def flush_to_leave(sock: Any) -> None:
    """Before ``sock`` is closed, or used past its methods: as :func:`flush_of`, but wait for no peer beside another.

    A green thread that waits there to send the rest goes on with that, or is told that it was closed.
    """
    pending = sock._wire.pending
    if pending is None or pending.sock is not sock:
        return
    if sock._wire.writer is None:
        pending.flush()
    else:
        pending.flush_nowait()
