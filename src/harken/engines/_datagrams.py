"""Datagrams on a hub: taken together, and served one after the other in a green thread that is used again.

A handler that does not wait costs no green thread of its own. One that waits keeps the green thread that it runs in,
and another one goes on with the rest.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

from harken import _hub
from harken.engines import DatagramService

__all__ = ["Datagrams"]

# Datagrams that are taken in one turn before others have theirs: as many as connections from one door.
MOST_IN_A_TURN = _hub.DOOR_BURST
# Green threads that are kept for the next batch.
MOST_IDLE = 16
# Handlers that may wait at once: some 10 KiB each. Beyond, datagrams stay in the kernel, which drops what does not fit.
MOST_WAITING = 1000


class Datagrams:
    """Serves the datagrams of one socket; see :class:`harken.engines.Engine`. All in the hub's thread."""

    def __init__(
        self,
        hub: Any,
        sock: socket.socket,
        *,
        begin: Callable[[greenlet], object],
        end: Callable[[greenlet], object],
        crowded: Callable[[int], object],
        more: Callable[[Callable[[], object]], object],
    ) -> None:
        """Prepare to serve.

        Args:
            hub: that serves.
            sock: whose class is a subclass of its own from now on, until ``close``.
            begin: called with a green thread that has work from now on, also while its handler waits.
            end: called with it when it has none any more.
            crowded: called with 1 when as many handlers wait as may, and with -1 when there is room again.
            more: calls what it is given, which takes more, if anybody wants more at the moment; never raises.
        """
        self.sock = sock
        self.service: DatagramService | None = None
        self._hub = hub
        self._kind = type(sock)
        self._batch = _hub.Batch(hub, sock)
        self._begin, self._end, self._crowded = begin, end, crowded
        self._more = more
        self._idle: list[greenlet] = []
        self._active: greenlet | None = None
        self._waiting = 0
        _answer_by_batches(sock)

    def close(self) -> None:
        """Give the socket its class back."""
        self._batch.close()
        self._idle.clear()
        if isinstance(self.sock, _hub.Answers):
            self.sock.__class__ = self._kind

    def take(self, service: DatagramService) -> None:
        """Take what is there, to be served this turn. Called at the door; it does not wait.

        Raises:
            OSError: as recvmsg(2).
        """
        if self._batch.left:
            return  # a green thread that serves them is about to start
        self.service = service
        if self._receive():
            self._hub.call_soon(self._go_on)

    def _receive(self) -> int:
        service = self.service
        assert service is not None
        taken: int = self._batch.receive(service.size, service.cut)
        if taken:
            service.taken(taken)
        return taken

    def _go_on(self) -> None:
        """Serve what was taken, and what has come meanwhile. In the hub's own greenlet.

        A runner comes back when it is done, or when its handler waits.
        """
        served = 0
        while left := self._batch.left:
            if not self._idle:
                self._start()
                self._hub.call_soon(self._go_on)
                return
            served += left
            runner = self._active = self._idle.pop()
            self._begin(runner)
            self._hub.resume(runner)
            if self._active is runner:
                self._active = None
                self._wait(runner)
            elif served < MOST_IN_A_TURN:
                self._batch.flush()
                self._more(self._receive)
        self._batch.flush()

    def _wait(self, runner: greenlet) -> None:
        self._waiting += 1
        if self._waiting == MOST_WAITING:
            self._crowded(1)
        self._batch.waits(runner)

    def _start(self) -> None:
        self._begin(self._hub.spawn(self._run))  # or the hub might end before it has started

    def _run(self) -> None:
        """A runner's life: idle until it is resumed, once for each batch."""
        runner = getcurrent()
        try:
            while len(self._idle) < MOST_IDLE:
                self._idle.append(runner)
                self._end(runner)
                self._hub.park()
                if not self._serve_as(runner):
                    return
        except GreenletExit:
            pass  # the hub is being closed
        finally:
            self._end(runner)

    def _serve_as(self, runner: greenlet) -> bool:
        try:
            return self._serve()
        finally:
            if self._active is runner:
                self._active = None
            else:
                if self._waiting == MOST_WAITING:
                    self._crowded(-1)
                self._waiting -= 1

    def _serve(self) -> bool:
        service = self.service
        assert service is not None
        return self._batch.serve(service.serve, service.server, service.failed, service.lean)  # type: ignore[no-any-return]


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
