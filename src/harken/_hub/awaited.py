"""A connection's verbs, awaited: what ``request``, ``rfile`` and ``wfile`` are to an ``async def handle``.

In the handler's own task each verb is the blocking one of the connection below, which waits in the hub. In any other
task of the loop (a task group's, say) a green thread does it meanwhile.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Generator, Iterable, Iterator
from typing import Any

from harken._hub import hosts
from harken._hub.task import Task, aside, own

__all__ = ["AsyncConnection", "AsyncReader", "AsyncWriter"]

# Bytes that one read asks for, and that are joined or sent at once: as the hub's own files.
CHUNK = 65536
# Bytes that the peer has not taken, beyond which drain() waits until it has: asyncio's high-water mark.
HIGH_WATER = 65536


class AsyncConnection:
    """A connection whose verbs are awaited. All else is the socket's: ``getpeername``, ``setsockopt``, ``fileno`` ….

    Attributes:
        socket: the connection below.
    """

    __slots__ = ("_left_over", "socket")

    def __init__(self, sock: Any) -> None:
        self.socket = sock
        self._left_over = b""  # received for a task that was cancelled before it got it

    async def recv(self, bufsize: int) -> bytes:
        """Receive at most ``bufsize`` bytes, waiting for the first; nothing is the end.

        Raises:
            OSError: as on a socket; TimeoutError after its timeout.
        """
        task = own()
        if task is not None and not self._left_over:
            return task.call(self.socket.recv, bufsize)  # type: ignore[no-any-return]
        if not self._left_over:
            await aside(self._receive, bufsize)
        data = self._left_over[:bufsize]
        self._left_over = self._left_over[bufsize:]
        return data

    def _receive(self, bufsize: int) -> None:
        self._left_over = self.socket.recv(bufsize)

    async def sendall(self, data: Any) -> None:
        """Send all of ``data``.

        Raises:
            OSError: as on a socket.
        """
        task = own()
        if task is not None:
            task.call(self.socket.sendall, data)
        else:
            await aside(self.socket.sendall, data)

    def close(self) -> None:
        """Close the connection; whoever waits for it gets OSError."""
        self.socket.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.socket, name)

    def __repr__(self) -> str:
        return f"<AsyncConnection of {self.socket!r}>"


class AsyncReader:
    """``rfile`` under ``async def handle``. Its sizes are asyncio's: ``read(n)`` gives what is there, at most ``n``."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self._data = b""  # received; what is before `_at` was read
        self._at = 0
        self.closed = False

    @property
    def unread(self) -> int:
        """Bytes that were received and not yet read."""
        return len(self._data) - self._at

    async def readline(self, limit: int = -1) -> bytes:
        """Read one line, of at most ``limit`` bytes unless that is negative; what there is of it at the end."""
        return await self._until(b"\n", limit)

    async def readuntil(self, separator: bytes = b"\n") -> bytes:
        """Read up to and with ``separator``.

        Raises:
            asyncio.IncompleteReadError: the end came before it.
        """
        data = await self._until(separator)
        if not data.endswith(separator):
            raise asyncio.IncompleteReadError(data, None)
        return data

    async def _until(self, separator: bytes, limit: int = -1) -> bytes:
        searched = 0  # unread bytes in which it is not
        while True:
            found = self._data.find(separator, self._at + searched)
            if found >= 0:
                size = found + len(separator) - self._at
                return self._take(size if limit < 0 else min(size, limit))
            if 0 <= limit <= self.unread:
                return self._take(limit)
            searched = max(0, self.unread - len(separator) + 1)
            if not await self._more():
                return self._take(self.unread)

    async def read(self, n: int = -1) -> bytes:
        """Read at most ``n`` bytes, waiting for the first; all until the end if ``n`` is negative."""
        if n < 0:
            return await self._gather(-1)
        if n and not self.unread:
            await self._more()
        return self._take(min(n, self.unread))

    async def readexactly(self, n: int) -> bytes:
        """Read ``n`` bytes.

        Raises:
            asyncio.IncompleteReadError: the end came before; ``partial`` has what there was.
        """
        if n <= self.unread:
            return self._take(n)
        data = await self._gather(n)
        if len(data) < n:
            raise asyncio.IncompleteReadError(data, n)
        return data

    async def _gather(self, size: int) -> bytes:
        """Read ``size`` bytes, all if that is negative, or to the end; when interrupted, nothing is lost."""
        pieces = [self._take(self.unread)]
        have = len(pieces[0])
        try:
            while (size < 0 or have < size) and await self._more():
                pieces.append(self._take(self.unread if size < 0 else min(self.unread, size - have)))
                have += len(pieces[-1])
        except BaseException:
            self._data = b"".join([*pieces, self._data[self._at :]])
            self._at = 0
            raise
        return b"".join(pieces)

    async def _more(self) -> bool:
        """Receive once; tell whether it was not the end."""
        if self.closed:
            raise ValueError("I/O operation on closed file.")
        connection = self._connection
        task = own()
        if task is not None and not connection._left_over:  # spares a coroutine
            data = task.call(connection.socket.recv, CHUNK)
        else:
            data = await connection.recv(CHUNK)
        if data:
            self._data = self._data[self._at :] + data if self.unread else data
            self._at = 0
        return bool(data)

    def _take(self, size: int) -> bytes:
        data, at = self._data, self._at
        end = at + size
        if end < len(data):
            self._at = end
        else:
            self._data = b""
            self._at = 0
        return data if at == 0 and end >= len(data) else data[at:end]

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        line = await self._until(b"\n")
        if not line:
            raise StopAsyncIteration
        return line

    def close(self) -> None:
        """Read no more; the connection stays open."""
        self.closed = True
        self._data = b""
        self._at = 0


