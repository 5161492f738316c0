"""Listeners that survive their process: what a successor needs to go on with the same sockets.

Two ways lead to a successor. ``exec`` puts a new program into this process, which keeps its pid, once nothing is left
to serve. An upgrade starts it beside this one: the successor writes a word into a pipe when it is ready, and only then
does this process leave; a successor that ends, or says nothing in time, is killed and nothing has happened.

Either way the sockets are inherited and named in one environment variable; ``inheritance`` takes them over. The queue
of a listener belongs to the socket, not to a process: whoever waits in it does not notice who accepts.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from harken import events
from harken.errors import ConfigError, HandoffError
from harken.listener import Listener
from harken.observe.access import STDOUT
from harken.observe.outlet import open_log
from harken.process import inheritance, signals, streams
from harken.process.inheritance import READY, VARIABLE, Entry
from harken.process.orders import Orders
from harken.process.pidfile import PidFile
from harken.settings import Settings

__all__ = ["Successor", "exec_anew", "may_begin_anew", "may_leave", "probe", "serve_on"]


# Bytes of the variable: the kernel takes 128 KiB for one, execve(2).
MOST_BYTES = 100_000


def _all(opened: dict[str, list[Listener]]) -> list[Listener]:
    return [listener for several in opened.values() for listener in several]


def _entry(listener: Listener) -> Entry:
    shared = listener.shared  # before we share it ourselves
    return Entry(listener.share(), listener.owned_path, shared)


def _bequest(
    opened: dict[str, list[Listener]], orders: Orders, *, pipe: int = -1, pidfile: PidFile | None = None
) -> str:
    listeners = {key: [_entry(listener) for listener in several] for key, several in opened.items()}
    path = str(pidfile.path) if pidfile is not None and pidfile.path is not None else None
    told: dict[str, Any] = {"listeners": listeners, "pipe": pipe, "pid": os.getpid(), "pidfile": path}
    bequest = json.dumps(told | {"orders": orders}, default=str)
    if len(bequest) <= MOST_BYTES:
        return bequest
    events.emit("reload_failed", what="live settings", reason="they are too long to be handed on")
    return json.dumps(told)


def may_leave() -> None:
    """Check that a successor would outlive this process.

    Raises:
        HandoffError: it would not: with process 1 the kernel ends all others of its container, pid_namespaces(7).
    """
    if os.getpid() == 1:
        raise HandoffError(
            "this is process 1 of a container, which ends with it; start a new container, or reload (SIGHUP) a target "
            "of `harken serve`"
        )


def may_begin_anew(directory: str, settings: Settings) -> None:
    """Check that this program can be started once more.

    Args:
        directory: the working directory in which it was started.
        settings: ``log_file`` and ``access_log`` are read.

    Raises:
        HandoffError: its interpreter or its directory is not there any more, or a log cannot be opened anew.
    """
    if not os.access(sys.executable, os.X_OK):
        raise HandoffError(f"{sys.executable} is not there any more, or may not be run")
    if not os.access(directory, os.X_OK):
        raise HandoffError(f"the directory {directory!r}, in which this program was started, may not be entered now")
    for path in (settings["log_file"], settings["access_log"]):
        if path not in (None, STDOUT):
            try:
                open_log(os.path.join(directory, path), sys.stderr).close()
            except ConfigError as error:
                raise HandoffError(str(error)) from None


def _command() -> list[str]:
    """Return how this program was started, whatever it has done to ``sys.argv``."""
    return [sys.executable, *sys.orig_argv[1:]]


def exec_anew(
    opened: dict[str, list[Listener]],
    directory: str,
    pidfile: PidFile,
    orders: Orders,
    *,
    unless: Callable[[], bool],
) -> None:
    """Put a new copy of this program into this process. Returns only when it shall end after all.

    Args:
        opened: the listeners to keep, by address.
        directory: the working directory in which the program was started.
        pidfile: the file that names this process.
        orders: what operators have ordered of this one.
        unless: tells whether an operator has ended the program; asked when all handlers of signals have run.

    Raises:
        OSError: the program cannot be started any more; nothing has changed.
    """
    streams.flush()
    environment = dict(os.environ) | {VARIABLE: _bequest(opened, orders, pidfile=pidfile)}
    os.chdir(directory)
    signals.hold_back()
    if not unless():
        os.execve(sys.executable, _command(), environment)  # noqa: S606 - there is no shell to want


def _without_watchdog_pid() -> dict[str, str]:
    """Return the environment of a successor: the watchdog watches the service, which is another process then."""
    return {name: value for name, value in os.environ.items() if name != "WATCHDOG_PID"}


class Successor:
    """A new copy of this program, started beside it."""

    def __init__(self, opened: dict[str, list[Listener]], directory: str, timeout: float, orders: Orders) -> None:
        """Start it.

        Args:
            opened: the listeners to hand over, by address.
            directory: the working directory in which the program was started.
            timeout: seconds it may take to be ready.
            orders: what operators have ordered of this program.

        Raises:
            HandoffError: it cannot be started; nothing has changed.
        """
        try:
            self._pipe, writer = os.pipe()
        except OSError as error:
            raise HandoffError(f"the new program cannot be started: {error}") from None
        self.deadline = time.monotonic() + timeout
        self._timeout = timeout
        inheritance.reclaim()
        self._shared = [(listener, listener.shared) for listener in _all(opened)]
        try:
            fds = [listener.fileno() for listener in _all(opened)]
            self._process = subprocess.Popen(
                _command(),
                cwd=directory,
                env=_without_watchdog_pid() | {VARIABLE: _bequest(opened, orders, pipe=writer)},
                pass_fds=(writer, *fds),
                start_new_session=False,
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:  # ValueError: of -1, a listener was closed
            os.close(self._pipe)
            raise HandoffError(f"the new program cannot be started: {error}") from None
        finally:
            os.close(writer)
            for listener in _all(opened):
                with suppress(OSError):  # closed meanwhile: this process was told to end
                    listener.set_inheritable(False)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def fileno(self) -> int:
        """Return a descriptor that is readable when there is news, for selectors."""
        return self._pipe

    def check(self, wait: float = 0.0) -> bool | None:
        """Tell whether it is ready; None while that is open.

        Args:
            wait: seconds to wait for news.

        Raises:
            HandoffError: it ended or was too slow, and is gone; the message says which.
        """
        if select.select([self._pipe], [], [], wait)[0]:
            if os.read(self._pipe, len(READY)) == READY:
                self._hang_up()
                return True
            status = self._end()
            raise HandoffError(f"the new program (pid {self.pid}) ended with status {status} before it was ready")
        if time.monotonic() < self.deadline:
            return None
        self.abandon()  # at once: it must not get ready now, and take over files that stay ours
        raise HandoffError(f"the new program (pid {self.pid}) was not ready within {self._timeout:g} s and was killed")

    def release(self) -> None:
        """In a forked child: let go of what is the parent's."""
        os.close(self._pipe)

    def _end(self) -> int:
        """Make sure that it is gone, after a moment to go by itself; return its status."""
        self._hang_up()
        for listener, shared in self._shared:
            listener.shared = shared
        for number, patience in ((None, 1.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, None)):
            if number is not None:
                self._process.send_signal(number)
            try:
                return self._process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
        raise AssertionError("a killed process ends")

    def _hang_up(self) -> None:
        pipe, self._pipe = self._pipe, -1
        if pipe >= 0:
            os.close(pipe)

    def abandon(self) -> None:
        """Kill it: this process stops, or waits no longer, and takes the attempt back."""
        self._process.kill()
        self._end()


