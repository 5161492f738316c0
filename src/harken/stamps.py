"""Stamps: when a connection's handler began to wait, and what has moved, where the kernel does not tell.

The kernel knows when bytes moved on TCP. It does not know since when one call waits, where a request began, or anything
of this kind on a Unix socket. Connections of which somebody must know these get methods that stamp, by a change of
their class; all others keep their own, at no cost. Connections that stamp by themselves say so by ``stamps()``.
"""

from __future__ import annotations

import io
import socket
from collections.abc import Callable
from time import monotonic
from typing import Any

from harken.unpatched import Socket

__all__ = ["Stamps", "plain_kind", "stamp"]


class Stamps:
    """What is known of one connection. Times are by ``time.monotonic()``; 0.0 means never, or not now.

    Attributes:
        reading: since when the handler is in one call that reads.
        writing: since when it is in one that writes.
        first: when the first byte of the request came that is being served.
        answered: whether anything was sent since.
        moved: when bytes last moved, either way.
        received: bytes read.
        sent: bytes written.
        requests: how many have begun: the first, and each that comes after an answer.
    """

    __slots__ = ("answered", "first", "moved", "reading", "received", "requests", "sent", "writing")

    def __init__(self) -> None:
        self.reading = self.writing = self.first = 0.0
        self.answered = False
        self.moved = monotonic()
        self.received = self.sent = self.requests = 0

    @classmethod
    def of(cls, told: tuple[float, float, float, float, int, int, int]) -> Stamps:
        """Take over what a connection stamped by itself."""
        made = cls.__new__(cls)
        made.reading, made.writing, made.first, made.moved, made.received, made.sent, made.requests = told
        made.answered = False
        return made

    def begin(self) -> None:
        """A call that reads begins: after an answer that means the next request."""
        self.reading = monotonic()
        if self.answered:
            self.answered = False
            self.first = 0.0

    def got(self, size: int) -> None:
        """Bytes were read."""
        self.moved = now = monotonic()
        self.received += size
        if not self.first:
            self.begin_request(now)

    def begin_request(self, now: float) -> None:
        """The first byte of a request has come."""
        self.first = now
        self.requests += 1

    def gave(self, size: int) -> None:
        """Bytes were written."""
        self.moved = monotonic()
        self.sent += size
        self.answered = True


def _stamps_of(sock: Any) -> Stamps | None:
    """What is known of a connection; nothing of one that a program made of this class, as ``socket.dup`` does."""
    record = getattr(sock, "record", None)
    return None if record is None else record.stamps


def _size(result: Any) -> int:
    """How much a call that reads has read."""
    if isinstance(result, tuple):  # recvfrom, recvmsg
        result = result[0]
    return result if isinstance(result, int) else len(result or b"")


def _reads(kind: type, name: str) -> Callable[..., Any]:
    plain: Any = getattr(kind, name)

    def method(self: Any, *args: Any, **words: Any) -> Any:
        stamps = _stamps_of(self)
        if stamps is None:
            return plain(self, *args, **words)
        whole, before = not stamps.reading, stamps.received
        if whole:
            stamps.begin()
        try:
            result = plain(self, *args, **words)
        finally:
            if whole:
                stamps.reading = 0.0
        # Some kinds make their recv() of their read(), which has counted then; others do not.
        if stamps.received == before and (size := _size(result)):
            stamps.got(size)
        return result

    return _named(method, name)


def _writes(kind: type, name: str) -> Callable[..., Any]:
    plain: Any = getattr(kind, name)

    def method(self: Any, *args: Any, **words: Any) -> Any:
        stamps = _stamps_of(self)
        if stamps is None or stamps.writing:  # within another: sendall() of TLS is made of send()
            return plain(self, *args, **words)
        stamps.writing = monotonic()
        try:
            result = plain(self, *args, **words)
        finally:
            stamps.writing = 0.0
        stamps.gave(result if isinstance(result, int) else memoryview(args[0]).nbytes)
        return result

    return _named(method, name)