class AsyncWriter:
    """``wfile`` under ``async def handle``.

    ``write`` never waits. What the peer does not take is sent by a green thread, and ``drain`` waits when that is much.
    While ``rfile`` holds unread requests, answers are joined; they are sent before the handler's task waits.
    """

    def __init__(self, connection: AsyncConnection, reader: AsyncReader) -> None:
        self._connection = connection
        self._reader = reader
        self._joined: list[bytes] = []
        self._joined_size = 0
        self._unsent = bytearray()
        self._sending = False
        self._error: OSError | None = None
        self._waiting: list[asyncio.Future[None]] = []
        self.closed = False

    def write(self, data: Any) -> AsyncWriter:
        """Send ``data``. The result may be awaited, which is ``drain()``, or be left.

        When the peer has gone, that is raised where it is awaited.
        """
        if self.closed:
            raise ValueError("I/O operation on closed file.")
        if self._joined or self._reader.unread:
            task = own()
            if task is not None:
                self._join(task, bytes(data))
                return self
            self._flush()
        self._send(data)
        return self

    def writelines(self, lines: Iterable[Any]) -> AsyncWriter:
        """Write each."""
        for line in lines:
            self.write(line)
        return self

    def _join(self, task: Task, data: bytes) -> None:
        self._joined.append(data)
        self._joined_size += len(data)
        if not self._reader.unread or self._joined_size >= CHUNK:
            self._flush()
        elif task.before_wait is None:
            task.before_wait = self._flush
        elif task.before_wait != self._flush:  # of another connection, to which this handler writes too
            self._flush()

    def _flush(self) -> None:
        if self._joined:
            data = b"".join(self._joined)
            self._joined.clear()
            self._joined_size = 0
            self._send(data)

    def _send(self, data: Any) -> None:
        """Send what can be sent without waiting, and leave the rest to a green thread."""
        if self._error is not None:
            return
        sent = 0
        if not self._unsent:
            try:
                sent = self._connection.socket.send(data, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
            except (ValueError, NotImplementedError):  # TLS knows no flags
                pass
            except OSError as error:
                self._error = error
                return
        with memoryview(data) as view:
            if sent == view.nbytes:
                return
            self._unsent += view.cast("B")[sent:]
        if not self._sending:
            self._sending = True
            hosts.any_host().stage.hub.spawn(self._send_rest)

    def _send_rest(self) -> None:
        """What a green thread does until nothing is left."""
        try:
            while self._unsent:
                piece = bytes(self._unsent[:CHUNK])
                self._connection.socket.sendall(piece)
                del self._unsent[: len(piece)]
                if len(self._unsent) <= HIGH_WATER:
                    self._tell()
        except OSError as error:
            self._error = error
            self._unsent.clear()
        finally:
            self._sending = False
            self._tell()

    def _tell(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def drain(self, at_most: int = HIGH_WATER) -> None:
        """Wait until the peer has taken all but ``at_most`` bytes of what was written.

        Raises:
            OSError: the peer has gone.
        """
        if not at_most:
            self._flush()
        while len(self._unsent) > at_most and self._sending:
            room = asyncio.get_running_loop().create_future()
            self._waiting.append(room)
            await room
        if self._error is not None:
            raise self._error

    def __await__(self) -> Generator[Any, None, None] | Iterator[None]:
        if self._error is None and len(self._unsent) <= HIGH_WATER:
            return iter(())
        return self.drain().__await__()

    def close(self) -> None:
        """Write no more. What was written before is sent; the connection stays open."""
        self._flush()
        self.closed = True
