"""The connection under TLS on engines that block: an ``ssl.SSLSocket`` that ends well.

The standard library's own drops its TLS state in ``shutdown()``, so that a handler's next ``recv`` returns ciphertext,
and closes without telling the peer. This one keeps the state until it is closed, sends close_notify first, and never
waits for the peer's.
"""

from __future__ import annotations

import os
import socket
import ssl
from typing import Any

from harken.connection import peer_fault, shut

__all__ = ["Secured"]

# A close_notify on the wire is 31 bytes at the most (TLS 1.2 with CBC pads it to some more).
MAX_NOTIFY = 1024


class Secured(ssl.SSLSocket):
    """An accepted connection under TLS; the kernel waits. It tells its record when it closes."""

    record: Any = None
    _sslobj: Any
    _ended = False  # our side: close_notify was sent, or nothing can be sent any more

    def shutdown(self, how: int) -> None:
        """End one side or both. With SHUT_WR the peer is told by close_notify, and its data can still be read."""
        if how == socket.SHUT_WR:
            self._end_and_read_on()
        elif how == socket.SHUT_RDWR:
            self._end()
        socket.socket.shutdown(self, how)

    def part(self) -> None:
        """End our side when nobody will read on."""
        self._end()
        socket.socket.shutdown(self, socket.SHUT_WR)

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
        timeout = socket.socket.gettimeout(self)
        try:
            socket.socket.settimeout(self, 0.0)
            return not self._sslobj.read(1)
        except ssl.SSLZeroReturnError:
            return True
        except (OSError, ValueError):  # it has not; or the connection is broken
            return False
        finally:
            if self.fileno() >= 0:
                socket.socket.settimeout(self, timeout)

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
        timeout = self.gettimeout()
        try:
            socket.socket.settimeout(self, 0.0)
            self._sslobj.shutdown()
        except (OSError, ValueError):  # the usual end; or the connection has gone
            pass
        finally:
            if self.fileno() >= 0:
                socket.socket.settimeout(self, timeout)

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
        ahead = b""
        while more := self._sslobj.pending():  # the rest of a record, which OpenSSL would stumble over
            ahead += self._sslobj.read(more)
        timeout, fd = self.gettimeout(), self.fileno()
        with inner, outer:
            outer.setblocking(False)
            wire = os.dup(fd)
            try:
                os.dup2(inner.fileno(), fd, inheritable=False)
                socket.socket.settimeout(self, 0.0)
                self._sslobj.shutdown()
            except OSError:  # the usual
                pass
            finally:
                os.dup2(wire, fd, inheritable=False)
                os.close(wire)
                socket.socket.settimeout(self, timeout)
            self._send_on(outer)
        if self.record is not None and self.record.reason is not None:
            shut(self)  # who cut it in that moment met the pair
        self.__class__ = _HalfClosed
        self._ahead = ahead

    def _send_on(self, outer: socket.socket) -> None:
        try:
            socket.socket.sendall(self, outer.recv(MAX_NOTIFY))
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


class _HalfClosed(Secured):
    """After our end: what OpenSSL held comes first, and the peer's end is an end like any other."""

    _ahead = b""

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        """As ``ssl.SSLSocket.read``."""
        if self._ahead:
            piece, self._ahead = self._ahead[:len], self._ahead[len:]
            return give(piece, buffer)
        try:
            return super().read(len, buffer)
        except ssl.SSLZeroReturnError:
            return give(b"", buffer)

    def pending(self) -> int:
        """As ``ssl.SSLSocket.pending``."""
        return len(self._ahead) or super().pending()


def give(piece: bytes, buffer: Any) -> bytes | int:
    """Return what was read: as bytes, or in ``buffer`` and its length."""
    if buffer is None:
        return piece
    with memoryview(buffer) as view, view.cast("B") as target:
        target[: len(piece)] = piece
    return len(piece)
