"""What happens at a readable door: one connection after the other through the hooks, or as ``overload`` says."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from harken import straight
from harken.acceptor import WAITING, Readable, turn_away
from harken.admission import reply_of
from harken.connection import shut
from harken.datagrams import DatagramIntake
from harken.lifecycle import State
from harken.sharing import NO_HANDLER, Sharing
from harken.shedding import Shedder

if TYPE_CHECKING:
    from harken.admission import Admission, Ticket
    from harken.records import Record
    from harken.serving import Serving

__all__ = ["Intake"]

# Seconds that a connection that was shed gets to go before the next one is: its handler wakes within milliseconds.
SHED_SECONDS = 1.0
# Seconds that the thread of a connection gets to begin when a signal ends the loop that has just started it: it takes
# some 0.0001, on a busy machine hundreds of times as long.
BEGIN_SECONDS = 0.2


class Intake:
    """Takes the connections of one server when its engine says that there are some."""

    def __init__(self, serving: Serving) -> None:
        self.datagrams = DatagramIntake(serving)
        self._has_datagrams = hasattr(serving.server, "max_packet_size")
        self._serving = serving
        self.serve = partial(straight.serve_known, serving)
        self._readable = Readable()
        self._lock = threading.Lock()
        self._shedder = Shedder(self._find_counted)
        # A handler is free only when one ends that has begun: who waits in the queue may stay there.
        self._served = Shedder(self._find_served)
        self._shed_again = 0.0
        self.sharing = Sharing(serving, self.readable, self.watch)

    def watch(self) -> None:
        """Watch the door, unless the server is suspended: room in the pool does not end a suspension.

        Nor does a suspension's end, or a drain, end a pause: :meth:`turn` does.
        """
        serving = self._serving
        state = serving.lifecycle.state
        if serving.acceptor.paused:
            return
        if state is State.SERVING or (state is State.DRAINING and not serving.last_loop):
            serving.engine.watch(serving.server, self._accept_ready)

    def after_fork(self) -> None:
        """In a child: another loop may have had the lock, or have been asking whether somebody waits."""
        self._lock = threading.Lock()
        self._readable = Readable()

    def readable(self) -> bool:
        """Whether a connection waits at the door."""
        return self._readable(self._serving.server.fileno())

    @property
    def admission(self) -> Admission | None:
        """Whose places the next one needs; None also where datagrams come, which stay nowhere."""
        return None if self._has_datagrams else self._serving.bounds.admission

    @property
    def bursts(self) -> bool:
        """Whether ``get_request`` may be called again while the door is readable: whether it is our own."""
        return bool(getattr(self._serving.server.get_request, "bursts", False))

    def take_turns(self, get: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """Call ``get`` as the only one of several loops, and only while a connection is there.

        Raises:
            BlockingIOError: another loop was quicker.
        """
        admission = self.admission
        with self._lock:
            if (admission is not None and admission.full) or not self.readable():
                raise BlockingIOError("another thread took the connection")
            taken = get()
            if admission is not None and not isinstance(taken[0], tuple):
                admission.reserve()
            return taken

    def admit(self, record: Record | None, request: Any, client_address: Any) -> bool:
        """Ask the limits about a connection that was accepted; one that they refuse is closed here."""
        serving = self._serving
        admission = serving.bounds.admission
        if admission is None:
            return True
        books = serving.books
        reason = admission.admit(
            record,
            lambda: record.peer if record is not None else books.describe(request, client_address),
            client_known=serving.entry is None or not serving.entry.tells_client,
        )
        if reason is not None:
            self.refuse(record, request, client_address, reason)
        return reason is None

    def admit_unrecorded(self, request: Any, client_address: Any) -> Ticket | None:
        """Ask as :meth:`admit` does about a connection that gets a record only when somebody reads it.

        Returns:
            What it was let in by; None: it was refused, and is closed.
        """
        books, admission = self._serving.books, self._serving.bounds.admission
        assert admission is not None, "who asks has limits"
        ticket, reason = admission.admit_unrecorded(partial(books.describe, request, client_address))
        if reason is None:
            return ticket
        record = books.connections.begin(request, client_address, time.monotonic())
        self.refuse(record, request, client_address, reason)
        return None

    def refuse(self, record: Record | None, request: Any, client_address: Any, reason: str) -> None:
        """Close a connection that is not let in: by a reset, or with the reply that ``overload`` asks for."""
        serving = self._serving
        admission = serving.bounds.admission
        serving.books.rejected(record, client_address, reason)
        turn_away(request, reply_of(serving.settings) if admission is None else admission.reply)
        serving.server.close_request(request)  # not shutdown_request(): its FIN would pass for an answer

    def broken_off(self, request: Any) -> None:
        """The loop ends by what a signal raised while ``request`` was handed over. Called where that is caught.

        Ctrl-C ends the connection. ``SystemExit``, say, leaves a handler that has begun its time, as everywhere.
        """
        serving = self._serving
        if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
            if serving.engine.in_child:
                serving.server.close_request(request)  # the child, if there is one, has it too
                return
            if self._begins(serving.connections.find(request)):
                return
        serving.books.interrupted = True
        shut(request)  # its thread may be in recv(), which close() does not wake
        serving.server.shutdown_request(request)

    def _begins(self, record: Record | None) -> bool:
        """Wait a moment for the handler of a connection to begin; tell whether it has."""
        deadline = time.monotonic() + BEGIN_SECONDS
        while record is not None and not record.begun and time.monotonic() < deadline:
            time.sleep(0.001)
        return record is not None and record.begun

    def _accept_ready(self) -> bool | None:
        """Take one connection of the readable door through the hooks; tell whether there is another.

        Only our own ``get_request`` is called twice in a turn: an overridden one may do anything in between. The
        listener is asked by poll() and not made non-blocking, since its flags belong to all processes that share it.

        Raises:
            OSError: the door is no listener any more.
        """
        serving = self._serving
        engine = serving.engine
        if engine.full and not self._make_room():
            return False
        admission = self.admission
        if admission is not None and admission.full:
            # Whoever took the last place asks whether there is more, and nobody may wait. Several loops do not ask so.
            if serving.shared or self.readable():
                self.wait_for_room(admission)
            return False
        if self._has_datagrams and self.datagrams.take():
            return False
        if engine.bursts and not serving.shared and straight.is_straight(serving):
            return straight.take(serving)
        return self._take_one()

    def _take_one(self) -> bool:
        serving = self._serving
        engine, server, admission = serving.engine, serving.server, self.admission
        if admission is not None and not admission.claim():
            self.wait_for_room(admission)
            return False
        try:
            taken = server._handle_request_noblock()
        finally:
            if admission is not None:
                admission.unclaim()
        if serving.acceptor.troubled:
            serving.acceptor.settle(taken=bool(taken))
        if taken is not True or serving.shared or engine.full or not getattr(server.get_request, "bursts", False):
            return False
        if admission is not None and admission.full:
            return False
        return self._readable(server.fileno())

    def turn(self) -> None:
        """Once a turn of the loop while the door is paused: watch it again when there is room."""
        serving = self._serving
        admission = serving.bounds.admission
        if admission is None or not admission.holds(serving):
            self._turn_for_handlers()
            return
        room = admission.room()
        if not room and admission.policy == "shed":
            self._shed_again_if_due(self._shedder)
        serving.acceptor.turn(room=room and not serving.engine.full, again=admission.patience)
        if not serving.acceptor.paused:
            admission.unhold(serving)

    def _turn_for_handlers(self) -> None:
        """Its part where no handler is free."""
        serving = self._serving
        policy, full = serving.settings["overload"], serving.engine.full
        if full and serving.acceptor.rests and not self.sharing.is_awaited(policy):
            return
        if full and policy == "shed":
            self._shed_again_if_due(self._served)
        again = SHED_SECONDS if policy == "shed" else math.inf
        serving.acceptor.turn(room=not full or policy not in WAITING, again=again)

    def wait_for_room(self, admission: Admission) -> None:
        """As many are inside as may be: leave the door alone until somebody leaves, or make the longest idle leave."""
        serving = self._serving
        admission.hold(serving, serving.wake)
        if admission.policy == "shed":
            self._shed(self._shedder)
        serving.acceptor.hold(f"max_connections ({admission.crowd.maximum}) are open")

    def _make_room(self) -> bool:
        """The engine is full: do as ``overload`` says. True when a connection may be accepted all the same."""
        policy = self._serving.settings["overload"]
        if policy != "wait" and self.sharing.may_rest():
            self._serving.acceptor.rest(NO_HANDLER)
        elif policy not in WAITING:
            self._turn_away()
        else:
            if policy == "shed":
                self._shed(self._served)
            self._serving.acceptor.hold(NO_HANDLER)
        return False

    def _turn_away(self) -> None:
        """Take a connection and refuse it, since no handler is free."""
        serving = self._serving
        try:
            request, client_address = serving.server.get_request()
        except OSError as error:
            serving.acceptor.failed(error)
            return
        record = serving.books.accepted(request, client_address)
        try:
            self.refuse(record, request, client_address, "overload")
        except Exception as error:  # noqa: BLE001 - a hook of the program's
            serving.books.failed(request, client_address, error)
            serving.server.handle_error(request, client_address)

    def _shed(self, shedder: Shedder) -> None:
        self._shed_again = time.monotonic() + SHED_SECONDS
        shedder.shed()

    def _shed_again_if_due(self, shedder: Shedder) -> None:
        """The last one has not gone in the time that it gets."""
        if time.monotonic() >= self._shed_again:
            self._shed(shedder)

    def _find_counted(self) -> Iterable[Record]:
        """Those who have a place: of all servers that share the limits."""
        admission = self._serving.bounds.admission
        return self._serving.connections if admission is None else admission.records()

    def _find_served(self) -> list[Record]:
        """The connections whose handler, or preamble, has begun; all where nobody knows, as of a program's own kind."""
        known = list(self._serving.connections)
        return [each for each in known if each.begun] or known
