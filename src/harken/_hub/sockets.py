"""The fallback's connection: a ``socket.socket`` that never blocks its thread and looks as if it did."""

from __future__ import annotations

import _socket
import errno
import os
import select
import socket
import stat
import time
from collections.abc import Callable
from typing import Any

from harken import connection
from harken._hub import BUSY, TURN_BYTES, TURN_OPERATIONS
from harken._hub.files import Reader, Writer
from harken._hub.pending import flush_of, flush_to_leave
from harken._hub.wire import PIECE_SHIFT, Wire, give_way, here, wait
from harken.errors import DeadlineExceeded
from harken.tracing import tell, tell_call
from harken.traffic import unread
from harken.unpatched import family_of, kind_of, original

__all__ = ["Connection"]

_recv = _socket.socket.recv
_recv_into = _socket.socket.recv_into
_send = _socket.socket.send
_fileno = _socket.socket.fileno
_connect_ex = _socket.socket.connect_ex
_DONTWAIT = int(getattr(socket, "MSG_DONTWAIT", 0))  # its own type costs a microsecond for each `|`
_WAITALL = int(getattr(socket, "MSG_WAITALL", 0))
_INET = (socket.AF_INET, socket.AF_INET6)
# Bytes that one sendfile(2) may send, so that a quick peer cannot keep the hub; as much as a turn allows.
_SENDFILE_BYTES = TURN_BYTES
# Seconds between attempts to connect to a Unix listener whose queue is full: there is nothing to wait for.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05


# Seconds that the standard library's sockets take at most: it counts nanoseconds in 63 bits.
_LONGEST_TIMEOUT = 2.0**63 / 1e9


def _wait_and_retry(wire: Wire, write: bool, call: Callable[[], Any]) -> Any:
    """Wait, then ``call()``, until that does not raise BlockingIOError; the timeout holds for all of it."""
    deadline = None if wire.timeout is None else time.monotonic() + wire.timeout
    while True:
        wait(wire, write, None if deadline is None else max(0.0, deadline - time.monotonic()))
        try:
            return call()
        except BlockingIOError:
            pass


def _has_failed(connection: Connection) -> bool:
    """Whether an error is all that is left to read, which is the next call's, as on a socket that blocks."""
    poller = original("select", "poll")()
    poller.register(_fileno(connection), 0)
    return bool(poller.poll(0)) and not unread(connection)


def _waiting(name: str, write: bool, flags_at: int) -> Callable[..., Any]:
    """Make the waiting form of a method of ``_socket.socket`` whose flags are its argument number ``flags_at``."""
    raw: Callable[..., Any] = getattr(_socket.socket, name)

    def method(self: Connection, *args: Any) -> Any:
        wire = self._wire
        if write and wire.writer is not None:
            self._refuse_to_part()
        flush_of(self)
        if wire.spent > TURN_OPERATIONS:
            give_way(wire)
        wire.spent += 1
        try:
            result = self._hushed(raw, self, *args)
        except BlockingIOError:
            if wire.timeout == 0.0 or (len(args) > flags_at and args[flags_at] & _DONTWAIT):
                raise
            result = _wait_and_retry(wire, write, lambda: self._hushed(raw, self, *args))
        if wire.traced:
            tell_call(self, name, args, result)
        return result

    method.__name__ = name
    method.__qualname__ = f"Connection.{name}"
    method.__doc__ = f"As ``socket.{name}``, waiting in the hub."
    return method


