"""``workers=0``: one process that serves by itself, without a supervisor.

A reload puts a new program into this very process once nothing is left to serve; meanwhile new connections wait in the
backlog. An upgrade starts the new program beside this one, and nobody waits.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from harken import events
from harken.errors import HandoffError
from harken.listener import Listener
from harken.process import handoff, privileges
from harken.process.notify import notify
from harken.process.pidfile import PidFile
from harken.process.worker import Worker
from harken.settings import Settings
from harken.transports import bind_options

__all__ = ["Alone"]


class Alone:
    """The one process."""

    def __init__(
        self,
        handler: Callable[..., Any],
        addresses: tuple[str, ...],
        keywords: dict[str, Any],
        *,
        reopen: Callable[[], None],
    ) -> None:
        """Bind every address and become who the settings say.

        Args:
            handler: the handler class.
            addresses: URLs.
            keywords: settings by name.
            reopen: opens the log anew.

        Raises:
            ConfigError: an address, a setting or the handler is wrong; nothing stays open.
            BindError: an address cannot be had; nothing stays open.
        """
        self.settings = Settings(None, keywords, "serve")
        self._directory = os.getcwd()
        self._pidfile = PidFile(self.settings["pidfile"])
        privileges.set_umask(self.settings)
        self._opened = handoff.listen(addresses, bind_options(self.settings))
        self._kept: dict[str, list[Listener]] = {}
        listeners = [listener for several in self._opened.values() for listener in several]
        try:
            self._worker = Worker(handler, (), keywords, listeners=listeners)
            if not handoff.upgraded_from():
                self._pidfile.write()
            privileges.drop(self.settings)
            privileges.chdir(self.settings)
        except BaseException:
            for listener in listeners:
                listener.close()
            raise
        self._worker.obeys = {
            signal.SIGHUP: self._reload,
            signal.SIGUSR1: reopen,
            signal.SIGUSR2: self._upgrade,
            signal.SIGTTIN: _no_workers,
            signal.SIGTTOU: _no_workers,
        }

    def run(self) -> int:
        """Serve until a signal; return the exit status."""
        try:
            status = self._worker.run(on_ready=self._ready)
        finally:
            self._worker.close()
            if not self._kept:
                self._pidfile.remove()
        if self._kept:
            handoff.exec_anew(self._kept, self._directory)
        return status

    def _ready(self) -> None:
        predecessor = handoff.upgraded_from()
        if predecessor:
            handoff.probe(self._opened)
            self._pidfile.write(over=predecessor)
        handoff.tell_predecessor()
        notify(READY=1, MAINPID=os.getpid())

    def _reload(self) -> None:
        """Keep a second descriptor of each listener, drain, and become the new program."""
        if self._kept:
            return
        self._kept = {address: [_twin(listener) for listener in each] for address, each in self._opened.items()}
        self._leave()

    def _upgrade(self) -> None:
        """Start the new program and wait for it here, in the thread that acts on signals."""
        if self._kept:
            return
        try:
            successor = handoff.Successor(self._opened, self._directory, self.settings["upgrade_timeout"])
            while not successor.check(wait=1.0):
                pass
        except HandoffError as error:
            events.emit("upgrade_failed", reason=f"{error}; this one serves on")
            return
        notify(MAINPID=successor.pid)
        for listener in (listener for several in self._opened.values() for listener in several):
            listener.disown()
        self._leave()

    def _leave(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def _twin(listener: Listener) -> Listener:
    """Return a second descriptor of the same socket, which goes on when the first is closed."""
    path = listener.owned_path
    listener.disown()
    twin = Listener.adopt(os.dup(listener.fileno()))
    twin.url = listener.url
    if path is not None:
        twin.own(path)
    return twin


def _no_workers() -> None:
    """There are none to add or take away."""
