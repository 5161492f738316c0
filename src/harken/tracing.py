"""Traces: what moves on one live connection, told to somebody who follows it.

A connection that nobody follows keeps its own methods and pays nothing. The hub's connections tell what moves by
themselves, once they are asked by ``trace()``; the others get methods that do, by a change of their class, as
``stamps`` does it. What a call on those receives that had begun before the trace is told of by its size alone.
"""

from __future__ import annotations

import _thread
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from harken.traffic import traffic, unread
from harken.unpatched import Socket

__all__ = ["MOST_HELD", "MOST_SHOWN", "Piece", "Tracer", "begin", "end", "mark", "tell", "tell_call"]

# Bytes that are kept of one piece; of what is longer the size is told.
MOST_SHOWN = 4096
# Bytes that are kept until they are taken, each piece with what it costs beside: a connection that moves more while
# nobody takes them is not slowed down; what is left out is counted.
MOST_HELD = 1 << 18
_PIECE_COST = 128


class Piece(NamedTuple):
    """What moved at once.

    Attributes:
        time: when, in seconds since the epoch.
        out: whether it was sent; else it came.
        size: bytes.
        data: the first of them; fewer than ``size`` where they are many, or were not seen.
    """

    time: float
    out: bool
    size: int
    data: bytes


class Tracer:
    """What one connection moves, until somebody takes it. Any thread; nothing here waits."""

    def __init__(self, record: Any) -> None:
        """Begin with nothing.

        Args:
            record: the connection's.
        """
        self._record = record
        self._lock = _thread.allocate_lock()
        # What the handler had read before, and since as far as was seen; and what had not been at the last look.
        self._consumed = _consumed(record)
        self._unseen = 0
        self._pieces: list[Piece] = []
        self._held = 0
        self._left_out = 0
        self.busy: set[tuple[int, bool]] = set()
        """Threads that are in a call already, and its direction: one call may be made of others."""

    def note(self, out: bool, data: bytes, size: int) -> None:
        """Keep a piece, if there is room."""
        with self._lock:
            if not out and self._consumed is not None:
                self._consumed += size
            cost = len(data) + _PIECE_COST
            if self._held + cost > MOST_HELD:
                self._left_out += 1
                return
            self._held += cost
            self._pieces.append(Piece(time.time(), out, size, data))

    def take(self) -> tuple[list[Piece], int]:
        """Return the pieces since the last time, and how many were left out behind them."""
        unseen = self._look()
        with self._lock:
            pieces, self._pieces = [*unseen, *self._pieces], []
            left_out, self._left_out = self._left_out, 0
            self._held = 0
        return pieces, left_out

    def _look(self) -> list[Piece]:
        """Find what a call received that had begun before the trace, once it is so at two looks one after another."""
        consumed = _consumed(self._record) if self._consumed is not None else None
        with self._lock:
            if consumed is None or self._consumed is None:
                return []
            before, self._unseen = self._unseen, consumed - self._consumed
            if self._unseen <= 0 or self._unseen != before:
                return []
            self._consumed, self._unseen = consumed, 0
            return [Piece(time.time(), False, before, b"")]


# -- what connections call ---------------------------------------------------------------------------------------------


def _tracer_of(request: Any) -> Tracer | None:
    record = getattr(request, "record", None)
    return None if record is None else record.tracer


def tell(request: Any, out: bool, data: bytes, size: int) -> None:
    """So many bytes moved, and ``data`` are the first of them. Never raises, never waits."""
    tracer = _tracer_of(request)
    if tracer is not None and size:
        tracer.note(out, data[:MOST_SHOWN], size)


def tell_call(request: Any, method: str, args: Any, result: Any) -> None:
    """A method of a socket was called with ``args`` and returned ``result``: find out what that moved."""
    out = method in _WRITES
    if not out and _peeks(method, args):
        return
    data, size = _written(method, args, result) if out else _read(args, result)
    tell(request, out, data, size)


_READS = ("recv", "recv_into", "recvfrom", "recvfrom_into", "recvmsg", "recvmsg_into", "read")
_WRITES = ("send", "sendall", "sendto", "sendmsg", "sendfile", "write")
_FLAGS_AT = {"recv": 1, "recvfrom": 1}
_MSG_PEEK = 2


