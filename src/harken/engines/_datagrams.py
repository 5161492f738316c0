"""Datagrams on a hub: taken together, and served one after the other in a green thread that is used again.

How that goes is the hub's (see ``Batch`` in :mod:`harken._hub`); here is what an engine has to do with it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from harken import _hub
from harken.engines import DatagramService, Door

__all__ = ["Datagrams"]

# Handlers that may wait at once: some 10 KiB each. Beyond, datagrams stay in the kernel, which drops what does not fit.
MOST_WAITING = 1000


class Datagrams:
    """Serves the datagrams of one socket; see :class:`harken.engines.Engine`. In the hub's thread, but for one verb."""

    def __init__(
        self,
        hub: Any,
        sock: socket.socket,
        door: Door,
        *,
        busy: set[Any],
        crowded: Callable[[int], object],
        more: Callable[[Callable[[], object]], object],
    ) -> None:
        """Prepare to serve.

        Args:
            hub: that serves.
            sock: whose class is a subclass of its own from now on, until ``close``.
            door: at which the datagrams are seen.
            busy: holds green threads that serve, also while their handlers wait.
            crowded: called with 1 when as many handlers wait as may, and with -1 when there is room again.
            more: calls what it is given, which takes more, if anybody wants more at the moment; never raises.
        """
        self.sock = sock
        self.distrust: Callable[[], object]
        """Look at the door again before anything more is taken. Any thread."""
        self._door = door
        self._kind = type(sock)
        self._batch = _hub.Batch(hub, sock, busy, crowded, more, MOST_WAITING)
        self.distrust = self._batch.distrust
        _answer_by_batches(sock)

    def close(self) -> None:
        """Give the socket its class back."""
        self._batch.close()
        if isinstance(self.sock, _hub.Answers):
            self.sock.__class__ = self._kind

    def take(self, service: DatagramService) -> None:
        """Take what is there, to be served this turn. Called at the door; it does not wait.

        Raises:
            OSError: as recvmsg(2).
        """
        self._batch.take(service)
        if service.server is not None:  # no hook has a say
            self._batch.trust(self._door)


def _answer_by_batches(sock: socket.socket) -> None:
    """Let ``sendto`` of this very object, which programs compare and keep, be the batch's.

    A socket with a ``sendto`` of its own keeps it, and each answer goes at once.
    """
    kind = type(sock)
    if getattr(kind, "sendto", None) is not socket.socket.sendto:
        return
    if kind not in _kinds:
        _kinds[kind] = type(kind.__name__, (_hub.Answers, kind), {"__slots__": (), "__module__": kind.__module__})
    try:
        sock.__class__ = _kinds[kind]
    except TypeError:  # a class of another layout
        pass


_kinds: dict[type, type] = {}
