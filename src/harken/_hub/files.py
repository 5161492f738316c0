"""``rfile`` and ``wfile`` of the fallback's connections; the contract is the room's."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from greenlet import getcurrent

from harken._hub.pending import MOST, flush_of
from harken._hub.wire import here
from harken.buffers import FREE_BYTES

if TYPE_CHECKING:
    from harken._hub.sockets import Connection

__all__ = ["Reader", "Writer", "on_growth"]

# Bytes to ask the kernel for at once, as the compiled hub does.
_AHEAD = 65536


_growth: Callable[[Any, int], object] | None = None


def on_growth(function: Callable[[Any, int], object] | None) -> None:
    """Tell ``function`` what large readers hold; see the room's contract."""
    global _growth
    _growth = function


class _Pieces(list[bytes]):
    """What has come of a line or block whose rest is waited for."""

    def __init__(self, sock: Any) -> None:
        self.size = self._told = 0
        self._sock = sock

    def add(self, piece: bytes) -> None:
        """Keep one more; may wait, until there is memory for more."""
        self.append(piece)
        self.size += len(piece)
        if _growth is not None and self.size > max(FREE_BYTES, 2 * self._told):
            self._told = self.size
            _growth(self._sock, self.size)

    def take(self) -> bytes:
        """Return all of it."""
        if _growth is not None and self._told:
            _growth(self._sock, 0)
        return self[0] if len(self) == 1 else b"".join(self)


class _File(io.BufferedIOBase):
    """What both have: the connection, which stays open until its last file is closed."""

    def __init__(self, sock: Connection) -> None:
        self._sock = sock
        sock._io_refs += 1

    def fileno(self) -> int:
        """Return the connection's descriptor."""
        self._checkClosed()
        return self._sock.fileno()

    def close(self) -> None:
        """Let the connection go."""
        if self.closed:
            return
        try:
            super().close()  # which flushes
        finally:
            self._sock._decref_socketios()  # type: ignore[attr-defined]


def _writable(buffer: Any) -> memoryview:
    """Return a view, before anything is read that could not be put there."""
    view = memoryview(buffer)
    if view.readonly:
        raise TypeError(f"a buffer that can be written to is needed, not {type(buffer).__name__}")
    return view


