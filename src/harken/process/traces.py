"""``trace``: what one live connection moves, shown to whoever asked, while it lasts.

The worker that serves it takes it down and sends it on, ten times a second; nobody who serves waits for that. Between
worker and client every buffer is bounded: what does not fit is left out and counted.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from harken import tracing
from harken.errors import ConfigError
from harken.process.channel import Message
from harken.tracing import Piece, Tracer

if TYPE_CHECKING:
    from harken.process.control import Client
    from harken.records import Record
    from harken.serving import Serving

__all__ = ["FORMS", "Followers", "Traces", "redact"]

# Seconds between two looks at what has moved: people read no faster. With the bound of a Tracer it is the rate.
TURN_SECONDS = 0.1
# Connections of one worker that are followed at once: by people.
MAX_TRACES = 16
# Bytes that wait for a client that does not read, before more is left out.
MAX_UNREAD = 1 << 20
FORMS = ("text", "hex")
MASK = b"***"

_NAME = rb"(?i)(passw(?:or)?d|passphrase|secret|token|api[_-]?key)"
# What follows these words is nobody's to read. Every expression takes time in proportion to what it reads.
_SECRETS = tuple(
    re.compile(expression)
    for expression in (
        rb"(?im)^((?:proxy-)?authorization|cookie|set-cookie|x-api-key)([ \t]*:[ \t]*)[^\r\n]+",
        _NAME + rb"([\"']?[ \t]{0,8}[=:][ \t]{0,8}\")(?:[^\"\\\r\n]|\\.)+",
        _NAME + rb"([\"']?[ \t]{0,8}[=:][ \t]{0,8}')(?:[^'\\\r\n]|\\.)+",
        _NAME + rb"([\"']?[ \t]{0,8}[=:][ \t]{0,8})[^\s\"'&;,][^\s\"&;,]*",
        rb"(?im)^(auth|pass|login)([ \t]+)[^\r\n]+",
    )
)


def redact(data: bytes) -> bytes:
    """Put asterisks in the place of passwords, cookies and keys, as far as a piece shows that it holds any."""
    for secret in _SECRETS:
        data = secret.sub(rb"\1\2" + MASK, data)
    return data


class _Trace:
    """One connection that is followed."""

    def __init__(self, record: Record, tracer: Tracer, form: str, redacts: bool) -> None:
        self.record = record
        self.over = False
        self._tracer = tracer
        self._form = form
        self._redacts = redacts

    def begun(self) -> Message:
        return {"connection": self.record.id, "peer": str(self.record.peer), "begin": True}

    def turn(self) -> list[Message]:
        """Return what there is to tell; the last entry says why the connection has ended."""
        self.over = not self.record.is_open
        pieces, left_out = self._tracer.take()
        entries = [self._entry(piece) for piece in pieces]
        if left_out:
            entries.append({"connection": self.record.id, "left_out": left_out})
        if self.over:
            entries.append({"connection": self.record.id, "end": self.record.reason or "handler_returned"})
        return entries

    def _entry(self, piece: Piece) -> Message:
        data = redact(piece.data) if self._redacts else piece.data
        return {
            "connection": self.record.id,
            "time": piece.time,
            "direction": "out" if piece.out else "in",
            "bytes": piece.size,
            "shown": len(piece.data),
            self._form: data.hex() if self._form == "hex" else data.decode("utf-8", "backslashreplace"),
        }


class Traces:
    """Those of one worker, with a thread that lasts while there are any. Any thread.

    Attributes:
        push: takes a token and what to tell whoever holds it.
    """

    def __init__(self) -> None:
        self.push: Callable[[str, list[Message]], object] = lambda _token, _entries: None
        self._lock = threading.Lock()
        self._open: dict[str, _Trace] = {}
        self._news = threading.Event()

    def begin(self, servings: Iterable[Serving], connection: str, token: str, form: str, redacts: bool) -> bool:
        """Follow a connection; tell whether this process has it.

        Args:
            servings: where to look for it.
            connection: its id.
            token: names the trace in ``push`` and :meth:`end`.
            form: one of :data:`FORMS`.
            redacts: whether secrets are masked.

        Raises:
            ConfigError: it cannot be followed.
        """
        if form not in FORMS:
            raise ConfigError(f"form = {form!r}: take {' or '.join(FORMS)}")
        found = (serving.connections.by_id(connection) for serving in servings)
        record = next((each for each in found if each is not None), None)
        if record is None:
            return False
        with self._lock:
            if record.tracer is not None:
                raise ConfigError(f"connection {connection!r} is traced already; end that trace first")
            if len(self._open) >= MAX_TRACES:
                raise ConfigError(f"{MAX_TRACES} connections are traced already; end one of those traces first")
            if record.process:
                raise ConfigError(
                    f"connection {connection!r} is served by the child process {record.process} of the fork engine, "
                    "which this one cannot look into; trace that process (strace -f -e network), or take another engine"
                )
            tracer = tracing.begin(record)
            if tracer is None:
                raise ConfigError(f"connection {connection!r} has a request object of a kind that cannot be traced")
            trace = _Trace(record, tracer, form, redacts)
            self.push(token, [trace.begun()])
            self._open[token] = trace
            if len(self._open) == 1:
                self._news.clear()
                threading.Thread(target=self._run, name="harken-trace", daemon=True).start()
        return True

    def end(self, token: str) -> None:
        """Follow it no more. Harmless when it has ended."""
        with self._lock:
            trace = self._open.pop(token, None)
            if trace is not None:
                tracing.end(trace.record)
            if not self._open:
                self._news.set()

    def _run(self) -> None:
        news = self._news
        while not news.wait(TURN_SECONDS):
            for token, trace in list(self._open.items()):
                entries = trace.turn()
                if entries:
                    self.push(token, entries)
                if trace.over:
                    self.end(token)

    def close(self) -> None:
        """End all of them."""
        for token in list(self._open):
            self.end(token)


class Followers:
    """Who asked for traces, where the control socket is served. One thread."""

    def __init__(self) -> None:
        self._count = 0
        self._open: dict[str, _Follower] = {}

    def add(self, client: Client, number: Any, leave: Callable[[str], object]) -> str:
        """Note who follows; return the token of the trace.

        Args:
            client: gets the entries.
            number: of its question.
            leave: called with the token when the client hangs up.
        """
        self._count += 1
        token = str(self._count)

        def hung_up() -> None:
            if self._open.pop(token, None) is not None:
                leave(token)

        self._open[token] = _Follower(client, number, hung_up)
        client.on_gone.append(hung_up)
        return token

    def leave(self, client: Client, number: Any) -> None:
        """A client that stays wants to follow no more what it asked for by ``number``."""
        for follower in list(self._open.values()):
            if follower.client is client and follower.number == number:
                follower.hung_up()
                client.on_gone.remove(follower.hung_up)

    def refuse(self, token: str, error: str) -> None:
        """There is no such trace after all."""
        follower = self._open.pop(token, None)
        if follower is not None:
            follower.client.answer(follower.number, error=error)

    def tell(self, token: str, entries: list[Message], worker: int = 0) -> None:
        """Send on what a worker, by its pid, has pushed."""
        follower = self._open.get(token)
        if follower is None:
            return
        follower.worker = worker
        for entry in entries:
            follower.tell(entry)
            if "end" in entry:
                del self._open[token]

    def lost(self, worker: int) -> None:
        """A worker has ended, and its connections with it."""
        for token, follower in list(self._open.items()):
            if follower.worker == worker:
                self.tell(token, [{"end": "the worker ended"}], worker)


class _Follower:
    def __init__(self, client: Client, number: Any, hung_up: Callable[[], None]) -> None:
        self.client = client
        self.number = number
        self.hung_up = hung_up
        self.worker = 0
        self._left_out = 0

    def tell(self, entry: Message) -> None:
        if self.client.channel.unsent_bytes > MAX_UNREAD and "end" not in entry:
            self._left_out += entry.get("left_out", 1)
            return
        if self._left_out:
            self.client.answer(self.number, result={"left_out": self._left_out})
            self._left_out = 0
        self.client.answer(self.number, result=entry)
