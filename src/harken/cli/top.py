"""``harken top``: a live view of a running server in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable

import click

from harken.cli import asking
from harken.errors import ConfigError

__all__ = ["command"]


@click.command(
    help="Watch a running server in the terminal: connections, rates, workers, limits and stalls. "
    "Close and trace connections, suspend, resume and drain by keys; ? shows them."
)
@click.option("--socket", metavar="PATH", help="The control socket; by default that of the only server that runs.")
def command(socket: str | None) -> Callable[[], int]:
    """Find the server, and return what shows it."""
    try:
        from harken.cli._top.app import Top
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("textual", "rich"):
            raise
        raise ConfigError("harken top needs textual: pip install 'harken[top]'") from None
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):  # textual draws on stderr
        raise ConfigError("harken top needs a terminal; harken ctl --json tells scripts the same")
    path = asking.find_socket(socket)
    with asking.connected(path) as sock:  # what is wrong from the start is one line, not a screen
        asking.ask(sock, "health")

    def watch() -> int:
        top = Top(path)
        top.run()
        return top.return_code or 0

    return watch
