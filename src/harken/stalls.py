"""Handlers that keep a loop from its other connections: found by a watchdog, told of, and counted by place.

A loop that serves many connections in one thread gives each its turn; one that computes on, sleeps or waits for a lock
keeps all the others waiting. The loop says when each piece of its work begins (see ``Beat`` in :mod:`harken._hub`); a
watchdog listens, in a thread that sleeps while the loop does.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import FrameType
from typing import Any, Protocol

from harken import events
from harken.connection import Connection
from harken.settings import seconds, setting
from harken.stacks import uncollected
from harken.unpatched import NativeThread, original, patched

__all__ = ["STALL_AFTER", "Tally", "Watchdog"]

STALL_AFTER = setting(
    "stall_after",
    seconds(optional=True),
    None,
    serve=0.1,
    unit="seconds",
    live=True,
    meaning="report a handler that keeps a hub or event loop from its other connections for so long, with file and "
    "line; none: never",
    origin="asyncio's slow_callback_duration is 0.1 s, from which on people notice",
)

# Places counted by name; more than a program of any size has. The rest is counted together.
MOST_PLACES = 256
ELSEWHERE = "elsewhere"
# Seconds that a watchdog gets to tell its last news.
LEAVE_SECONDS = 1.0

_HARKEN = os.path.dirname(__file__) + os.sep


class Beat(Protocol):
    """What a watchdog listens to; :mod:`harken._hub` has the contract."""

    after: float | None

    def watch(self) -> tuple[str, float]:
        """Wait for news."""

    def same(self) -> bool:
        """Tell whether the late piece of work still runs."""

    def stop(self) -> None:
        """Make ``watch`` return ``stopped``."""


class Tally:
    """How often each place has stalled a loop. Any thread may read it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, place: str) -> None:
        """Count a stall."""
        known = place in self.counts or len(self.counts) < MOST_PLACES
        self.counts[place if known else ELSEWHERE] += 1


@dataclass(frozen=True, slots=True)
class Sighting:
    """Where a loop was when it was late.

    Attributes:
        file: of the innermost line of the program's own; else of a library's, the standard library's, harken's.
        line: in it.
        function: its name.
        stack: all frames, as a traceback shows them.
        server: whose handler it was, if a handler ran.
        connection: its id.
        peer: its far end.
    """

    file: str = "unknown"
    line: int = 0
    function: str = ""
    stack: str = ""
    server: Any = None
    connection: str | None = None
    peer: Any = None

    @property
    def place(self) -> str:
        """File and line, as editors and people write it."""
        return f"{self.file}:{self.line}" if self.line else self.file

    def tell(self, seconds: float, *, ongoing: bool) -> None:
        """Emit the event."""
        if events.subscribers["stalled"]:
            events.emit(
                "stalled",
                place=self.place,
                seconds=seconds,
                ongoing=ongoing,
                file=self.file,
                line=self.line,
                function=self.function,
                stack=self.stack,
                server=self.server,
                connection=self.connection,
                peer=self.peer,
            )


@uncollected()
def sight(thread: int) -> Sighting:
    """Look where a thread is. Frames move on as soon as the GIL is given up: what they say is read first."""
    frames = list(_callers(sys._current_frames().get(thread)))
    steps = [(frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_name) for frame in frames]
    who = _whose(frames)
    frames.clear()
    if not steps:
        return Sighting()
    file, line, function = min(steps, key=lambda step: _strangeness(step[0]))
    stack = traceback.format_list([traceback.FrameSummary(*step, lookup_line=False) for step in reversed(steps)])
    return Sighting(file, line, function, "".join(stack), *who)


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _strangeness(file: str) -> int:
    """How far a file is from what the reader wrote."""
    if file.startswith((_HARKEN, "<frozen ")):
        return 3
    return 1 if file.startswith(_paths("purelib", "platlib")) else 2 if file.startswith(_paths("stdlib")) else 0


@cache
def _paths(*names: str) -> tuple[str, ...]:
    return tuple(sysconfig.get_path(name) + os.sep for name in names)


def _whose(frames: list[FrameType]) -> tuple[Any, str | None, Any]:
    """Find server, connection id and peer in the arguments of the functions that run, outermost first."""
    for frame in reversed(frames):
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount]
        known = frame.f_locals
        for value in (known[name] for name in names if name in known):
            if isinstance(value, Connection) and getattr(value, "record", None):
                return _of_connection(value, known)
            if _is_handler(value):
                return value.server, getattr(value, "connection_id", None), getattr(value, "peer", None)
    return None, None, None


def _is_handler(value: object) -> bool:
    kept = getattr(value, "__dict__", None)
    return isinstance(kept, dict) and {"request", "client_address", "server"} <= kept.keys()


def _of_connection(connection: Connection, arguments: Any) -> tuple[Any, str | None, Any]:
    record = connection.record
    server = next((value for value in arguments.values() if hasattr(value, "RequestHandlerClass")), None)
    return (server, record.id, record.peer) if record is not None else (server, None, None)


class Watchdog:
    """Listens to the beat of one loop; the thread is started by ``start`` and ended by ``stop``."""

    def __init__(self, beat: Beat, *, tally: Tally | None = None, send: Callable[[], object] | None = None) -> None:
        """Make a watchdog that sleeps, in the thread in which the loop is to run.

        Args:
            beat: of the loop.
            tally: counts what is found.
            send: sends, without waiting, what the running green thread has written; called when that goes on.
        """
        self._beat = beat
        self._loop_thread: int = original("_thread", "get_ident")()
        self._tally = tally if tally is not None else Tally()
        self._send = send
        self._seen: Sighting | None = None
        self._told = False
        self._thread: threading.Thread | NativeThread | None = None
        self._starting = threading.Lock()

    @property
    def after(self) -> float | None:
        """Seconds after which a handler is late; None: never. Any thread may set it."""
        return self._beat.after

    @after.setter
    def after(self, after: float | None) -> None:
        self._beat.after = after

    def start(self) -> None:
        """Begin to listen; harmless when it does. Any thread."""
        if self._starting.acquire(blocking=False):  # the first, who never gives it back
            if patched():  # a thread of gevent's would keep all waiting, and runs only when they do not
                self._thread = NativeThread(self._listen)
            else:
                self._thread = threading.Thread(target=self._listen, name="harken-watchdog", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Tell what there is to tell, and end."""
        self._beat.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(LEAVE_SECONDS)

    def _listen(self) -> None:
        word = ""
        while word != "stopped":
            word, seconds = self._beat.watch()
            if word == "late":
                self._seen = sight(self._loop_thread) if self._beat.same() else Sighting()
            elif word == "over":
                self._tell(seconds, ongoing=False)
                self._seen, self._told = None, False
            elif word in ("long", "stopped"):
                self._tell(seconds, ongoing=True)
            elif word == "unsent" and self._send is not None:
                self._send()

    def _tell(self, seconds: float, *, ongoing: bool) -> None:
        if self._seen is None:
            return
        if not self._told:
            self._tally.add(self._seen.place)
            self._told = True
        try:
            self._seen.tell(seconds, ongoing=ongoing)
        except BaseException:  # noqa: BLE001 - a subscriber's SystemExit, or gevent's Timeout: who else would watch?
            traceback.print_exc()
