"""One green thread a connection: tens of thousands of blocking handlers in one thread.

The hub runs in a thread of the engine's own. Handlers may outlive ``serve_forever()``, and green threads cannot leave
the thread that they were started in; so the loop's caller only waits, acts on signals, and leaves within milliseconds
whatever the handlers do. Doors, hooks and handlers all run in the hub's thread: a connection costs no thread switch.
"""

from __future__ import annotations

import _thread
import contextvars
import itertools
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from greenlet import GreenletExit, getcurrent

from harken import _hub
from harken._hub import hosts
from harken._hub.bell import Bell
from harken._hub.growth import grown
from harken.connection import Connection
from harken.engines import Door, Engine as Contract, Options, Way
from harken.engines._crew import Crew
from harken.engines._datagrams import Datagrams
from harken.engines._loops import Loop, Loops
from harken.engines._shortcuts import Shortcuts
from harken.engines._underway import Job, Underway, caller
from harken.forking import told_in_child
from harken.green import aside, release_threads
from harken.lifecycle import at_exit
from harken.stacks import end_handshake
from harken.stalls import Tally, Watchdog
from harken.stamps import plain_kind
from harken.unpatched import Socket, patched

__all__ = ["Engine"]

# Seconds that a spawn from another thread waits for the start, as Thread.start() does, unless handlers keep the hub.
START_SECONDS = 0.1
# Seconds that the hub's thread gets to end once nothing keeps it: it takes a turn.
LEAVE_SECONDS = 1.0
# The same where it is to leave although handlers are under way: coroutines get a second to clean up, see hosts/asyncio.
LEAVE_BUSY_SECONDS = 2.0
# Seconds that somebody in a hurry waits for the end of what a door does: it takes a turn, too.
TURN_SECONDS = 0.5

_numbers = itertools.count(1)
# What a handler may be given that the hub waits for; a datagram is a pair.
_FIT = (_hub.Connection, tuple)


