"""Taking connections from a door: bounded bursts, a table of errors, and pauses. It never waits and never reads.

What a failed accept(2) means
-----------------------------
Linux passes errors of the *network* that are already pending on a new connection to accept(); accept(2) says to treat
them like EAGAIN and to go on. So most errors speak of one peer (NEXT). Some speak of *us*: out of descriptors or of
kernel memory (PAUSE). The connection then stays in the queue and the listener stays readable, so a loop that merely
tries again spins at 100 % CPU: we stop watching the listener for a while that doubles. And because clients that hang
in the queue would learn nothing until then, one descriptor is kept in reserve: it is given back, the queue is accepted
and reset with it, and it is taken again. Only a listener that is none (FAIL) ends the loop, loudly.

Where no thread and no process can be started the accept went well, and whoever was taken is lost: for the others the
door pauses in the same way, and they wait in the queue.
"""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from enum import Enum
from typing import Any

from harken import events
from harken.connection import READ_OFF_TURNS
from harken.listener import NO_ROOM
from harken.settings import choice, setting, text
from harken.unpatched import Socket, original

__all__ = ["ACCEPT_ERRORS", "WAITING", "Acceptor", "Readable", "Verdict", "judge", "refuse", "turn_away"]

# Connections taken in one wake-up, so that open connections and other listeners get their turn.
# gevent takes 100, redis 10; above some dozens a burst gains nothing more here.
MAX_ACCEPT = 64
# Seconds of the first pause and of the longest: Ranch and trio pause 0.1; gevent doubles to 1.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0
# Connections reset from the queue at one exhaustion; the queue is seldom longer than SOMAXCONN.
MAX_SHED = 4096

OVERLOAD = setting(
    "overload",
    choice("wait", "reset", "reply", "shed"),
    "wait",
    live=True,
    meaning="what happens to a connection beyond `max_connections`, or when the pool and its queue are full: `wait` "
    "leaves it in the backlog, `reset` accepts and resets it, `reply` sends `overload_reply` and closes it, `shed` "
    "closes the longest idle one; limits by client and by second never wait: they reset, or reply",
    origin="Ranch, gunicorn and gevent leave the connection in the backlog",
)
# The policies under which the next one stays in the backlog; the others take it, and turn it away.
WAITING = ("wait", "shed")
OVERLOAD_REPLY = setting(
    "overload_reply",
    text(),
    b"",
    live=True,
    meaning="what `overload=reply` sends before it closes",
    origin="protocols differ: nothing unless asked",
)


class Verdict(Enum):
    """What to do after a failed accept."""

    STOP = "the queue is empty"
    NEXT = "that peer's trouble: take the next one"
    PAUSE = "ours: stop for a while"
    FAIL = "this is no listener: fail loudly"


_NEXT = (  # accept(2): "already-pending network errors … treat them like EAGAIN by retrying", and firewalls (EPERM)
    "ECONNABORTED EINTR EPERM EPROTO ENOPROTOOPT ENETDOWN ENETUNREACH EHOSTDOWN EHOSTUNREACH ENONET ETIMEDOUT "
    # of recvfrom() on a datagram socket: an ICMP answer to an earlier sendto(), recv(2)
    "ECONNREFUSED ECONNRESET"
)
_PAUSE = "EMFILE ENFILE ENOBUFS ENOMEM"  # accept(2): per process, per system, and kernel memory
_FAIL = "EBADF EINVAL ENOTSOCK EFAULT EOPNOTSUPP"  # accept(2): not open, not listening, no socket, no stream

ACCEPT_ERRORS: dict[int, Verdict] = {
    getattr(errno, name): verdict
    for verdict, listed in ((Verdict.NEXT, _NEXT), (Verdict.PAUSE, _PAUSE), (Verdict.FAIL, _FAIL))
    for name in listed.split()
    if hasattr(errno, name)
} | {errno.EAGAIN: Verdict.STOP, errno.EWOULDBLOCK: Verdict.STOP}


def judge(error: OSError) -> Verdict:
    """Look an error of ``get_request`` up.

    A subclass (``ssl.SSLError`` on a TLS listener, a timeout) or an error with no number was raised above accept(2),
    and its number means something else: that connection's trouble. A number that the table lacks pauses, so that no
    surprise of a kernel becomes a spin.
    """
    if error.errno is None or type(error).__module__ != "builtins":
        return Verdict.NEXT
    return ACCEPT_ERRORS.get(error.errno, Verdict.PAUSE)