def serve_on(reason: str, pidfile: PidFile) -> None:
    """Say that an upgrade has failed, and take the PID file back, which the successor may have had for a moment."""
    events.emit("upgrade_failed", reason=f"{reason}; this one serves on")
    with suppress(ConfigError):
        pidfile.write()


def probe(listeners: Iterable[Listener], directory: str, timeout: float = 5.0) -> None:
    """Connect to each of our own stream listeners once: what cannot be reached is not ready.

    Linux connects to a wildcard address by way of loopback.

    Args:
        listeners: open ones.
        directory: where this program was started, from which a relative path is meant.
        timeout: seconds for each; a connection is made by the kernel, whatever the workers do.

    Raises:
        ConfigError: one cannot be reached; the message says which.
    """
    for listener in listeners:
        if listener.type != socket.SOCK_STREAM:
            continue
        with socket.socket(listener.family, listener.type) as client:
            client.settimeout(timeout)
            try:
                client.connect(_seen_from_here(listener.getsockname(), directory))
            except PermissionError:
                pass  # a Unix path that the user we have become may not enter; others may
            except OSError as error:
                raise ConfigError(f"cannot connect to {listener.url}, which this process listens on: {error}") from None


def _seen_from_here(name: Any, directory: str) -> Any:
    """Return a socket's name, for a process that may have changed its directory since it was bound."""
    is_relative = isinstance(name, str) and not os.path.isabs(name)  # an abstract one is bytes, of TCP it is a tuple
    return os.path.relpath(os.path.join(directory, name)) if is_relative else name
