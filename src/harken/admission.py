"""Admission: a server's limits in their order, the tickets of those who were let in, and who waits for room.

A server without limits has no admission at all, and pays for none. The listeners of one worker share one, so that its
numbers hold over all of them. A ticket travels with a connection's record and is given back once, by whoever ends it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from harken import plugins
from harken.acceptor import WAITING
from harken.errors import ConfigError
from harken.limits import Limit
from harken.limits.addresses import Addresses
from harken.limits.alarm import Alarm
from harken.limits.connections import SETTLE_SECONDS, MaxConnections, in_force
from harken.limits.peers import MaxConnectionsPerPeer
from harken.limits.rate import MaxAcceptRate

if TYPE_CHECKING:
    from harken.limits.across import Place
    from harken.peer import Peer
    from harken.records import Record, Registry
    from harken.settings import Settings

__all__ = ["Admission", "Ticket", "load_limits", "reply_of", "wanted"]

# Seconds between looks while all places are taken: with ``overload=shed`` the next one may have to go.
SHED_SECONDS = 1.0
# Why a connection is refused that a limit could not judge.
LIMIT_FAILED = "limit_failed"

_NAMES = (
    "max_connections",
    "max_connections_per_peer",
    "max_accept_rate",
    "allow",
    "deny",
    "alarm_connections",
    "limits",
)


def wanted(settings: Settings) -> bool:
    """Tell whether any limit is set: also by an empty ``allow``, which lets nobody in."""
    return settings["allow"] is not None or any(settings[name] not in (None, ()) for name in _NAMES)


def reply_of(settings: Settings) -> bytes:
    """Return what a refused client is sent: nothing, unless ``overload`` is ``reply``."""
    reply = settings["overload_reply"] if settings["overload"] == "reply" else b""
    return reply.encode() if isinstance(reply, str) else bytes(reply)


class Ticket:
    """What a connection was let in by; given back when it ends.

    Attributes:
        peer: as the limits were told; None while only those were asked that do not look at it.
        limits: those that let it in.
    """

    __slots__ = ("_admission", "limits", "peer")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.peer: Any = None
        self.limits: list[Limit] = []

    def give_back(self) -> None:
        """Release the limits. The caller sees to it that this happens once: see ``Record.ticket``."""
        for limit in self.limits:
            try:
                limit.release(self.peer)
            except Exception:  # noqa: BLE001 - a program's own, which must not keep the places of the others
                _complain(limit, "release")
        self._admission.left()


class Admission:
    """The limits that hold, in the order in which they are asked.

    Attributes:
        crowd: how many are inside.
        policy: the setting ``overload``.
        reply: what a refused client is sent under ``overload=reply``, else nothing.
    """

    def __init__(self, place: Place | None = None) -> None:
        """Begin with no limit; see :meth:`refresh`.

        Args:
            place: this process's among several over which numbers hold; None: it is alone.
        """
        self.crowd = MaxConnections(None, place)
        self.policy = "wait"
        self.reply = b""
        self._members: list[tuple[Registry, Callable[[int], None]]] = []
        self._own: tuple[Any, tuple[Limit, ...]] = ((), ())
        self._rate = MaxAcceptRate(None, place=place)
        self._alarm = Alarm(None, lambda: self.crowd.inside, self._ring)
        self._per_peer = MaxConnectionsPerPeer(None)
        self._addresses: Addresses | None = None
        self._lists: tuple[Any, Any] = (None, None)
        # Limits that ask nothing about the peer, and those that do: with a PROXY header these come after the preamble.
        self._at_door: tuple[Limit, ...] = ()
        self._by_client: tuple[Limit, ...] = ()
        self._reserved: deque[None] = deque()
        self._held: dict[int, Callable[[], None]] = {}
        self._free_since: float | None = None

    # -- what holds ----------------------------------------------------------------------------------------------------

    def join(self, registry: Registry, ring: Callable[[int], None]) -> None:
        """Count a server's connections here, those that are open already too.

        Args:
            registry: the server's.
            ring: tells its subscribers that ``alarm_connections`` are open.
        """
        if all(member is not registry for member, _ in self._members):
            self._members.append((registry, ring))
            registry.await_ends(len(self._held))
            self._count_again()

    def refresh(self, settings: Settings, engine_name: str) -> None:
        """Read the settings anew. What is inside stays inside, and counts."""
        self.crowd.maximum = in_force(settings, engine_name).value
        self.policy = settings["overload"]
        self.reply = reply_of(settings)
        self._rate.maximum = settings["max_accept_rate"]
        self._alarm.threshold = settings["alarm_connections"]
        self._per_peer.maximum = settings["max_connections_per_peer"]
        lists = settings["allow"], settings["deny"]
        if lists != self._lists:
            self._lists = lists
            self._addresses = Addresses(*lists) if any(entry is not None for entry in lists) else None
        if settings["limits"] != self._own[0]:
            self._own = settings["limits"], load_limits(settings["limits"])
        self._arrange()
        self.left()

    def _arrange(self) -> None:
        addresses = (self._addresses,) if self._addresses is not None else ()
        # Once per-peer numbers were wanted they are kept, so that they are right when they are wanted again.
        counted = self._per_peer.maximum is not None or self._per_peer in self._by_client
        self._by_client = (*addresses, *((self._per_peer,) if counted else ()), *self._own[1])
        rate = (self._rate,) if self._rate.maximum is not None else ()
        alarm = (self._alarm,) if self._alarm.threshold is not None else ()
        self._at_door = (self.crowd, *rate, *alarm)
        self._count_again()

    def _count_again(self) -> None:
        """Give a ticket of every counting limit to the connections that have none yet."""
        for registry, _ in self._members:
            for record in registry:
                self._count(registry, record)

    def _count(self, registry: Registry, record: Record) -> None:
        if not record.opened or not self._misses(record, record.ticket):
            return  # before it is opened, admit() is about to give it a ticket
        ticket = record.__dict__.pop("ticket", None) or Ticket(self)
        if self.crowd not in ticket.limits:
            self.crowd.count()
            ticket.limits.append(self.crowd)
        if self._counts_peer(record) and self._per_peer not in ticket.limits:
            ticket.peer = ticket.peer or record.peer
            self._per_peer.count(ticket.peer)
            ticket.limits.append(self._per_peer)
        record.ticket = ticket
        if not registry.holds(record) and record.__dict__.pop("ticket", None) is not None:
            ticket.give_back()  # it ended meanwhile, and whoever ended it found no ticket

    def _misses(self, record: Record, ticket: Ticket | None) -> bool:
        """Whether a limit counts that its ticket lacks."""
        limits = ticket.limits if ticket is not None else []
        return self.crowd not in limits or (self._counts_peer(record) and self._per_peer not in limits)

    def _counts_peer(self, record: Record) -> bool:
        """Whether it counts for its client: while a preamble has yet to tell who that is, it does so for nobody."""
        return self._per_peer in self._by_client and not record.held

    def records(self) -> list[Record]:
        """Return the open connections, of all servers."""
        return [record for registry, _ in self._members for record in registry]

    def _ring(self, inside: int) -> None:
        for _, ring in self._members[:1]:
            ring(inside)

    # -- one connection ------------------------------------------------------------------------------------------------

    def admit(self, record: Record | None, peer: Callable[[], Peer], *, client_known: bool = True) -> str | None:
        """Ask the limits about a connection that was accepted.

        Args:
            record: keeps the ticket; None for a datagram, which leaves at once.
            peer: tells where it comes from; called when a limit wants to know.
            client_known: False when a PROXY header is still to come: then :meth:`admit_client` asks the rest.

        Returns:
            None, or why it is refused; then nothing of it is counted.
        """
        ticket, at_door = Ticket(self), self._at_door
        reserved = bool(self._reserved) and self._take_reserved()
        if reserved:
            ticket.limits.append(self.crowd)
        if reserved or record is None:
            at_door = at_door[1:]
        reason = self._judge(ticket, at_door, peer if client_known else None)
        if reason is not None or record is None:
            ticket.give_back()
        else:
            record.ticket = ticket
        return reason

    def admit_unrecorded(self, peer: Callable[[], Peer]) -> tuple[Ticket, str | None]:
        """Ask as :meth:`admit` does about a connection that has no record yet, nor a place reserved.

        Returns:
            Its ticket, and None; or one that was given back, and why.
        """
        ticket = Ticket(self)
        reason = self._judge(ticket, self._at_door, peer)
        if reason is not None:
            ticket.give_back()
        return ticket, reason

    def _judge(self, ticket: Ticket, at_door: tuple[Limit, ...], peer: Callable[[], Peer] | None) -> str | None:
        reason = None
        if peer is not None and self._by_client:  # first: who is not wanted must not use up the tokens of others
            reason = self._ask(self._by_client, ticket, peer())
        if reason is None:
            reason = self._ask(at_door, ticket, ticket.peer)
        return reason

    def admit_client(self, record: Record, peer: Peer) -> str | None:
        """Ask the limits that judge the real client, once a preamble has told who that is; as :meth:`admit`.

        A refused connection keeps its ticket until it is closed.
        """
        ticket = record.ticket
        return self._ask(self._by_client, ticket, peer) if ticket is not None else None

    def _ask(self, limits: tuple[Limit, ...], ticket: Ticket, peer: Any) -> str | None:
        if peer is not None:
            ticket.peer = peer
        for limit in limits:
            try:
                reason = limit.admit(peer)
            except Exception:  # noqa: BLE001 - a program's own: it costs this connection alone
                _complain(limit, "admit")
                return LIMIT_FAILED
            if reason is not None:
                return reason
            ticket.limits.append(limit)
        return None

    # -- room ----------------------------------------------------------------------------------------------------------

    @property
    def asks_datagrams(self) -> bool:
        """Whether any limit has a say about datagrams, which leave as soon as they come."""
        return bool(self._by_client) or self._rate.maximum is not None

    @property
    def full(self) -> bool:
        """Whether the next connection must stay in the backlog for now."""
        return self.crowd.full and self.policy in WAITING

    def places(self, most: int) -> int:
        """How many connections may be taken from the backlog now, at most ``most``; as :meth:`claim`."""
        maximum = self.crowd.maximum
        if maximum is None or self.policy not in WAITING:
            return most
        if self.crowd.near:
            return int(self.reserve())
        return min(most, max(0, maximum - self.crowd.inside))

    def spare(self, most: int) -> int:
        """How many connections may come, at most ``most``, before :attr:`full` must be looked at again."""
        return self.crowd.spare(most, len(self._members)) if self.policy in WAITING else most

    def reserve(self) -> bool:
        """Count a connection before ``admit`` is asked, where several loops accept; tell whether it has a place."""
        if self.crowd.admit(None) is not None:
            return False
        self._reserved.append(None)
        return True

    def claim(self) -> bool:
        """Tell whether the next connection may be accepted.

        Near the limit it has its place from now on where other processes accept too, or else none of them would wait.
        :meth:`unclaim` gives it back.
        """
        if self.policy in WAITING and self.crowd.near:
            return self.reserve()
        return not self.full

    def unclaim(self) -> None:
        """Nobody came: give the place back."""
        if self.crowd.shared and self._take_reserved():
            self.crowd.release(None)

    def _take_reserved(self) -> bool:
        try:
            self._reserved.pop()
        except IndexError:
            return False
        return True

    def room(self) -> bool:
        """Tell whether a server that was full may accept again: so many have left, or some place stays free.

        Or nobody is left in the backlog any more, by another ``overload``.
        """
        if self.full:
            self._free_since = None
            return False
        if self.policy not in WAITING:
            return True
        now = time.monotonic()
        self._free_since = now if self._free_since is None else self._free_since
        return self.crowd.low or now - self._free_since >= SETTLE_SECONDS

    def hold(self, who: object, wake: Callable[[], None]) -> None:
        """Call ``wake()`` whenever there may be room, until :meth:`unhold`."""
        self._free_since = None
        if self._held.setdefault(id(who), wake) is wake:
            self._await_ends(1)
        self._held[id(who)] = wake

    def holds(self, who: object) -> bool:
        """Tell whether ``who`` waits for room."""
        return id(who) in self._held

    @property
    def patience(self) -> float:
        """Seconds after which to ask for :meth:`room` again, if nobody is woken before."""
        return SHED_SECONDS if self.full and not self.crowd.shared else SETTLE_SECONDS

    def unhold(self, who: object) -> None:
        """Call no more."""
        if self._held.pop(id(who), None) is not None:
            self._await_ends(-1)

    def _await_ends(self, change: int) -> None:
        for registry, _ in self._members:
            registry.await_ends(change)

    def left(self) -> None:
        """Somebody has left, or settings have changed: wake those that wait for room."""
        if self._held and not self.full:
            for wake in list(self._held.values()):
                wake()

    def wait_room(self, timeout: float | None) -> bool:
        """Wait until the next connection may be accepted; tell whether that came within ``timeout`` seconds."""
        news = threading.Event()
        deadline = None if timeout is None else time.monotonic() + timeout
        self.hold(news, news.set)
        try:
            while self.full:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                news.wait(left)
                news.clear()
            return True
        finally:
            self.unhold(news)

    def __iter__(self) -> Iterator[Limit]:
        """The limits, in their order."""
        return iter((self.crowd, self._rate, self._alarm, *self._by_client))


def _complain(limit: Limit, method: str) -> None:
    """Say that a limit of the program's own raised; in its ``except``."""
    with contextlib.suppress(Exception):  # a stderr that nobody reads any more must not break the server either
        print(f"harken: {method}() of the limit {type(limit).__name__} raised", file=sys.stderr)
        traceback.print_exc()


def load_limits(entries: Iterable[Any]) -> tuple[Limit, ...]:
    """Return the limits of the setting ``limits``: each is one, or the dotted path of one or of its class.

    Raises:
        ConfigError: a path leads nowhere, or to something else.
    """
    return tuple(map(_made, entries))


def _made(entry: Any) -> Limit:
    found = plugins.find("limits", entry, "Limit") if isinstance(entry, str) else entry
    try:
        made = found() if isinstance(found, type) else found
    except Exception as error:
        raise ConfigError(f"limits: {entry!r} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(made, Limit):
        raise ConfigError(f"limits: {entry!r} is no limit: it has no admit() and release()")
    return made
