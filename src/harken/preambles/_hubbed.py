"""The connection under TLS on a hub: a real ``ssl.SSLSocket`` over memory, and a hub's connection for the wire.

OpenSSL never sees the descriptor. What comes in is fed to it and what it has to say is sent, by the hub's connection
that this one is made of, so that waiting, timeouts and fairness are the hub's. A read looks into memory first and
receives only when nothing is there, and receives whole records: OpenSSL is not asked in vain.
"""

from __future__ import annotations

import _socket
import socket
import ssl
import time
from operator import index
from typing import Any

from harken import _hub
from harken.preambles._secured import Secured, give, size_of
from harken.tracing import tell_call
from harken.unpatched import Socket, family_of, kind_of, proto_of

__all__ = ["Hubbed"]

# The largest piece of plain text in a TLS record, RFC 8446, 5.1.
PIECE = 16384
# One record on the wire at the most: 16 KiB of plain text, 2 KiB of expansion (TLS 1.2; RFC 5246, 6.2.3), the header.
# Memory BIOs never shrink, so they are fed and emptied by such slices: 64 KiB at once would stay 68 KiB for ever.
SLICE = PIECE + 2048 + 5
# What is encrypted and sent at once: more records in one system call, for a moment's memory.
BATCH = 4 * PIECE
# What may be received without data in it, one read after the other: more than a client's certificates are in OpenSSL
# (100 KiB, SSL_CTX_set_max_cert_list(3)). Go breaks off after 16 such records.
MOST_IN_VAIN = 8 * PIECE
# What of it may be received before others have their turn: some 190 updates of a key, of 22 bytes each. Over ssl's own
# sockets one took 20 µs, system calls and all, on a machine on which an echo of 64 bytes took 10.
VAIN_A_TURN = 4096


def _give_way() -> None:
    """Let the other green threads have their turn, if this is one."""
    hub = _hub.current()
    if hub is not None:
        hub.sleep(0)