class Engine(Contract):
    """A green thread for each connection, without bound.

    A request that the hub cannot wait for (a TLS socket of the program's own, any object with ``recv``) is served in a
    plain thread instead, since it would keep everybody waiting.
    """

    bursts = True
    shares_threads = True
    connection = _hub.Connection
    host: str | None = None
    """What the hub begins with, by its name in ``harken._hub.hosts``; None: what suits the process."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._doors: dict[int, tuple[Door, Callable[[], bool | None]]] = {}
        self._underway = Underway(self.wake)
        self._awakeners: dict[Callable[..., object], Callable[[Any], None]] = {}
        self._shortcuts = Shortcuts()
        self._loops = Loops(on_end=self._shortcuts.distrust)
        self._served: Any = None  # a datagram on its way through the hooks, in the green thread that will serve it
        self._at = 0  # the door that is being served
        self._crew = Crew(self._are_daemons)
        self._hub: Any = None
        self._stalls = Tally()
        self._watchdog: Watchdog | None = None
        self._thread: threading.Thread | None = None
        self._ident = 0  # of that thread
        self._leaving = False
        self._hurried = False  # by Ctrl-C, or the interpreter's end
        self._moved_in = False
        self._failure: BaseException | None = None
        # Held while a door's or a loop's callable runs. Taken before the guard, never after it.
        self._turns = threading.RLock()
        # Held while the hub comes and goes.
        self._guard = threading.RLock()
        _engines.add(self)

    @classmethod
    def remark(cls) -> str:
        """Which hub runs."""
        slower = f"; the compiled one, which is quicker, {_hub.fault()}" if "compiled" not in _hub.kinds() else ""
        return f"hub: {_hub.kind}{slower if _hub.kind == 'fallback' else ''}"

    def prepare(self, handler: Any) -> None:
        """See that the event loop that was chosen is there: else the first ``green.wait`` would end the server."""
        super().prepare(handler)
        self.check(self.options)

    @classmethod
    def check(cls, options: Options) -> None:
        """Check that the event loop is installed.

        Raises:
            ConfigError: it is not.
        """
        name = options("loop")
        if name != "asyncio":
            hosts.loop_factory(name)

    # -- doors ---------------------------------------------------------------------------------------------------------

    def watch(self, door: Door, on_readable: Callable[[], bool | None]) -> None:
        """Watch ``door``; see :class:`harken.engines.Engine`."""
        with self._guard:
            self._doors[id(door)] = (door, on_readable)
            if self._hub is not None:
                self._watch(self._hub, door)
                self._hub.wake()

    def unwatch(self, door: Door) -> None:
        """Stop watching ``door``; when this returns nothing of its is under way, unless the caller is that itself."""
        self._shortcuts.distrust()
        with self._turn(), self._guard:
            self._doors.pop(id(door), None)
            self._shortcuts.drop(door)
            if self._hub is not None:
                self._hub.unwatch(door)

    def _watch(self, hub: Any, door: Door) -> None:
        hub.watch(door, partial(self._serve, id(door)), self.shares_doors)

    def _serve(self, number: int) -> bool | None:
        """Take one connection from a door, while somebody wants that."""
        with self._turns:
            self._loops.drop_stopped()
            _, on_readable = self._doors.get(number, (None, None))
            # By EPOLLEXCLUSIVE nobody else was woken for who is at a door that others share: not even at our end.
            if on_readable is None or not (self._loops or self.shares_doors):
                return False
            self._at = number
            try:
                more = on_readable()
            except BaseException as error:  # noqa: BLE001 - raised again by the loop's caller
                self._loops.fail(error)
                return False
            if more:
                self._tick()  # the hub does it before the next turn
            return more

    # -- loops ---------------------------------------------------------------------------------------------------------

    def run(self, stopped: Callable[[], bool], tick: Callable[[], None], patience: Callable[[], float]) -> None:
        """Let the hub serve the doors until ``stopped``; see :class:`harken.engines.Engine`."""
        loop = Loop(stopped, tick, patience)
        self._hurried = False
        try:  # Ctrl-C may come as soon as the hub runs: a loop that stayed in the list would keep it running
            with self._turns, self._guard:
                self._loops.add(loop)
                self._need_hub().wake()
            loop.wait()
        except BaseException:
            self._hurried = True
            raise
        finally:
            self._leave(loop)
        if loop.error is not None:
            raise loop.error

    def wake(self) -> None:
        """Make the hub and every thread in ``run`` take a turn."""
        self._shortcuts.distrust()
        for loop in self._loops:
            loop.nudge()
        hub = self._hub
        if hub is not None:
            hub.wake()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the turns; in a hurry go on without, when a door's callable waits for its client: it may do so for ever.

        It may be in a hook of the program's; or in accept(), with the handshake of a listener that speaks TLS itself.
        """
        held = self._turns.acquire(timeout=TURN_SECONDS if self._hurried else -1)
        if not held:
            end_handshake(self._ident)
            held = self._turns.acquire(timeout=TURN_SECONDS)
        try:
            yield
        finally:
            if held:
                self._turns.release()

    def _leave(self, loop: Loop) -> None:
        with self._turn():
            self._loops.discard(loop)
        self.wake()
        if not self._loops and not self._underway:
            self._await_thread(LEAVE_SECONDS)

    def _tick(self) -> None:
        """A turn of the loops; called by the hub once a turn, and after each connection."""
        if self._loops:
            with self._turns:
                self._loops.tick()

    @property
    def holds_doors(self) -> bool:
        """Whether no door's callable is under way; a loop whose hub a handler keeps ends without it."""
        if not self._turns.acquire(blocking=False):
            return False
        self._turns.release()
        return True

    # -- the hub's thread ----------------------------------------------------------------------------------------------

    def _need_hub(self) -> Any:
        """Return the hub, starting its thread when there is none. Under the guard."""
        if self._hub is None:
            started = Bell()
            self._leaving = False
            threading.Thread(
                target=self._run_hub,
                args=(started,),
                name=f"harken-green-{next(_numbers)} (process_request_thread)",  # as in stdlib: monitors look
                daemon=self._are_daemons() or threading.current_thread().daemon,
            ).start()
            started.wait()
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
        return self._hub

    def _make_hub(self) -> tuple[hosts.Stage, Watchdog]:
        """Make the hub, in the thread that is to be its own."""
        self._thread = threading.current_thread()
        self._ident = _thread.get_ident()
        hub = _hub.Hub()
        _hub.on_growth(grown)
        for door, _ in list(self._doors.values()):
            self._watch(hub, door)
        self._hub = hub
        stage = hosts.Stage(hub, self._is_over, self._loops.patience, self._tick, lambda: self.options("loop"))
        return stage, self._watch_for_stalls(hub)

    def _run_hub(self, started: Bell) -> None:
        try:
            stage, watchdog = self._make_hub()
        except BaseException as error:  # noqa: BLE001 - raised again by who needs the hub
            self._failure = error
            return
        finally:
            started.ring()
        try:
            hosts.run(self.host or hosts.first(), stage)
        except BaseException as error:  # noqa: BLE001 - raised again by the loops' callers
            with self._guard:
                if self._hub is stage.hub:  # else it was over, and another may be there
                    self._give_up()
                    self._underway.lose()
            for loop in self._loops:
                self._loops.finish(loop, error)
        finally:
            watchdog.stop()
            self._underway.ring()

    def move_in(self) -> Callable[[], Awaitable[None]]:
        """Let the hub be a guest in the loop of this thread; see :class:`harken.engines.Engine`."""
        from harken._hub.hosts.asyncio import Lodger

        with self._guard:
            self._moved_in = True
            stage, watchdog = self._make_hub()
            lodger = Lodger(stage)

        async def leave() -> None:
            try:
                await lodger.leave()
            finally:
                with self._guard:
                    self._give_up()
                    self._thread = None
                    self._ident = 0
                    self._moved_in = False
                    self._underway.lodgers = 0  # they go with the hub
                watchdog.stop()
                self._underway.ring()

        return leave

    def _is_over(self) -> bool:
        """Whether the hub's thread may end; asked by the hub when a green thread has ended, for one."""
        self._underway.ring()
        hub = self._hub
        if hub is not None:
            hub.asks_at_ends = self._leaving or not self._loops or self._underway.awaited
        if self._moved_in:
            return False
        if not self._leaving and (self._loops or self._underway):
            return False
        with self._guard:
            if self._leaving or not (self._loops or self._underway):
                self._give_up()
        return self._hub is None

    def _give_up(self) -> None:
        """Whoever needs a hub from now on gets another; its thread must not meet what was made for this one.

        Under the guard, in the hub's thread, which takes a while to end.
        """
        self._shortcuts.close()
        self._hub = None

    def _await_thread(self, seconds: float | None) -> None:
        thread = self._thread
        if thread is not None and not self._moved_in and thread is not threading.current_thread():
            thread.join(seconds)

    @property
    def in_loop_thread(self) -> bool:
        """Whether the calling thread is the hub's; under gevent, where all share one, whether the hub's code calls."""
        if self._hub is None:
            return False
        if patched():
            from harken._hub.hosts.gevent import is_inside

            return is_inside(self._hub)
        return self._ident == _thread.get_ident()

    # -- stalls --------------------------------------------------------------------------------------------------------

    def _watch_for_stalls(self, hub: Any) -> Watchdog:
        """Start the watchdog, which is needed in any case: it sends what handlers wrote before they compute on."""
        watchdog = self._watchdog = Watchdog(hub.beat, tally=self._stalls, send=hub.flush_pending_nowait)
        self.refresh()
        watchdog.start()
        return watchdog

    @property
    def stalls(self) -> Mapping[str, int]:
        """What the watchdog has counted; see :class:`harken.engines.Engine`."""
        return dict(self._stalls.counts)

    def refresh(self) -> None:
        """Take over ``stall_after``, and let datagrams be taken as the settings say now."""
        self._shortcuts.distrust()
        watchdog = self._watchdog
        if watchdog is not None:
            watchdog.after = self.options("stall_after")

    # -- handlers ------------------------------------------------------------------------------------------------------

    def spawn(self, function: Callable[..., object], *args: Any, done: Callable[[int], None] | None = None) -> int:
        """Run ``function`` in a green thread of its own."""
        if args and not isinstance(args[0], _FIT) and hasattr(args[0], "recv"):
            self._crew.submit(function, *args)
            return 0
        if self._served is not None and args and args[0] is self._served:
            self._served = None
            _run_here(function, args)
            return 0
        hub, jobs = self._hub, self._underway.jobs
        if hub is not None and self.in_loop_thread:
            hub.spawn_into(jobs, function, *args)
            return 0
        job = Job(jobs, function, args)
        with self._guard:
            jobs.add(job)
            self._need_hub().call_soon_threadsafe(contextvars.copy_context().run, self._hub.spawn, job)
        job.begun.wait(START_SECONDS)
        return 0

    def starter(self) -> Callable[..., object]:
        """Return what starts green threads at once; see :class:`harken.engines.Engine`."""
        return partial(self._hub.spawn_into, self._underway.jobs) if self.in_loop_thread else self.spawn

    def spawn_on_data(self, function: Callable[..., object], request: Any, *args: Any) -> None:
        """Start the green thread of ``request`` when its first bytes have come."""
        if self._hub is None or not self.in_loop_thread or not isinstance(request, _hub.Connection):
            self.spawn(function, request, *args)
            return
        self._hub.lodge(request, self._awakener(function, args))
        self._underway.lodgers += 1

    def _awakener(self, function: Callable[..., object], args: tuple[Any, ...]) -> Callable[[Any], None]:
        """Return what starts a handler: one for all that differ in their connection alone, of whom there are many."""
        if args:
            return partial(self._start, function, args)
        starter = self._awakeners.get(function)
        if starter is None:
            starter = self._awakeners[function] = partial(self._start, function, args)
        return starter

    def _start(self, function: Callable[..., object], args: tuple[Any, ...], request: Any) -> None:
        self._underway.lodgers -= 1
        self._hub.spawn_into(self._underway.jobs, function, request, *args)

    def adopt(self, request: Any) -> Any:
        """Make a plain socket, also gevent's, a connection of the hub's; anything else stays as it is."""
        kind = plain_kind(type(request))
        plain = kind in (Socket, Connection) or (kind is socket.socket and patched())
        return _hub.adopt(request) if plain else request

    def beside(self, function: Callable[..., object], *args: Any) -> None:
        """Run ``function`` in a green thread; see :class:`harken.engines.Engine`."""
        with self._guard:
            hub = self._hub
            if hub is not None:
                hub.call_soon_threadsafe(hub.spawn, partial(function, *args))
                return
        super().beside(function, *args)

    def lane(self, door: Door, way: Callable[[], Way]) -> Any:
        """Serve connections of a plain server by compiled code alone; see :class:`harken.engines.Engine`."""
        lanes, number = self._shortcuts.lanes, id(door)
        if number not in lanes and _hub.Lane is not None and number in self._doors and self.in_loop_thread:
            lanes[number] = _hub.Lane(self._hub, self._underway.jobs, way())
        return lanes.get(number)

    # -- datagrams -----------------------------------------------------------------------------------------------------

    def datagrams(self, sock: Any) -> Datagrams | None:
        """Serve datagrams in green threads that are used again; see :class:`harken.engines.Engine`."""
        if not isinstance(sock, Socket):  # gevent's, which waits by itself
            return None
        found = self._shortcuts.datagrams.get(id(sock))
        if found is None or found.sock is not sock:
            if not self.in_loop_thread:
                return None
            number = self._at
            found = self._shortcuts.datagrams[id(sock)] = Datagrams(
                self._hub,
                sock,
                self._doors[number][0],
                busy=self._underway.jobs,
                crowded=self._crowd,
                more=partial(self._take_more, number),
            )
        return found

    def here(self, request: Any) -> None:
        """The datagram ``request`` goes through the hooks in a green thread that will serve it: ``spawn`` is to."""
        self._served = request

    def _take_more(self, number: int, take: Callable[[], object]) -> None:
        """Take more datagrams of a door, while somebody wants that; what goes wrong is the next turn's to see."""
        with self._turns:
            self._loops.drop_stopped()
            if self._loops and number in self._doors and not self._shortcuts.crowds:
                try:
                    take()
                except OSError:
                    pass

    def _crowd(self, change: int) -> None:
        self._shortcuts.crowds += change
        if self._hub is not None:
            self._hub.wake()  # so that the loops look whether there is room

    @property
    def full(self) -> bool:
        """Whether as many datagram handlers wait as may."""
        return self._shortcuts.crowds > 0

    def aside(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(*args)``; in a green thread it runs in a plain one meanwhile."""
        token = caller.set(getcurrent())
        try:
            return aside(function, *args)
        finally:
            caller.reset(token)

    def join(self, deadline: float | None) -> int:
        """Wait for the handlers; see :class:`harken.engines.Engine`. The hub's own greenlet cannot wait."""
        if not self.in_loop_thread or _hub.current() is not None:
            while self._underway.others:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._underway.await_end(left)
        threads = self._crew.join(deadline)
        release_threads()
        others = self._underway.others
        if not self._underway and not self._loops and not self.in_loop_thread:  # busy: with the caller's own handler
            self._await_thread(LEAVE_SECONDS)
        return others + threads

    def _are_daemons(self) -> bool:
        return bool(self.options("daemon_threads"))

    # -- the end of the process, and forked children -------------------------------------------------------------------

    def at_exit(self) -> None:
        """Before the interpreter waits for threads: do for a daemon's loop what would have become of it."""
        ending = [loop for loop in self._loops if loop.daemon]
        if ending:
            self._hurried = True
            with self._turn():
                for loop in ending:
                    self._loops.finish(loop)
        if self._thread is None or not self._thread.daemon:
            return  # the interpreter waits for it, and it ends with its last loop and handler
        if not self._are_daemons():
            while self._underway:
                self._underway.await_end(None)
        self._leaving = True
        self.wake()
        self._await_thread(LEAVE_BUSY_SECONDS)
        if self._watchdog is not None:
            self._watchdog.stop()  # a handler that keeps the hub still is told of

    def after_fork(self) -> None:
        """In a child: the loops, the handlers and the hub are the parent's."""
        self._doors.clear()
        self._loops.clear()
        self._underway.forget()
        self._shortcuts.forget()
        self._served = None
        self._hub = self._thread = self._watchdog = None
        self._moved_in = False
        self._ident = 0
        self._turns = threading.RLock()
        self._guard = threading.RLock()


def _run_here(function: Callable[..., object], args: tuple[Any, ...]) -> None:
    """Run a handler in this green thread, which serves another one after it."""
    try:
        function(*args)
    except GreenletExit:
        raise
    except BaseException:  # noqa: BLE001 - shown as a thread's would be
        threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))


_engines = told_in_child(Engine)


@at_exit
def _end_all() -> None:
    for engine in list(_engines):
        engine.at_exit()
