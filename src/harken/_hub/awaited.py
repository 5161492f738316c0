"""A connection's verbs, awaited: what ``request``, ``rfile`` and ``wfile`` are to an ``async def handle``.

In the handler's own task each verb is the blocking one of the connection below, which waits in the hub. In any other
task of the loop (a task group's, say) a green thread does it meanwhile.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from greenlet import getcurrent

from harken import _hub
from harken._hub import hosts
from harken._hub.files import Reader
from harken._hub.growth import grown
from harken._hub.locks import Event
from harken._hub.task import Task, aside, own
from harken.buffers import FREE_BYTES, WRITING, buffers_of

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["AsyncConnection", "AsyncReader", "AsyncWriter"]

# Bytes that are sent at once, and that are joined at the most: as the hub's own files.
CHUNK = 65536
# Bytes that the peer has not taken, beyond which drain() waits until it has: asyncio's high-water mark.
HIGH_WATER = 65536
# What sends, or gives away what sends, and is not awaited.
_SENDING = frozenset({"detach", "send", "sendfile", "sendmsg", "sendto"})


class AsyncConnection:
    """A connection whose verbs are awaited. All else is the socket's: ``getpeername``, ``setsockopt``, ``fileno`` ….

    Attributes:
        socket: the connection below.
    """

    __slots__ = ("_driver", "_left_over", "_reader", "_recv", "_sendall", "_writer", "socket")

    def __init__(self, sock: Any, driver: Any) -> None:
        self.socket = sock
        self._driver = driver
        self._recv, self._sendall = _verbs(sock)
        self._left_over = b""  # received for a task that was cancelled before it got it; the reader's, if there is one
        self._reader: Any = None
        self._writer: AsyncWriter | None = None

    def recv(self, bufsize: int) -> Awaitable[bytes]:
        """Receive at most ``bufsize`` bytes, waiting for the first; nothing is the end.

        Raises:
            OSError: as on a socket; TimeoutError after its timeout.
        """
        return self._driver.wait(self, self._recv, bufsize)  # type: ignore[no-any-return]

    def sendall(self, data: ReadableBuffer) -> Awaitable[None]:
        """Send all of ``data``, behind what was written to ``wfile``.

        Raises:
            OSError: as on a socket.
        """
        if self._writer is not None and self._writer.holds_back():
            return self._sendall_behind(self._writer, data)
        return self._driver.wait(self, self._sendall, data)  # type: ignore[no-any-return]

    async def _sendall_behind(self, writer: AsyncWriter, data: Any) -> None:
        await writer.sent()
        await self._driver.wait(self, self._sendall, data)

    async def elsewhere(self, function: Callable[..., Any], *args: Any) -> Any:
        """Do what a task asks for in which this connection's handler does not run."""
        task = own()
        if task is not None:  # another handler's
            return task.driver.call(function, *args)
        return await aside(function, *args, give_back=self._give_back)

    def _give_back(self, result: Any) -> None:
        """Keep what was received for a task that was cancelled; nothing was sent for one that asked for that."""
        if not result:
            return
        if self._reader is None or self._reader.closed:
            self._left_over = result + self._left_over
        elif self._recv == self._recv_left_over:  # which took it from there
            self._reader.give_back(result)
        else:
            self._reader.add(result)
        self._recv = self._recv_left_over

    def _recv_left_over(self, bufsize: int) -> bytes:
        """Receive what was kept, and what the reader had read ahead of it."""
        if bufsize < 0:
            raise ValueError("negative buffersize in recv")  # the socket's words
        data: bytes
        if self._left_over:
            data, self._left_over = self._left_over[:bufsize], self._left_over[bufsize:]
        elif self._reader is not None and len(self._reader):
            data = self._reader.read1(bufsize)
        else:
            self._recv, _ = _verbs(self.socket)
            data = self._recv(bufsize)
        return data

    def shutdown(self, how: int) -> None:
        """As ``socket.shutdown``, once what was written to ``wfile`` is sent; it does not wait for that."""
        if how != socket.SHUT_RD and self._writer is not None and self._writer.holds_back():
            self._writer.shut_down_later(how)
        else:
            self.socket.shutdown(how)

    def close(self) -> None:
        """Close the connection; whoever waits for it gets OSError."""
        self.socket.close()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.socket, name)
        return found if self._writer is None or name not in _SENDING else partial(self._behind, self._writer, found)

    def _behind(self, writer: AsyncWriter, verb: Any, *args: Any, **words: Any) -> Any:
        if writer.holds_back():
            if self._driver.green is not getcurrent():
                raise RuntimeError(f"{verb.__name__}() would overtake what wfile holds; `await request.sendall(data)`")
            self._driver.call(writer.wait_until_sent)
        return verb(*args, **words)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(f"cannot pickle {type(self).__name__!r} object")  # a socket's words, for copies too

    def __repr__(self) -> str:
        return f"<AsyncConnection of {self.socket!r}>"


