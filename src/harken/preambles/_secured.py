"""The connection under TLS on engines that block: an ``ssl.SSLSocket`` that ends well.

The standard library's own drops its TLS state in ``shutdown()``, so that a handler's next ``recv`` returns ciphertext,
and closes without telling the peer. This one keeps the state until it is closed, sends close_notify first, and never
waits for the peer's.

Two threads on one connection
-----------------------------
A hook that says goodbye writes while the handler's thread waits in ``recv``. OpenSSL's objects are not for two threads
at once, and Python lets go of its lock within their calls (from 3.13 on it keeps a lock of its own: then the goodbye
would wait for the read). So a connection that is shared never waits within OpenSSL: its calls are made one at a time
and without waiting, and the waiting is done by poll() in between. What one write has begun it ends, before another may.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import nullcontext
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from harken.connection import kept_open, peer_fault, shut
from harken.unpatched import Socket, original, rebased

if TYPE_CHECKING:
    from ssl import SSLSocket as SSLSocket  # noqa: PLC0414 - the class, which gevent replaces
else:
    SSLSocket = original("ssl", "SSLSocket")
    if not issubclass(SSLSocket, Socket):  # ssl was first imported when gevent had patched socket
        SSLSocket = rebased(SSLSocket, Socket)

__all__ = ["SSLSocket", "Secured"]

# A close_notify on the wire is 31 bytes at the most (TLS 1.2 with CBC pads it to some more).
MAX_NOTIFY = 1024


T = TypeVar("T")


class Secured(SSLSocket):
    """An accepted connection under TLS; the kernel waits. It tells its record when it closes."""

    record: Any = None
    _sslobj: Any
    _closed: bool  # socket.socket's own, with _io_refs
    _io_refs: int
    _ended = False  # our side: close_notify was sent, or nothing can be sent any more
    _ahead = b""  # what OpenSSL held when our side ended: it comes first
    _turns: Turns | None = None

    def share(self) -> None:
        """From now on another thread may send while one receives. Called before the other can."""
        if self._turns is None:
            self._turns = Turns()

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        """As ``ssl.SSLSocket.read``; after our end the peer's is an end like any other."""
        read = super().read
        if self._turns is not None:
            return self._turns.take(self, lambda: self._read_on(read, len, buffer))
        return self._read_on(read, len, buffer) if self._ended else read(len, buffer)

    def _read_on(self, read: Callable[..., Any], len: int, buffer: Any) -> Any:
        if self._ahead:
            return give(self._take(len if buffer is None else size_of(buffer, len)), buffer)
        try:
            return read(len, buffer)
        except ssl.SSLZeroReturnError:
            if not self._ended:
                raise
            return give(b"", buffer)

    def _take(self, size: int) -> bytes:
        piece, self._ahead = self._ahead[:size], self._ahead[size:]
        return piece

    def pending(self) -> int:
        """As ``ssl.SSLSocket.pending``."""
        return len(self._ahead) or super().pending()

    def send(self, data: Any, flags: int = 0) -> int:
        """As ``ssl.SSLSocket.send``."""
        if self._turns is None:
            return super().send(data, flags)
        send = super().send
        with self._turns.writing:
            return self._turns.take(self, lambda: send(data, flags))

    def shutdown(self, how: int) -> None:
        """End one side or both. With SHUT_WR the peer is told by close_notify, and its data can still be read."""
        was_open = self.fileno() >= 0
        if how == socket.SHUT_WR:
            self._end_and_read_on()
        elif how == socket.SHUT_RDWR:
            self._end()
        try:
            Socket.shutdown(self, how)
        except OSError:
            if not was_open or self.fileno() >= 0:
                raise  # else the peer answered our close_notify at once, and the handler has closed all

    def part(self) -> None:
        """End our side when nobody will read on."""
        self._end()
        Socket.shutdown(self, socket.SHUT_WR)

    def end(self) -> bool:
        """Say goodbye and close, as ``part`` and ``close`` do, without telling the record; see ``Connection.end``."""
        record, self.record = self.record, None
        try:
            self.part()
        except OSError:
            pass  # the peer, or the handler, was quicker
        if kept_open(self, record):
            return False
        self._let_go()
        return True

    def fall_silent(self) -> None:
        """Say nothing more, not even goodbye: a reset is to come, and close_notify would pass for an answer's end."""
        self._ended = True

    def unwrap(self) -> socket.socket:
        """End TLS and go on in plain text, which takes the peer's close_notify too; see ``ssl.SSLSocket.unwrap``."""
        plain = super().unwrap()
        self._ended = True
        return plain

    @property
    def far_end(self) -> str | None:
        """Why the peer is gone, if it is: by the kernel, or by close_notify, of which the kernel hears a moment later.

        For when nothing more will be read.
        """
        return peer_fault(self) or ("peer_closed" if self._peer_has_ended() else None)

    def _peer_has_ended(self) -> bool:
        if self._sslobj is None:
            return False
        timeout = Socket.gettimeout(self)
        try:
            Socket.settimeout(self, 0.0)
            return not self._sslobj.read(1)
        except ssl.SSLZeroReturnError:
            return True
        except (OSError, ValueError):  # it has not; or the connection is broken
            return False
        finally:
            if self.fileno() >= 0:
                Socket.settimeout(self, timeout)

    def broken_by(self, error: BaseException) -> bool:
        """Tell whether ``error`` is this connection's own: TLS was broken off or violated, which nobody here did.

        A handler may meet such errors on connections of its own making too.
        """
        if not isinstance(error, ssl.SSLError) or isinstance(error, (ssl.SSLWantReadError, ssl.SSLWantWriteError)):
            return False
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        return trace is not None and trace.tb_frame.f_locals.get("self") is self

    def _end(self) -> None:
        """Send close_notify, if that can be done at once: a peer that does not read must not keep us.

        OpenSSL then looks for the peer's. Data that it meets instead is lost, and with it what comes behind.
        """
        if self._ended or self._sslobj is None:
            return
        self._ended = True
        with self._turns.one if self._turns is not None else nullcontext():
            timeout = self.gettimeout()
            try:
                Socket.settimeout(self, 0.0)
                self._sslobj.shutdown()
            except (OSError, ValueError):  # the usual end; or the connection has gone
                pass
            finally:
                if self.fileno() >= 0:
                    Socket.settimeout(self, timeout)

    def _end_and_read_on(self) -> None:
        """Send close_notify without letting OpenSSL look for the peer's.

        Python's ``ssl`` cannot send it alone. So for that moment the descriptor leads to a pair of sockets of our own,
        where nothing can be read, and what was written there is sent on.
        """
        if self._ended or self._sslobj is None:
            return
        try:
            inner, outer = socket.socketpair()
        except OSError:  # no descriptor is left
            self._end()
            return
        self._ended = True
        with inner, outer:
            outer.setblocking(False)
            with self._turns.one if self._turns is not None else nullcontext():
                self._end_by(inner)
            self._send_on(outer)
        record = self.record  # another thread may close the connection
        if record is not None and record.reason is not None:
            shut(self)  # who cut it in that moment met the pair

    def _end_by(self, inner: socket.socket) -> None:
        """Let OpenSSL meet ``inner`` as it says close_notify, and nothing that it would stumble over."""
        while more := self._sslobj.pending():  # the rest of a record
            self._ahead += self._sslobj.read(more)
        timeout, fd = self.gettimeout(), self.fileno()
        wire = os.dup(fd)
        try:
            os.dup2(inner.fileno(), fd, inheritable=False)
            Socket.settimeout(self, 0.0)
            self._sslobj.shutdown()
        except OSError:  # the usual
            pass
        finally:
            os.dup2(wire, fd, inheritable=False)
            os.close(wire)
            Socket.settimeout(self, timeout)

    def _send_on(self, outer: socket.socket) -> None:
        try:
            Socket.sendall(self, outer.recv(MAX_NOTIFY))
        except OSError:
            pass  # TLS was broken and had nothing to say, or the peer has gone

    def _real_close(self) -> None:
        record, self.record = self.record, None
        if record is not None and record.reason is None:
            record.judge(self)
        try:
            self._end()
        finally:
            self._let_go()
            if record is not None:
                record.ended()

    def _let_go(self) -> None:
        super()._real_close()  # type: ignore[misc]


