"""The control socket: a Unix path by which ``harken ctl`` and other tools see into a running server and change it.

A line of JSON asks, a line of JSON answers, any number of times on one connection::

    {"version": 1, "verb": "kill", "arguments": {"connection": "5f2a1c-7"}, "number": 1}
    {"version": 1, "number": 1, "result": true}
    {"version": 1, "number": 2, "error": "no verb 'kil'; did you mean 'kill'?"}

The path's mode is 0600, and the kernel says who connects (SO_PEERCRED, unix(7)): root and the server's own user are
heard, nobody else. What they say is bounded in size, and how many of them in number.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harken import events, transports
from harken.acceptor import FIRST_PAUSE, Verdict, judge
from harken.listener import AddressInUse, Listener
from harken.process.channel import Channel, Message
from harken.settings import Settings, setting, text

__all__ = [
    "BY_NAME",
    "VERSION",
    "Client",
    "Control",
    "describe",
    "directory",
    "hear",
    "open_listener",
    "replies",
    "sockets",
]

VERSION = 1
BY_NAME = "by name"


def _is_named(path: Any) -> None:
    if not path:
        raise ValueError("is empty; write a path, or none")


CONTROL = setting(
    "control",
    text(optional=True, test=_is_named),
    None,
    serve=BY_NAME,
    process=True,
    meaning="the path of the control socket, mode 0600; `by name` is a file with the handler's name in "
    "`$XDG_RUNTIME_DIR/harken`, `/run/harken` or `/tmp/harken-UID`; none: there is none",
    origin="gunicorn's control socket, which is not named by the operator either",
)

# Bytes of one question, and clients at once: people and their scripts.
MAX_QUESTION_BYTES = 1 << 16
MAX_CLIENTS = 64
# Servers of one name on one machine.
_MOST_OF_A_NAME = 100
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid, unix(7)


def directory() -> Path:
    """Return the directory of control sockets that need no name, made if it is not there, mode 0700."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        path = Path(runtime) / "harken"
    elif os.geteuid() == 0:
        path = Path("/run/harken")
    else:
        path = Path(f"/tmp/harken-{os.geteuid()}")  # noqa: S108 - checked below to be ours alone
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    if path.is_symlink() or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise PermissionError(f"{path} is not this user's alone; remove it, or name a path by control=")
    return path


def sockets() -> list[Path]:
    """Return the paths of all sockets in :func:`directory`, newest last."""
    return sorted(directory().glob("*.sock"), key=lambda path: path.lstat().st_mtime)


def open_listener(settings: Settings, name: str) -> Listener | None:
    """Open the control socket that the settings ask for.

    Args:
        settings: ``control`` is read.
        name: the server's, for a socket that is named by it.

    Raises:
        BindError: the path named cannot be had. A socket by name that cannot be had is left out, and an event tells.
    """
    path = settings["control"]
    if path is None:
        return None
    if path != BY_NAME:
        return transports.listen(f"unix:{os.path.abspath(path)}?mode=600")[0]
    reason = f"{_MOST_OF_A_NAME - 1} servers have this name"
    try:
        for number in range(1, _MOST_OF_A_NAME):
            with contextlib.suppress(AddressInUse):
                suffix = "" if number == 1 else f"-{number}"
                return transports.listen(f"unix:{directory()}/{name}{suffix}.sock?mode=600")[0]
    except OSError as error:  # a machine without such a directory serves all the same
        reason = describe(error)
    events.emit("control_failed", reason=f"{reason}; `harken ctl` needs control=PATH then")
    return None


def describe(error: OSError) -> str:
    """Say why there is no directory for control sockets, in words without numbers."""
    return f"{error.filename}: {error.strerror}" if error.strerror and error.filename else str(error)


