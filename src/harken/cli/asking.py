"""How commands talk to a running server, by its control socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from harken.cli import FAILED
from harken.process import control

__all__ = ["Refused", "ask", "connected", "find_socket", "follow"]

# Seconds for a server to answer; it gives its workers three.
ANSWER_SECONDS = 10.0


class Refused(click.ClickException):
    """The server said no, or is not there."""

    exit_code = FAILED


def find_socket(path: str | None) -> str:
    """Return the socket to talk to: the one named, or the only one there is.

    Raises:
        Refused: there is none, or there are several.
    """
    if path is not None:
        return path
    try:
        found = [str(each) for each in control.sockets() if _answers(str(each))]
    except OSError as error:
        raise Refused(f"{control.describe(error)}; name the server's socket by --socket") from None
    if not found:
        raise Refused("no server with a control socket runs; name its socket by --socket")
    if len(found) > 1:
        raise Refused(f"several servers run; name one by --socket: {', '.join(found)}")
    return found[0]


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


@contextmanager
def connected(path: str) -> Iterator[socket.socket]:
    """A connection to the server while the block runs.

    Raises:
        Refused: it cannot be reached, hangs up, or says nothing.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(ANSWER_SECONDS)
        try:
            sock.connect(path)
            yield sock
        except (FileNotFoundError, ConnectionRefusedError):
            raise Refused(f"no server answers at {path!r}; is it running, and is that its control= path?") from None
        except EOFError:
            raise Refused(f"the server at {path!r} hung up: it hears its own user and root alone") from None
        except OSError as error:
            raise Refused(f"cannot talk to {path!r}: {error.strerror or error}") from None


def ask(sock: socket.socket, verb: str, /, **arguments: Any) -> Any:
    """Ask over a connection and return the answer.

    Raises:
        Refused: the server says no.
        EOFError, OSError: what :func:`connected` turns into a word for people.
    """
    return next(_results(sock, verb, arguments, ANSWER_SECONDS))


def follow(sock: socket.socket, **arguments: Any) -> Iterator[dict[str, Any]]:
    """Trace a connection and return what is told of it, up to its end.

    Raises:
        Refused: the server says no.
        EOFError, OSError: as :func:`ask`.
    """
    for entry in _results(sock, "trace", arguments, None):
        yield entry
        if "end" in entry:
            return


def _results(sock: socket.socket, verb: str, arguments: dict[str, Any], patience: float | None) -> Iterator[Any]:
    try:
        for reply in control.replies(sock, verb, arguments, patience):
            if "error" in reply:
                raise Refused(str(reply["error"]))
            yield reply["result"]
    except (ValueError, KeyError):
        raise Refused("what answers there is no server of harken; is that its control= path?") from None