def _verbs(sock: Any) -> tuple[Callable[[int], bytes], Callable[[Any], None]]:
    """Return what receives and what sends, for good: under TLS they become others when deadlines come (stamps.py)."""
    if hasattr(type(sock), "stamps"):
        return sock.recv, sock.sendall

    def recv(bufsize: int) -> bytes:
        return sock.recv(bufsize)  # type: ignore[no-any-return]

    def sendall(data: Any) -> None:
        sock.sendall(data)

    return recv, sendall


class AsyncReader:
    """``rfile`` under ``async def handle``. Its sizes are asyncio's: ``read(n)`` gives what is there, at most ``n``."""

    def __init__(self, connection: AsyncConnection, file: Any) -> None:
        """Read by ``file``: the hub's own, which loses nothing when a read is interrupted."""
        self._file = file
        self._driver = connection._driver
        self._socket = connection.socket
        self._readline = file.readline

    @property
    def unread(self) -> int:
        """Bytes that were received and not yet read."""
        return len(self._file)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return bool(self._file.closed)

    def readline(self, limit: int = -1) -> Awaitable[bytes]:
        """Read one line, of at most ``limit`` bytes unless that is negative; what there is of it at the end."""
        return self._driver.wait(self, self._readline, limit)  # type: ignore[no-any-return]

    def read(self, n: int = -1) -> Awaitable[bytes]:
        """Read at most ``n`` bytes, waiting for the first; all until the end if ``n`` is negative."""
        return self._driver.wait(self, self._file.read if n < 0 else self._file.read1, n)  # type: ignore[no-any-return]

    async def readexactly(self, n: int) -> bytes:
        """Read ``n`` bytes.

        Raises:
            asyncio.IncompleteReadError: the end came before; ``partial`` has what there was.
            ValueError: ``n`` is negative.
        """
        if n < 0:
            raise ValueError("readexactly size can not be less than zero")  # asyncio's words, here and below
        data: bytes = await self._driver.wait(self, self._file.read, n)
        if len(data) < n:
            raise asyncio.IncompleteReadError(data, n)
        return data

    async def readuntil(self, separator: bytes = b"\n") -> bytes:
        """Read up to and with ``separator``.

        Raises:
            asyncio.IncompleteReadError: the end came before it.
            ValueError: ``separator`` is empty.
        """
        if not separator:
            raise ValueError("Separator should be at least one-byte string")
        data = bytearray()
        try:
            while (found := data.find(separator, max(0, len(data) - CHUNK - len(separator)))) < 0:
                piece = await self._driver.wait(self, self._read_more, len(data))
                if not piece:
                    raise asyncio.IncompleteReadError(bytes(data), None)
                data += piece
        except asyncio.IncompleteReadError:
            raise
        except BaseException:
            self._file.give_back(bytes(data))
            raise
        finally:
            if len(data) > FREE_BYTES:
                grown(self._socket, 0)
        self._file.give_back(bytes(data[found + len(separator) :]))
        return bytes(data[: found + len(separator)])

    def _read_more(self, have: int) -> bytes:
        """Read a piece of a block of which there are ``have`` bytes, once there is memory for that."""
        if have > FREE_BYTES:
            grown(self._socket, have)
        return self._file.read1(CHUNK)  # type: ignore[no-any-return]

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    def __anext__(self) -> Awaitable[bytes]:
        return self._driver.next(self, self._readline)  # type: ignore[no-any-return]

    async def elsewhere(self, function: Callable[..., Any], *args: Any) -> Any:
        """Do what a task asks for in which this connection's handler does not run."""
        task = own()
        if task is not None:
            return task.driver.call(function, *args)
        return await aside(function, *args, give_back=self._file.give_back)

    def close(self) -> None:
        """Read no more; the connection stays open."""
        self._file.close()


