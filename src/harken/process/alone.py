"""``workers=0``: one process that serves by itself, without a supervisor.

A reload puts a new program into this very process once nothing is left to serve; meanwhile new connections wait in the
backlog. An upgrade starts the new program beside this one, and nobody waits.
"""

from __future__ import annotations

import os
import selectors
import signal
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, ClassVar

from harken import events
from harken.errors import ConfigError, HandoffError, HarkenError, LifecycleError
from harken.listener import Listener
from harken.process import handoff, inheritance, page, privileges
from harken.process.answers import alone_status, answer, refuse_at_end
from harken.process.channel import Message
from harken.process.control import Client, Control, open_listener
from harken.process.notify import Watchdog, hand_over, notify, reloading
from harken.process.orders import STANDING, heeded, with_order
from harken.process.pidfile import PidFile
from harken.process.signals import Early
from harken.process.traces import Followers
from harken.process.worker import Worker
from harken.settings import Settings, operator
from harken.transports import bind_options
from harken.waker import Waker

__all__ = ["Alone"]

# The key under which a successor finds the control socket.
_CONTROL = "control"
# Seconds between looks whether a successor is still wanted.
_LOOK_SECONDS = 0.1
# Seconds between attempts to send on what a slow reader of an answer has not taken.
_FLUSH_SECONDS = 0.05


