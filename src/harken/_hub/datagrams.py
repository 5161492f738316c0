"""Datagrams of one socket for the hub in Python: one system call each, to the compiled hub's contract."""

from __future__ import annotations

import contextvars
import socket
import struct
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from greenlet import GreenletExit, getcurrent, greenlet

from harken._hub import DOOR_BURST
from harken._hub.wire import here

if TYPE_CHECKING:
    from harken._hub.fallback import Hub

__all__ = ["Answers", "Batch"]

# As in the compiled hub.
MOST = 32  # in a batch
MOST_IDLE = 16  # green threads that are kept for the next batch
ENOUGH = 4  # a batch after which it is worth asking at once whether more has come
WAIT_SECONDS = 0.001  # between two tries to send when the kernel has no room
_DONTWAIT = int(getattr(socket, "MSG_DONTWAIT", 0))  # its own type costs a microsecond for each `|`
_sendto: Any = socket.socket.sendto
_sendmsg: Any = getattr(socket.socket, "sendmsg", None)
# linux/in.h and linux/in6.h; the socket module has the second pair.
_IP_PKTINFO = getattr(socket, "IP_PKTINFO", 8 if sys.platform == "linux" else None)
_RECVPKTINFO = getattr(socket, "IPV6_RECVPKTINFO", None)
_PKTINFO = getattr(socket, "IPV6_PKTINFO", None)
_ROOM = 128  # bytes of ancillary data: one address of either kind, with its header

Ancillary = list[tuple[int, int, bytes]]