class PlainReader(AsyncReader):
    """Over the fallback's file: what that holds is given without a call, before which joined answers would be sent."""

    async def readline(self, limit: int = -1) -> bytes:
        """As above."""
        if limit < 0 and self._file.holds_line:
            return self._readline()  # type: ignore[no-any-return]
        return await super().readline(limit)

    async def read(self, n: int = -1) -> bytes:
        """As above."""
        if n > 0 and len(self._file):
            return self._file.read1(n)  # type: ignore[no-any-return]
        return await super().read(n)

    async def readexactly(self, n: int) -> bytes:
        """As above."""
        if 0 < n <= len(self._file):
            return self._file.read(n)  # type: ignore[no-any-return]
        return await super().readexactly(n)

    async def __anext__(self) -> bytes:
        if self._file.holds_line:
            return self._readline()  # type: ignore[no-any-return]
        return await super().__anext__()


class _Loan:
    """What a handler wrote and waits for: its own memory, from which it is sent piece by piece.

    Attributes:
        data: what is not sent yet.
        kept: whether the handler waits no more, so that ``data`` is a copy.
        over: set when nothing more will be sent of it.
    """

    def __init__(self, data: Any) -> None:
        self.data = memoryview(data)
        self.kept = False
        self.over = Event()

    def __len__(self) -> int:
        return len(self.data)

    def first(self) -> bytes:
        """Return the next piece: a copy, so that nobody holds the handler's memory as it goes away."""
        return bytes(self.data[:CHUNK])

    def sent(self, size: int) -> None:
        """So much of it was."""
        self.data = self.data[size:]

    def keep(self) -> None:
        """The handler waits no more."""
        self.data, self.kept = memoryview(bytes(self.data)), True