class Reader(_File):
    """Reads a connection, at most ``size`` bytes ahead."""

    mode = "rb"

    def __init__(self, sock: Connection, size: int = -1) -> None:
        super().__init__(sock)
        self._most = size if 0 < size < _AHEAD else _AHEAD
        self._unread = b""
        self._at = 0

    def __len__(self) -> int:
        """The bytes that are held and unread."""
        return len(self._unread) - self._at

    def __bool__(self) -> bool:
        """True: a reader that holds nothing is one all the same."""
        return True

    @property
    def holds_line(self) -> bool:
        """Whether a line is held whole."""
        return self._unread.find(b"\n", self._at) >= 0

    def readable(self) -> bool:
        """True."""
        self._checkClosed()
        return True

    def _take(self, size: int) -> bytes:
        at = self._at
        piece = self._unread[at : at + size]
        if at + size >= len(self._unread):
            self._unread, self._at = b"", 0
        else:
            self._at = at + size
        return piece

    def _fill(self) -> bool:
        """Receive one more piece; False at the end."""
        piece = self._sock.recv(self._most)
        if piece:
            self._unread = self._take(len(self)) + piece
        return bool(piece)

    def readline(self, size: int | None = -1, /) -> bytes:
        """Read one line, or what there is of it."""
        self._checkClosed()
        if size is None or size < 0:
            end = self._unread.find(b"\n", self._at) + 1
            if end > 0:
                return self._take(end - self._at)
            if not self._unread:  # as mostly; and what comes is one line, some, or the end
                piece = self._sock.recv(self._most)
                if self._at != len(self._unread):  # somebody has given something back meanwhile
                    piece = self._take(len(self)) + piece
                end = piece.find(b"\n") + 1
                if end == len(piece):
                    return piece
                self._unread, self._at = piece, 0
                if end > 0:
                    return self._take(end)
        return self._read_line(-1 if size is None else size)

    def _read_line(self, limit: int) -> bytes:
        pieces = _Pieces(self._sock)
        while pieces.size != limit:
            if not len(self) and not self._fill_or_keep(pieces):
                break
            end = self._unread.find(b"\n", self._at)
            there = len(self) if end < 0 else end + 1 - self._at
            piece = self._take(there if limit < 0 else min(there, limit - pieces.size))
            self._add_or_keep(pieces, piece)
            if piece.endswith(b"\n"):
                break
        return pieces.take()

    def _fill_or_keep(self, pieces: _Pieces) -> bool:
        """As ``_fill``; after a timeout the next read finds what has come."""
        try:
            return self._fill()
        except BaseException:
            self.give_back(pieces.take())
            raise

    def _add_or_keep(self, pieces: _Pieces, piece: bytes) -> None:
        """Keep one more, which may wait for memory; after a timeout the next read finds it all."""
        try:
            pieces.add(piece)
        except BaseException:
            self.give_back(pieces.take())
            raise

    def read(self, size: int | None = -1, /) -> bytes:
        """Read so many bytes, or all until the end."""
        self._checkClosed()
        if size is None or size < 0:
            size = -1
        elif size <= len(self._unread) - self._at:  # as mostly, in a request that came whole
            return self._take(size)
        pieces = _Pieces(self._sock)
        while pieces.size != size:
            if not len(self) and not self._fill_or_keep(pieces):
                break
            self._add_or_keep(pieces, self._take(len(self) if size < 0 else min(len(self), size - pieces.size)))
        return pieces.take()

    def read1(self, size: int = -1, /) -> bytes:
        """Read what is there, or comes first."""
        self._checkClosed()
        if size and not len(self):
            self._fill()
        return self._take(len(self) if size < 0 else min(size, len(self)))

    def give_back(self, data: bytes, /) -> None:
        """Put back what was read last."""
        self._unread, self._at = data + self._take(len(self)), 0

    def add(self, data: bytes, /) -> None:
        """Put behind what is held what somebody else received after it."""
        self._unread, self._at = self._take(len(self)) + data, 0

    def readinto(self, buffer: Any, /) -> int:
        """Fill ``buffer``."""
        with _writable(buffer) as view, view.cast("B") as target:
            piece = self.read(len(target))
            target[: len(piece)] = piece
            return len(piece)

    def readinto1(self, buffer: Any, /) -> int:
        """Read what is there, or comes first, into ``buffer``."""
        with _writable(buffer) as view, view.cast("B") as target:
            piece = self.read1(len(target))
            target[: len(piece)] = piece
            return len(piece)

    def peek(self, size: int = 0, /) -> bytes:
        """Return what is there, without taking it."""
        self._checkClosed()
        if not len(self):
            self._fill()
        return self._unread[self._at :]

    def close(self) -> None:
        """Let the connection go, and what was received of it."""
        self._unread, self._at = b"", 0
        super().close()


class Writer(_File):
    """Writes to a connection, joining answers while ``reader`` holds requests."""

    def __init__(self, sock: Connection, reader: Any = None) -> None:
        super().__init__(sock)
        self._reader = reader if isinstance(reader, Reader) else None

    def writable(self) -> bool:
        """True."""
        self._checkClosed()
        return True

    def write(self, data: Any, /) -> int:
        """Send ``data``: at once, or before this green thread waits."""
        self._checkClosed()
        size = len(data) if type(data) is bytes else memoryview(data).nbytes
        sock, hub = self._sock, here.hub
        more = self._reader is not None and self._reader._unread != b""
        if (
            hub is None
            or hub.occupies  # it may wait unseen
            or size > MOST
            or not (more or hub.pending.sock is sock)
            or sock.gettimeout() == 0.0
            or getcurrent() is hub.own
        ):
            sock.sendall(data)
        else:
            hub.pending.join(sock, data, size)
            if not more:
                hub.pending.flush()
        return size

    def writelines(self, lines: Iterable[Any], /) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Send what was written."""
        self._checkClosed()
        flush_of(self._sock)