class Connection(connection.Connection):
    """See :mod:`harken._hub`."""

    __slots__ = ("_exposed", "_wire")
    reader_kind = Reader  # what open_reader() makes
    _wire: Wire
    _exposed: bool  # set once the descriptor was given out

    def __init__(self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None) -> None:
        super().__init__(family, type, proto, fileno)
        self._exposed = False
        _socket.socket.settimeout(self, 0.0)
        stream = family_of(self) in _INET and kind_of(self) == socket.SOCK_STREAM
        self._wire = Wire(_fileno(self), socket.getdefaulttimeout(), wet=not stream)

    # -- the descriptor ------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Return the descriptor; whoever uses that finds sent what was written, and that it blocks as a socket does."""
        flush_to_leave(self)
        if not self._exposed:
            self._exposed = True
            self._show_flags()  # from now on the program may have set them itself
        return super().fileno()

    def dup(self) -> Connection:
        """As ``socket.dup``; both have one set of flags from now on, whatever the new one's constructor has done."""
        other: Connection = super().dup()
        other._exposed = True
        self._show_flags()
        return other

    def _show_flags(self) -> None:
        """Leave the descriptor, if anybody has asked for it, as the standard library's sockets do theirs.

        Programs read(2) it, make another of it, or start a child on it. Here all goes by MSG_DONTWAIT.
        """
        fd = _fileno(self)
        if self._exposed and fd >= 0 and _DONTWAIT:
            os.set_blocking(fd, self._wire.timeout is None)

    def _hushed(self, call: Callable[..., Any], *args: Any) -> Any:
        """Return ``call(*args)``, which has no MSG_DONTWAIT and is not to block."""
        fd = _fileno(self)
        if not self._exposed or fd < 0 or self._wire.timeout is not None or not _DONTWAIT:
            return call(*args)
        blocked = os.get_blocking(fd)
        os.set_blocking(fd, False)
        try:
            return call(*args)
        finally:
            if _fileno(self) >= 0:
                os.set_blocking(fd, blocked)

    # -- reading -------------------------------------------------------------------------------------------------------

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """Read at most ``bufsize`` bytes, waiting in the hub for the first."""
        wire = self._wire
        if wire.spent > TURN_OPERATIONS:
            give_way(wire)
        if flags & _WAITALL and not flags & socket.MSG_PEEK and wire.timeout != 0.0:
            return self._recv_whole(bufsize, flags)
        data = None
        if not wire.dry or flags or wire.timeout == 0.0 or bufsize <= 0:
            try:
                data = _recv(self, bufsize, flags | _DONTWAIT)
            except BlockingIOError:
                if wire.timeout == 0.0 or flags & _DONTWAIT:
                    raise
        if data is None:
            data = _wait_and_retry(wire, False, lambda: _recv(self, bufsize, flags | _DONTWAIT))
        size = len(data)
        wire.spent += 1 + (size >> PIECE_SHIFT)
        if 0 < size < bufsize and not flags and not wire.wet:
            wire.dry = True
        if wire.traced:
            tell_call(self, "recv", (bufsize, flags), data)
        return data

    def _recv_whole(self, bufsize: int, flags: int) -> bytes:
        """Read as much as was asked for, or what came before the end, an error or the timeout."""
        wire, data = self._wire, b""
        deadline = None if wire.timeout is None else time.monotonic() + wire.timeout
        try:
            while not data or (len(data) < bufsize and not _has_failed(self)):
                try:
                    piece = _recv(self, bufsize - len(data), flags | _DONTWAIT)
                except BlockingIOError:
                    if flags & _DONTWAIT:
                        raise
                    wait(wire, False, None if deadline is None else max(0.0, deadline - time.monotonic()))
                    continue
                if not piece:
                    break
                data += piece
        except DeadlineExceeded:  # is for the green thread, not an end of this operation
            raise
        except OSError:
            if not data:
                raise
        wire.spent += 1 + (len(data) >> PIECE_SHIFT)
        if wire.traced:
            tell_call(self, "recv", (bufsize, flags), data)
        return data

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Read into ``buffer``, waiting in the hub for the first byte."""
        wire = self._wire
        if wire.spent > TURN_OPERATIONS:
            give_way(wire)
        if flags & _WAITALL and not flags & socket.MSG_PEEK and wire.timeout != 0.0:
            with memoryview(buffer) as view, view.cast("B") as target:
                data = self._recv_whole(nbytes or len(target), flags)
                target[: len(data)] = data
            return len(data)
        size = None
        if not wire.dry or flags or wire.timeout == 0.0 or not _has_room(buffer, nbytes):
            try:
                size = _recv_into(self, buffer, nbytes, flags | _DONTWAIT)
            except BlockingIOError:
                if wire.timeout == 0.0 or flags & _DONTWAIT:
                    raise
        if size is None:
            with memoryview(buffer):  # which nobody is to resize meanwhile
                size = _wait_and_retry(wire, False, lambda: _recv_into(self, buffer, nbytes, flags | _DONTWAIT))
        wire.spent += 1 + (size >> PIECE_SHIFT)
        if 0 < size < (nbytes or memoryview(buffer).nbytes) and not flags and not wire.wet:
            wire.dry = True
        if wire.traced:
            tell_call(self, "recv_into", (buffer, nbytes, flags), size)
        return size

    _recvfrom = _waiting("recvfrom", write=False, flags_at=1)
    _recvfrom_into = _waiting("recvfrom_into", write=False, flags_at=2)
    _recvmsg = _waiting("recvmsg", write=False, flags_at=2)
    _recvmsg_into = _waiting("recvmsg_into", write=False, flags_at=2)

    def _wants_all(self, flags: int) -> bool:
        """Whether a call with these flags is to return as much as was asked for: of a stream."""
        stream = family_of(self) in _INET and kind_of(self) == socket.SOCK_STREAM
        return bool(flags & _WAITALL) and not flags & socket.MSG_PEEK and self._wire.timeout != 0.0 and stream

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, Any]:
        """As ``socket.recvfrom``, waiting in the hub."""
        if self._wants_all(flags):
            return self.recv(bufsize, flags), None
        return self._recvfrom(bufsize, flags)  # type: ignore[no-any-return]

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, Any]:
        """As ``socket.recvfrom_into``, waiting in the hub."""
        if self._wants_all(flags):
            return self.recv_into(buffer, nbytes, flags), None
        return self._recvfrom_into(buffer, nbytes, flags)  # type: ignore[no-any-return]

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /) -> tuple[bytes, list[Any], int, Any]:
        """As ``socket.recvmsg``, waiting in the hub."""
        if self._wants_all(flags) and not ancbufsize:
            return self.recv(bufsize, flags), [], 0, None
        return self._recvmsg(bufsize, ancbufsize, flags)  # type: ignore[no-any-return]

    def recvmsg_into(self, buffers: Any, ancbufsize: int = 0, flags: int = 0, /) -> tuple[int, list[Any], int, Any]:
        """As ``socket.recvmsg_into``, waiting in the hub."""
        parts = tuple(buffers)
        if not self._wants_all(flags) or ancbufsize:
            return self._recvmsg_into(parts, ancbufsize, flags)  # type: ignore[no-any-return]
        data = self.recv(sum(memoryview(part).nbytes for part in parts), flags)
        rest = memoryview(data)
        for part in parts:
            with memoryview(part) as view, view.cast("B") as target:
                size = min(len(target), len(rest))
                target[:size], rest = rest[:size], rest[size:]
        return len(data), [], 0, None

    # -- writing -------------------------------------------------------------------------------------------------------

    def send(self, data: Any, flags: int = 0, /) -> int:
        """Send ``data``, waiting in the hub for room; return how many bytes.

        Without a timeout that is all of it, or what went before an error, as on a socket that blocks: programs do not
        look at the number. With one it is some, as on Python's sockets.
        """
        wire = self._wire
        if wire.writer is not None:
            self._refuse_to_part()
        flush_of(self)
        if wire.spent > TURN_OPERATIONS:
            give_way(wire)
        sent = None
        try:
            sent = _send(self, data, flags | _DONTWAIT)
        except BlockingIOError:
            if wire.timeout == 0.0 or flags & _DONTWAIT:
                raise
        if sent is None:
            sent = _wait_and_retry(wire, True, lambda: _send(self, data, flags | _DONTWAIT))
        if self._blocks(flags):
            sent = self._send_on(data, sent, flags)
        wire.spent += 1 + (sent >> PIECE_SHIFT)
        if wire.traced:
            tell_call(self, "send", (data,), sent)
        return sent

    def try_send(self, data: Any) -> int:
        """Send what there is room for; nobody else has a turn meanwhile.

        Raises:
            BlockingIOError: there is none.
        """
        wire = self._wire
        if wire.writer is not None:
            self._refuse_to_part()
        sent: int = _send(self, data, _DONTWAIT)
        wire.spent += 1 + (sent >> PIECE_SHIFT)
        if wire.traced:
            tell_call(self, "send", (data,), sent)
        return sent

    def _refuse_to_part(self) -> None:
        """Another green thread waits to send the rest of its bytes: none are to come between.

        Raises:
            RuntimeError: this is a stream, where they would; and the rest is not what was joined, which goes first.
        """
        pending = self._wire.pending
        if kind_of(self) == socket.SOCK_STREAM and (pending is None or pending.sock is not self):
            raise RuntimeError(BUSY)

    def _blocks(self, flags: int) -> bool:
        """Whether a socket of the standard library would block in send(2)."""
        return self._wire.timeout is None and not flags & _DONTWAIT

    def _send_on(self, data: Any, sent: int, flags: int) -> int:
        """Go on where some was sent, until all is, or until an error, which the next call meets; return how much."""
        with memoryview(data) as view, view.cast("B") as rest:
            while sent < len(rest):
                try:
                    wait(self._wire, True, None)
                    sent += _send(self, rest[sent:], flags | _DONTWAIT)
                except BlockingIOError:
                    pass
                except DeadlineExceeded:  # is for the green thread, not an end of this operation
                    raise
                except OSError:
                    break
        return sent

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """Send all of ``data``, waiting in the hub for room; ``timeout`` bounds the whole."""
        wire = self._wire
        if wire.writer is not None:
            self._refuse_to_part()
        flush_of(self)
        if wire.spent > TURN_OPERATIONS:
            give_way(wire)
        deadline = None if wire.timeout is None else time.monotonic() + wire.timeout
        sent = 0
        try:
            sent = _send(self, data, flags | _DONTWAIT)
        except BlockingIOError:
            if wire.timeout == 0.0:
                raise
        wire.spent += 1 + (sent >> PIECE_SHIFT)
        if wire.traced:
            tell_call(self, "sendall", (data,), None)
        if type(data) is bytes and sent == len(data):
            return
        with memoryview(data) as view, view.cast("B") as rest:
            self._send_rest(rest, sent, flags, deadline)

    def _send_rest(self, data: memoryview, sent: int, flags: int, deadline: float | None) -> None:
        wire = self._wire
        while sent < len(data):
            if wire.timeout != 0.0:
                wait(wire, True, None if deadline is None else max(0.0, deadline - time.monotonic()))
            try:
                sent += _send(self, data[sent:], flags | _DONTWAIT)
            except BlockingIOError:
                if wire.timeout == 0.0:
                    raise

    _sendto = _waiting("sendto", write=True, flags_at=2)
    _sendmsg = _waiting("sendmsg", write=True, flags_at=2)

    def sendto(self, data: Any, *args: Any) -> int:
        """As ``socket.sendto``, waiting in the hub; how much, see :meth:`send`."""
        sent: int = self._sendto(data, *args)
        flags = args[0] if len(args) > 1 else 0
        return self._send_on(data, sent, flags) if self._blocks(flags) else sent

    def sendmsg(self, buffers: Any, ancdata: Any = (), flags: int = 0, *address: Any) -> int:
        """As ``socket.sendmsg``, waiting in the hub; how much, see :meth:`send`."""
        parts = tuple(buffers)
        sent: int = self._sendmsg(parts, ancdata, flags, *address)
        if not self._blocks(flags) or sent == sum(memoryview(part).nbytes for part in parts):
            return sent
        return self._send_on(b"".join(parts), sent, flags)

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """Send a file or a part of it, by the kernel where that can be; return how many bytes."""
        self._check_sendfile_params(file, offset, count)  # type: ignore[attr-defined]
        flush_of(self)
        size = _regular_size(file)
        if size is None or self._wire.timeout == 0.0:
            return self._sendfile_use_send(file, offset, count)  # type: ignore[attr-defined, no-any-return]
        end = size if count is None else min(size, offset + count)
        sent = 0
        try:
            while offset + sent < end:
                part = self._send_part(file.fileno(), offset + sent, min(end - offset - sent, _SENDFILE_BYTES))
                if not part:
                    break  # the file has got shorter
                sent += part
        finally:
            if sent:
                file.seek(offset + sent)
        return sent

    def _send_part(self, file: int, offset: int, size: int) -> int:
        wire = self._wire
        if wire.writer is not None:
            self._refuse_to_part()
        if wire.spent > TURN_OPERATIONS:
            give_way(wire)

        def attempt() -> int:
            return int(self._hushed(os.sendfile, _fileno(self), file, offset, size))

        try:
            sent = attempt()
        except BlockingIOError:
            sent = _wait_and_retry(wire, True, attempt)
        wire.spent += 1 + (sent >> PIECE_SHIFT)
        if wire.traced:
            tell(self, True, b"", sent)
        return sent

    def trace(self, yes: bool, /) -> None:
        """Tell what moves, or no more; see the contract."""
        self._wire.traced = yes

    # -- files ---------------------------------------------------------------------------------------------------------

    def waits_for(self) -> str | None:
        """Return ``reading``, ``writing`` or None: what its green thread waits for at the moment. Any thread."""
        wire = self._wire
        if wire.writer is not None:
            return "writing"
        return None if wire.reader is None and wire.guest is None else "reading"

    def open_reader(self, size: int = -1, /) -> Reader:
        """Return a buffered file to read; see the contract."""
        return self.reader_kind(self, size)

    def open_writer(self, reader: Any = None, /) -> Writer:
        """Return a file to write; see the contract."""
        return Writer(self, reader)

    # -- connecting ----------------------------------------------------------------------------------------------------

    def connect(self, address: Any, /) -> None:
        """Connect, waiting in the hub. A host name is looked up by blocking the thread; ``harken.green`` does not."""
        error = self._try_connect(address)
        if error:
            raise OSError(error, os.strerror(error))

    def connect_ex(self, address: Any, /) -> int:
        """As ``connect``, but return the error's number: EAGAIN after the timeout, as the socket module does."""
        try:
            return self._try_connect(address)
        except DeadlineExceeded:
            raise
        except TimeoutError:
            return errno.EAGAIN

    def _try_connect(self, address: Any) -> int:
        wire = self._wire
        deadline = None if wire.timeout is None else time.monotonic() + wire.timeout
        pause = _FIRST_PAUSE
        error = self._hushed(_connect_ex, self, address)
        while error in (errno.EINPROGRESS, errno.EALREADY, errno.EAGAIN) and wire.timeout != 0.0:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if error == errno.EAGAIN:
                if left == 0.0:
                    raise TimeoutError("timed out")
                pause = _rest(pause, left)
            else:
                wait(wire, True, left)
            error = self._hushed(_connect_ex, self, address)
            if error == errno.EISCONN:
                error = 0
        return int(error)

    def accept(self) -> tuple[Connection, Any]:
        """Take a connection from a listener, waiting in the hub."""
        fd, address = self._accept()
        return Connection(family_of(self), kind_of(self), self.proto, fd), address

    @classmethod
    def take(cls, listener: socket.socket, most: int, /) -> list[tuple[Connection, Any]]:
        """Accept what is at the door, without waiting; see the contract."""
        taken: list[tuple[Connection, Any]] = []
        quiet = listener.gettimeout() == 0.0
        parts = family_of(listener), kind_of(listener), listener.proto
        while len(taken) < most and (quiet or select.select([listener], [], [], 0)[0]):
            try:
                fd, address = listener._accept()  # type: ignore[attr-defined]
            except BlockingIOError:
                break
            except OSError:
                if not taken:
                    raise
                break  # the next call meets it
            taken.append((cls(*parts, fd), address))
        return taken

    _accept = _waiting("_accept", write=False, flags_at=0)

    # -- time-outs -----------------------------------------------------------------------------------------------------

    def settimeout(self, value: float | None, /) -> None:
        """Set the seconds that one operation may take; None waits without end, 0 does not wait."""
        if value is not None:
            value = value + 0.0  # what is no number is a TypeError
            if not value >= 0.0:
                raise ValueError("Timeout value out of range")
            if value > _LONGEST_TIMEOUT:
                raise OverflowError("timeout is too large")
        self._wire.timeout = value
        self._show_flags()

    def gettimeout(self) -> float | None:
        """Return what ``settimeout`` was given."""
        return self._wire.timeout

    def setblocking(self, flag: bool, /) -> None:
        """As ``settimeout(None)`` or ``settimeout(0.0)``."""
        self._wire.timeout = None if flag else 0.0
        self._show_flags()

    def getblocking(self) -> bool:
        """Tell whether operations wait."""
        return self._wire.timeout != 0.0

    @property
    def timeout(self) -> float | None:
        """The timeout in seconds."""
        return self._wire.timeout

    # -- the end -------------------------------------------------------------------------------------------------------

    def shutdown(self, how: int, /) -> None:
        """As ``socket.shutdown``, once what was written is sent."""
        flush_to_leave(self)
        super().shutdown(how)

    def settle(self) -> bool:
        """Send what was written; see the contract."""
        self._send_last()
        return True

    def detach(self) -> int:
        """Give the descriptor away, blocking if this socket did."""
        wire = self._wire
        self._send_last()
        wire.release()
        fd = super().detach()
        wire.fd = -1
        if fd >= 0 and wire.timeout is None:
            os.set_blocking(fd, True)
        return fd

    def _real_close(self, *_: Any) -> None:
        wire = getattr(self, "_wire", None)  # None: its constructor failed
        if wire is not None:
            self._send_last()
            wire.release()
        super()._real_close()
        if wire is not None:
            wire.fd = -1

    far_end: str | None = None  # the kernel is asked

    def end(self) -> bool:
        """Tell the peer that nothing more comes, and close; see the contract."""
        record, self.record = getattr(self, "record", None), None
        try:
            self.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the peer, or the handler, was quicker
        self.close()
        if _fileno(self) >= 0:
            self.record = record
        return _fileno(self) < 0

    def _send_last(self) -> None:
        try:
            flush_to_leave(self)
        except OSError:
            pass  # the peer has gone: nobody is left to be told

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Travel to another process, where it blocks by ``poll()``: the flags of the descriptor are shared."""
        from multiprocessing import reduction

        return _rebuild, (reduction.DupFd(self.fileno()), int(self.family), int(self.type), self.proto)


def _rebuild(duplicate: Any, family: int, kind: int, proto: int) -> Connection:
    return Connection(family, kind, proto, duplicate.detach())


def _has_room(buffer: Any, nbytes: int) -> bool:
    """Whether ``recv_into`` of these may wait; the others are refused at once, or ask for nothing."""
    with memoryview(buffer) as view:
        return not view.readonly and 0 < (nbytes or view.nbytes) <= view.nbytes


def _rest(pause: float, left: float | None) -> float:
    """Wait for ``pause`` seconds, at most ``left``; return the next pause."""
    sleep = here.hub.sleep if here.hub is not None else time.sleep
    sleep(pause if left is None else min(pause, left))
    return min(2 * pause, _LONGEST_PAUSE)


def _regular_size(file: Any) -> int | None:
    """The size of a regular file, or None for anything else."""
    try:
        about = os.fstat(file.fileno())
    except (AttributeError, OSError, ValueError):  # io.UnsupportedOperation is both of the latter
        return None
    return about.st_size if stat.S_ISREG(about.st_mode) and hasattr(os, "sendfile") else None
