"""The parent of worker processes: binds, starts them, heeds signals and the control socket. It serves nobody itself.

One thread, one loop, in which nothing waits but the loop itself.
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
from harken.limits.across import Place
from harken.listener import Listener
from harken.observe.collector import add_queues
from harken.observe.figures import Figures
from harken.process import handoff, inheritance, page, privileges
from harken.process.channel import Message
from harken.process.commands import Commands
from harken.process.control import Client, Control, open_listener
from harken.process.notify import Watchdog, hand_over, notify, reloading
from harken.process.orders import heeded
from harken.process.pidfile import PidFile
from harken.process.signals import MEANINGS, Early, Inbox
from harken.process.worker import CUT, DRAINED, Worker
from harken.process.workers import MOST_WORKERS, Workers
from harken.settings import Settings, operator, seconds, setting
from harken.transports import bind_options, for_socket

__all__ = ["Supervisor"]

UPGRADE_TIMEOUT = setting(
    "upgrade_timeout",
    seconds(),
    60.0,
    unit="seconds",
    live=True,
    process=True,
    meaning="how long a new binary may take to be ready before it is killed and the old one serves on",
    origin="tableflip's UpgradeTimeout",
)

# Seconds between looks at heartbeats, which come once a second.
LOOK_SECONDS = 1.0
# The key under which a successor finds the control socket.
_CONTROL = "control"

_WORKERS_IGNORE = (signal.SIGHUP, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU)
_SIGNALS = (*MEANINGS, signal.SIGCHLD)


class Supervisor:
    """Workers on shared listeners, and what an operator can do with them."""

    def __init__(
        self,
        load: Callable[[], Callable[..., Any]],
        addresses: tuple[str, ...],
        keywords: dict[str, Any],
        *,
        name: str,
        reopen: Callable[[], None],
        reread: Callable[[], None],
        early: Early,
        in_memory: bool,
    ) -> None:
        """Bind every address and become who the settings say.

        Args:
            load: returns the handler; called in each worker.
            addresses: URLs.
            keywords: settings by name.
            name: the handler's, for the control socket.
            reopen: opens the log anew.
            reread: lets the log follow settings that were read anew.
            early: the signals that come before we heed them.
            in_memory: whether ``load`` returns what this process has loaded, so that only a new process has new code.

        Raises:
            ConfigError: an address or a setting is wrong; nothing stays open.
            BindError: an address cannot be had; nothing stays open.
        """
        self._load = load
        self._reopen = reopen
        self._reread = reread
        self._early = early
        self._in_memory = in_memory
        self._keywords = keywords
        self.settings = Settings(None, keywords, "serve")
        self._directory = os.getcwd()
        self._pidfile = PidFile(self.settings["pidfile"])
        privileges.set_umask(self.settings)
        self._opened: dict[str, list[Listener]] = {}
        self._attendant: page.Attendant | None = None
        self._page_key = page.key_of(self.settings)
        self._token = page.read_token(self.settings)
        with ExitStack() as undo:
            undo.callback(self._close_listeners)
            undo.callback(self._close_page)
            undo.callback(self._close_control)
            self._opened = inheritance.listen(addresses, bind_options(self.settings), also=(_CONTROL, self._page_key))
            self._open_page()
            self._open_control(name)
            undo.callback(self._pidfile.remove)
            self._become()
            undo.pop_all()
        self._selector = selectors.DefaultSelector()
        self._inbox: Inbox | None = None
        self._control: Control | None = None
        self._commands = Commands(self)
        self.workers = Workers(
            self.settings,
            self._selector,
            self._make_worker,
            self._let_go,
            on_ready=self._announce,
            on_reloaded=self._tell_manager,
            orders=heeded(inheritance.orders(), self.settings),
        )
        if "configure" in self.workers.orders:
            events.emit("configured", server=self, changes=self.workers.orders["configure"])
        self._announced = False
        self._ending = False
        self._successor: handoff.Successor | None = None
        self._reload_next = False  # after an upgrade that fails
        self._watchdog = Watchdog()
        self._told = ""  # to the service manager

    def _open_page(self) -> None:
        opened = page.open_listener(self.settings)
        if opened is not None:
            self._opened[self._page_key] = [opened]

    def _open_control(self, name: str) -> None:
        kept = inheritance.take(_CONTROL)
        opened = kept[0] if kept else open_listener(self.settings, name)
        if opened is not None:
            self._opened[_CONTROL] = [opened]

    def _become(self) -> None:
        if not inheritance.upgraded_from():
            self._pidfile.write()
            own = (*self._opened.get(_CONTROL, ()), *self._opened.get(self._page_key, ()))
            privileges.give(self.settings, (self._pidfile.path, *(listener.owned_path for listener in own)))
        privileges.drop(self.settings)
        privileges.chdir(self.settings)

    @property
    def listeners(self) -> list[Listener]:
        """The listeners that workers accept from, in the order of their addresses."""
        own = (_CONTROL, self._page_key)
        return [listener for address, several in self._opened.items() if address not in own for listener in several]

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Keep workers running until a signal; return the exit status.

        Main thread only.

        Raises:
            ConfigError: the first worker cannot start; everything is closed.
        """
        self._inbox = Inbox(_SIGNALS)
        self._selector.register(self._inbox, selectors.EVENT_READ, self._heed_signals)
        self._early.repeat()
        try:
            if not inheritance.upgraded_from():  # while we start, the predecessor speaks for the service
                self._start_control()
                self._start_page()
            while not self._over():
                self.workers.reap()
                self._heed_signals()  # Ctrl-C reaches workers too: nobody replaces one that has heeded it first
                self.workers.turn()
                self._tell_status()
                for key, _ in self._selector.select(self._patience()):
                    key.data()
                self._watchdog.feed()
                self._follow_upgrade()
                self.workers.flush()
                if self._control is not None:
                    self._control.flush()
                if self._attendant is not None:
                    self._attendant.turn()
            return CUT if CUT in self.workers.statuses else DRAINED
        finally:
            self._close()

    def _start_control(self) -> None:
        if _CONTROL in self._opened:
            self._control = Control(self._opened[_CONTROL][0], self._selector, self._asked)

    def _start_page(self) -> None:
        for listener in self._opened.get(self._page_key, ()):
            let_go = self._let_go_for_page
            self._attendant = page.Attendant(listener, self._token, self._selector, self._asked, let_go)

    def _over(self) -> bool:
        return self._ending and not len(self.workers)

    def _patience(self) -> float:
        if self._over():
            return 0.0
        interval = self._watchdog.patience(LOOK_SECONDS)
        if any(asker is not None and asker.waits for asker in (self._control, self._attendant)):
            interval = min(interval, 0.05)
        return max(0.0, min(interval, self.workers.deadline() - time.monotonic()))

    def _close(self) -> None:
        if self._successor is not None:
            self._successor.abandon()
        self.workers.close()
        self._close_page()
        if self._control is not None:
            self._control.close()
        self._close_listeners()
        self._pidfile.remove()
        self._selector.close()
        if self._inbox is not None:
            self._inbox.close(last=not self._in_memory)

    def _close_listeners(self) -> None:
        for listener in self.listeners:
            listener.close()

    def _close_control(self) -> None:
        for listener in self._opened.get(_CONTROL, ()):
            listener.close()

    def _close_page(self) -> None:
        if self._attendant is not None:
            self._attendant.close()
            self._attendant = None
        for listener in self._opened.pop(self._page_key, ()):
            listener.close()

    # -- in a worker's process -----------------------------------------------------------------------------------------

    def _leave_to_parent(self) -> None:
        """Close what no child has a part in: signals, orders, the successor."""
        assert self._inbox is not None
        self._inbox.leave_to_parent()
        self._selector.close()
        if self._control is not None:
            self._control.release()
        if self._successor is not None:
            self._successor.release()

    def _let_go(self) -> None:
        """Close what is the supervisor's."""
        self._leave_to_parent()
        if self._attendant is not None:
            self._attendant.release()
        for listener in self._opened.get(self._page_key, ()):
            listener.disown()
            listener.close()
        events.subscribers["listening"] = ()  # the supervisor tells it once for all

    def _let_go_for_page(self) -> None:
        """In the page's process: close what is the supervisor's, and the doors, which it must not keep open."""
        self._leave_to_parent()
        self.workers.release()
        for listener in self.listeners:
            listener.disown()
            listener.close()

    def _make_worker(self, place: Place) -> Worker:
        listeners = self.listeners
        for listener in listeners:
            listener.disown()
        shared = self.workers.wanted > 1
        worker = Worker(self._load(), (), self._keywords, listeners=listeners, shares_listeners=shared)
        # What these mean is the supervisor's affair; a terminal, though, sends some to every process.
        worker.obeys.update(dict.fromkeys(_WORKERS_IGNORE, lambda: None))
        worker.obeys[signal.SIGUSR1] = self._reopen
        for serving in worker.servings():
            serving.offers_page = False
            serving.bounds.place = place
        return worker

    # -- what happens to the service -----------------------------------------------------------------------------------

    def _announce(self, engine: str) -> None:
        """A worker is ready: the service is, if it was not yet."""
        if self._announced:
            return
        self._announced = True
        predecessor = inheritance.upgraded_from()
        if predecessor:
            handoff.probe(self.listeners, self._directory)
            self._pidfile.write(over=predecessor)
            self._start_control()
            self._start_page()
        for listener in self.listeners:
            events.emit("listening", address=listener.url, engine=engine, server=self)
        for listener in self._opened.get(self._page_key, ()):
            events.emit("page_opened", address=page.web_address(listener))
        inheritance.tell_predecessor()
        notify(READY=1, STATUS=self._status, MAINPID=os.getpid())

    def _tell_manager(self) -> None:
        """A reload is over, one way or the other."""
        if self._announced:
            notify(READY=1, STATUS=self._status)

    def _tell_status(self) -> None:
        if self._announced and not self._ending and self._status != self._told:
            self._told = self._status
            notify(STATUS=self._told)

    @property
    def _status(self) -> str:
        ready = sum(child.ready and not child.leaving for child in self.workers.all)
        return f"{ready} of {self.workers.wanted} workers on {', '.join(listener.url for listener in self.listeners)}"

    def health(self) -> dict[str, Any]:
        """Say whether new connections are served, and if not why. Whoever hears it knows that the supervisor lives."""
        reason = (
            "draining"
            if self._ending
            else "suspended"
            if self.workers.suspended
            else "ready"
            if self.workers.ready
            else "no worker is ready"
        )
        return {"live": True, "ready": reason == "ready", "reason": reason}

    def figures(self) -> Figures:
        """Return what the workers have counted, and what only the supervisor sees."""
        figures = self.workers.figures()
        add_queues(figures, self.listeners)
        figures.add("harken_ready", (), float(self.health()["ready"]))
        return figures

    def _asked(self, client: Client, question: Message) -> None:
        self._commands.obey(client, question)

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
                    self._reopen()
                    self.workers.signal(signal.SIGUSR1)
                case signal.SIGUSR2:
                    self.upgrade()
                case signal.SIGTTIN:
                    self.workers.wanted = min(MOST_WORKERS, self.workers.wanted + 1)
                case signal.SIGTTOU:
                    self.workers.wanted = max(min(1, self.workers.wanted), self.workers.wanted - 1)
                case signal.SIGWINCH:
                    self._rest()

    @property
    def ending(self) -> bool:
        """Whether it was told to end."""
        return self._ending

    def drain(self) -> None:
        """Let every worker serve what it has, and end."""
        if not self._ending:
            notify(STOPPING=1, STATUS="draining")
            self._drain(last=True)

    def _drain(self, *, last: bool) -> None:
        self._ending = True
        self._shut_out()
        self._close_listeners()
        self.workers.drain(last=last)

    def _shut_out(self) -> None:
        """Let nobody new come to doors that only our workers share, and let those come in who are on the way."""
        inheritance.reclaim()
        rests = [
            for_socket(listener).shut_out(listener)
            for listener in self.listeners
            if not listener.shared and listener.fileno() >= 0
        ]
        time.sleep(max((rest or 0.0 for rest in rests), default=0.0))

    def stop(self) -> None:
        """Stop every worker now, and end."""
        if not self._ending:
            self._ending = True
            notify(STOPPING=1)
            self._close_listeners()
        self.workers.stop()

    def reload(self) -> None:
        """Start workers with the code, the settings and the certificates as they are now; then let the old ones go."""
        if self._ending:
            return
        reloading()
        if self._successor is not None:
            self._reload_next = True  # if it fails; or else it has all that is to be read anew
            return
        if self._in_memory:
            self.upgrade()
            return
        before = self.settings["workers"]
        try:
            operator.reload()
        except ConfigError as error:
            events.emit("upgrade_failed", reason=f"{error}; the old workers serve on")
            self._tell_manager()
            return
        self._reread()
        number = self.settings["workers"]
        if number != before or not self.workers.wanted:  # what an operator said by a signal or `ctl` holds on
            self.workers.wanted = max(1, number)
        self.workers.reload()

    def _rest(self) -> None:
        """Let all workers go and keep the listeners, as gunicorn does when it is no terminal's."""
        if not any(os.isatty(fd) for fd in (0, 1, 2)):
            self.workers.wanted = 0

    def upgrade(self) -> None:
        """Start a new copy of this program beside this one; leave when it is ready."""
        if self._ending or self._successor is not None:
            return
        if not self._announced:
            events.emit("upgrade_failed", reason="this process is not ready itself")
            return
        try:
            handoff.may_leave()
            self._successor = handoff.Successor(
                self._opened, self._directory, self.settings["upgrade_timeout"], self.workers.orders
            )
        except HandoffError as error:
            events.emit("upgrade_failed", reason=str(error))
            self._tell_manager()
            return
        self._selector.register(self._successor, selectors.EVENT_READ, lambda: None)

    def _follow_upgrade(self) -> None:
        successor, self._successor = self._successor, None
        if successor is None:
            return
        # Before its pipe is closed: a child that was forked meanwhile has it too, and epoll(7) would still tell of it.
        self._selector.unregister(successor)
        if self._ending:
            successor.abandon()
            return
        try:
            ready = successor.check()
        except HandoffError as error:
            self._serve_on(str(error))
            return
        if ready:
            self._hand_over(successor.pid)
        else:
            self._successor = successor
            self._selector.register(successor, selectors.EVENT_READ, lambda: None)

    def _serve_on(self, reason: str) -> None:
        """The successor failed: a HUP that came meanwhile is obeyed now."""
        handoff.serve_on(reason, self._pidfile)
        self._tell_manager()
        if self._reload_next:
            self._reload_next = False
            self.reload()

    def _hand_over(self, pid: int) -> None:
        hand_over(pid)
        inheritance.hand_on(listener for several in self._opened.values() for listener in several)
        if self._control is not None:
            self._control.shut()  # who asks from now on means the successor, as on the page
        self._close_page()
        self._drain(last=False)
