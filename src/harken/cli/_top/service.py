"""The running server, seen through its control socket."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from harken.cli import asking
from harken.observe.figures import Figures

__all__ = ["MOST_CONNECTIONS", "Look", "Rates", "Service"]

# Connections asked of each listener of each worker, the oldest ones: some hundred bytes each, once a second.
MOST_CONNECTIONS = 1000


@dataclass(frozen=True)
class Look:
    """What was seen at one moment, as the server told it."""

    status: dict[str, Any]
    health: dict[str, Any]
    figures: Figures
    stalled: list[dict[str, Any]]
    settings: list[dict[str, Any]]
    connections: list[dict[str, Any]]
    time: float = field(default_factory=time.monotonic)

    @property
    def counted(self) -> bool:
        """Whether the server counts what passes, which it does with the setting ``metrics``."""
        return any(name == "harken_accepted_total" for name, _, _ in self.figures)

    def total(self, name: str) -> float:
        """Return a figure of all listeners."""
        return sum(numbers[0] for each, _, numbers in self.figures if each == name)

    def over_listeners(self, name: str) -> int:
        """Return a count of the status, of all listeners."""
        return sum(server[name] for server in self.status["servers"])

    @property
    def stalls(self) -> list[dict[str, Any]]:
        """The places that kept others waiting, costliest first; without ``metrics`` how often is all that is known."""
        if self.stalled:
            return self.stalled
        times: dict[str, int] = {}
        for server in self.status["servers"]:  # those of one process share what is known
            for place, count in server["stalled_total"].items():
                times[place] = max(count, times.get(place, 0))
        return [{"place": place, "function": "", "times": count} for place, count in times.items()]

    @cached_property
    def moved(self) -> dict[str, tuple[int, int]]:
        """Bytes in and out by connection."""
        return {each["id"]: (each["bytes_in"] or 0, each["bytes_out"] or 0) for each in self.connections}


@dataclass(frozen=True)
class Rates:
    """What happened between two looks, a second."""

    opened: float
    bytes_in: float
    bytes_out: float

    @classmethod
    def between(cls, before: Look, now: Look) -> Rates:
        """Compare two looks. A count that starts anew, as when workers are replaced, is no rate below zero.

        Without ``metrics`` bytes are those of the connections that are open at the later look.
        """
        if now.counted and before.counted:
            names = "harken_connections_opened_total", "harken_received_bytes_total", "harken_sent_bytes_total"
            opened, taken, sent = (now.total(name) - before.total(name) for name in names)
        else:
            opened = now.over_listeners("accepted_total") - before.over_listeners("accepted_total")
            changes = [(now.moved[each], before.moved.get(each, (0, 0))) for each in now.moved]
            taken, sent = (sum(late[way] - early[way] for late, early in changes) for way in (0, 1))
        seconds = max(now.time - before.time, 1e-3)
        return cls(*(max(change, 0) / seconds for change in (opened, taken, sent)))


class Service:
    """Asks the server at one control socket, over a connection for each call. Any thread; each call may wait.

    Attributes:
        path: of the control socket.
        over: whether it has hung up for good.
    """

    def __init__(self, path: str) -> None:
        """Ask nothing yet.

        Args:
            path: of the control socket.
        """
        self.path = path
        self._open: set[socket.socket] = set()
        self.over = False

    @contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        with asking.connected(self.path) as sock:
            self._open.add(sock)
            try:
                if self.over:
                    raise asking.Refused("the view is closed")
                yield sock
            finally:
                self._open.discard(sock)

    def look(self) -> Look:
        """Return what there is to see.

        Raises:
            Refused: the server is not there, or says no.
        """
        with self._connected() as sock:
            return Look(
                asking.ask(sock, "status"),
                asking.ask(sock, "health"),
                Figures(asking.ask(sock, "figures")),
                asking.ask(sock, "stalls"),
                asking.ask(sock, "settings"),
                asking.ask(sock, "connections", most=MOST_CONNECTIONS),
            )

    def ask(self, verb: str, **arguments: Any) -> Any:
        """Ask one question, as ``harken ctl`` does.

        Raises:
            Refused: the server is not there, or says no.
        """
        with self._connected() as sock:
            return asking.ask(sock, verb, **arguments)

    def follow(self, connection: str, form: str) -> Iterator[dict[str, Any]]:
        """Trace a connection to its end.

        Raises:
            Refused: the server is not there, or says no.
        """
        with self._connected() as sock:
            yield from asking.follow(sock, connection=connection, form=form)

    def hang_up(self) -> None:
        """End every call that waits, and refuse others."""
        self.over = True
        for sock in list(self._open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
