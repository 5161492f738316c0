"""Datagrams of one socket for the hub in Python: one system call each, to the compiled hub's contract."""

from __future__ import annotations

import contextvars
import socket
import struct
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from greenlet import GreenletExit, getcurrent, greenlet

from harken._hub.wire import here

if TYPE_CHECKING:
    from harken._hub.fallback import Hub

__all__ = ["Answers", "Batch"]

MOST = 32  # as in the compiled hub
WAIT_SECONDS = 0.001  # between two tries to send when the kernel has no room
_DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)
_sendto = socket.socket.sendto
# linux/in.h and linux/in6.h; the socket module has the second pair.
_IP_PKTINFO = getattr(socket, "IP_PKTINFO", 8 if sys.platform == "linux" else None)
_RECVPKTINFO = getattr(socket, "IPV6_RECVPKTINFO", None)
_PKTINFO = getattr(socket, "IPV6_PKTINFO", None)
_ROOM = 128  # bytes of ancillary data: one address of either kind, with its header

Ancillary = list[tuple[int, int, bytes]]
Serve = Callable[..., object]


class Batch:
    """See :mod:`harken._hub`."""

    def __init__(self, hub: Hub, sock: socket.socket) -> None:
        self._hub = hub
        self._sock: Any = sock
        self._pieces: list[tuple[Any, Any, Ancillary]] = []
        self._turn = 0
        self._wildcard = _ask_for_own(sock)
        self._ways: dict[greenlet, tuple[Any, Ancillary]] = {}
        _batches[id(sock)] = self

    @property
    def left(self) -> int:
        """Datagrams that were taken and not served yet."""
        return len(self._pieces)

    def receive(self, size: int, cut: Callable[[Any], object]) -> int:
        """Take what is there; see the contract."""
        for _ in range(MOST):
            try:
                data, ancillary, flags, address = self._sock.recvmsg(size, _ROOM if self._wildcard else 0, _DONTWAIT)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                if self._pieces:
                    break
                raise
            if flags & socket.MSG_TRUNC:
                cut(address)
            self._pieces.append(((data, self._sock), address, _own(ancillary)))
        self._pieces.reverse()  # they are popped
        return len(self._pieces)

    def serve(self, serve: Serve, server: Any, failed: Callable[..., object], lean: bool = False) -> bool:
        """Serve what is left; see the contract."""
        self._turn += 1
        turn, me = self._turn, getcurrent()
        more = () if server is None else (server,)
        try:
            while self._pieces and self._turn == turn:
                request, address, ancillary = self._pieces.pop()
                self._ways[me] = address, ancillary
                self._hub.beat.enter()
                contextvars.copy_context().run(self._serve_one, serve, failed, request, address, more)
        finally:
            self._ways.pop(me, None)
        if here.hub is not self._hub:  # a handler forked, and this is the child
            self._pieces.clear()
            return False
        return True

    def _serve_one(self, serve: Serve, failed: Callable[..., object], request: Any, address: Any, more: Any) -> None:
        from harken._hub.fallback import show

        try:
            try:
                serve(request, address, *more)
            except Exception as error:  # noqa: BLE001 - every fault of one request is handle_error's
                failed(request, address, error)
        except GreenletExit:
            raise
        except BaseException:  # noqa: BLE001 - shown as a thread's would be
            show()

    def waits(self, green: greenlet) -> None:
        """The handler that was being served waits; others go on."""
        self._turn += 1

    def flush(self) -> int:
        """Nothing: each answer went at once."""
        return 0

    def close(self) -> None:
        """Let the socket go."""
        if _batches.get(id(self._sock)) is self:
            del _batches[id(self._sock)]
        self._sock = None
        self._pieces.clear()

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
        batch = _batches.get(id(self))
        hub = here.hub
        if batch is None or hub is None or getcurrent() is hub.own or not 2 <= len(args) <= 3:
            return _sendto(sock, *args)
        flags = args[1] if len(args) == 3 else 0
        way = batch.way(args[-1]) if len(args) == 2 else []
        while True:
            try:
                if way:
                    return sock.sendmsg([args[0]], way, _DONTWAIT, args[1])  # type: ignore[no-any-return]
                return _sendto(sock, args[0], flags | _DONTWAIT, args[-1])
            except BlockingIOError:
                if flags & _DONTWAIT or sock.gettimeout() is not None:
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