def _peeks(method: str, args: Any) -> bool:
    at = _FLAGS_AT.get(method, 2)
    return method != "read" and len(args) > at and bool(args[at] & _MSG_PEEK)


def _read(args: Any, result: Any) -> tuple[bytes, int]:
    if isinstance(result, tuple):  # recvfrom, recvmsg, and their forms
        result = result[0]
    if not isinstance(result, int):
        return bytes(result[:MOST_SHOWN]), len(result)
    buffers = args[0] if isinstance(args[0], list | tuple) else [args[1] if isinstance(args[0], int) else args[0]]
    return _first(buffers, result), result


def _written(method: str, args: Any, result: Any) -> tuple[bytes, int]:
    if method == "sendfile":
        return b"", result or 0
    buffers = args[0] if method == "sendmsg" else [args[0]]
    size = result if isinstance(result, int) else memoryview(args[0]).nbytes
    return _first(buffers, size), size


def _first(buffers: Any, size: int) -> bytes:
    """Return the first of ``size`` bytes, which lie in several buffers."""
    left = min(size, MOST_SHOWN)
    parts = []
    for buffer in buffers:
        with memoryview(buffer) as view, view.cast("B") as plain:
            parts.append(bytes(plain[:left]))
        left -= len(parts[-1])
        if not left:
            break
    return b"".join(parts)


# -- connections that wait in the kernel -------------------------------------------------------------------------------


def _traced(kind: type, name: str) -> Callable[..., Any]:
    plain: Any = getattr(kind, name)
    out = name in _WRITES

    def method(self: Any, *args: Any, **words: Any) -> Any:
        tracer = _tracer_of(self)
        me = _thread.get_ident(), out
        if tracer is None or me in tracer.busy:
            return plain(self, *args, **words)
        tracer.busy.add(me)
        try:
            result = plain(self, *args, **words)
        finally:
            tracer.busy.discard(me)
        tell_call(self, name, (*args, *words.values()), result)
        return result

    method.__name__ = name
    method.__doc__ = f"As ``socket.{name}``, traced."
    return method


_made: dict[type, type] = {}


def _tracing(kind: type) -> type:
    """Return the kind of a class of sockets that tells what moves."""
    if kind not in _made:
        methods: dict[str, Any] = {"__slots__": (), "__doc__": f"A {kind.__name__} that is traced."}
        methods |= {name: _traced(kind, name) for name in (*_READS, *_WRITES) if hasattr(kind, name)}
        made = type(kind.__name__, (kind,), methods)
        made.__module__, made.__qualname__ = kind.__module__, kind.__qualname__
        _made[kind] = made
    return _made[kind]


def begin(record: Any) -> Tracer | None:
    """Follow a connection from now on; None where that cannot be. Any thread.

    Args:
        record: the connection's, which nobody follows yet.
    """
    tracer = Tracer(record)
    record.tracer = tracer
    if not mark(record):
        record.tracer = None
        return None
    return tracer


def mark(record: Any) -> bool:
    """Let the connection of a record tell what moves, since its request object is new; tell whether it can."""
    wire = record.successor or record.request
    own = getattr(wire, "trace", None)
    if own is not None:
        own(True)
        return True
    kind = type(wire)
    if not isinstance(wire, Socket) or not hasattr(kind, "record"):
        return False
    try:
        wire.__class__ = _tracing(kind)
    except TypeError:  # a layout of its own
        return False
    return True


def end(record: Any) -> None:
    """Follow it no more."""
    record.tracer = None
    wire = record.successor or record.request
    own = getattr(wire, "trace", None)
    if own is not None:
        own(False)
    elif wire is not None and _made.get(type(wire).__bases__[0]) is type(wire):
        wire.__class__ = type(wire).__bases__[0]


def _consumed(record: Any) -> int | None:
    """How many bytes its handler has read by the kernel's count, on plain TCP."""
    wire = record.successor or record.request
    if hasattr(wire, "_sslobj"):
        return None
    told = traffic(wire)
    return None if told is None else told.received - unread(wire)
