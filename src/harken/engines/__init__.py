"""An engine decides *when* to accept and *where* a handler runs. One file an engine; this is their contract.

An engine knows nothing of servers: it is given doors with callables, and functions to run. An engine written outside
harken is named by a dotted path (``engine="my.module:MyEngine"``) or an entry point of the group ``harken.engines``,
and :func:`harken.testing.check_engine` tells whether it keeps the contract.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from harken import plugins
from harken.connection import Connection
from harken.errors import ConfigError
from harken.records import Lane as Unrecorded
from harken.settings import choice, setting

__all__ = [
    "ENGINE",
    "LOOP",
    "DatagramService",
    "Datagrams",
    "Door",
    "Engine",
    "Lane",
    "Options",
    "Terms",
    "Way",
    "is_async",
    "load",
    "suited",
]

ENGINE = setting(
    "engine",
    choice("inline", "thread", "pool", "fork", "green", "asyncio", optional=True),
    None,
    serve="thread",
    meaning="where handlers run: `inline` one at a time, `thread` one thread a connection, `pool` bounded threads "
    "and queue, `fork` one child process a connection, `green` one green thread a connection, "
    "`asyncio` `async def handle`, or `package.module:Engine`; none: as the class says",
    origin="socketserver: plain servers are inline, ThreadingMixIn's thread, ForkingMixIn's fork",
)


LOOP = setting(
    "loop",
    choice("asyncio", "uvloop"),
    "asyncio",
    meaning="the event loop of the engine `asyncio`, and of `green` once a handler waits for a coroutine; `uvloop` "
    "needs `pip install harken[uvloop]`",
    origin="asyncio needs nothing installed",
)


class Options(Protocol):
    """What an engine may ask about its server, read late."""

    def __call__(self, name: str) -> Any:
        """Return a setting, or one of stdlib's attributes (``daemon_threads``, ``block_on_close``)."""


class Door(Protocol):
    """What an engine watches: anything with a descriptor."""

    def fileno(self) -> int:
        """Return the descriptor of the moment."""


# inspect.CO_COROUTINE; importing inspect costs more than all of `import harken`.
_CO_COROUTINE = 0x80


async def _nothing() -> None:
    """End what was not begun."""


def is_async(handler: Any) -> bool:
    """Tell whether a handler class has coroutines for hooks."""
    while hasattr(handler, "func"):  # a functools.partial
        handler = handler.func
    if getattr(handler, "is_async", False):
        return True
    code = getattr(getattr(handler, "handle", None), "__code__", None)
    return bool(getattr(code, "co_flags", 0) & _CO_COROUTINE)


