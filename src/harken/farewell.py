"""The goodbyes of a drain: each connection is told once, and one that is idle is asked to leave.

Asking means shutting its reading side: a handler that waits for its client reads the end, says what it has to say, and
returns. What a client has sent before is still read.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from harken.idle import Onlooker

if TYPE_CHECKING:
    from harken.records import Record
    from harken.serving import Serving

__all__ = ["LOOK_SECONDS", "Farewell"]

# Seconds between looks at the connections that are still busy: no person waits for less.
LOOK_SECONDS = 0.05
# A look at ten thousand connections takes a while: so many times as long is left to what they do.
_REST = 4


class Farewell:
    """Says goodbye on behalf of one server.

    Each connection's moment lies somewhere within ``jitter`` seconds, so that clients do not all come back at once.
    """

    def __init__(self, serving: Serving, jitter: float) -> None:
        self._serving = serving
        self._since = time.monotonic()
        self._jitter = jitter
        self._moments: dict[Record, float] = {}
        self._told: set[Record] = set()
        self._at_work: set[Record] = set()
        self._speaking: set[Record] = set()

    def turn(self, records: Iterable[Record]) -> float:
        """Say the goodbyes that are due; return how many seconds the next turn may wait."""
        began = time.monotonic()
        onlooker: Onlooker | None = None
        pause = LOOK_SECONDS
        for record in records:
            moment = self._moment(record)
            if moment > began:
                pause = min(pause, moment - began)
                continue
            if record.reason is not None or record.process:
                continue
            onlooker = onlooker or Onlooker(self._loop())
            told = record in self._told
            if record not in self._at_work and not told and onlooker.is_at_work(record):
                self._at_work.add(record)  # a goodbye on its way would look like work
            if not told and record.handler is not None:  # who waits for a thread has none yet, and is told later
                self._told.add(record)
                self._speak(record, record.handler)
            if record not in self._speaking and onlooker.is_idle(record):
                # Who was at work has finished that.
                record.leave("handler_returned" if record in self._at_work else "drained")
        return max(pause, _REST * (time.monotonic() - began))

    def _loop(self) -> int:
        serving = self._serving
        return next(iter(serving.loops), 0) if serving.engine.in_loop else 0

    def _moment(self, record: Record) -> float:
        if not self._jitter:
            return self._since
        return self._moments.setdefault(record, self._since + random.random() * self._jitter)  # noqa: S311

    def _speak(self, record: Record, handler: Any) -> None:
        """Call the handler's ``on_drain()`` beside it, if it has one."""
        self._speaking.add(record)
        try:
            self._serving.engine.beside(self._call, record, handler)
        except RuntimeError:  # no more threads: this one leaves without a word
            self._speaking.discard(record)

    def _call(self, record: Record, handler: Any) -> None:
        serving = self._serving
        try:
            handler.call_hook("on_drain")
        except Exception as error:  # noqa: BLE001 - every fault of a handler is handle_error's
            if serving.books.hook_failed(record, error):
                serving.server.handle_error(record.request, record.client_address)
        finally:
            self._speaking.discard(record)