class Batch:
    """See :mod:`harken._hub`."""

    def __init__(
        self,
        hub: Hub,
        sock: socket.socket,
        busy: set[Any],
        crowded: Callable[[int], object],
        more: Callable[[Callable[[], object]], object],
        most_waiting: int,
    ) -> None:
        self._hub = hub
        self._sock: Any = sock
        self._busy, self._crowded, self._more, self._most_waiting = busy, crowded, more, most_waiting
        self._service: Any = None
        self._pieces: list[tuple[Any, Any, Ancillary]] = []
        self._turn = 0
        self._idle: list[greenlet] = []
        self._active: greenlet | None = None
        self._waiting = 0
        self._wildcard = _ask_for_own(sock)
        self._ways: dict[greenlet, tuple[Any, Ancillary]] = {}
        _batches[id(sock)] = self

    # -- taking --------------------------------------------------------------------------------------------------------

    def take(self, service: Any) -> None:
        """Take what is there, to be served this turn; see the contract."""
        if self._pieces:
            return  # a green thread that serves them is about to start
        self._service = service
        self.again()
        if self._pieces:
            self._hub.call_soon(self.run)

    def again(self) -> None:
        """Take more, for the same service."""
        if self._pieces or self._sock is None:
            return
        for _ in range(MOST):
            if not self._take_one():
                break
        self._pieces.reverse()  # they are popped
        if self._pieces:
            self._service.taken(len(self._pieces))

    def _take_one(self) -> bool:
        room = _ROOM if self._wildcard else 0
        try:
            data, ancillary, flags, address = self._sock.recvmsg(self._service.size, room, _DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            if self._pieces:
                return False
            raise
        if flags & socket.MSG_TRUNC:
            self._service.cut(address)
        self._pieces.append(((data, self._sock), address, _own(ancillary)))
        return True

    # -- serving -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve what was taken, and what has come meanwhile; see the contract.

        A runner comes back when it is done, or when its handler waits.
        """
        served = 0
        while self._pieces:
            left = len(self._pieces)
            if not self._idle:
                self._busy.add(self._hub.spawn(self.work))  # or the hub might end before it has started
                self._hub.call_soon(self.run)
                return
            served += left
            runner = self._active = self._idle.pop()
            self._busy.add(runner)
            try:
                self._hub.resume(runner)
            except RuntimeError:  # somebody else is about to: it comes back by itself
                self._active = None
                self._busy.discard(runner)
                continue
            if self._active is runner:
                self._note_wait()
            elif left >= ENOUGH and served < DOOR_BURST:
                self._more(self.again)

    def _note_wait(self) -> None:
        self._active = None
        self._turn += 1
        self._waiting += 1
        if self._waiting == self._most_waiting:
            self._crowded(1)

    def work(self) -> None:
        """The life of a green thread that serves datagrams: idle until it is resumed, once for each batch."""
        runner = getcurrent()
        try:
            while len(self._idle) < MOST_IDLE:
                self._hub.settle()  # which may wait by itself
                if not self._rest(runner):
                    continue
                self._serve_as(runner)
                if here.hub is not self._hub:  # a handler forked, and this is the child
                    return
        finally:
            self._busy.discard(runner)

    def _rest(self, runner: greenlet) -> bool:
        """Wait until somebody resumes the runner; tell whether it was the batch, and not another who knows it."""
        self._idle.append(runner)
        self._busy.discard(runner)
        try:
            self._hub.park()
        finally:
            if self._active is not runner and runner in self._idle:
                self._idle.remove(runner)
        return self._active is runner

    def _serve_as(self, runner: greenlet) -> None:
        try:
            self._serve_left(runner)
        finally:
            if self._active is runner:
                self._active = None
            else:
                if self._waiting == self._most_waiting:
                    self._crowded(-1)
                self._waiting -= 1
                self._hub.wake()  # for those who wait for its end

    def _serve_left(self, me: greenlet) -> None:
        """Serve what is left. When a handler waits, others go on; then this is done when that handler is."""
        self._turn += 1
        turn, service = self._turn, self._service
        more = () if service.server is None else (service.server,)
        try:
            while self._pieces and self._turn == turn and here.hub is self._hub:
                request, address, ancillary = self._pieces.pop()
                self._ways[me] = address, ancillary
                self._hub.beat.enter()
                contextvars.copy_context().run(self._serve_one, service, request, address, more)
        finally:
            self._ways.pop(me, None)

    def _serve_one(self, service: Any, request: Any, address: Any, more: tuple[Any, ...]) -> None:
        from harken._hub.fallback import show

        try:
            try:
                service.serve(request, address, *more)
            except GreenletExit:
                raise
            except BaseException as error:  # noqa: BLE001 - every fault of one request is handle_error's
                service.failed(request, address, error)
        except GreenletExit:
            raise
        except BaseException:  # noqa: BLE001 - shown as a thread's would be
            show()

    # -- the rest ------------------------------------------------------------------------------------------------------

    def trust(self, door: Any) -> None:
        """Nothing: this hub asks each time."""

    def distrust(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Let the socket go."""
        if _batches.get(id(self._sock)) is self:
            del _batches[id(self._sock)]
        self._sock = None
        self._pieces.clear()
        self._idle.clear()

    def way(self, address: Any) -> Ancillary:
        """Return what makes an answer leave from the address that the calling handler's client asked."""
        client, ancillary = self._ways.get(getcurrent(), (None, []))
        return ancillary if client == address else []


_batches: dict[int, Batch] = {}


class Answers:
    """What the socket of a datagram server has besides, while a hub serves it."""

    __slots__ = ()

    def sendto(self, *args: Any) -> int:
        """As ``socket.sendto``, waiting in the hub."""
        sock: Any = self
        batch = _batch_of(sock)
        if batch is None or not 2 <= len(args) <= 3:
            sent: int = _sendto(sock, *args)
            return sent
        flags = args[1] if len(args) == 3 else 0
        way = batch.way(args[-1])
        if way:
            return _patiently(sock, flags, lambda quick: _sendmsg(sock, [args[0]], way, quick, args[-1]))
        return _patiently(sock, flags, lambda quick: _sendto(sock, args[0], quick, args[-1]))

    def sendmsg(self, *args: Any) -> int:
        """As ``socket.sendmsg`` likewise."""
        sock: Any = self
        send: Any = super().sendmsg  # type: ignore[misc]
        batch = _batch_of(sock)
        if batch is None or not 1 <= len(args) <= 4:
            sent: int = send(*args)
            return sent
        buffers, address = list(args[0]), args[3:]
        ancillary = args[1] if len(args) > 1 else []
        flags = args[2] if len(args) > 2 else 0
        if address and ancillary in ([], ()):
            ancillary = batch.way(*address)
        return _patiently(sock, flags, lambda quick: send(buffers, ancillary, quick, *address))


def _batch_of(sock: Any) -> Batch | None:
    """Return the batch of a socket, for a call of a green thread; None: the call is the plain socket's."""
    hub = here.hub
    return None if hub is None or getcurrent() is hub.own else _batches.get(id(sock))


def _patiently(sock: Any, flags: int, send: Callable[[int], int]) -> int:
    """Send with ``MSG_DONTWAIT``; while there is no room, wait in the hub, if a socket would."""
    while True:
        try:
            return send(flags | _DONTWAIT)
        except BlockingIOError:
            hub = here.hub
            if hub is None or flags & _DONTWAIT or sock.gettimeout() is not None:
                raise
        hub.sleep(WAIT_SECONDS)


def _ask_for_own(sock: socket.socket) -> bool:
    """Ask to which address datagrams come, if the socket is bound to all; tell whether the kernel will say."""
    try:
        if sock.family == socket.AF_INET and _IP_PKTINFO is not None and sock.getsockname()[0] == "0.0.0.0":
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            return True
        if sock.family == socket.AF_INET6 and _RECVPKTINFO is not None and sock.getsockname()[0] == "::":
            sock.setsockopt(socket.IPPROTO_IPV6, _RECVPKTINFO, 1)
            return True
    except OSError:
        pass
    return False


def _own(ancillary: Ancillary) -> Ancillary:
    """Turn what the kernel said of a datagram's way into what an answer's way is asked for by."""
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            local, asked = data[4:8], data[8:12]
            if local == bytes(4) and asked[0] < 0xE0:  # it came before we asked
                local = asked
            return [(level, kind, struct.pack("=i", 0) + local + asked)]  # the routes say by which card it leaves
        if level == socket.IPPROTO_IPV6 and kind == _PKTINFO:
            if data[0] == 0xFF:  # multicast: no address of ours
                return []
            link_local = data[0] == 0xFE and data[1] & 0xC0 == 0x80
            return [(level, kind, data if link_local else data[:16] + struct.pack("=i", 0))]
    return []
