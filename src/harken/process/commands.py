"""What the control socket's questions mean to a supervisor: some it does itself, the rest its workers answer."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from harken import events
from harken.errors import ConfigError, HarkenError, nearest
from harken.process.answers import VERBS, in_force, refuse_at_end
from harken.process.channel import Message
from harken.process.control import Client
from harken.process.orders import STANDING
from harken.process.recycling import resident_bytes
from harken.process.workers import WORKERS

if TYPE_CHECKING:
    from harken.process.supervisor import Supervisor

__all__ = ["Commands"]


class Commands:
    """Obeys questions in the supervisor's loop."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._own: dict[str, Callable[..., Any]] = {
            "drain": supervisor.drain,
            "stop": supervisor.stop,
            "reload": supervisor.reload,
            "upgrade": supervisor.upgrade,
            "workers": self._workers,
            "health": supervisor.health,
            "settings": lambda: in_force(supervisor.settings),
        }

    def obey(self, client: Client, question: Message) -> None:
        """Answer one question, now or when the workers have."""
        verb, number = str(question.get("verb")), question.get("number")
        arguments = question.get("arguments", {})
        try:
            if self._supervisor.ending:
                refuse_at_end(verb)
            if verb in self._own:
                client.answer(number, result=self._own[verb](**arguments))
            elif verb == "trace":
                self._trace(client, number, **arguments)
            elif verb == "untrace":
                self._supervisor.workers.followers.leave(client, **arguments)
            elif verb in VERBS:
                self._pass_on(verb, arguments, partial(client.answer, number))
            else:
                raise ConfigError(f"no verb {verb!r}{nearest(verb, [*self._own, *VERBS])}")
        except (HarkenError, TypeError) as error:  # TypeError: arguments that the verb does not take
            client.answer(number, error=str(error))

    def _workers(self, count: Any) -> int:
        if self._supervisor.ending:  # by another verb, which sets it
            refuse_at_end("workers")
        self._supervisor.workers.wanted = number = WORKERS.read(count, "ctl")
        return int(number)

    def _trace(self, client: Client, number: Any, connection: str, **arguments: Any) -> None:
        workers = self._supervisor.workers
        token = workers.followers.add(client, number, lambda token: workers.ask("untrace", {"token": token}, _unheard))

        def answered(result: bool = False, error: str | None = None) -> None:
            if error is not None or not result:
                workers.followers.refuse(token, error or f"no connection {connection!r} is open")

        workers.ask("trace", {**arguments, "connection": connection, "token": token}, answered)

    def _pass_on(self, verb: str, arguments: dict[str, Any], done: Callable[..., object]) -> None:
        workers = self._supervisor.workers
        if verb == "configure":
            if "workers" in arguments:
                arguments = dict(arguments)
                self._workers(arguments.pop("workers"))
            self._supervisor.settings.configure(arguments)  # refuses what is wrong before any worker is told
            events.emit("configured", server=self._supervisor, changes=arguments)
        if verb == "status":
            done = partial(self._add_own, done)
        elif verb == "figures":
            done = partial(self._add_up, done)
        workers.ask(verb, arguments, done, standing=verb in STANDING)

    def _add_up(self, done: Callable[..., object], **_reply: Any) -> None:
        """The workers have written their figures down; those that have not in time count as they last did."""
        done(result=self._supervisor.figures().plain())

    def _add_own(self, done: Callable[..., object], **reply: Any) -> None:
        """Put the supervisor's own figures around the workers'."""
        workers = self._supervisor.workers
        if "result" in reply:
            reply["result"] = {
                "supervisor": os.getpid(),
                "rss": resident_bytes(),
                "workers": [
                    {
                        "pid": child.pid,
                        "generation": child.generation,
                        "ready": child.ready,
                        "leaving": child.leaving,
                        "open": child.row.open,
                        "accepted": child.row.accepted,
                        "rss": resident_bytes(child.pid),
                    }
                    for child in workers.all
                ],
                "wanted": workers.wanted,
                "servers": reply["result"],
            }
        done(**reply)


def _unheard(**_reply: Any) -> None:
    """Nobody waits for this answer."""