def suited(handler: Any, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings to serve a handler class with: one with coroutines takes ``asyncio`` unless they say more."""
    return {"engine": "asyncio", **keywords} if is_async(handler) else dict(keywords)


def load(name: str) -> type[Engine]:
    """Return the engine of a name, a dotted path or an entry point.

    Raises:
        ConfigError: nothing goes by that name, or it is no engine.
    """
    found = plugins.find("engines", name, "Engine")
    missing = sorted(verb for verb in (*Engine.__abstractmethods__, "fit", "prepare") if not hasattr(found, verb))
    if missing or not isinstance(found, type):
        raise ConfigError(f"engine = {name!r} is no engine: derive a class from harken.engines.Engine")
    return found


@dataclass(frozen=True, slots=True)
class DatagramService:
    """What becomes of datagrams; see :meth:`Engine.datagrams`.

    Attributes:
        size: the most bytes of one that are taken.
        taken: called with the number of datagrams that were taken together, before they are served.
        cut: called with the sender's address for each that was longer.
        serve: called with ``((bytes, sock), address)``, and ``server`` unless that is None, for each.
        server: a third argument for ``serve``.
        failed: called with request, address and error, within ``except``, when ``serve`` raised an Exception, or an
            answer could not be sent.
        lean: ``serve`` is a handler class whose making is BaseRequestHandler's, with nothing to set up or finish.
    """

    size: int
    taken: Callable[[int], object]
    cut: Callable[[Any], object]
    serve: Callable[..., object]
    server: Any
    failed: Callable[[Any, Any, BaseException], object]
    lean: bool = False


class Datagrams(Protocol):
    """Takes the datagrams of one socket, and serves them where its engine runs handlers."""

    def take(self, service: DatagramService) -> None:
        """Take what is there without waiting, and see that it is served.

        Raises:
            OSError: as recvmsg(2).
        """


class Way(NamedTuple):
    """What a :class:`Lane` needs of a server; see :meth:`Engine.lane`.

    Attributes:
        server: the handlers' third argument.
        registry: where connections are known; its slots say whether anybody has to be told of an end.
        filed: the registry's records, by number.
        counts: what happened how often.
        reasons: why connections ended, how often each.
        subscribers: of events, by name.
        remember: makes the record of a connection when it is asked for: ``(connection, address, started, ticket)``.
        close: called with the connection whose handler is done, where somebody has to be told.
        failed: called with connection, address and error, within ``except``, when a handler raised an Exception.
        shown: called with listener and address for addresses that hooks get in another form.
        enter: called with connection and address in place of the handler, where preambles come first: it serves the
            connection to its end. None where there are none.
    """

    server: Any
    registry: Any
    filed: dict[int, Any]
    counts: dict[str, int]
    reasons: dict[str, int]
    subscribers: Mapping[str, tuple[Callable[..., object], ...]]
    remember: Callable[[Any, Any, float, Any], object]
    close: Callable[[Any], object]
    failed: Callable[[Any, Any, BaseException], object]
    shown: Callable[[Any, Any], Any]
    enter: Callable[[Any, Any], object] | None


class Terms(NamedTuple):
    """On which a :class:`Lane` lets connections in.

    Attributes:
        handler: the handler class.
        lean: whether its making is BaseRequestHandler's, with nothing to set up or finish.
        stamps: whether they stamp what they do from the beginning; see :mod:`harken.stamps`.
        gate: asked with each connection and its address before it comes in: returns its ticket, whose ``give_back()``
            is called at its end unless a record has it, or None when it was refused, and closed. None: all may.
    """

    handler: Any
    lean: bool
    stamps: bool
    gate: Callable[[Any, Any], object | None] | None


class Lane(Unrecorded, Protocol):
    """Lets connections in, serves them and sees to their end, for a server where nobody has to be told of each."""

    def take(self, listener: Any, most: int, terms: Terms, /) -> int:
        """Take what waits at the door, at most so many, without waiting, and let it in; return how many were there.

        Args:
            listener: the listening socket.
            most: connections.
            terms: on which these come in, and those that come while :meth:`trust` holds.

        Raises:
            OSError: as accept(2), for the first.
        """

    def trust(self, door: Door, places: int, /) -> object:
        """So many as come to ``door`` within a moment may be let in as the last was, without ``on_readable``."""


class Engine(ABC):
    """The contract. Verbs marked *any thread* may also be called by a signal handler.

    Attributes:
        in_child: whether ``spawn`` hands the connection to another process, so that the caller closes its own copy.
        in_loop: whether ``spawn`` runs the handler at once, in the loop.
        bursts: whether connections are to be taken many at a time, by ``connection.take``; ``spawn`` then never waits.
        shares_threads: whether handlers share threads, so that a thread does not tell which of them calls.
        connection: what accepted connections are made of, unless a program accepts by itself; see ``adopt``.
        shares_doors: whether other processes accept from the same doors, so that one of them should wake at a time, and
            each in its turn.
    """

    in_child: ClassVar[bool] = False
    in_loop: ClassVar[bool] = False
    bursts: ClassVar[bool] = False
    shares_threads: ClassVar[bool] = False
    connection: Any = Connection
    shares_doors: bool = False

    def __init__(self, options: Options) -> None:
        self.options = options

    @classmethod
    def fit(cls, handler: Any) -> None:
        """Check that a handler class can be served here.

        Raises:
            ConfigError: it cannot.
        """
        if is_async(handler):
            name = getattr(handler, "__qualname__", handler)
            raise ConfigError(f"{name}.handle is async, and handlers of this engine block; take engine='asyncio'")

    @classmethod
    def check(cls, options: Options) -> None:
        """Check that what the settings ask for is there on this machine.

        Raises:
            ConfigError: it is not.
        """

    def prepare(self, handler: Any) -> None:
        """Get ready to serve a handler class; called before it is served first, and whenever serving begins.

        Raises:
            ConfigError: it does not fit.
        """
        self.fit(handler)

    @abstractmethod
    def watch(self, door: Door, on_readable: Callable[[], bool | None]) -> None:
        """Call ``on_readable`` whenever ``door`` is readable, and again while it returns true, within bounds.

        Once more for a door that is watched and that others share: look who waits there already.
        When it returns None, ``run`` need not ask ``stopped`` nor call ``tick`` for it.
        """

    @abstractmethod
    def unwatch(self, door: Door) -> None:
        """Stop calling; a door that is not watched is ignored."""

    @abstractmethod
    def run(self, stopped: Callable[[], bool], tick: Callable[[], None], patience: Callable[[], float]) -> None:
        """Watch the doors until ``stopped``. Several threads may run one engine at once.

        Args:
            stopped: asked after each wake-up and each connection.
            tick: called once a turn, after each connection, and at least every ``patience()`` seconds.
            patience: how long, in seconds, the loop may sleep.

        Raises:
            Exception: whatever a door's ``on_readable`` or ``tick`` raises ends the loop.
        """

    @abstractmethod
    def wake(self) -> None:
        """Make ``run`` take a turn at once (*any thread*)."""

    def starter(self) -> Callable[..., object]:
        """Return what does as ``spawn(function, request, …)`` does, for the connections of one burst, at their door."""
        return self.spawn

    @abstractmethod
    def spawn(self, function: Callable[..., object], *args: Any, done: Callable[[int], None] | None = None) -> int:
        """Run ``function(*args)`` where this engine runs handlers.

        Args:
            function: must deal with its own exceptions.
            args: its arguments.
            done: for an engine that hands the connection to another process: called with its exit status.

        Returns:
            The pid of that other process, or 0.

        Raises:
            Exception: nothing was started.
        """

    def spawn_on_data(self, function: Callable[..., object], request: Any, *args: Any) -> None:
        """Run ``function(request, *args)`` as ``spawn`` does, or once bytes of ``request``, or its end, have come.

        For handlers that say that they wait for the client in any case (``lazy``).
        """
        self.spawn(function, request, *args)

    def show_threads(self, server: Any) -> None:
        """Let programs see the handlers' threads in ``server``; called where its hooks, which would do it, are not."""

    def adopt(self, request: Any) -> Any:
        """Make a connection fit for this engine's handlers, and return it.

        When that takes another object, the old one must be detached; the caller moves its record.
        """
        return request

    def datagrams(self, sock: socket.socket) -> Datagrams | None:
        """Return what serves the datagrams of ``sock`` better than one ``spawn`` each, if there is such a thing here.

        Called at the door, from ``on_readable``.
        """
        return None

    def lane(self, door: Door, way: Callable[[], Way]) -> Lane | None:
        """Return what takes connections from ``door`` to their end by itself, if there is such a thing here.

        Called at the door, from ``on_readable``.

        Args:
            door: at which they come.
            way: asked when the lane is made.
        """
        return None

    def here(self, request: Any) -> None:
        """The datagram ``request`` goes through the hooks where it will be served: ``spawn`` is to run it there."""

    def beside(self, function: Callable[..., object], *args: Any) -> None:
        """Run a hook beside the handlers, where it may use a connection of theirs, and return at once (*any thread*).

        Args:
            function: may wait, though the bytes of a peer who does not read keep it no longer than the connection
                lasts; must deal with its own exceptions.
            args: its arguments.

        Raises:
            RuntimeError: the system starts no more threads; it is not run.
        """
        from harken.engines._crew import beside

        beside(function, *args)

    def aside(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(*args)``, which waits for other handlers, so that it does not keep them from running."""
        return function(*args)

    @property
    def in_loop_thread(self) -> bool:
        """Whether the calling thread is one of the engine's own in which doors are watched (*any thread*)."""
        return False

    @property
    def holds_doors(self) -> bool:
        """Whether ``run`` waits at the doors, and leaves them when it is stopped and woken (*any thread*).

        False while it is inside something that may take as long as it likes: a handler, a hook, a handshake.
        """
        return True

    def move_in(self) -> Callable[[], Awaitable[None]]:
        """Run handlers in the asyncio loop that runs in this thread, if this engine has a loop for them.

        Returns:
            What ends that; to be awaited in this loop when nothing is served any more.
        """
        return _nothing

    @classmethod
    def remark(cls) -> str:
        """One line that ``harken check`` tells of the engine on this machine, or an empty string."""
        return ""

    @property
    def full(self) -> bool:
        """Whether ``spawn`` would have to wait."""
        return False

    @property
    def stalls(self) -> Mapping[str, int]:
        """How often each place (``FILE:LINE``) kept the loop from other connections for ``stall_after``."""
        return {}

    def refresh(self) -> None:
        """Read live settings anew, after they have changed (*any thread*)."""

    def collect(self) -> None:
        """Tidy up after handlers that have ended; called once a turn."""

    def terminate(self) -> None:
        """Ask the handlers to end that shutting their sockets here does not reach (*any thread*)."""

    def kill(self) -> int:
        """End at once what did not heed ``terminate``, where that can be done; return how many handlers still run."""
        return 0

    @abstractmethod
    def join(self, deadline: float | None) -> int:
        """Wait for handlers to end, and let idle threads go; return how many handlers still run at ``deadline``.

        The calling handler, if it is one, is not waited for.

        Args:
            deadline: by ``time.monotonic()``, or None to wait without end.
        """
