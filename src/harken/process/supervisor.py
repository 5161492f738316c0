"""The parent of worker processes: starts them, replaces them, and hands their listeners on. It serves nobody itself.

One thread, one loop: signals, what workers say, and time. Nothing here waits for a worker. Each turn the loop compares
what is with what is wanted, and moves towards it: so a worker that dies in the middle of a reload, or a signal that
comes twice, needs no case of its own.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from harken import events
from harken.errors import ConfigError, HandoffError
from harken.listener import Listener
from harken.process import handoff, privileges
from harken.process.answers import answer
from harken.process.channel import Channel, pair
from harken.process.child import Child, Inside
from harken.process.notify import notify, reloading, watchdog_interval
from harken.process.pidfile import PidFile
from harken.process.scoreboard import Scoreboard
from harken.process.signals import Inbox, blocked
from harken.process.worker import CUT, DRAINED, Worker
from harken.settings import Settings, count, operator, seconds, setting
from harken.transports import bind_options

__all__ = ["Supervisor"]

WORKERS = setting(
    "workers",
    count(),
    0,
    serve=1,
    unit="processes",
    live=True,
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
UPGRADE_TIMEOUT = setting(
    "upgrade_timeout",
    seconds(),
    60.0,
    unit="seconds",
    live=True,
    meaning="how long a new binary may take to be ready before it is killed and the old one serves on",
    origin="tableflip's UpgradeTimeout",
)

# Seconds between looks at heartbeats, which come once a second.
LOOK_SECONDS = 1.0
# Seconds that a worker gets beyond its drain: it cuts what is left at the deadline, and handlers notice within one.
GRACE_SECONDS = 3.0
# Seconds between the first two starts of a worker that keeps dying, and the most; doubling between, as systemd and
# Kubernetes do.
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
# After so many seconds without a death the next one begins a new count.
STEADY_SECONDS = 10.0
# Seconds for a hung worker to write its stacks down: it takes milliseconds.
DUMP_SECONDS = 1.0

_SIGNALS = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU, signal.SIGWINCH),
)
_SUPERVISORS = (signal.SIGHUP, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU)


class Supervisor:
    """Workers on shared listeners."""

    def __init__(
        self,
        load: Callable[[], Callable[..., Any]],
        addresses: tuple[str, ...],
        keywords: dict[str, Any],
        *,
        reopen: Callable[[], None],
        in_memory: bool,
    ) -> None:
        """Bind every address and become who the settings say.

        Args:
            load: returns the handler; called in each worker.
            addresses: URLs.
            keywords: settings by name.
            reopen: opens the log anew.
            in_memory: whether ``load`` returns what this process has loaded, so that only a new process has new code.

        Raises:
            ConfigError: an address or a setting is wrong; nothing stays open.
            BindError: an address cannot be had; nothing stays open.
        """
        self._load = load
        self._reopen = reopen
        self._in_memory = in_memory
        self._keywords = keywords
        self.settings = Settings(None, keywords, "serve")
        self._directory = os.getcwd()
        self._pidfile = PidFile(self.settings["pidfile"])
        privileges.set_umask(self.settings)
        with ExitStack() as undo:
            self._opened = handoff.listen(addresses, bind_options(self.settings))
            undo.callback(self._close_listeners)
            self._become()
            undo.pop_all()
        self._board = Scoreboard()
        self._children: dict[int, Child] = {}
        self._selector = selectors.DefaultSelector()
        self._inbox: Inbox | None = None
        self.wanted: int = self.settings["workers"]
        self._generation = 1
        self._proven = 0  # the last generation of which a worker has become ready
        self._announced = False
        self._reloading = False
        self._ending: str | None = None  # "drain" or "now"
        self._successor: handoff.Successor | None = None
        self._statuses: set[int] = set()
        self._deaths = 0  # in a row
        self._last_death = 0.0
        self._delay = 0.0
        self._not_before = 0.0
        self._watchdog = watchdog_interval()
        self._barked = 0.0

    def _become(self) -> None:
        uid, gid = privileges.identity(self.settings)
        predecessor = handoff.upgraded_from()
        if not predecessor:
            self._pidfile.write()
            if uid is not None or gid is not None:
                self._pidfile.give_to(-1 if uid is None else uid, -1 if gid is None else gid)
        privileges.drop(self.settings)
        privileges.chdir(self.settings)

    @property
    def listeners(self) -> list[Listener]:
        """All listeners, in the order of their addresses."""
        return [listener for several in self._opened.values() for listener in several]

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Keep workers running until a signal; return the exit status.

        Main thread only.

        Raises:
            ConfigError: the first worker cannot start; everything is closed.
        """
        self._inbox = Inbox(_SIGNALS)
        self._selector.register(self._inbox, selectors.EVENT_READ)
        try:
            while not self._over():
                self._fill()
                for key, _ in self._selector.select(self._patience()):
                    if isinstance(key.fileobj, Channel):
                        self._hear(key.data)
                self._heed_signals()
                self._reap()
                self._look()
                self._follow_upgrade()
                self._replace_old()
            return CUT if CUT in self._statuses else DRAINED
        finally:
            self._close()

    def _patience(self) -> float:
        now = time.monotonic()
        moments = [child.kill_at for child in self._children.values() if child.kill_at is not None]
        if self._lacking() > 0:
            moments.append(self._not_before)
        interval = LOOK_SECONDS if self._watchdog is None else min(LOOK_SECONDS, self._watchdog)
        return max(0.0, min([interval, *(moment - now for moment in moments)]))

    def _over(self) -> bool:
        return self._ending is not None and not self._children

    def _close(self) -> None:
        if self._successor is not None:
            self._successor.abandon()
        for child in self._children.values():  # only after an error of our own
            child.signal(signal.SIGKILL)
            os.waitpid(child.pid, 0)
            child.close()
        self._children.clear()
        self._close_listeners()
        self._pidfile.remove()
        self._selector.close()
        if self._inbox is not None:
            self._inbox.close()
        self._board.close()

    def _close_listeners(self) -> None:
        for listener in self.listeners:
            listener.close()

    # -- workers come --------------------------------------------------------------------------------------------------

    def _current(self) -> list[Child]:
        """The workers of the newest generation that stay."""
        return [
            child for child in self._children.values() if child.generation == self._generation and not child.leaving
        ]

    def _lacking(self) -> int:
        """How many workers to start now: one heir for each that wants one; until one has proved ready, only one."""
        if self._ending is not None:
            return 0
        current = self._current()
        lacking = self.wanted + sum(child.heir_wanted is not None for child in current) - len(current)
        if self._proven < self._generation:
            lacking = min(lacking, 1 - sum(not child.ready for child in current))
        return max(0, lacking)

    def _fill(self) -> None:
        while self._lacking() and time.monotonic() >= self._not_before:
            self._start()

    def _start(self) -> None:
        ours, theirs = pair()
        row = self._board.take()
        dump = os.memfd_create("harken-stacks", os.MFD_CLOEXEC)
        with blocked():
            pid = os.fork()
            if pid == 0:
                self._be_child(ours)
        if pid == 0:
            Inside(self._make_worker, theirs, row, dump, answer).live()
        theirs.release()
        child = Child(pid, self._generation, ours, row, dump)
        self._children[pid] = child
        self._selector.register(ours, selectors.EVENT_READ, child)

    def _be_child(self, own: Channel) -> None:
        """In the child: let go of everything that is the supervisor's."""
        assert self._inbox is not None
        self._inbox.leave_to_parent()
        self._selector.close()
        own.release()
        for other in self._children.values():
            other.channel.release()
        events.subscribers["listening"] = ()  # the supervisor tells it once for all

    def _make_worker(self) -> Worker:
        listeners = self.listeners
        for listener in listeners:
            listener.disown()
        worker = Worker(self._load(), (), self._keywords, listeners=listeners)
        # What these mean is the supervisor's affair; a terminal, though, sends some to every process.
        worker.obeys.update(dict.fromkeys(_SUPERVISORS, lambda: None))
        worker.obeys[signal.SIGUSR1] = self._reopen
        return worker

    # -- workers speak -------------------------------------------------------------------------------------------------

    def _hear(self, child: Child) -> None:
        try:
            messages = child.channel.receive()
        except EOFError:
            self._selector.unregister(child.channel)  # it is ending; reaped when it has
            return
        for message in messages:
            match message["type"]:
                case "ready":
                    self._became_ready(child)
                case "retire":
                    child.heir_wanted = message["reason"]
                case "failed":
                    child.trouble = message["reason"]

    def _became_ready(self, child: Child) -> None:
        child.ready = True
        self._proven = max(self._proven, child.generation)
        if not self._announced:
            self._announce()
        events.emit("worker_started", pid=child.pid, generation=child.generation)

    def _announce(self) -> None:
        self._announced = True
        predecessor = handoff.upgraded_from()
        if predecessor:
            handoff.probe(self._opened)
            self._pidfile.write(over=predecessor)
        for listener in self.listeners:
            events.emit("listening", address=listener.url, engine=self.settings["engine"] or "inline", server=self)
        handoff.tell_predecessor()
        notify(READY=1, STATUS=self._status(), MAINPID=os.getpid())

    def _status(self) -> str:
        return f"{len(self._current())} workers on {', '.join(listener.url for listener in self.listeners)}"

    # -- workers go ----------------------------------------------------------------------------------------------------

    def _reap(self) -> None:
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
        del self._children[child.pid]
        self._board.give_back(child.row)
        stacks = child.stacks() if child.killed_for else None
        child.close()
        self._statuses.add(status)
        reason = child.killed_for or child.trouble or (None if child.leaving else _describe(status))
        failed_to_start = not child.ready and not child.leaving and child.generation > self._proven
        if failed_to_start and self._proven == 0:
            raise ConfigError(child.trouble or f"the worker {reason} before it was ready")
        if not child.leaving:
            self._slow_down()
        details = {"reason": reason, "stacks": stacks, "restart_in": 0.0 if child.leaving else self._delay}
        told = {name: value for name, value in details.items() if value}
        events.emit("worker_exited", pid=child.pid, status=status, **told)
        if failed_to_start:
            self._take_reload_back(reason or "")

    def _slow_down(self) -> None:
        """Wait longer and longer for the next start while workers keep dying; the first is replaced at once."""
        now = time.monotonic()
        self._deaths = self._deaths + 1 if now - self._last_death < STEADY_SECONDS + self._delay else 1
        self._last_death = now
        self._delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (self._deaths - 2)) if self._deaths > 1 else 0.0
        self._not_before = now + self._delay

    def _take_reload_back(self, reason: str) -> None:
        """The new generation cannot start: the old one is the newest again."""
        self._generation = self._proven
        self._deaths = 0
        self._not_before = 0.0
        self._reloading = False
        events.emit("upgrade_failed", reason=f"the new code does not start: {reason}; the old workers serve on")
        notify(READY=1, STATUS=self._status())

    def _look(self) -> None:
        """Kill whoever has had its time, or does not turn its loop any more."""
        now = time.monotonic()
        limit = self.settings["worker_timeout"]
        judged = limit > 0 and self.settings["engine"] != "inline"
        for child in self._children.values():
            if child.kill_at is not None and now >= child.kill_at:
                child.kill_at = None
                child.signal(signal.SIGKILL)
            elif judged and child.ready and not child.leaving and child.row.silence > limit:
                child.kill(f"hung: its loop has not turned for {child.row.silence:.0f} s", DUMP_SECONDS)
        if self._watchdog is not None and now - self._barked >= self._watchdog:
            self._barked = now
            notify(WATCHDOG=1)

    def _replace_old(self) -> None:
        """Let old workers go as soon as there are enough new ones to take their place."""
        if self._ending is not None:
            return
        current = self._current()
        ready = [child for child in current if child.ready and child.heir_wanted is None]
        patience = self.settings["drain_timeout"] + GRACE_SECONDS
        if len(ready) >= self.wanted:
            old = [child for child in self._children.values() if child.generation < self._generation]
            for child in [*old, *(child for child in current if child.heir_wanted is not None)]:
                child.leave(patience)
            if old and all(child.leaving for child in old) and self._reloading:
                self._reloading = False
                events.emit("reloaded", what=f"code and settings; {len(ready)} new workers")
                notify(READY=1, STATUS=self._status())
        surplus = len([child for child in current if child.heir_wanted is None]) - self.wanted
        for child in sorted(current, key=lambda each: each.born)[: max(0, surplus)]:
            child.leave(patience)

    # -- signals -------------------------------------------------------------------------------------------------------

    def _heed_signals(self) -> None:
        assert self._inbox is not None
        for number in self._inbox.read():
            match number:
                case signal.SIGTERM:
                    self.drain()
                case signal.SIGINT | signal.SIGQUIT:
                    self.stop()
                case signal.SIGHUP:
                    self.reload()
                case signal.SIGUSR1:
                    self._reopen_logs()
                case signal.SIGUSR2:
                    self.upgrade()
                case signal.SIGTTIN:
                    self.wanted += 1
                case signal.SIGTTOU:
                    self.wanted = max(1, self.wanted - 1)
                case signal.SIGWINCH:
                    self._rest()

    def drain(self) -> None:
        """Let every worker serve what it has, and end."""
        if self._ending is not None:
            return
        self._ending = "drain"
        notify(STOPPING=1, STATUS="draining")
        self._close_listeners()
        for child in self._children.values():
            child.leave(self.settings["drain_timeout"] + GRACE_SECONDS)

    def stop(self) -> None:
        """Stop every worker now, and end."""
        if self._ending != "now":
            self._ending = "now"
            notify(STOPPING=1)
            self._close_listeners()
        for child in self._children.values():
            child.stop(GRACE_SECONDS)

    def reload(self) -> None:
        """Start workers with the code, the settings and the certificates as they are now; then let the old ones go."""
        if self._ending is not None or self._successor is not None:
            return
        if self._in_memory:
            self.upgrade()
            return
        try:
            operator.reload()
        except ConfigError as error:
            events.emit("upgrade_failed", reason=f"{error}; the old workers serve on")
            return
        reloading()
        self.wanted = max(self.wanted, 1)
        self._generation += 1
        self._reloading = True
        self._deaths = 0
        self._not_before = 0.0

    def _rest(self) -> None:
        """Let all workers go and keep the listeners, as gunicorn does when it is no terminal's."""
        if not any(os.isatty(fd) for fd in (0, 1, 2)):
            self.wanted = 0

    def _reopen_logs(self) -> None:
        self._reopen()
        for child in self._children.values():
            child.signal(signal.SIGUSR1)

    # -- upgrades ------------------------------------------------------------------------------------------------------

    def upgrade(self) -> None:
        """Start a new copy of this program beside this one; leave when it is ready."""
        if self._ending is not None or self._successor is not None:
            return
        if not self._announced:
            events.emit("upgrade_failed", reason="this process is not ready itself")
            return
        try:
            self._successor = handoff.Successor(self._opened, self._directory, self.settings["upgrade_timeout"])
        except HandoffError as error:
            events.emit("upgrade_failed", reason=str(error))
            return
        self._selector.register(self._successor, selectors.EVENT_READ)

    def _follow_upgrade(self) -> None:
        if self._successor is None:
            return
        successor = self._successor
        fd = successor.fileno()
        try:
            ready = successor.check()
        except HandoffError as error:
            self._selector.unregister(fd)
            self._successor = None
            events.emit("upgrade_failed", reason=f"{error}; this one serves on")
            return
        if ready:
            self._selector.unregister(fd)
            self._successor = None
            notify(MAINPID=successor.pid)
            for listener in self.listeners:
                listener.disown()
            self.drain()


def _describe(status: int) -> str:
    if status < 0:
        try:
            return f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"was killed by signal {-status}"
    return f"ended with status {status}"
