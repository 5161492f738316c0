"""What becomes of a connection whose deadline is over: an event, perhaps a last word of its handler, the end."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from harken.connection import forget_unsent
from harken.reaper import reaper
from harken.records import CHILD_STATUS, REASONS, Record

if TYPE_CHECKING:
    from harken.serving import Serving

__all__ = ["Expiry", "introduce"]

# Seconds that on_timeout() gets for its last word; a peer that reads takes it in milliseconds.
GOODBYE_SECONDS = 1.0
# Seconds that a child of the fork engine gets to leave after its connection was closed, before it is ended.
CHILD_SECONDS = 1.0


def introduce(handler: Any, request: Any) -> None:
    """Note who handles a connection, so that its hooks can be called from outside its own thread."""
    serving = getattr(handler.server, "_harken", None)
    connections = getattr(serving, "connections", None)
    record = connections.find(request) if connections is not None else None
    if record is not None:
        record.handler = handler
        share = getattr(request, "share", None)  # under TLS: a hook may send while the handler receives
        if share is not None:
            share()


class Expiry:
    """Ends the connections of one server whose time is over."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def __call__(self, record: Record, which: str, seconds: float) -> None:
        """End a connection. The reaper's thread."""
        if record.reason is not None:
            return  # it is on its way out
        record.reason, record.detail = (which, record.detail) if which in REASONS else ("killed", which)
        self._serving.books.timed_out(record, record.client_address, which, seconds)
        if which == "write_timeout":
            forget_unsent(record.request)
        handler = record.handler
        if handler is None:
            self._end(record)
            return
        if which == "write_timeout":
            self._end(record)  # who does not read has no last word read either; and its handler is in a write
        bell = reaper.call_at(time.monotonic() + GOODBYE_SECONDS, lambda: self._end(record))
        self._serving.engine.beside(self._say_goodbye, record, handler, which, bell)

    def _say_goodbye(self, record: Record, handler: Any, which: str, bell: int) -> None:
        try:
            result = handler.on_timeout(which)
            if isinstance(result, Awaitable):
                from harken._hub.task import drive

                drive(_settle(result))
            wfile: Any = getattr(handler, "wfile", None)
            # What is joined with later writes would wait for them; a hook that took too long finds all closed.
            if hasattr(wfile, "flush") and not wfile.closed and not isinstance(result, Awaitable):
                wfile.flush()
        except OSError:
            pass  # the peer has gone, or does not read: there is nobody to be told
        except Exception as error:  # noqa: BLE001 - as a handler's own
            if _comes_too_late(record, error):
                return
            self._serving.books.failed(record.request, record.client_address, error)
            self._serving.server.handle_error(record.request, record.client_address)
        finally:
            reaper.cancel(bell)
            self._end(record)

    def _end(self, record: Record) -> None:
        if not record.is_open or record.cut_already:
            return
        record.cut_already = True
        record.cut(record.reason or "killed")
        if record.silent:  # in a child: its slot is wanted, whatever its handler does
            reaper.call_at(time.monotonic() + CHILD_SECONDS, lambda: os._exit(child_status(record)))


def _comes_too_late(record: Record, error: Exception) -> bool:
    """Tell whether a last word failed as nobody can hear it: all is closed already, or the handler is in a write."""
    if isinstance(error, ValueError):  # as files say it
        return "closed" in str(error) and (record.cut_already or not record.is_open)
    from harken._hub import BUSY

    return isinstance(error, RuntimeError) and str(error) == BUSY


async def _settle(result: Awaitable[Any]) -> None:
    await result


def child_status(record: Record | None) -> int:
    """Return the exit status by which a child tells its parent why its connection ended."""
    reason = (record and record.reason) or "handler_returned"
    if reason == "killed" and record is not None and record.detail in CHILD_STATUS:
        reason = record.detail
    return CHILD_STATUS.get(reason, 0)
