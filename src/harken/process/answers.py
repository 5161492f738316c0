"""What a running worker can be asked, whoever asks: its supervisor on behalf of others, or somebody in its own process.

Answers are made of what JSON can say. Those of several workers are joined by :func:`joined`.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any

from harken.errors import ConfigError
from harken.process.worker import Worker

__all__ = ["STANDING", "VERBS", "answer", "joined"]


def answer(worker: Worker, verb: str, arguments: dict[str, Any]) -> Any:
    """Answer one question. Any thread.

    Raises:
        ConfigError: no verb is called so, or an argument is wrong.
        HarkenError: as the verb of the server raises.
    """
    if verb not in VERBS:
        raise ConfigError(f"no verb {verb!r}; there are {', '.join(VERBS)}")
    return VERBS[verb](worker, **arguments)


def _status(worker: Worker) -> list[dict[str, Any]]:
    return [server.stats() for server in worker.servers]


def _connections(worker: Worker) -> list[dict[str, Any]]:
    return [_plain(info) for server in worker.servers for info in server.connections()]


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(each) for name, each in asdict(value).items()}
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _kill(worker: Worker, connection: str, reason: str = "killed") -> bool:
    return any(server.close_connection(connection, reason) for server in worker.servers)


def _suspend(worker: Worker) -> None:
    for server in worker.servers:
        server.suspend()


def _resume(worker: Worker) -> None:
    for server in worker.servers:
        server.resume()


def _configure(worker: Worker, **changes: Any) -> None:
    worker.configure(changes)


def _stacks(worker: Worker) -> list[dict[str, Any]]:
    """What every thread does, by name, innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own = threading.get_ident()
    return [
        {"thread": names.get(ident, str(ident)), "process": os.getpid(), "stack": traceback.format_stack(frame)}
        for ident, frame in sys._current_frames().items()
        if ident != own
    ]


VERBS: dict[str, Callable[..., Any]] = {
    "status": _status,
    "connections": _connections,
    "kill": _kill,
    "suspend": _suspend,
    "resume": _resume,
    "configure": _configure,
    "stacks": _stacks,
}
"""What can be asked; each takes the worker and keyword arguments."""


STANDING = frozenset({"suspend", "resume", "configure"})
"""What a worker that starts later must be told as well."""


def joined(verb: str, answers: list[Any]) -> Any:
    """Make one answer of those of several workers."""
    if verb == "status":
        return _joined_status(answers)
    if verb == "kill":
        return any(answers)
    if verb in {"connections", "stacks"}:
        return [entry for each in answers for entry in each]
    return None


_SUMMED = ("open", "accepted_total", "rejected_total", "handler_failed_total")


def _joined_status(answers: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One entry an address: counts added up, and the states of all workers when they differ."""
    by_address: dict[str, list[dict[str, Any]]] = {}
    for entry in (entry for each in answers for entry in each):
        by_address.setdefault(entry["address"], []).append(entry)
    return [_sum(entries) for entries in by_address.values()]


def _sum(entries: list[dict[str, Any]]) -> dict[str, Any]:
    closed: Counter[str] = Counter()
    for entry in entries:
        closed.update(entry["closed_total"])
    total = dict(entries[0])
    total.update({name: sum(entry[name] for entry in entries) for name in _SUMMED})
    total["closed_total"] = dict(closed)
    total["state"] = "/".join(sorted({entry["state"] for entry in entries}))
    total["paused"] = any(entry["paused"] for entry in entries)
    total["process"] = [entry["process"] for entry in entries]
    return total