class AsyncWriter:
    """``wfile`` under ``async def handle``.

    ``write`` need not be awaited. What the peer does not take is sent by a green thread, and ``drain`` waits when that
    is much. While ``rfile`` holds unread requests, answers are joined; they are sent before the handler's task waits.

    Where that much is bounded (``max_write_buffer``, ``max_memory_bytes``), a write of the handler's own task that goes
    beyond waits until its bytes are sent, whether it is awaited or not. One of any other task cannot wait, and one that
    is cancelled does not: the first that goes beyond is kept, and the next finds the connection ended.
    """

    def __init__(self, connection: AsyncConnection, reader: AsyncReader, file: Any = None) -> None:
        """Write by ``file``, the compiled hub's, which joins; without one, here."""
        self._connection = connection
        self._reader = reader
        self._driver = connection._driver
        self._file = file
        self._offer = None if file is None else file.offer
        if file is not None:
            file.keep_by(self._keep_joined)
        self._done = connection._driver.done(None)
        self._joined: list[bytes] = []
        self._joined_size = 0
        self._unsent = bytearray()
        self._loan: _Loan | None = None  # goes before the unsent
        self._sending = False
        self._error: Exception | None = None
        self._shut: int | None = None  # how to shut the connection down once all is sent
        self._waiting: list[asyncio.Future[None] | Event] = []
        self.closed = False

    def write(self, data: ReadableBuffer) -> Awaitable[None]:
        """Send ``data``. The result may be awaited, which is ``drain()``, or be left.

        When the peer has gone, that is raised where it is awaited.
        """
        if self._offer is not None and not self._unsent and not self._sending and self._error is None:
            try:
                taken = self._offer(data)
            except OSError as error:
                self._error = error
                return self
            if taken is None:
                return self._done  # type: ignore[no-any-return]
            self._flush()
            self._keep_from(data, taken)
            return self
        return self._write(data)

    def _write(self, data: Any) -> Awaitable[None]:
        if self.closed:
            raise ValueError("I/O operation on closed file.")
        if self._offer is None and (self._joined or self._reader.unread):
            task = own()
            if task is not None:
                self._join(task, bytes(data))
                return self
            self._flush()
        self._send(data)
        return self

    def writelines(self, lines: Iterable[ReadableBuffer]) -> Awaitable[None]:
        """Write each."""
        for line in lines:
            self.write(line)
        return self

    def _join(self, task: Task, data: bytes) -> None:
        self._joined.append(data)
        self._joined_size += len(data)
        driver = task.driver
        if not self._reader.unread or self._joined_size >= CHUNK:
            self._flush()
        elif driver.before_wait is None:
            driver.before_wait = self._flush
        elif driver.before_wait != self._flush:  # of another connection, to which this handler writes too
            self._flush()

    def shut_down_later(self, how: int) -> None:
        """Shut the connection down once what is held back is sent."""
        self._shut = how if self._shut is None else max(self._shut, how)  # both ways is the highest

    def holds_back(self) -> bool:
        """Tell whether something that was written cannot be sent at once; what can be, is."""
        self._flush()
        return bool(self._unsent) or self._sending

    def _flush(self) -> None:
        """Send what was joined, and leave to a green thread what the peer does not take at once."""
        if self._offer is not None:
            rest = self._file.take_back()
            if rest:
                self._keep(rest, self._driver.call)
        elif self._joined:
            data = b"".join(self._joined)
            self._joined.clear()
            self._joined_size = 0
            self._send(data)

    def _send(self, data: Any) -> None:
        """Send what can be sent without waiting, and leave the rest to a green thread."""
        if self._error is None and self._shut is not None:
            self._error = BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        if self._error is not None:
            return
        sent = 0
        if not self._unsent and not self._sending:
            try:
                sent = self._send_at_once(data)
            except BlockingIOError:
                pass
            except (ValueError, NotImplementedError):  # TLS knows no flags
                pass
            except OSError as error:
                self._error = error
                return
        self._keep_from(data, sent)

    def _send_at_once(self, data: Any) -> int:
        sock = self._connection.socket
        try_send = getattr(sock, "try_send", None)  # the fallback's: its send() may give way, as write() must not
        sent: int = sock.send(data, socket.MSG_DONTWAIT) if try_send is None else try_send(data)
        return sent

    def _keep_from(self, data: Any, start: int) -> None:
        """Leave what comes behind so many bytes to a green thread."""
        with memoryview(data) as view, view.cast("B") as plain, plain[start:] as rest:
            if rest:
                self._keep(rest, self._driver.call)

    def _keep_joined(self, rest: bytes) -> None:
        """Leave to a green thread what the compiled file had joined and could not send before a wait."""
        self._keep(rest, lambda send, rest: send(rest))

    def _keep(self, rest: Any, wait: Callable[..., object]) -> None:
        """Leave ``rest`` to a green thread; send it now, by ``wait``, if so much may not be held."""
        bounds = buffers_of(self._connection.socket)
        size = self._held + len(rest)
        if bounds is None or not bounds[0].must_wait(size):
            self._unsent += rest
            self._send_on()
            return
        if self._driver.green is getcurrent():
            self._lend(rest, wait)
        else:
            self._keep_beyond(rest)

    def _keep_beyond(self, rest: Any) -> None:
        """Hold more than may be held, of a write that cannot wait; the second such ends the connection."""
        bounds = buffers_of(self._connection.socket)
        if bounds is not None and bounds[0].must_wait(self._held) and not bounds[0].over:
            bounds[1].abandon("shed", "max_write_buffer")
        else:
            self._unsent += rest
            self._send_on()

    def _lend(self, rest: Any, wait: Callable[..., object]) -> None:
        """Send ``rest`` behind all else, and wait, by ``wait``, until that is done: it stays the handler's till then.

        A cancellation ends the waiting alone: a stream that lacks the rest could not be understood.
        """
        loan = _Loan(rest)
        try:
            wait(self._send_loan, loan)
        except BaseException:
            if self._loan is loan:
                loan.keep()
                self._count()
            elif len(loan) and self._error is None:  # it was not its turn yet
                self._keep_beyond(loan.data)
            raise

    def _send_loan(self, loan: _Loan) -> None:
        """Leave a loan to a green thread, and wait until that has sent it. In the handler's own green thread."""
        self.wait_until_sent()
        if self._error is not None:
            return
        self._loan = loan
        self._send_on()
        loan.over.wait()

    def wait_until_sent(self) -> None:
        """Wait until nothing is held back. In a green thread."""
        while self._sending:
            room = Event()
            self._waiting.append(room)
            room.wait()

    def _send_on(self) -> None:
        """See to it that a green thread sends what is unsent."""
        self._count()
        if not self._sending:
            self._sending = True
            hosts.any_host().stage.hub.spawn(self._send_rest)

    def _send_rest(self) -> None:
        """What a green thread does until nothing is left."""
        try:
            if self._loan is not None:
                self._pay_back(self._loan)
            while self._unsent:
                piece = bytes(self._unsent[:CHUNK])
                self._connection.socket.sendall(piece)
                del self._unsent[: len(piece)]
                self._count()
                if len(self._unsent) <= HIGH_WATER:
                    self._tell()
        except Exception as error:  # noqa: BLE001 - told where somebody waits for the peer
            self._error = error
            self._unsent.clear()
        else:
            self._shut_down()
        finally:
            self._sending = False
            self._count()
            if self.closed:
                self._connection._writer = None
            self._tell()

    def _shut_down(self) -> None:
        how, self._shut = self._shut, None
        if how is not None:
            try:
                self._connection.socket.shutdown(how)
            except OSError:
                pass  # the peer was quicker

    def _pay_back(self, loan: _Loan) -> None:
        try:
            while piece := loan.first():
                self._connection.socket.sendall(piece)
                loan.sent(len(piece))
        finally:
            self._loan = None
            loan.over.set()

    @property
    def _held(self) -> int:
        """Bytes that are held here: not those that a handler has lent and waits for."""
        return len(self._unsent) + (len(self._loan) if self._loan is not None and self._loan.kept else 0)

    @property
    def _left(self) -> int:
        """Bytes that the kernel has not taken."""
        return len(self._unsent) + (len(self._loan) if self._loan is not None else 0)

    def _count(self) -> None:
        """Say how much is held, where somebody must know."""
        bounds = buffers_of(self._connection.socket)
        if bounds is not None:
            bounds[0].hold(bounds[1], WRITING, self._held)

    def _tell(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if isinstance(waiter, Event):
                waiter.set()
            elif not waiter.done():
                waiter.set_result(None)

    def drain(self) -> Awaitable[None]:
        """Wait until the peer has taken all but 64 KiB of what was written.

        Raises:
            OSError: the peer has gone.
        """
        if self._error is None and self._left <= HIGH_WATER:
            return self._done  # type: ignore[no-any-return]
        return self.sent(HIGH_WATER)

    async def sent(self, all_but: int = 0) -> None:
        """Wait until the kernel has taken all but so many bytes of what was written.

        Raises:
            OSError: the peer has gone.
        """
        if not all_but:
            self._flush()
        while self._left > all_but and self._sending:
            room = asyncio.get_running_loop().create_future()
            self._waiting.append(room)
            await room
        if self._error is not None:
            raise self._error

    def __await__(self) -> Generator[Any, Any, None]:
        return self.drain().__await__()

    def close(self) -> None:
        """Write no more. What was written before is sent; the connection stays open."""
        self._flush()
        self.closed = True
        if not self._sending:
            self._connection._writer = None
        self._offer = None
        if self._file is not None:
            self._file.close()


def files(connection: AsyncConnection) -> tuple[AsyncReader, AsyncWriter]:
    """Make ``rfile`` and ``wfile``: the compiled hub's own below them, where it can wait for the connection itself."""
    sock = connection.socket
    if _hub.kind == "compiled" and type(sock) is _hub.Connection:
        from importlib import import_module

        compiled = import_module("harken._hub.compiled")
        connection._reader = inner = compiled.Reader(sock)
        reader = AsyncReader(connection, inner)
        connection._writer = writer = AsyncWriter(connection, reader, compiled.Writer(sock, inner))
        return reader, writer
    # Its own kind, if it has one: that stamps where the connection does.
    connection._reader = sock.open_reader() if hasattr(sock, "open_reader") else Reader(sock)
    kind = PlainReader if isinstance(connection._reader, Reader) else AsyncReader
    reader = kind(connection, connection._reader)
    connection._writer = writer = AsyncWriter(connection, reader)
    return reader, writer