def _named(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    method.__name__ = name
    method.__doc__ = f"As ``socket.{name}``, stamped."
    return method


_READS = ("recv", "recv_into", "recvfrom", "recvfrom_into", "recvmsg", "recvmsg_into", "read")
_WRITES = ("send", "sendall", "sendto", "sendmsg", "sendfile", "try_send", "write")


class _Reader(io.BufferedReader):
    """``rfile``: one call of it counts as one, however often it receives."""

    def __init__(self, raw: Any, size: int, stamps: Stamps) -> None:
        super().__init__(raw, size)
        self._stamps = stamps


def _whole(kind: type, name: str) -> Callable[..., Any]:
    plain: Any = getattr(kind, name)

    def method(self: Any, *args: Any) -> Any:
        stamps = self._stamps
        if stamps.reading:
            return plain(self, *args)
        stamps.begin()
        try:
            result = plain(self, *args)
        finally:
            stamps.reading = 0.0
        if not stamps.first and result:
            stamps.begin_request(monotonic())  # it lay in the buffer
        return result

    return _named(method, name)


_CALLS = ("read", "read1", "readinto", "readinto1", "readline", "readlines", "peek", "__next__")
for _name in _CALLS:
    setattr(_Reader, _name, _whole(io.BufferedReader, _name))


def _makefile(kind: type) -> Callable[..., Any]:
    plain: Any = kind.makefile  # type: ignore[attr-defined]

    def makefile(self: Any, mode: str = "r", buffering: int | None = None, **words: Any) -> Any:
        stamps = _stamps_of(self)
        if stamps is None or mode not in ("rb", "br") or buffering == 0:
            return plain(self, mode, buffering, **words)
        raw = socket.SocketIO(self, "r")
        self._io_refs += 1
        return _Reader(raw, io.DEFAULT_BUFFER_SIZE if buffering is None or buffering < 0 else buffering, stamps)

    return _named(makefile, "makefile")


def _open_reader(kind: type) -> Callable[..., Any]:
    plain: Any = kind.reader_kind  # type: ignore[attr-defined]

    def open_reader(self: Any, *args: Any) -> Any:
        stamps = _stamps_of(self)
        if stamps is None:
            return plain(self, *args)
        reader = _whole_kind(plain)(self, *args)
        reader._stamps = stamps
        return reader

    return _named(open_reader, "open_reader")


def _whole_kind(kind: type) -> type:
    """Return a class of readers each of whose calls counts as one."""
    if kind not in _made:
        _made[kind] = type(kind.__name__, (kind,), {name: _whole(kind, name) for name in _CALLS if hasattr(kind, name)})
    return _made[kind]


_made: dict[type, type] = {}


def _stamping(kind: type) -> type:
    """Return the kind of a class of sockets that stamps."""
    if kind not in _made:
        methods: dict[str, Any] = {"__slots__": (), "__doc__": f"A {kind.__name__} that stamps."}
        methods |= {name: _reads(kind, name) for name in _READS if hasattr(kind, name)}
        methods |= {name: _writes(kind, name) for name in _WRITES if hasattr(kind, name)}
        methods["makefile"] = _makefile(kind)
        if hasattr(kind, "open_reader"):
            methods["open_reader"] = _open_reader(kind)
        made = type(kind.__name__, (kind,), methods)
        made.__module__, made.__qualname__ = kind.__module__, kind.__qualname__
        _made[kind] = _made[made] = made
    return _made[kind]


def plain_kind(kind: type) -> type:
    """Return what a kind of sockets was before it was let stamp."""
    return kind.__bases__[0] if _made.get(kind) is kind else kind


def stamp(request: Any, record: Any) -> None:
    """Let a connection stamp from now on, where that can be.

    Its class becomes one with methods that do, of the same name and layout.
    """
    kind = type(request)
    if hasattr(kind, "stamps"):
        request.keep_stamps()
        return
    if not hasattr(kind, "record") or not isinstance(request, Socket):
        return
    if record.stamps is None:
        record.stamps = Stamps()
    try:
        request.__class__ = _stamping(kind)
    except TypeError:  # a layout of its own
        record.stamps = None
