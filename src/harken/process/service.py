"""``serve``: a handler on any number of addresses, in one process or in many, until a signal says otherwise."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from harken.engines import suited
from harken.process import inheritance, privileges, signals
from harken.process.fitness import fit_handler
from harken.process.worker import Worker
from harken.settings import Settings
from harken.transports import as_urls

__all__ = ["run", "serve"]


def serve(handler: Callable[..., Any], *addresses: str, **settings: Any) -> int:
    """Serve ``handler`` on every address until SIGTERM (drains) or SIGINT or SIGQUIT (stops now).

    With ``workers`` at 1 or more, processes forked from this one serve, and this one looks after them; with 0 it
    serves itself. Signals are heeded when called in the main thread; elsewhere the call serves, in this process, until
    that ends.

    Args:
        handler: a handler class, called as ``(request, client_address, server)``. One with ``async def handle`` takes
            the engine ``asyncio`` unless told otherwise.
        addresses: URLs such as ``tcp://127.0.0.1:8800``, ``unix:/run/echo.sock``, ``udp://:8800``.
        settings: any setting by name; those not given have the defaults of ``serve``.

    Returns:
        The exit status: 0 when every connection ended by itself, 3 when some were cut at the drain's deadline.

    Raises:
        ConfigError: an address, a setting or the handler is wrong; nothing stays open.
        BindError: an address cannot be had; it is a ConfigError and an OSError.
    """
    with inheritance.beginning():
        fit_handler(handler)
        urls = as_urls(addresses) or ("tcp://127.0.0.1:8800",)
        settings = suited(handler, settings)
        name = getattr(handler, "__name__", type(handler).__name__)
        return run(lambda: handler, urls, settings, name=name, in_memory=True)


def run(
    load: Callable[[], Callable[..., Any]],
    addresses: tuple[str, ...],
    keywords: dict[str, Any],
    *,
    name: str,
    in_memory: bool = False,
) -> int:
    """Serve what ``load`` returns; see :func:`serve`.

    Args:
        load: returns the handler class; with workers it is called in each of them.
        addresses: URLs.
        keywords: settings by name.
        name: the handler's, for the control socket.
        in_memory: whether ``load`` returns what this process has loaded, so that only a new process has new code.
    """
    settings = Settings(None, keywords, "serve")
    with _logs(settings) as (reopen, reread):
        if threading.current_thread() is not threading.main_thread():
            return _serve_here(load(), addresses, keywords)
        with _early_signals() as early:
            privileges.give(settings, _new_logs(settings))
            if settings["workers"] == 0:
                from harken.process.alone import Alone

                with privileges.visiting(settings):
                    handler = load()
                alone = Alone(handler, addresses, keywords, name=name, reopen=reopen, early=early, in_memory=in_memory)
                status = alone.run()
            else:
                from harken.process.supervisor import Supervisor

                status = Supervisor(
                    load,
                    addresses,
                    keywords,
                    name=name,
                    reopen=reopen,
                    reread=reread,
                    early=early,
                    in_memory=in_memory,
                ).run()
            if not in_memory:
                early.over(status)
        return status


@contextmanager
def _early_signals() -> Iterator[signals.Early]:
    early = signals.Early()
    try:
        yield early
    finally:
        early.close()


@contextmanager
def _logs(settings: Settings) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Write the logs while the block runs; yields what opens them anew, and what reads their settings anew."""
    from harken.observe.access import AccessLog
    from harken.observe.log import LogObserver

    with ExitStack() as attached:
        logs = LogObserver(settings), AccessLog(settings)
        for log in logs:
            log.attach()
            attached.callback(log.detach)

        def reopen() -> None:
            for log in logs:
                log.reopen()

        yield reopen, logs[0].reread


def _new_logs(settings: Settings) -> list[str]:
    """Return the log files that root has just made: who the server becomes must be able to open them anew."""
    paths = [path for path in (settings["log_file"], settings["access_log"]) if path is not None]
    return [path for path in paths if os.geteuid() == 0 and _is_new_file(path)]


def _is_new_file(path: str) -> bool:
    try:
        status = os.lstat(path)
    except OSError:  # as of `-`, which is stdout
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == 0


def _serve_here(handler: Callable[..., Any], addresses: tuple[str, ...], keywords: dict[str, Any]) -> int:
    worker = Worker(handler, addresses, keywords)
    try:
        return worker.run()
    finally:
        worker.close()
