"""A descriptor that makes a sleeping loop return."""

from __future__ import annotations

import os
import socket
import threading

from harken.forking import told_in_child

__all__ = ["Waker"]


class Waker:
    """Makes a sleeping selector return: an eventfd, or a socket pair where there is none.

    The lock is re-entrant, since a signal handler may wake the very thread that opens or closes it. A wake-up after
    ``close()`` writes to nobody: never to a descriptor of the same number that somebody else has got since.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._closed = False
        self._pair: tuple[socket.socket, socket.socket] | None = None
        self._fd = -1
        if hasattr(os, "eventfd"):
            self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        else:
            self._pair = socket.socketpair()
            for end in self._pair:
                end.setblocking(False)
        _wakers.add(self)

    def fileno(self) -> int:
        """Return the descriptor to watch."""
        return self._pair[0].fileno() if self._pair else self._fd

    def wake(self) -> None:
        """Make the descriptor readable. Any thread, any signal handler; never blocks, never raises."""
        with self._lock:
            if self._closed:
                return
            try:
                if self._pair:
                    self._pair[1].send(b"\0")
                else:
                    os.eventfd_write(self._fd, 1)
            except OSError:
                pass  # full: a wake-up is under way already

    def drain(self) -> None:
        """Forget the wake-ups so far."""
        try:
            if self._pair:
                self._pair[0].recv(4096)
            else:
                os.eventfd_read(self._fd)
        except OSError:
            pass  # another thread that runs the loop was quicker

    def close(self) -> None:
        """Close the descriptor; calling it twice is harmless."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._pair:
                for end in self._pair:
                    end.close()
            else:
                os.close(self._fd)

    def after_fork(self) -> None:
        """In a child: a thread that stayed in the parent may have been waking it."""
        self._lock = threading.RLock()


_wakers = told_in_child(Waker)
