"""Messages between the supervisor and one of its children: JSON objects, a line each, over a socket pair.

The supervisor's end never blocks: what a child does not read is kept for it, up to :data:`MAX_BACKLOG_BYTES`. A child's
end blocks and may be used by several threads. Either end sees the other's death as an end of the stream, at once and
without polling, which is how a worker notices that it has lost its supervisor.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import threading
from typing import Any

__all__ = ["Channel", "pair"]

Message = dict[str, Any]

# Bytes of one message: an answer about very many connections. What comes from strangers is bounded more tightly.
MAX_LINE_BYTES = 64 << 20
# Bytes that are kept for a child that does not read: thousands of commands, or one answer about very many connections.
MAX_BACKLOG_BYTES = 64 << 20
_CHUNK = 1 << 16  # bytes read at once: what a Unix socket holds, or more


class Channel:
    """One end."""

    def __init__(self, sock: socket.socket, *, blocking: bool, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        """Take over one end of a stream socket.

        Args:
            sock: a connected stream socket.
            blocking: whether ``send`` and ``receive`` may wait.
            max_line_bytes: the longest message that is taken.
        """
        sock.setblocking(blocking)
        self._max_line_bytes = max_line_bytes
        self._sock = sock
        self._lock = threading.Lock()
        self._unread = b""
        self._unsent = b""

    def fileno(self) -> int:
        """Return the descriptor, for selectors."""
        return self._sock.fileno()

    @property
    def unsent(self) -> bool:
        """Whether something waits until the other end reads."""
        return bool(self._unsent)

    @property
    def unsent_bytes(self) -> int:
        """How much that is."""
        return len(self._unsent)

    def send(self, **message: Any) -> bool:
        """Send one message; tell whether the other end can still get it. Any thread.

        Raises:
            TypeError: it is nothing that JSON can say.
        """
        line = json.dumps(message, default=str).encode() + b"\n"
        with self._lock:
            if len(self._unsent) + len(line) > MAX_BACKLOG_BYTES:
                return False
            self._unsent += line
            return self._flush()

    def flush(self) -> bool:
        """Send what is left of earlier messages, as far as it goes without waiting; tell whether anybody reads."""
        with self._lock:
            return self._flush()

    def _flush(self) -> bool:
        try:
            if self._sock.gettimeout() is None:
                line, self._unsent = self._unsent, b""
                self._sock.sendall(line)
                return True
            while self._unsent:
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:  # the other end has gone, or ours is closed
            self._unsent = b""
            return False
        return True

    def receive(self) -> list[Message]:
        """Return the messages that have come, waiting for the first where this end blocks. One thread at a time.

        Raises:
            EOFError: the other end is gone, and every message was returned before.
            ValueError: what came is no message, or longer than allowed; nothing more can be read.
        """
        try:
            data = self._sock.recv(_CHUNK)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            raise EOFError("the other end of the channel is gone")
        *lines, self._unread = (self._unread + data).split(b"\n")
        if len(self._unread) > self._max_line_bytes:
            raise ValueError(f"a message is longer than {self._max_line_bytes} bytes")
        try:
            messages = [json.loads(line) for line in lines]
        except RecursionError:
            raise ValueError("a message is nested too deeply") from None
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("a message is no JSON object")
        return messages

    def raise_at_end(self, number: int) -> None:
        """Have the kernel send this process a signal when the other end is gone or says something; 0 ends that.

        It needs no thread, so that whatever is imported meanwhile finds none. Where there is no F_SETSIG (fcntl(2)),
        nothing happens.
        """
        if not hasattr(fcntl, "F_SETSIG"):
            return
        fd = self._sock.fileno()
        fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(fd, fcntl.F_SETSIG, number)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_ASYNC if number else flags & ~os.O_ASYNC)
        if number and select.select([fd], [], [], 0)[0]:  # it has gone before
            os.kill(os.getpid(), number)

    def close(self) -> None:
        """Close this end; whoever waits in ``receive`` is woken."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other end was quicker
        self._sock.close()

    def release(self) -> None:
        """Close this process's copy of an end that belongs to another process, without ending the stream."""
        self._sock.close()


def pair() -> tuple[Channel, Channel]:
    """Return the supervisor's end and the child's end."""
    ours, theirs = socket.socketpair()
    return Channel(ours, blocking=False), Channel(theirs, blocking=True)