class Turns:
    """Who may call OpenSSL: one thread at a time; and who writes: one until all is written.

    Attributes:
        one: held within a call of OpenSSL, which does not wait.
        writing: held while one write waits, since OpenSSL takes a write that could not end up again with the same data.
    """

    def __init__(self) -> None:
        self.one = threading.Lock()
        self.writing = threading.Lock()

    def take(self, connection: Secured, operation: Callable[[], T]) -> T:
        """Return ``operation()``, waiting as the connection's timeout says between its turns.

        Raises:
            TimeoutError: the timeout is over.
            OSError: as ``operation``; with a timeout of 0 that it would have to wait.
        """
        deadline = None
        while True:
            with self.one:
                timeout = Socket.gettimeout(connection)
                Socket.settimeout(connection, 0.0)
                try:
                    return operation()
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                    if timeout == 0.0:
                        raise
                    event = select.POLLIN if isinstance(error, ssl.SSLWantReadError) else select.POLLOUT
                finally:
                    if connection.fileno() >= 0:
                        Socket.settimeout(connection, timeout)
            if timeout is not None and deadline is None:
                deadline = monotonic() + timeout
            _wait(connection.fileno(), event, deadline)


def _wait(fd: int, event: int, deadline: float | None) -> None:
    poll = select.poll()
    poll.register(fd, event)
    left = None if deadline is None else deadline - monotonic()
    if (left is not None and left <= 0) or not poll.poll(None if left is None else left * 1000):
        raise TimeoutError("timed out")


def size_of(buffer: Any, asked: int) -> int:
    """Return how much a read puts in ``buffer``: what was asked for, if that is something and there is room for it."""
    with memoryview(buffer) as view:
        return asked if 0 < asked < view.nbytes else view.nbytes


def give(piece: bytes, buffer: Any) -> bytes | int:
    """Return what was read: as bytes, or in ``buffer`` and its length."""
    if buffer is None:
        return piece
    with memoryview(buffer) as view, view.cast("B") as target:
        target[: len(piece)] = piece
    return len(piece)