class Hubbed(Secured):
    """A connection under TLS; the hub waits. Two green threads may use it, one reading and one writing."""

    # In slots, where compiled methods find them.
    __slots__ = (
        "_ahead",
        "_broken",
        "_context",
        "_ended",
        "_guard",
        "_incoming",
        "_inner",
        "_outgoing",
        "_rest",
        "_sslobj",
        "_traced",
        "record",
    )

    # What ssl.SSLSocket keeps in each of its objects, and here is the same in all.
    _session = None
    _connected = True
    server_side = True
    server_hostname: str | None = None
    do_handshake_on_connect = False
    suppress_ragged_eofs = True

    _begun = 0  # bytes of plain text whose record could not be sent whole without waiting: a write is to be repeated

    reader_kind = _hub.Reader  # what open_reader() makes

    _inner: Any
    _sslobj: Any
    _incoming: ssl.MemoryBIO
    _outgoing: ssl.MemoryBIO
    _guard: Any
    _context: ssl.SSLContext
    _ahead: bytes
    # What stands before the next write: None nothing; else bytes that were not sent yet, or b"" while others send.
    _rest: bytes | None
    _broken: bool  # a record was cut in the middle: nothing that we send can be understood any more
    _traced: bool

    @classmethod
    def over(cls, inner: Any, context: ssl.SSLContext, first: bytes = b"", *, client_of: str | None = None) -> Hubbed:
        """Take over a hub's connection. The TLS handshake is still to be done.

        Args:
            inner: the connection; it stays the owner of the descriptor, and its record is the caller's to move.
            context: for our side.
            first: what was received already.
            client_of: the server's name, where we are the client.
        """
        self = cls.__new__(cls)
        if client_of is not None:
            self.server_side, self.server_hostname = False, client_of
        self._stand_for(inner)
        self.record = None
        self._inner = inner
        self._ahead, self._rest = b"", None
        self._broken = self._traced = self._ended = False
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._incoming.write(first)
        self._guard = _hub.Guard()  # OpenSSL lets go of the GIL, and programs have other threads too
        self._context = context
        self._sslobj = context._wrap_bio(  # type: ignore[attr-defined]
            self._incoming, self._outgoing, server_side=self.server_side, server_hostname=client_of, owner=self
        )
        return self

    def _stand_for(self, inner: Any) -> None:
        """Become a socket of the same descriptor, which asks nobody to wait: the hub does."""
        Socket.__init__(self, family_of(inner), kind_of(inner), proto_of(inner), _socket.socket.fileno(inner))
        _socket.socket.settimeout(self, 0.0)

    def fileno(self) -> int:
        """Return the descriptor, as any socket; the hub's connection notes that somebody has it."""
        return self._inner.fileno()  # type: ignore[no-any-return]

    # -- reading -------------------------------------------------------------------------------------------------------

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """Read at most ``buflen`` bytes, waiting in the hub for the first."""
        if self._sslobj is None:
            return self._plain(buflen, flags)
        if flags:
            raise ValueError(f"non-zero flags not allowed in calls to recv() on {type(self)}")
        return self.read(buflen)  # type: ignore[no-any-return]

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        """Read into ``buffer``, waiting in the hub for the first byte."""
        with memoryview(buffer) as view:
            if view.readonly:
                raise TypeError(f"recv_into() needs a buffer that can be written to, not {type(buffer).__name__}")
            nbytes = nbytes or view.nbytes
        if self._sslobj is None:
            return give(self._plain(nbytes, flags), buffer)  # type: ignore[return-value]
        if flags:
            raise ValueError(f"non-zero flags not allowed in calls to recv_into() on {type(self)}")
        return self.read(nbytes, buffer)  # type: ignore[no-any-return]

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        """As ``ssl.SSLSocket.read``, waiting in the hub."""
        sslobj, incoming = self._sslobj, self._incoming
        if sslobj is None:
            raise ValueError("Read on closed or unwrapped SSL socket.")
        size = index(len) if buffer is None else size_of(buffer, len)
        if size < 0:
            raise ValueError("size should not be negative")
        if self._ahead:
            return give(self._take(size), buffer)
        vain = 0
        while True:
            held = incoming.pending
            if held or incoming.eof or sslobj.pending():
                try:
                    with self._guard:
                        if piece := self._take(size):  # another thread has begun to end the connection meanwhile
                            return give(piece, buffer)
                        read = sslobj.read(size) if buffer is None else sslobj.read(size, buffer)
                    if not read and size:
                        incoming.write_eof()  # it has said close_notify, and may wait for ours: no read waits again
                    if self._traced:
                        tell_call(self, "read", (len, buffer), read)
                    return read
                except ssl.SSLError as error:
                    if self._judge(error) is not None:
                        return give(b"", buffer)
                    vain += held
            elif not size:
                return give(b"", buffer)
            self._feed_behind(vain)

    def _judge(self, error: Exception) -> bytes | None:
        """Return what a read that ended so has read: nothing at the end, None when more is to be fed."""
        if isinstance(error, ssl.SSLWantReadError):
            return None
        if isinstance(error, ssl.SSLZeroReturnError) or (
            isinstance(error, ssl.SSLEOFError) and self.suppress_ragged_eofs
        ):
            return b""
        if isinstance(error, ssl.SSLError):
            self._send_last()  # OpenSSL's alert
            self._incoming.write_eof()  # no read may wait for more: OpenSSL has given up
        raise error

    def _fail(self, error: Exception) -> None:
        """Raise ``error``, which a compiled method met: the frame tells :meth:`broken_by` whose it is."""
        raise error

    def _tell(self, method: str, argument: Any, result: Any) -> None:
        """Tell whoever traces of a compiled method's call."""
        tell_call(self, method, (argument,), result)

    def _flush(self) -> None:
        """Send what OpenSSL has to say of its own accord, unless a write is under way."""
        if self._outgoing.pending and self._rest is None:
            self._send(self._outgoing.read())

    def _feed(self) -> None:
        """Wait for more from the peer; what OpenSSL has to say to it goes first."""
        try:
            self._flush()
        except ConnectionError:
            data = self._left_behind()
            if not data:
                raise
        else:
            data = self._receive()
        with self._guard:
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()

    def _feed_behind(self, vain: int) -> None:
        """As :meth:`_feed`, behind so many bytes without data: who sends such keeps nobody waiting, and is cut off."""
        if vain > MOST_IN_VAIN:
            self._refuse_more()
        if vain >= VAIN_A_TURN:
            _give_way()
        self._feed()

    def _refuse_more(self) -> None:
        """The peer sends and sends, and none of it is data."""
        self._incoming.write_eof()
        raise ssl.SSLError(ssl.SSL_ERROR_SSL, f"the peer sent {MOST_IN_VAIN} bytes of records without data")

    def _receive(self) -> bytes:
        try:
            return self._inner.recv(SLICE)  # type: ignore[no-any-return]
        except BlockingIOError:
            raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "The operation did not complete (read)") from None

    def _left_behind(self) -> bytes:
        """Return what a peer had sent that is gone now: it can still be read, whatever was to be said to it."""
        try:
            return self._inner.recv(SLICE, socket.MSG_DONTWAIT)  # type: ignore[no-any-return]
        except OSError:
            return b""

    def _plain(self, size: int, flags: int) -> bytes:
        """After ``unwrap``: what came behind the peer's close_notify is first."""
        if self._ahead:
            return self._ahead[:size] if flags & socket.MSG_PEEK else self._take(size)
        return self._inner.recv(size, flags)  # type: ignore[no-any-return]

    def recvfrom(self, buflen: int = 1024, flags: int = 0) -> tuple[bytes, Any]:
        """As ``socket.recvfrom``, waiting in the hub; only after ``unwrap``."""
        return super().recvfrom(buflen, flags) if self._sslobj is not None else (self._plain(buflen, flags), None)

    def recvfrom_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> tuple[int, Any]:
        """As ``socket.recvfrom_into``, waiting in the hub; only after ``unwrap``."""
        if self._sslobj is not None:
            return super().recvfrom_into(buffer, nbytes, flags)
        return self.recv_into(buffer, nbytes, flags), None

    def pending(self) -> int:
        """Return how many bytes can be read at once, without the descriptor's becoming readable."""
        sslobj = self._sslobj
        if sslobj is None:
            return 0
        with self._guard:
            self._look(sslobj)
        return len(self._ahead) or sslobj.pending()

    def _look(self, sslobj: Any) -> None:
        """Read ahead, if there is nothing yet that can be read at once. With the guard."""
        if not self._ahead and not sslobj.pending() and self._incoming.pending:
            try:
                self._ahead = sslobj.read(PIECE)
            except OSError:  # half a record; or an error, which the next read meets again
                pass

    def open_reader(self, size: int = -1, /) -> Any:
        """Return a buffered file to read, which a timeout does not end, as it ends ``makefile``'s."""
        return self.reader_kind(self, size)

    # -- writing -------------------------------------------------------------------------------------------------------

    def send(self, data: Any, flags: int = 0) -> int:
        """Send ``data``, waiting in the hub for room; return how many bytes: all, if this socket waits."""
        if self._sslobj is None:
            return self._inner.send(data, flags)  # type: ignore[no-any-return]
        if flags:
            raise ValueError(f"non-zero flags not allowed in calls to send() on {type(self)}")
        return self.write(data)

    def write(self, data: Any) -> int:
        """As ``ssl.SSLSocket.write``, waiting in the hub."""
        if self._sslobj is None:
            raise ValueError("Write on closed or unwrapped SSL socket.")
        with memoryview(data) as view, view.cast("B") as plain:
            if self._begun or self.gettimeout() == 0.0:
                return self._write_at_once(plain)
            for start in range(0, len(plain), BATCH):
                with plain[start : start + BATCH] as piece:
                    self._encrypt(piece)
            return len(plain)

    def _write_at_once(self, plain: memoryview) -> int:
        """Send one record at the most, and return how much it holds, once all of it is with the kernel.

        Until then the same is to be written again, as OpenSSL has it: who was told that it is sent may only wait.
        """
        if not plain:
            return 0
        if len(plain) < self._begun:
            raise ssl.SSLError(ssl.SSL_ERROR_SSL, "bad write retry: there is less than what was begun")
        if self._begun:
            self._make_way()
        else:
            with plain[:PIECE] as piece:
                self._encrypt(piece)
                self._begun = len(piece)
            if self._rest is not None:
                raise ssl.SSLWantWriteError(ssl.SSL_ERROR_WANT_WRITE, "The operation did not complete (write)")
        size, self._begun = self._begun, 0
        return size

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send all of ``data``, waiting in the hub for room; the timeout bounds each part of 64 KiB."""
        if self._sslobj is None:
            self._inner.sendall(data, flags)
            return
        if flags:
            raise ValueError(f"non-zero flags not allowed in calls to sendall() on {type(self)}")
        if self._begun or self.gettimeout() == 0.0:
            self._send_all_at_once(data)
            return
        if type(data) is bytes and len(data) <= BATCH:
            self._encrypt(data)
            return
        with memoryview(data) as view, view.cast("B") as plain:
            for start in range(0, len(plain), BATCH):
                with plain[start : start + BATCH] as piece:
                    self._encrypt(piece)

    def _send_all_at_once(self, data: Any) -> None:
        with memoryview(data) as view, view.cast("B") as plain:
            sent = 0
            while sent < len(plain):
                sent += self.write(plain[sent:])

    def sendto(self, data: Any, *args: Any) -> int:
        """As ``socket.sendto``, waiting in the hub; only after ``unwrap``."""
        return super().sendto(data, *args) if self._sslobj is not None else self._inner.sendto(data, *args)

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """Send a file or a part of it, waiting in the hub."""
        plain = self._sslobj is None
        return self._inner.sendfile(file, offset, count) if plain else super().sendfile(file, offset, count)

    def _encrypt(self, plain: Any) -> None:
        """Send at most BATCH bytes."""
        if self._rest is not None:
            self._make_way()
        size = len(plain)
        if size <= PIECE:
            if not size:
                return
            with self._guard:
                self._sslobj.write(plain)
                data = self._outgoing.read()
        else:
            parts = []
            with self._guard:
                for start in range(0, size, PIECE):
                    self._sslobj.write(plain[start : start + PIECE])
                    parts.append(self._outgoing.read())
            data = b"".join(parts)
        self._send(data)
        if self._traced:
            tell_call(self, "write", (plain,), size)

    def _send(self, data: bytes) -> None:
        """Send ciphertext. What a socket that does not wait cannot send yet is kept, and goes before the next."""
        inner = self._inner
        if inner.gettimeout() == 0.0:
            self._rest = data
            self._send_rest()
            return
        self._rest = b""
        try:
            inner.sendall(data)
        except BaseException:
            self._broken = True
            raise
        self._rest = None

    def _make_way(self) -> None:
        """Something stands before the next write."""
        if self._broken:
            raise ssl.SSLError(ssl.SSL_ERROR_SSL, "an earlier write was cut short; the connection can only be closed")
        if not self._rest:
            raise RuntimeError(_hub.BUSY)
        if self._inner.gettimeout() == 0.0:
            self._send_rest()
            if self._rest is not None:
                raise ssl.SSLWantWriteError(ssl.SSL_ERROR_WANT_WRITE, "The operation did not complete (write)")
        else:
            self._send(self._rest)

    def _send_rest(self) -> None:
        """Send what the kernel takes at once of what was kept."""
        rest = self._rest or b""
        try:
            while rest:
                rest = rest[self._inner.send(rest) :]
        except BlockingIOError:
            pass
        self._rest = rest or None

    def settle(self) -> bool:
        """Send what was put off; see ``Connection.settle`` of the hub."""
        return self._inner.settle()  # type: ignore[no-any-return]

    def shutdown(self, how: int) -> None:
        """As ``ssl.SSLSocket.shutdown``, once what was written is sent."""
        self._inner.settle()
        super().shutdown(how)

    # -- the handshake, and the end ------------------------------------------------------------------------------------

    def do_handshake(self, block: bool = False) -> None:
        """Do the TLS handshake, waiting in the hub; the timeout holds for all of it."""
        timeout = self.gettimeout()
        self.shake(time.monotonic() + timeout if timeout else None)

    def shake(self, deadline: float | None) -> None:
        """Do the TLS handshake, waiting in the hub until ``deadline``, by ``time.monotonic()``."""
        timeout = self.gettimeout()
        try:
            while True:
                try:
                    with self._guard:
                        self._sslobj.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    if deadline is not None:
                        self.settimeout(max(0.001, deadline - time.monotonic()))
                    self._feed()
                    if self._incoming.pending >= VAIN_A_TURN:  # pieces of a byte, perhaps, each in a record of its own
                        _give_way()
            self._settle()
        except ssl.SSLError as error:
            self._break_off(error)
        finally:
            self.settimeout(timeout)

    def shake_as_client(self, deadline: float | None) -> None:
        """Do the handshake as :meth:`shake`, and send what ends it: a server waits for that."""
        self.shake(deadline)
        self._flush()

    def _settle(self) -> None:
        """The handshake is done. What TLS 1.3 has left to say are tickets, which nobody waits for.

        They go with the first answer, or before a wait: not later. A client's kernel may hold its request back until
        what ended the handshake is acknowledged (Nagle), and ours acknowledges at once only with something to send.
        """
        if self._sslobj.version() != "TLSv1.3":
            self._flush()

    def _break_off(self, error: Exception) -> None:
        """Raise ``error``, which the handshake met, after OpenSSL's alert that tells the peer why."""
        if isinstance(error, ssl.SSLError):
            self._send_last()
        raise error

    def unwrap(self) -> socket.socket:
        """End TLS and go on in plain text; see ``ssl.SSLSocket.unwrap``."""
        if self._sslobj is None:
            raise ValueError("No SSL wrapper around " + str(self))
        self._ended = True
        vain = 0
        while True:
            held = self._incoming.pending
            try:
                with self._guard:
                    self._sslobj.shutdown()
                break
            except ssl.SSLWantReadError:
                vain += held
                self._feed_behind(vain)
            except ssl.SSLError:
                self._send_last()
                self._incoming.write_eof()  # no read may wait for more: OpenSSL has given up
                raise
        if self._outgoing.pending:
            self._send(self._outgoing.read())
        self._ahead = self._incoming.read()
        self._sslobj = None
        return self

    def anew(self, context: ssl.SSLContext) -> Hubbed:
        """After ``unwrap``: go under TLS once more, as a server; this object is used up."""
        made = Hubbed.over(self._inner, context, self._ahead)
        _socket.socket.detach(self)
        return made

    def _end_and_read_on(self) -> None:
        self._end()

    def _end(self) -> None:
        sslobj = self._sslobj  # another thread may close the connection meanwhile
        if self._ended or sslobj is None:
            return
        self._ended = True
        with self._guard:  # all of it: who reads in another thread is to find everything in order
            self._look(sslobj)  # takes what came already: OpenSSL would not forgive data behind our close_notify
            while more := sslobj.pending():
                self._ahead += sslobj.read(more)
            fed = self._incoming.read()
            try:
                sslobj.shutdown()
            except OSError:  # the usual: the peer's close_notify has not come
                pass
            if fed and not self._incoming.eof:  # eof: its end was fed, and nothing can be written behind that
                self._incoming.write(fed)
        self._send_last()

    def _send_last(self) -> None:
        """Send what OpenSSL has to say if that can be done at once, and if it can be understood."""
        if not self._inner.settle():
            return
        data = (self._rest or b"") + self._outgoing.read()
        if not data or self._broken or self._rest == b"":
            return
        try:
            _socket.socket.send(self, data, socket.MSG_DONTWAIT)
        except OSError:
            pass  # the peer does not read, or has gone

    @property
    def far_end(self) -> str | None:
        """Why the peer is gone, if it is; what reads have told is asked first."""
        return self._inner.far_end or super().far_end

    def end(self) -> bool:
        """Say goodbye and close, when nothing will be read on; see ``Connection.end``."""
        record, self.record = self.record, None
        self._say_goodbye()
        self._closed = True
        if self._io_refs > 0:  # the last makefile() closes it
            self.record = record
            return False
        self._give_up()
        self._inner.end()
        return True

    def _say_goodbye(self) -> None:
        """Send close_notify, as :meth:`_end`, but keep nothing of what has come."""
        sslobj = self._sslobj
        if self._ended or sslobj is None:
            return
        self._ended = True
        try:
            with self._guard:
                sslobj.shutdown()
        except OSError:  # the usual: the peer's close_notify has not come
            pass
        self._send_last()

    def _let_go(self) -> None:
        self._give_up()
        self._inner.close()

    def _give_up(self) -> None:
        """Leave the descriptor to the hub's connection."""
        self._sslobj = None
        _socket.socket.detach(self)
        self._inner.record = None  # after start_tls() it leads here

    def detach(self) -> int:
        """Give the descriptor away; nothing knows of TLS any more."""
        _socket.socket.detach(self)
        self._closed = True
        return self._inner.detach()  # type: ignore[no-any-return]

    __del__ = _socket.socket.detach  # the descriptor is the other's to close

    def waits_for(self) -> Any:
        """For what a green thread waits here, as the hub's connection tells: ``reading``, ``writing`` or None."""
        return self._inner.waits_for()

    def trace(self, yes: bool) -> None:
        """Tell what moves in plain text, or no more; as the hub's connection. Any thread."""
        self._traced = yes

    # -- time-outs, which the hub's connection keeps -------------------------------------------------------------------

    def settimeout(self, value: float | None) -> None:
        """As ``socket.settimeout``."""
        self._inner.settimeout(value)

    def gettimeout(self) -> float | None:
        """As ``socket.gettimeout``."""
        return self._inner.gettimeout()  # type: ignore[no-any-return]

    def setblocking(self, flag: bool) -> None:
        """As ``socket.setblocking``."""
        self._inner.setblocking(flag)

    def getblocking(self) -> bool:
        """As ``socket.getblocking``."""
        return self._inner.getblocking()  # type: ignore[no-any-return]

    @property
    def timeout(self) -> float | None:
        """As ``socket.timeout``."""
        return self._inner.gettimeout()  # type: ignore[no-any-return]


_hub.quicken(Hubbed)
