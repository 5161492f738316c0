"""The worker processes of a supervisor: they come, are watched, are replaced, and go.

Nothing here waits for a worker. Each turn compares what is with what is wanted, and moves towards it: so a worker that
dies in the middle of a reload needs no case of its own.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from harken import events
from harken.errors import ConfigError
from harken.limits.across import Across, Place
from harken.observe.figures import Figures
from harken.process.answers import answer
from harken.process.channel import pair
from harken.process.child import Child, Inside
from harken.process.inquiry import Inquiries
from harken.process.ledger import Ledger, Slate
from harken.process.orders import Orders, with_order
from harken.process.scoreboard import MAX_ROWS, Scoreboard
from harken.process.signals import Early, blocked
from harken.process.traces import Followers
from harken.process.worker import CUT, DRAINED, Worker
from harken.settings import Settings, count, seconds, setting

__all__ = ["GRACE_SECONDS", "MOST_WORKERS", "Workers"]

# A reload needs room for as many again.
MOST_WORKERS = MAX_ROWS // 2

WORKERS = setting(
    "workers",
    count(maximum=MOST_WORKERS),
    0,
    serve=1,
    unit="processes",
    live=True,
    process=True,
    meaning="processes that serve, under a supervisor that replaces those that die; 0 serves in the process itself",
    origin="gunicorn's workers; the drop-in classes serve where they are called",
)
WORKER_TIMEOUT = setting(
    "worker_timeout",
    seconds(),
    30.0,
    unit="seconds",
    live=True,
    meaning="a worker whose loop has not turned for so long is killed and replaced; 0 never kills. The inline engine's "
    "loop turns between connections only, so it is not judged",
    origin="gunicorn's timeout",
)

# Seconds that a worker gets beyond its drain: it cuts what is left at the deadline, and handlers notice within one.
GRACE_SECONDS = 3.0
# Seconds between the first two starts of a worker that keeps dying, and the most; doubling between, as systemd and
# Kubernetes do.
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
# After so many seconds without a death the next one begins a new count.
STEADY_SECONDS = 10.0
# Workers started in one turn: signals and questions wait for so many forks, of some milliseconds each, and no more.
STARTS_A_TURN = 8
# Seconds between two looks at the workers, which come once a second, after which this process has not run either: it
# was stopped (SIGTSTP, `docker pause`), and its workers with it.
STOPPED_SECONDS = 2.0
# Seconds for a hung worker to write its stacks down: it takes milliseconds.
DUMP_SECONDS = 1.0


class Workers:
    """All workers, those that come and those that go.

    Attributes:
        statuses: with which exit statuses workers have ended.
        inquiries: what they are asked.
        followers: who follows connections of theirs.
        orders: what operators have ordered, of workers that start later too.
        replaced: how many were replaced, by cause; see ``observe.families``.
    """

    def __init__(
        self,
        settings: Settings,
        selector: selectors.BaseSelector,
        make: Callable[[Place], Worker],
        let_go: Callable[[], None],
        *,
        on_ready: Callable[[str], None],
        on_reloaded: Callable[[], None],
        orders: Orders,
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            settings: the service's.
            selector: of the supervisor's loop; its keys' ``data`` are functions to call when a descriptor is ready.
            make: called in each new process, with its place among all, to load the handler and make the worker.
            let_go: called in each new process first, to close what is the supervisor's.
            on_ready: called with its engine whenever a worker has become ready.
            on_reloaded: called when a reload is over, one way or the other.
            orders: what operators have ordered already.
        """
        self._wanted: int = settings["workers"]
        self.statuses: set[int] = set()
        self.inquiries = Inquiries()
        self.followers = Followers()
        self.replaced: Counter[str] = Counter()
        self._settings = settings
        self._selector = selector
        self._make = make
        self._let_go = let_go
        self._on_ready = on_ready
        self._on_reloaded = on_reloaded
        self._board = Scoreboard()
        self._across = Across(MAX_ROWS)
        self._ledger = Ledger()
        self._children: dict[int, Child] = {}
        self._generation = self._newest = 1  # what there should be, and the last number given
        self._proven = 0  # the last generation of which a worker has become ready
        self._reloading = False
        self._ending = False
        self._deaths = 0  # in a row
        self._last_death = 0.0
        self._delay = 0.0
        self._not_before = 0.0
        self.orders = orders
        self._looked = self._judging_since = time.monotonic()

    def __len__(self) -> int:
        return len(self._children)

    @property
    def all(self) -> list[Child]:
        """The workers, those that leave among them."""
        return list(self._children.values())

    @property
    def staying(self) -> list[Child]:
        """The workers of the newest generation that are not leaving."""
        return [
            child for child in self._children.values() if child.generation == self._generation and not child.leaving
        ]

    @property
    def wanted(self) -> int:
        """How many there should be."""
        return self._wanted

    @wanted.setter
    def wanted(self, number: int) -> None:
        changed, self._wanted = number not in (0, self._wanted), number
        if changed:  # each takes its part of what holds over all
            self.ask("configure", {"workers": number}, _unheard)

    @property
    def _standing(self) -> Orders:
        """What a worker that starts later is told."""
        if self._wanted in (0, self._settings["workers"]):
            return self.orders
        return with_order(self.orders, "configure", {"workers": self._wanted})

    @property
    def suspended(self) -> bool:
        """Whether workers leave new connections in the backlog."""
        return "suspend" in self.orders

    @property
    def ready(self) -> bool:
        """Whether one of them serves and stays, for now."""
        return any(child.ready and not child.leaving for child in self._children.values())

    def release(self) -> None:
        """In a forked child: let go of what is the parent's."""
        for child in self._children.values():
            child.release()

    def turn(self) -> None:
        """Once a turn of the loop, after messages, signals and `reap`.

        Raises:
            ConfigError: the very first worker cannot start.
        """
        self._look()
        self.inquiries.turn()
        self._replace()
        self._fill()

    def deadline(self) -> float:
        """When the next turn is due, by ``time.monotonic()``, if nothing happens before."""
        moments = [child.kill_at for child in self._children.values() if child.kill_at is not None]
        if self._lacking() > 0:
            moments.append(self._not_before)
        if self.inquiries.deadline is not None:
            moments.append(self.inquiries.deadline)
        return min(moments, default=float("inf"))

    # -- they come -----------------------------------------------------------------------------------------------------

    def _lacking(self) -> int:
        """How many workers to start now: one heir for each that wants one; until one has proved ready, only one."""
        if self._ending:
            return 0
        staying = self.staying
        lacking = self.wanted + sum(child.heir_wanted is not None for child in staying) - len(staying)
        if self._proven < self._generation:
            lacking = min(lacking, 1 - sum(not child.ready for child in staying))
        return max(0, lacking)

    def _fill(self) -> None:
        for _ in range(min(self._lacking(), STARTS_A_TURN)):
            if not self._lacking() or time.monotonic() < self._not_before:
                return
            try:
                self._start()
            except OSError as error:  # no descriptors, memory or processes left: those that are there serve on
                if self._proven == 0:
                    raise ConfigError(f"no worker can be started: {error.strerror}") from None
                self._slow_down()
                events.emit("worker_failed", reason=error.strerror, restart_in=self._delay)

    def _start(self) -> None:
        with ExitStack() as undo:
            ours, theirs = pair()
            undo.callback(ours.close)
            undo.callback(theirs.close)
            row = self._board.take()
            undo.callback(self._board.give_back, row)
            place = self._across.place(row.number)
            slate = Slate()
            undo.callback(slate.close)
            dump = os.memfd_create("harken-stacks", os.MFD_CLOEXEC)
            undo.callback(os.close, dump)
            early: Early | None = None
            with blocked():
                pid = os.fork()
                if pid == 0:
                    undo.pop_all()
                    self._let_go()
                    early = Early()
                    ours.release()
                    self.release()
            undo.pop_all()
        if early is not None:
            Inside(partial(self._make, place), theirs, row, slate, dump, answer, self._standing, early).live()
        theirs.release()
        child = self._children[pid] = Child(
            pid, self._generation, ours, row, slate, dump, self._settings["drain_timeout"]
        )
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._hear(child))

    # -- they speak ----------------------------------------------------------------------------------------------------

    def _hear(self, child: Child) -> None:
        try:
            messages = child.channel.receive()
        except (EOFError, ValueError):
            self._selector.unregister(child.channel)  # it is ending; reaped when it has
            return
        for message in messages:
            match message["type"]:
                case "ready":
                    self._became_ready(child, message["engine"])
                case "retire" if not child.leaving:
                    child.heir_wanted = message["reason"]
                case "failed":
                    child.trouble = message["reason"]
                case "traced":
                    self.followers.tell(message["token"], message["entries"], child.pid)
                case "reply":
                    self.inquiries.hear(child, message)

    def _became_ready(self, child: Child, engine: str) -> None:
        child.ready = True
        child.engine = engine
        if not child.leaving:  # of a reload that was taken back, or overtaken by another
            self._proven = max(self._proven, child.generation)
        self._on_ready(engine)
        events.emit("worker_started", pid=child.pid, generation=child.generation)
        for verb, arguments in self._standing.items():
            self.inquiries.ask([child], verb, arguments, _unheard)

    def ask(self, verb: str, arguments: dict[str, Any], done: Callable[..., object], *, standing: bool = False) -> None:
        """Ask every worker that serves.

        Args:
            verb: what; see ``answers``.
            arguments: the verb's.
            done: called once, with ``result=`` or ``error=``.
            standing: whether workers that come later are told too.
        """
        if standing:
            self.orders = with_order(self.orders, verb, arguments)
        if verb == "configure" and "drain_timeout" in arguments:
            for child in self._children.values():
                child.drain_timeout = self._settings["drain_timeout"]
        self.inquiries.ask([child for child in self._children.values() if child.ready], verb, arguments, done)

    # -- they go -------------------------------------------------------------------------------------------------------

    def reap(self) -> None:
        """See who has ended.

        Raises:
            ConfigError: the very first worker ended before it was ready.
        """
        for child in list(self._children.values()):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                self._ended(child, os.waitstatus_to_exitcode(status))
        if os.getpid() == 1:
            self._reap_strangers()

    def _reap_strangers(self) -> None:
        """As process 1 of a container: orphans of other programs are ours to reap, wait(2)."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._children:  # it ended since we looked
                self._ended(self._children[pid], os.waitstatus_to_exitcode(status))

    def _ended(self, child: Child, status: int) -> None:
        if child.channel.fileno() in self._selector.get_map():
            self._hear(child)  # its last words
        if child.channel.fileno() in self._selector.get_map():
            self._selector.unregister(child.channel)
        if status == -signal.SIGKILL and self._ending and child.row.open:
            self.statuses.add(CUT)  # its time was over, and it could not say so itself
        del self._children[child.pid]
        self._board.give_back(child.row)
        self._across.clear(child.row.number)
        self._ledger.bury(child)
        self.followers.lost(child.pid)
        self.inquiries.forget(child)  # after that: who has asked for figures may be answered now
        self._count(child, status)
        stacks = child.stacks() if child.killed_for else None
        child.close()
        if self._ending:
            self.statuses.add(status)
        own_end = child.heir_wanted if status in (DRAINED, CUT) else None
        expected = child.leaving or own_end is not None
        reason = child.killed_for or child.trouble or own_end or (None if child.leaving else _describe(status))
        failed_to_start = not child.ready and not child.leaving and child.generation > self._proven
        if failed_to_start and self._proven == 0:
            raise ConfigError(child.trouble or f"the worker {reason} before it was ready")
        if not expected:
            self._slow_down()
        details = {"reason": reason, "stacks": stacks, "restart_in": 0.0 if expected else self._delay}
        told = {name: value for name, value in details.items() if value}
        events.emit("worker_exited", pid=child.pid, status=status, **told)
        if failed_to_start and child.generation == self._generation:
            self._take_reload_back(reason or "")

    def _count(self, child: Child, status: int) -> None:
        """Note why a worker has to be replaced, unless it has not."""
        if self._ending:
            return
        if child.killed_for:
            self.replaced["hung"] += 1
        elif child.heir_wanted:
            self.replaced[child.heir_wanted.partition(":")[0]] += 1
        elif child.leaving:
            self.replaced["reload"] += child.generation < self._generation
        else:
            self.replaced["start" if not child.ready else "signal" if status < 0 else "ended"] += 1

    def figures(self) -> Figures:
        """Return what all workers have counted, those that have ended too, and how many there are."""
        total = self._ledger.total(self._children.values())
        states = Counter(
            "leaving" if child.leaving else "ready" if child.ready else "starting" for child in self._children.values()
        )
        for state, number in states.items():
            total.add("harken_workers", (state,), number)
        for cause, number in self.replaced.items():
            total.add("harken_worker_restarts_total", (cause,), number)
        total.add("harken_workers_wanted", (), self.wanted)
        return total

    def _slow_down(self) -> None:
        """Wait longer and longer for the next start while workers keep dying; the first is replaced at once."""
        now = time.monotonic()
        self._deaths = self._deaths + 1 if now - self._last_death < STEADY_SECONDS + self._delay else 1
        self._last_death = now
        self._delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (self._deaths - 2)) if self._deaths > 1 else 0.0
        self._not_before = now + self._delay

    def _look(self) -> None:
        """Kill whoever has had its time, or does not turn its loop any more."""
        now = time.monotonic()
        if now - self._looked > STOPPED_SECONDS:
            self._judging_since = now
        self._looked = now
        limit = self._settings["worker_timeout"]
        judged = now - self._judging_since > limit > 0
        for child in self._children.values():
            if child.kill_at is not None and now >= child.kill_at:
                child.kill_at = None
                child.signal(signal.SIGKILL)
            elif judged and child.is_judged and child.row.silence > limit:
                child.kill(f"hung: its loop has not turned for {child.row.silence:.0f} s", DUMP_SECONDS)

    # -- they are replaced ---------------------------------------------------------------------------------------------

    def reload(self) -> None:
        """Start workers anew; the old ones leave when enough new ones are ready."""
        self._give_up_starting()
        self._newest += 1
        self._generation = self._newest
        self._reloading = True
        self._deaths = 0
        self._not_before = 0.0

    def _take_reload_back(self, reason: str) -> None:
        """The new generation cannot start: the old one is the newest again."""
        self._generation = self._proven
        self._give_up_starting()
        self._deaths = 0
        self._not_before = 0.0
        self._reloading = False
        events.emit("upgrade_failed", reason=f"the new code does not start: {reason}; the old workers serve on")
        self._on_reloaded()

    def _give_up_starting(self) -> None:
        """Whoever starts for a reload that is over comes too late."""
        for child in self._children.values():
            if child.generation > self._proven:
                child.leave(GRACE_SECONDS)

    def _replace(self) -> None:
        """Let old workers go as soon as there are enough new ones to take their place."""
        if self._ending:
            return
        staying = self.staying
        heirs = [child for child in staying if child.heir_wanted is None]
        ready = sum(child.ready for child in heirs)
        if ready >= self.wanted:
            old = [child for child in self._children.values() if child.generation < self._generation]
            for child in [*old, *(child for child in staying if child.heir_wanted is not None)]:
                child.leave(GRACE_SECONDS)
            if self._reloading:
                self._reloading = False
                events.emit("reloaded", what=f"code and settings; {ready} new workers")
                self._on_reloaded()
        for child in sorted(heirs, key=lambda each: (each.ready, each.born))[: max(0, len(heirs) - self.wanted)]:
            child.leave(GRACE_SECONDS)

    # -- all of them ---------------------------------------------------------------------------------------------------

    def drain(self, *, last: bool) -> None:
        """Let every worker serve what it has, and end. No new ones come.

        Args:
            last: whether nobody takes whom they leave at the doors, where they are suspended.
        """
        self._ending = True
        if last:
            self._board.close_doors()
        for child in self._children.values():
            child.leave(GRACE_SECONDS)

    def stop(self) -> None:
        """Stop every worker now. No new ones come."""
        self._ending = True
        for child in self._children.values():
            child.stop(GRACE_SECONDS)

    def signal(self, number: int) -> None:
        """Send every worker a signal."""
        for child in self._children.values():
            child.signal(number)

    def close(self) -> None:
        """Kill whoever is left, which is nobody after a drain or a stop."""
        for child in self._children.values():
            child.signal(signal.SIGKILL)
            os.waitpid(child.pid, 0)
            child.close()
        self._children.clear()
        self._board.close()
        self._across.close()

    def flush(self) -> None:
        """Send on what busy workers have not read yet."""
        for child in self._children.values():
            if child.channel.unsent:
                child.channel.flush()


def _unheard(**_reply: Any) -> None:
    """Nobody waits for this answer."""


def _describe(status: int) -> str:
    if status < 0:
        try:
            return f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"was killed by signal {-status}"
    return f"ended with status {status}"
