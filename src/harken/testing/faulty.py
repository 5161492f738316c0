"""A socket that misbehaves on purpose."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Iterable
from typing import Any

__all__ = ["Faulty"]

_TCP_CLOSE = 7  # linux/tcp_states.h: the first byte of TCP_INFO, once a reset has come


class Faulty(socket.socket):
    """A socket that does as its peer, its network or its kernel might on a bad day.

    It takes over the descriptor of a socket: a client's, a connection's, or, to test a server, its listener's
    (``server.socket = Faulty(server.socket, accept=["EMFILE"])``). Bytes are counted both ways together.

    Example::

        with testing.serve(Handler) as served, Faulty(served.connect(), write_bytes=1) as client:
            client.sendall(b"one segment a byte")
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        read_bytes: int | None = None,
        write_bytes: int | None = None,
        reset_at: int | None = None,
        stall_at: int | None = None,
        accept: Iterable[int | str | None] = (),
        connections: dict[str, Any] | None = None,
    ) -> None:
        """Take over ``sock``, which cannot be used afterwards.

        Args:
            sock: the socket.
            read_bytes: the most that one read returns; 1 is a byte at a time.
            write_bytes: the most that one ``send`` takes, and the size of the pieces in which ``sendall`` sends.
            reset_at: after so many bytes the connection is reset; calls raise ConnectionResetError from then on.
            stall_at: after so many bytes nothing moves any more, until the timeout or until the socket is shut down.
            accept: what the next calls of ``accept`` do: raise an error, by number or name, or None to go well. Those
                after the last go well.
            connections: the faults of accepted connections, as keywords of this class.
        """
        timeout = sock.gettimeout()
        super().__init__(sock.family, sock.type, sock.proto, sock.detach())
        self.settimeout(timeout)
        self._read_bytes = read_bytes
        self._write_bytes = write_bytes
        self._reset_at = reset_at
        self._stall_at = stall_at
        self._accept_errors = [_number(error) for error in accept]
        self._connections = connections
        self._moved = 0
        self._was_reset = False
        if write_bytes is not None and self.family in (socket.AF_INET, socket.AF_INET6):
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else the kernel glues the pieces together

    def accept(self) -> tuple[socket.socket, Any]:
        """Take a connection, or raise the next error on the list.

        Raises:
            OSError: as listed, or as accept(2).
        """
        number = self._accept_errors.pop(0) if self._accept_errors else None
        if number is not None:
            raise OSError(number, os.strerror(number))
        connection, address = super().accept()
        if self._connections is not None:
            connection = Faulty(connection, **self._connections)
        return connection, address

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """Read, as the faults allow."""
        size = self._allow(bufsize, self._read_bytes)
        data = super().recv(size, flags)
        self._count(len(data))
        return data

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0, /) -> int:
        """Read into ``buffer``, as the faults allow; ``makefile`` reads by this."""
        with memoryview(buffer) as view:
            size = self._allow(nbytes or view.nbytes, self._read_bytes)
        read = super().recv_into(buffer, size, flags)
        self._count(read)
        return read

    def send(self, data: Any, flags: int = 0, /) -> int:
        """Write some of ``data``, as the faults allow."""
        with memoryview(data) as view, view.cast("B") as piece:
            size = self._allow(piece.nbytes, self._write_bytes)
            sent = super().send(piece[:size], flags)
        self._count(sent)
        return sent

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """Write all of ``data``, piece by piece."""
        with memoryview(data) as view, view.cast("B") as rest:
            done = 0
            while done < rest.nbytes:
                done += self.send(rest[done:], flags)

    def getsockopt(self, level: int, optname: int, buflen: int = 0, /) -> Any:
        """As ``socket.getsockopt``. Of a connection that was reset TCP_INFO tells so, as if its peer had done it."""
        if self._was_reset and (level, optname) == (socket.IPPROTO_TCP, socket.TCP_INFO):
            return bytes([_TCP_CLOSE]).ljust(buflen, b"\0")
        return super().getsockopt(level, optname, buflen)

    def _allow(self, wanted: int, limit: int | None) -> int:
        """Return how many bytes may move now, after the resets and stalls that are due."""
        if self._was_reset or (self._reset_at is not None and self._moved >= self._reset_at):
            self._reset()
        if self._stall_at is not None and self._moved >= self._stall_at:
            self._stall()
        bounds = [bound - self._moved for bound in (self._reset_at, self._stall_at) if bound is not None]
        positive = [bound for bound in bounds if bound > 0]
        return min([wanted, *positive, *([limit] if limit is not None else [])])

    def _count(self, moved: int) -> None:
        self._moved += moved

    def _reset(self) -> None:
        if not self._was_reset:
            self._was_reset = True
            self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._real_close()  # type: ignore[attr-defined]  # close() would wait for files of makefile()
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    def _stall(self) -> None:
        """Wait for the timeout, or for a shutdown of this end: a poll for nothing reports a hang-up all the same.

        Raises:
            TimeoutError: the timeout has passed.
            BlockingIOError: the socket does not block.
        """
        timeout = self.gettimeout()
        if timeout == 0:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        poller = select.poll()
        poller.register(self, 0)
        if not poller.poll(None if timeout is None else timeout * 1000):
            raise TimeoutError("timed out")


def _number(error: int | str | None) -> int | None:
    return getattr(errno, error) if isinstance(error, str) else error
