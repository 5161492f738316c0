"""What the running green thread has written and not sent: the answers to a pipeline, joined."""

from __future__ import annotations

import _socket
import _thread
import socket
from typing import Any

from harken.tracing import tell_call

__all__ = ["MOST", "Pending", "flush_of"]

MOST = 65536  # bytes that are joined: as the compiled hub's buffer
_send = _socket.socket.send
_DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)


class Pending:
    """One is enough for a hub: it is sent before the green thread gives up its turn, so that others have none.

    Attributes:
        sock: the connection that it is for, or None.
    """

    __slots__ = ("_data", "_guard", "sock")

    def __init__(self) -> None:
        self.sock: Any = None
        self._data = bytearray()
        self._guard = _thread.allocate_lock()  # against flush_nowait() in another thread

    def join(self, sock: Any, data: Any, size: int) -> None:
        """Add ``size`` bytes for ``sock``."""
        if self.sock is not None and (self.sock is not sock or len(self._data) + size > MOST):
            self.flush()
        with self._guard:
            self.sock = sock
            self._data += data
        sock._wire.pending = self

    def flush(self) -> None:
        """Send it; this may wait, and raise what sending raises."""
        if self.sock is None:
            return
        with self._guard:
            sock, data = self.sock, self._data
            self.sock, self._data = None, bytearray()
        if data:
            sock.sendall(data)

    def flush_nowait(self) -> int:
        """Send what can be sent without waiting, whatever thread this is; return how many bytes.

        An error is left for the green thread to meet.
        """
        with self._guard:
            if self.sock is None or not self._data:
                return 0
            try:
                sent = _send(self.sock, self._data, _DONTWAIT)
            except OSError:
                return 0
            if self.sock._wire.traced:
                tell_call(self.sock, "send", (bytes(self._data),), sent)
            del self._data[:sent]
            if not self._data:
                self.sock = None
            return sent


def flush_of(hub: Any, sock: Any) -> None:
    """Before ``sock`` is used in another way: what was written goes first."""
    pending = sock._wire.pending if hub is None else hub.pending  # outside the hub: of the green thread that has joined
    if pending is not None and pending.sock is sock:
        pending.flush()
