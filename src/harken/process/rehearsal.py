"""What a service does before it serves, tried out: nothing stays, and nothing is written.

The order is that of the real thing, and so are the messages.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from harken.errors import ConfigError
from harken.observe.access import STDOUT
from harken.observe.outlet import check_log
from harken.process import page, privileges
from harken.process.control import BY_NAME, open_listener
from harken.process.pidfile import PidFile
from harken.settings import Settings

__all__ = ["try_logs", "try_page", "try_process"]


def try_logs(settings: Settings) -> None:
    """See that the logs can be opened.

    Raises:
        ConfigError: one cannot.
    """
    for path in (settings["log_file"], settings["access_log"]):
        if path not in (None, STDOUT):
            check_log(path)


def try_page(settings: Settings, undo: ExitStack) -> None:
    """Open the address of the page, until ``undo`` closes it.

    Raises:
        ConfigError: the address or the token is wrong, or a library is missing.
        BindError: the address cannot be had.
    """
    page.read_token(settings)
    opened = page.open_listener(settings)
    if opened is not None:
        undo.callback(opened.close)


def try_process(settings: Settings, undo: ExitStack) -> None:
    """Open the control socket, until ``undo`` closes it, and see that the process could become what it is to be.

    Raises:
        ConfigError: the PID file, the user, the group or the directory cannot be had.
        BindError: the control socket cannot be had.
        FileNotFoundError: there is no working directory.
    """
    os.getcwd()  # where a new program is to begin
    if settings["control"] != BY_NAME:  # one by name that cannot be had is left out
        opened = open_listener(settings, "")
        if opened is not None:
            undo.callback(opened.close)
    PidFile(settings["pidfile"]).check()
    if any(settings[name] is not None for name in ("user", "group", "chdir")):
        _try_becoming(settings)


def _try_becoming(settings: Settings) -> None:
    """Become the user and go to the directory in a child: there is no way back."""
    reader, writer = os.pipe()
    with open(reader, encoding="utf-8", errors="surrogateescape") as told:
        try:
            pid = os.fork()
            if pid == 0:
                try:
                    os.write(writer, _become(settings).encode(errors="surrogateescape"))
                finally:
                    os._exit(0)
        finally:
            os.close(writer)
        trouble = told.read()
    os.waitpid(pid, 0)
    if trouble:
        raise ConfigError(trouble)


def _become(settings: Settings) -> str:
    """Return what is in the way; empty when nothing is."""
    try:
        privileges.drop(settings)
        privileges.chdir(settings)
    except Exception as error:  # noqa: BLE001 - whoever waits for the child is told
        return str(error)
    return ""
