"""What the fallback keeps of one descriptor, and how anybody waits for it: in the hub, or by ``poll()``."""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from greenlet import getcurrent, greenlet

from harken.unpatched import original

if TYPE_CHECKING:
    from harken._hub.fallback import Hub
    from harken._hub.pending import Pending

__all__ = ["PIECE_SHIFT", "Wire", "closed", "give_way", "here", "wait"]

# TURN_BYTES in TURN_OPERATIONS: an operation costs one, and one more for each of these.
PIECE_SHIFT = 14


class _Here(original("threading", "local")):  # type: ignore[misc]
    """The hubs of this thread.

    Attributes:
        hub: that of whoever calls: whose turn runs, or ran last, if that one occupies the thread; or None.
        occupants: those that occupy it.
    """

    hub: Hub | None = None

    def __init__(self) -> None:
        self.occupants: list[Hub] = []

    def occupy(self, hub: Hub, yes: bool) -> None:
        """Note that ``hub`` keeps this thread between its turns, or no more."""
        if yes:
            self.occupants.append(hub)
        else:
            self.occupants.remove(hub)
        if len(self.occupants) > 1:
            self.__class__ = _Crowded


class _Crowded(_Here):
    """The same where several occupy one: a host may resume a green thread of one when another's turn was the last."""

    @property
    def hub(self) -> Hub | None:
        """The hub of whoever calls."""
        hub: Hub | None = self.__dict__.get("hub")
        if hub is None or getcurrent() is hub.own or getcurrent() in hub._greens:
            return hub
        return next((other for other in self.occupants if getcurrent() in other._greens), hub)

    @hub.setter
    def hub(self, hub: Hub | None) -> None:
        self.__dict__["hub"] = hub


here = _Here()


class Wire:
    """A descriptor's state in a hub. It holds no socket, so that one that is dropped unclosed is collected.

    Attributes:
        fd: the descriptor.
        guest: what is to be called at the first event, while no green thread serves the connection; else None.
        hub: the hub in which it is registered, or None.
        pending: what holds answers that were joined for it, now or before, or None.
        reader: the green thread that waits to read, or None.
        writer: the green thread that waits to write, or None.
        dry: whether the last read took all there was: the next one waits without asking.
        wet: whether a short read proves nothing: not a TCP stream, or FIN, RST or urgent data have been seen.
        spent: operations and pages of 4 KiB since it last waited.
        timeout: seconds, None to wait without end, 0.0 not to wait.
        traced: whether somebody follows what moves; see ``harken.tracing``.
    """

    __slots__ = ("dry", "fd", "guest", "hub", "pending", "reader", "spent", "timeout", "traced", "wet", "writer")

    def __init__(self, fd: int, timeout: float | None = None, wet: bool = True) -> None:
        self.fd = fd
        self.guest: Callable[[], object] | None = None
        self.hub: Hub | None = None
        self.pending: Pending | None = None
        self.reader: greenlet | None = None
        self.writer: greenlet | None = None
        self.dry = False
        self.wet = wet
        self.spent = 0
        self.timeout = timeout
        self.traced = False

    def release(self) -> None:
        """Before the descriptor is closed or given away: whoever waits for it gets EBADF."""
        if self.hub is not None:
            self.hub.forget(self)


def wait(wire: Wire, write: bool, timeout: float | None) -> None:
    """Wait until ``wire`` may be ready.

    Raises:
        TimeoutError: after ``timeout`` seconds.
        RuntimeError: another green thread waits for the same.
        OSError: EBADF, it was closed meanwhile.
    """
    hub = here.hub
    if hub is not None and getcurrent() is not hub.own:
        hub.wait_wire(wire, write, timeout)
    else:
        _block(wire.fd, write, timeout)
    wire.spent = 0
    if not write:
        wire.dry = False


def give_way(wire: Wire) -> None:
    """Let the other green threads have their turn."""
    wire.spent = 0
    hub = here.hub
    if hub is not None and getcurrent() is not hub.own:
        hub.sleep(0)


def closed() -> OSError:
    """What somebody gets who waits for a descriptor that is closed meanwhile."""
    return OSError(errno.EBADF, os.strerror(errno.EBADF))


def _block(fd: int, write: bool, timeout: float | None) -> None:
    """Wait as a plain thread does."""
    if fd < 0:
        raise closed()
    poller = original("select", "poll")()
    poller.register(fd, select.POLLOUT if write else select.POLLIN | select.POLLPRI)
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if poller.poll(None if left is None else left * 1000 + 1):  # whole milliseconds, rounded down by poll()
            return
        if left is not None and left <= 0:
            raise TimeoutError("timed out")