class Alone:
    """The one process."""

    def __init__(
        self,
        handler: Callable[..., Any],
        addresses: tuple[str, ...],
        keywords: dict[str, Any],
        *,
        name: str,
        reopen: Callable[[], None],
        early: Early,
        in_memory: bool,
    ) -> None:
        """Bind every address and become who the settings say.

        Args:
            handler: the handler class.
            addresses: URLs.
            keywords: settings by name.
            name: the handler's, for the control socket.
            reopen: opens the log anew.
            early: the signals that come before we heed them.
            in_memory: whether the program goes on when this is over.

        Raises:
            ConfigError: an address, a setting or the handler is wrong; nothing stays open.
            BindError: an address cannot be had; nothing stays open.
        """
        self.settings = Settings(None, keywords, "serve")
        self._early = early
        self._directory = os.getcwd()
        self._pidfile = PidFile(self.settings["pidfile"])
        privileges.set_umask(self.settings)
        self._opened = inheritance.listen(
            addresses, bind_options(self.settings), also=(_CONTROL, page.key_of(self.settings))
        )
        self._kept: dict[str, list[Listener]] = {}
        self._orders = heeded(inheritance.orders(), self.settings)
        listeners = [listener for several in self._opened.values() for listener in several]
        self._desk: _Desk | None = None
        self._page: page.Local | None = None
        with ExitStack() as undo:
            undo.callback(_close, self._opened)
            self._worker = Worker(handler, (), keywords, listeners=listeners)
            undo.callback(self._worker.close)
            self._open_page()
            self._open_control(name)
            undo.callback(self._close_desk)
            undo.callback(self._pidfile.remove)
            if not inheritance.upgraded_from():
                self._pidfile.write()
                own = (*self._opened.get(_CONTROL, ()), *self._opened.get(page.key_of(self.settings), ()))
                privileges.give(self.settings, (self._pidfile.path, *(listener.owned_path for listener in own)))
            privileges.drop(self.settings)
            privileges.chdir(self.settings)
            undo.pop_all()
        self._worker.doors_stay = lambda: self._replaced or bool(self._kept)
        self._replaced = False
        self._ended = False  # by an operator, who wants no new program
        self._leaving = threading.Event()
        self._upgrading = False
        self._reload_next = False  # after an upgrade that fails
        self._upgrade_thread: threading.Thread | None = None
        self._watchdog = Watchdog()
        self._worker.turn_seconds = self._watchdog.patience(self._worker.turn_seconds)
        if not in_memory:
            self._worker.ends_with_process()
        self._worker.on_leaving = self._tell_why
        self._worker.on_told = self._told_to_end
        self._worker.obeys = {
            signal.SIGHUP: self._reload,
            signal.SIGUSR1: reopen,
            signal.SIGUSR2: self._upgrade,
            signal.SIGTTIN: _no_workers,
            signal.SIGTTOU: _no_workers,
        }

    def _open_page(self) -> None:
        opened = page.open_listener(self.settings)
        if opened is not None:
            self._opened[page.key_of(self.settings)] = [opened]
            self._page = page.Local(self.settings, opened)
            self._page.servers.extend(self._worker.servers)
            self._worker.collector = self._page.collector
        for serving in self._worker.servings():
            serving.offers_page = False

    def _open_control(self, name: str) -> None:
        kept = inheritance.take(_CONTROL)
        opened = kept[0] if kept else open_listener(self.settings, name)
        if opened is not None:
            self._opened[_CONTROL] = [opened]
            self._desk = _Desk(opened, self._worker, self._note_order, lambda: self._ended)

    def _note_order(self, verb: str, arguments: dict[str, Any]) -> None:
        self._orders = with_order(self._orders, verb, arguments)

    def _close_desk(self) -> None:
        if self._desk is not None:
            self._desk.close()

    def run(self) -> int:
        """Serve until a signal; return the exit status."""
        try:
            status = self._worker.run(on_ready=self._ready, on_turn=self._watchdog.feed)
        finally:
            self._leaving.set()
            if self._upgrade_thread is not None:
                self._upgrade_thread.join()
            self._worker.close()
            if self._page is not None:
                self._page.close()
            self._close_desk()
            if not self._kept:
                self._pidfile.remove()
        if self._kept:
            self._begin_anew()
        return status

    def _begin_anew(self) -> None:
        try:
            handoff.exec_anew(self._kept, self._directory, self._pidfile, self._orders, unless=lambda: self._ended)
        except OSError as error:
            raise HandoffError(f"the program cannot be started anew: {error}") from None
        finally:
            _close(self._kept)
            self._pidfile.remove()

    def _ready(self) -> None:
        for verb, arguments in self._orders.items():
            with suppress(HarkenError):  # there is nothing to resume
                answer(self._worker, verb, arguments)
        predecessor = inheritance.upgraded_from()
        if predecessor:
            listeners = [server.socket for server in self._worker.servers]
            handoff.probe(listeners, self._directory)  # type: ignore[arg-type]
            self._pidfile.write(over=predecessor)
        if self._desk is not None:
            self._desk.start()
        if self._page is not None:
            self._page.start()
        inheritance.tell_predecessor()
        where = ", ".join(server.serving.address() for server in self._worker.servers)
        notify(READY=1, STATUS=f"one process on {where}", MAINPID=os.getpid())
        self._early.repeat()

    def _reload(self) -> None:
        """Keep a second descriptor of each listener, drain, and become the new program.

        Not when what it would read anew is wrong: it could not begin, and there would be nobody left to serve.
        """
        if self._leaving.is_set():
            return
        reloading()
        if self._upgrading:
            self._reload_next = True  # if that fails; or else the successor has all that is to be read anew
        elif self._can_begin_anew() and self._keep_doors():
            self._worker.leave()
        else:
            notify(READY=1)

    def _keep_doors(self) -> bool:
        try:
            handoff.may_begin_anew(self._directory, self.settings)
            self._kept = _twins(self._opened)
        except OSError as error:  # HandoffError is one
            events.emit("reload_failed", what="code", reason=str(error))
            return False
        return True

    def _can_begin_anew(self) -> bool:
        """Read settings and certificates; what is wrong with them is an event."""
        try:
            operator.reload()
        except ConfigError as error:
            events.emit("reload_failed", what="settings", reason=str(error))
            return False
        done = [server.serving.reload() for server in self._worker.servers]
        return all(done)

    def _upgrade(self) -> None:
        """Start the new program and wait for it, in a thread: meanwhile signals are acted on."""
        if self._leaving.is_set() or self._upgrading:
            return
        self._upgrading = True
        thread = threading.Thread(target=self._follow_upgrade, name="harken-upgrade", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the machine has no threads left
            self._upgrading = False
            self._serve_on(f"the new program cannot be started: {error}")
        else:
            self._upgrade_thread = thread

    def _follow_upgrade(self) -> None:
        try:
            handoff.may_leave()
            timeout = self._worker.settings["upgrade_timeout"]
            successor = handoff.Successor(self._opened, self._directory, timeout, self._orders)
            while not successor.check(wait=_LOOK_SECONDS):
                if self._leaving.is_set():
                    successor.abandon()
                    return
        except HandoffError as error:
            self._upgrading = False  # before anybody is told, who may ask for the next at once
            if not self._leaving.is_set():
                self._serve_on(str(error))
            return
        if self._leaving.is_set():  # told to end in the moment in which it became ready
            successor.abandon()
            return
        self._replaced = True
        hand_over(successor.pid)
        inheritance.hand_on(listener for several in self._opened.values() for listener in several)
        if self._page is not None:
            self._page.close()  # the successor has one
        if self._desk is not None:
            self._desk.shut()  # who asks from now on means the successor
        self._worker.leave()

    def _serve_on(self, reason: str) -> None:
        """The successor failed: a HUP that came meanwhile is obeyed now."""
        handoff.serve_on(reason, self._pidfile)
        if self._reload_next:
            self._reload_next = False
            os.kill(os.getpid(), signal.SIGHUP)

    def _tell_why(self) -> None:
        """Tell the service manager that the worker ends; not when it begins anew, or has a successor."""
        inheritance.reclaim()
        if not self._kept and not self._replaced:
            notify(STOPPING=1, STATUS="draining")
        self._leaving.set()

    def _told_to_end(self) -> None:
        if self._kept and not self._ended:
            notify(STOPPING=1, STATUS="draining")
        self._ended = True


class _Desk:
    """Answers the control socket's questions, in a thread of its own."""

    _SIGNALS: ClassVar = {
        "drain": signal.SIGTERM,
        "stop": signal.SIGQUIT,
        "reload": signal.SIGHUP,
        "upgrade": signal.SIGUSR2,
    }

    def __init__(
        self,
        listener: Listener,
        worker: Worker,
        note: Callable[[str, dict[str, Any]], object],
        ending: Callable[[], bool],
    ) -> None:
        """Prepare.

        Args:
            listener: the control socket.
            worker: whom the questions are about.
            note: called with each order that holds until it is ordered otherwise, and its arguments.
            ending: tells whether an operator has said that the service shall end.
        """
        self._worker = worker
        self._note = note
        self._ending = ending
        self._ended = False  # by an order that came here, and may still be on its way as a signal
        self._selector = selectors.DefaultSelector()
        self._control = Control(listener, self._selector, self._answer)
        self._waker = Waker()
        self._selector.register(self._waker, selectors.EVENT_READ, self._waker.drain)
        self._closing = self._shut = False
        self._followers = Followers()
        self._traced: deque[tuple[str, list[Message]]] = deque()
        worker.traces.push = self._push
        self._thread = threading.Thread(target=self._run, name="harken-control", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def shut(self) -> None:
        """Let nobody new ask, and go on to answer those who are here. Any thread."""
        self._shut = True
        self._waker.wake()

    def _run(self) -> None:
        while not self._closing:
            if self._shut:
                self._control.shut()
            for key, _ in self._selector.select(_FLUSH_SECONDS if self._control.waits else None):
                key.data()
            while self._traced:
                self._followers.tell(*self._traced.popleft())
            self._control.flush()

    def _push(self, token: str, entries: list[Message]) -> None:
        self._traced.append((token, entries))
        self._waker.wake()

    def _trace(self, client: Client, number: Any, arguments: dict[str, Any]) -> None:
        token = self._followers.add(client, number, self._worker.traces.end)
        try:
            found = answer(self._worker, "trace", {**arguments, "token": token})
            error = f"no connection {arguments.get('connection')!r} is open"
        except (HarkenError, TypeError) as problem:
            found, error = False, str(problem)
        if not found:
            self._followers.refuse(token, error)

    def _answer(self, client: Client, question: Message) -> None:
        verb, number = str(question.get("verb")), question.get("number")
        try:
            if self._ended or self._ending():
                refuse_at_end(verb)
            if verb in self._SIGNALS:
                os.kill(os.getpid(), self._SIGNALS[verb])
                self._ended = self._ended or verb in ("drain", "stop")
                client.answer(number, result=None)
            elif verb == "trace":
                self._trace(client, number, question.get("arguments", {}))
            elif verb == "workers":
                raise LifecycleError("this process serves by itself (workers = 0); start it with --workers 1 or more")
            else:
                arguments = question.get("arguments", {})
                answered = answer(self._worker, verb, arguments)
                if verb in STANDING:
                    self._note(verb, arguments)
                client.answer(number, result=answered if verb != "status" else alone_status(answered))
        except (HarkenError, TypeError) as error:  # TypeError: arguments that the verb does not take
            client.answer(number, error=str(error))

    def close(self) -> None:
        """Hang up and close the socket."""
        self._closing = True
        self._waker.wake()
        if self._thread.ident is not None:
            self._thread.join()
        self._control.close()
        self._selector.close()
        self._waker.close()


def _close(opened: dict[str, list[Listener]]) -> None:
    for listener in (listener for several in opened.values() for listener in several):
        listener.close()


def _twins(opened: dict[str, list[Listener]]) -> dict[str, list[Listener]]:
    """Return second descriptors of the same sockets, which go on when the first are closed.

    Raises:
        OSError: there are no descriptors left; nothing has changed.
    """
    listeners = [listener for several in opened.values() for listener in several]
    inheritance.reclaim()
    with ExitStack() as undo:
        fds = []
        for listener in listeners:
            fds.append(os.dup(listener.fileno()))
            undo.callback(os.close, fds[-1])
        undo.pop_all()
    twins = iter([_twin(listener, fd) for listener, fd in zip(listeners, fds, strict=True)])
    inheritance.hand_on(listeners)
    return {address: [next(twins) for _ in several] for address, several in opened.items()}


def _twin(listener: Listener, fd: int) -> Listener:
    path = listener.owned_path
    twin = Listener.adopt(fd)
    twin.shared = listener.shared
    listener.shared = True  # its drain must leave the socket fit for the new program
    twin.url = listener.url
    if path is not None:
        twin.own(path)
    return twin


def _no_workers() -> None:
    """There are none to add or take away."""