class Client:
    """Somebody who asks.

    Attributes:
        channel: to them.
        on_gone: what is called when they have hung up.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.on_gone: list[Callable[[], object]] = []

    def gone(self) -> None:
        """They have hung up."""
        self.channel.close()
        for tell in self.on_gone:
            tell()

    def answer(self, number: Any, **reply: Any) -> bool:
        """Answer a question by ``result=`` or ``error=``; tell whether anybody is there to hear it."""
        return self.channel.send(version=VERSION, number=number, **reply)


def hear(client: Client, ask: Callable[[Client, Message], None]) -> bool:
    """Take in what somebody asks, and hand each question to ``ask``; tell whether more may come."""
    try:
        questions = client.channel.receive()
    except (EOFError, ValueError):
        return False
    for question in questions:
        if question.get("version") != VERSION:
            client.answer(question.get("number"), error=f"this server speaks version {VERSION} of the protocol")
        elif not isinstance(question.get("arguments", {}), dict):
            client.answer(question.get("number"), error="arguments is no JSON object")
        else:
            ask(client, question)
    return True


class Control:
    """Listens for questions in somebody's loop. One thread."""

    def __init__(
        self, listener: Listener, selector: selectors.BaseSelector, ask: Callable[[Client, Message], None]
    ) -> None:
        """Begin to listen.

        Args:
            listener: the open control socket; closed by :meth:`close`.
            selector: of the loop; its keys' ``data`` are functions to call when a descriptor is ready.
            ask: answers one question, now or later, by ``client.answer``.
        """
        self._listener = listener
        self._selector = selector
        self._ask = ask
        self._clients: set[Client] = set()
        self._deaf_until: float | None = None
        selector.register(listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if judge(error) is Verdict.PAUSE:  # no descriptors are left: whoever asks keeps us awake, and waits
                self._selector.unregister(self._listener)
                self._deaf_until = time.monotonic() + FIRST_PAUSE
            return  # or it has gone again
        if len(self._clients) >= MAX_CLIENTS or not _is_trusted(sock):
            sock.close()
            return
        client = Client(Channel(sock, blocking=False, max_line_bytes=MAX_QUESTION_BYTES))
        self._clients.add(client)
        self._selector.register(client.channel, selectors.EVENT_READ, lambda: self._hear(client))

    def _hear(self, client: Client) -> None:
        if not hear(client, self._ask):
            self._drop(client)

    @property
    def waits(self) -> bool:
        """Whether :meth:`flush` must be called soon: a slow reader has not taken all yet, or nobody new is heard."""
        return self._deaf_until is not None or any(client.channel.unsent for client in self._clients)

    def flush(self) -> None:
        """Send on what slow readers have not taken yet, and listen again after a pause; called once a turn."""
        if self._deaf_until is not None and time.monotonic() >= self._deaf_until:
            self._deaf_until = None
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        for client in list(self._clients):
            if client.channel.unsent and not client.channel.flush():
                self._drop(client)

    def _drop(self, client: Client) -> None:
        self._clients.discard(client)
        self._selector.unregister(client.channel)
        client.gone()

    def shut(self) -> None:
        """Close the socket, and go on to answer those who are here."""
        self._deaf_until = None
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(self._listener)
        self._listener.close()

    def close(self) -> None:
        """Hang up on everybody and close the socket."""
        for client in list(self._clients):
            client.channel.flush()
            self._drop(client)
        self.shut()

    def release(self) -> None:
        """In a forked child: let go of what is the parent's."""
        for client in self._clients:
            client.channel.release()
        self._listener.disown()
        self._listener.close()


def _is_trusted(sock: socket.socket) -> bool:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(credentials)[1] in (0, os.geteuid())


def replies(
    sock: socket.socket, verb: str, arguments: dict[str, Any], patience: float | None = None
) -> Iterator[Message]:
    """Ask over a connected control socket, and return what comes back: one answer, or many for ``trace``.

    Args:
        sock: connected.
        verb: what to ask.
        arguments: the verb's.
        patience: seconds to wait for each; None to wait for ever.

    Raises:
        EOFError: the server hung up.
        TimeoutError: it says nothing for too long.
    """
    channel = Channel(sock, blocking=True)
    channel.send(version=VERSION, verb=verb, arguments=arguments, number=1)
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    while True:
        if not poll.poll(None if patience is None else patience * 1000):
            raise TimeoutError(f"no answer within {patience:g} s")
        yield from channel.receive()