def refuse(request: object, reply: bytes = b"") -> None:
    """Close a connection that is not wanted: with ``reply``, or with a reset, which no client takes for an answer."""
    if isinstance(request, (Socket, socket.socket)):
        turn_away(request, reply)
        request.close()


def turn_away(request: object, reply: bytes = b"") -> None:
    """Do all of :func:`refuse` but the closing, which then sends the reset, or what ends the reply."""
    if not isinstance(request, (Socket, socket.socket)):
        return
    try:
        if reply:
            request.setblocking(False)
            request.send(reply)
            request.shutdown(socket.SHUT_WR)
            for _ in range(READ_OFF_TURNS):  # unread input would turn the close into a reset, and the reply be lost
                if not request.recv(65536):  # bytes; 1 MiB in all, more than a client sends unasked
                    break
        else:
            fall_silent = getattr(request, "fall_silent", None)
            if fall_silent is not None:
                fall_silent()
            request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass  # nothing more to read, or it has gone: both is what we wanted


class Acceptor:
    """Feeds one door's connections to its server, and pauses the door when it must."""

    def __init__(
        self,
        *,
        listener: Callable[[], Any],
        pause: Callable[[], None],
        resume: Callable[[], None],
        address: Callable[[], str],
    ) -> None:
        """Make an acceptor.

        Args:
            listener: returns the socket of the moment; programs replace it.
            pause: stops watching the door.
            resume: watches it again.
            address: names the door in events.
        """
        self._listener = listener
        self._pause = pause
        self._resume = resume
        self._address = address
        self._readable = Readable()
        self._reserve = -1
        self._until = math.inf
        self._began = 0.0
        self._delay = FIRST_PAUSE
        self._again = math.inf
        self._exhausted = False
        self._shed = 0
        self._in_vain = False
        self._untold: str | None = None
        self.fatal: OSError | None = None
        self.last = False
        """Whether the door is to close: nobody found there means that nobody is left, or that others will care."""
        self.emptied = False
        """Whether an error has told so."""
        self.paused = False
        """Whether the door is not watched at the moment."""
        self.troubled = False
        """Whether an accept failed and none has succeeded since: ``settle`` must be called after the next."""

    def open(self) -> None:
        """Forget earlier trouble and take the reserved descriptor; called when a loop begins to watch the door."""
        self.fatal = None
        self.troubled = self._exhausted = self.paused = self.last = self.emptied = self._in_vain = False
        self._untold = None
        self._take_reserve()

    def _take_reserve(self) -> None:
        if self._reserve < 0:
            try:
                self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                self._reserve = -1  # exhausted already: the pauses alone must do

    def close(self) -> None:
        """Give the reserved descriptor back; called when the last loop has ended."""
        if self._reserve >= 0:
            reserve, self._reserve = self._reserve, -1
            os.close(reserve)
        self.paused = False

    def settle(self, *, taken: bool) -> None:
        """Look back at an accept that came after trouble.

        Raises:
            OSError: the door is no listener any more.
        """
        if self.fatal is not None:
            error, self.fatal = self.fatal, None
            raise error
        in_vain, self._in_vain = self._in_vain, False
        if taken and not in_vain:
            self._recovered()

    def starved(self, error: Exception) -> None:
        """No thread or process could be started for whom was taken: let the next ones wait in the queue for a while."""
        if self.last:
            return  # the door is to close, and nobody may wait
        self._in_vain = True
        if not self.paused:
            self._rest(error)

    def failed(self, error: OSError) -> bool:
        """Deal with an error of ``get_request``; never raises. Returns False: no connection was taken."""
        verdict = judge(error)
        if self.last and verdict in (Verdict.STOP, Verdict.FAIL):
            self.found_empty()
            return False
        if verdict is Verdict.PAUSE:
            self._exhaust(error)
        elif verdict is Verdict.FAIL:
            self.fatal = error
            self.troubled = True
        return False

    def found_empty(self) -> None:
        """Nobody was there although the door is readable: when the door is to close, it may."""
        if self.last:
            self.emptied = True
            self._pause()

    def hold(self, reason: str) -> None:
        """Stop watching the door until :meth:`turn` finds room again."""
        if not self.paused:
            self._begin(math.inf, reason)

    def rest(self, reason: str) -> None:
        """As :meth:`hold` while nobody waits yet: it is told when :meth:`awaited` says that somebody does."""
        if not self.paused:
            self._untold = reason
            self._begin(math.inf, reason)

    @property
    def rests(self) -> bool:
        """Whether a pause has not been told."""
        return self.paused and self._untold is not None

    def awaited(self) -> None:
        """Somebody waits at a door that rests."""
        reason, self._untold = self._untold, None
        events.emit("paused", address=self._address(), reason=reason)

    def turn(self, *, room: bool, again: float = math.inf) -> None:
        """Once a loop turn: watch the door again when the pause is over, or when there is room.

        Args:
            room: whether what :meth:`hold` waits for has come.
            again: seconds after which to ask again, at the latest.
        """
        if not self.paused:
            return
        self._again = again
        if (room and math.isinf(self._until)) or time.monotonic() >= self._until:
            waited_for_room = math.isinf(self._until)
            self.paused = False
            try:
                self._resume()
            except OSError as error:
                self._put_off(error)
                return
            if waited_for_room:
                self._tell_resumed()

    def patience(self, interval: float) -> float:
        """How long the loop may sleep: ``interval``, or less when a pause ends sooner."""
        if not self.paused:
            return interval
        if math.isinf(self._until):
            return min(interval, self._again)
        return max(0.0, min(interval, self._until - time.monotonic()))

    def _exhaust(self, error: OSError) -> None:
        self._shed += self._shed_queue()
        self._rest(error)

    def _rest(self, error: Exception) -> None:
        """Pause, longer each time until an accept has come to something."""
        if not self._exhausted:
            self._exhausted = self.troubled = True
            self._delay = FIRST_PAUSE
            self._begin(time.monotonic() + self._delay, _words(error))
            return
        self._delay = min(LONGEST_PAUSE, self._delay * 2)
        self._until = time.monotonic() + self._delay
        self.paused = True
        self._pause()

    def _put_off(self, error: OSError) -> None:
        """The kernel has no room for the door in its epoll set: try again later.

        Raises:
            OSError: it is something else.
        """
        if error.errno not in NO_ROOM:
            raise error
        self.paused = True
        self._until = time.monotonic() + LONGEST_PAUSE
        self.troubled = self._exhausted = True  # the pause is told of as over when somebody has been taken

    def _begin(self, until: float, reason: str) -> None:
        self._until = until
        self.paused = True
        self._began = time.monotonic()
        self._pause()
        if self._untold is None:
            events.emit("paused", address=self._address(), reason=reason)

    def _recovered(self) -> None:
        self.troubled = False
        self._exhausted = False
        self._tell_resumed()

    def _tell_resumed(self) -> None:
        if self._untold is not None:
            self._untold = None
            return
        shed, self._shed = self._shed, 0
        events.emit("resumed", address=self._address(), seconds=time.monotonic() - self._began, shed=shed)

    def _shed_queue(self) -> int:
        """Reset what waits in the queue, by the reserved descriptor; return how many."""
        listener = self._listener()
        if self._reserve < 0 or not isinstance(listener, socket.socket) or listener.type != socket.SOCK_STREAM:
            return 0
        os.close(self._reserve)
        self._reserve = -1
        shed = 0
        try:
            while shed < MAX_SHED and self._readable(listener.fileno()):
                refuse(socket.socket.accept(listener)[0])
                shed += 1
        except OSError:
            pass  # another thread was quicker to take the descriptor
        self._take_reserve()
        return shed


def _words(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{errno.errorcode.get(error.errno or 0, error.errno)}: {error.strerror}"
    return str(error)


class Readable:
    """Tells whether accept() would find a connection at once. A blocking listener must be asked before each accept."""

    def __init__(self) -> None:
        self._fd = -1
        self._poll: Callable[[int], list[tuple[int, int]]] = lambda timeout: []

    def __call__(self, fd: int) -> bool:
        """Ask for the listener whose descriptor is ``fd`` at the moment; -1 is never readable."""
        if fd != self._fd:
            poller = original("select", "poll")()
            if fd >= 0:
                poller.register(fd, select.POLLIN)
            self._fd, self._poll = fd, poller.poll
        return bool(self._poll(0))
