"""How a draining server closes its door: nobody new may come, who waits is let in, then the listener goes."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from harken.acceptor import Readable
from harken.connection import backlog_length
from harken.transports import for_socket

if TYPE_CHECKING:
    from harken.serving import Serving

__all__ = ["DOOR_SECONDS", "Closing"]

# Seconds between looks at a door that somebody may still wait at.
DOOR_SECONDS = 0.005
# Seconds that a drain gives the loop to leave its poll(): it takes one turn.
LEAVE_SECONDS = 0.2


class Closing:
    """Closes the door of one server.

    While it is open the server's own loop goes on to take connections. Where the drain was called in the loop's own
    thread, or no loop runs, it takes them itself; but not with the inline engine, whose handlers need that thread.
    """

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._listener: Any = getattr(serving.server, "socket", None)
        self._readable = Readable()
        self._rest: float | None = None
        self._most = 0
        self._quiet_since: float | None = None
        self._looped = False
        self._left = False

    @property
    def closed(self) -> bool:
        """Whether there is no open door."""
        return self._fileno() < 0

    def _fileno(self) -> int:
        try:
            return int(self._listener.fileno())
        except (OSError, AttributeError, TypeError):  # none, or a test's double
            return -1

    def leave(self) -> None:
        """Let nobody in: those that wait are for others, who have the door too."""
        self._left = True

    def shut_out(self) -> None:
        """Let nobody new come, where that can be done and concerns no other process."""
        serving = self._serving
        if self.closed:
            return
        serving.acceptor.last = True  # before anything changes for the loop
        if serving.holding is not None and serving.holding.alone(self._listener):
            try:
                self._rest = for_socket(self._listener).shut_out(self._listener)
            except OSError:
                if self._fileno() >= 0:
                    raise
                return  # by server_close(), meanwhile
            if self._rest:  # somebody may be on the way
                serving.acceptor.last = serving.acceptor.emptied = False
        self._looped = not serving.last_loop and not serving.in_loop
        # Where nobody can be shut out, those that wait now are let in: who keeps coming must not hold the door open.
        self._most = serving.books.counts["accepted"] + backlog_length(self._listener)
        if self._looped:
            serving.intake.watch()  # it may be suspended
        elif serving.started:
            serving.engine.unwatch(serving.server)  # green's loop runs in a thread of its own

    def is_empty(self, now: float) -> bool:
        """Let in who waits; tell whether nobody does and nobody can be on the way any more."""
        if self.closed or self._left:
            return True
        if not self._looped and not self._take():
            return True
        if self._serving.acceptor.emptied:
            return True
        if self._rest is None and self._serving.books.counts["accepted"] >= self._most:
            return True
        if self._readable(self._fileno()):
            self._quiet_since = None
            return False
        if self._quiet_since is None:
            self._quiet_since = now
        return now - self._quiet_since >= (self._rest or 0.0)

    def _take(self) -> bool:
        """Take who waits in this thread; False where that cannot be done."""
        serving = self._serving
        if not serving.started or serving.engine.in_loop or not serving.intake.bursts:
            return False
        while not serving.engine.full and not serving.acceptor.emptied and self._readable(self._fileno()):
            if self._rest is None and serving.books.counts["accepted"] >= self._most:
                break
            if not serving.server._handle_request_noblock():
                break
        return True

    def close(self) -> None:
        """Close the listener, once the loop was asked to end; one on which handlers answer stays open for them."""
        serving = self._serving
        serving.wake()
        # Its poll() would hold the listener's port; a loop that is inside a handler holds nothing, and may stay there.
        serving.left.wait(LEAVE_SECONDS)
        if getattr(self._listener, "type", None) != socket.SOCK_DGRAM:
            self.end()

    def end(self) -> None:
        """Close the listener; no handler answers on it any more."""
        if self._listener is not None:
            self._listener.close()
