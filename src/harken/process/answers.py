"""What a running worker can be asked, whoever asks: its supervisor on behalf of others, or somebody in its own process.

Answers are made of what JSON can say. Those of several workers are joined by :func:`joined`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any, Protocol

from harken.errors import ConfigError, LifecycleError
from harken.lifecycle import State
from harken.observe.collector import Collector
from harken.observe.stalls import joined as joined_stalls
from harken.process.activity import activity
from harken.process.recycling import resident_bytes
from harken.process.traces import Traces
from harken.serving import Serving
from harken.settings import REGISTRY, Settings, declare_all

__all__ = ["SEARCHES", "VERBS", "Served", "alone_status", "answer", "in_force", "joined", "refuse_at_end"]


class Served(Protocol):
    """Servers of one process, about which somebody asks: a worker."""

    @property
    def servers(self) -> list[Any]:
        """The servers."""

    @property
    def settings(self) -> Settings:
        """What holds for all of them."""

    @property
    def collector(self) -> Collector | None:
        """Who collects their figures, if anybody does."""

    @property
    def traces(self) -> Traces:
        """Those of their connections."""

    def servings(self) -> list[Serving]:
        """Their running sides."""

    def configure(self, changes: dict[str, Any]) -> None:
        """Change live settings of all of them."""


def answer(worker: Served, verb: str, arguments: dict[str, Any]) -> Any:
    """Answer one question. Any thread.

    Raises:
        ConfigError: no verb is called so, or an argument is wrong.
        HarkenError: as the verb of the server raises.
    """
    if verb not in VERBS:
        raise ConfigError(f"no verb {verb!r}; there are {', '.join(VERBS)}")
    return VERBS[verb](worker, **arguments)


def refuse_at_end(verb: str) -> None:
    """The service drains, and ends: refuse what would be done by the program or the workers that came after.

    Raises:
        LifecycleError: this is such a verb.
    """
    if verb in ("reload", "upgrade", "workers"):
        raise LifecycleError(f"the service drains and ends: {verb} has no effect any more")


def _status(worker: Served) -> list[dict[str, Any]]:
    return [server.stats() for server in worker.servers]


def alone_status(servers: list[dict[str, Any]]) -> dict[str, Any]:
    """Put around the servers' status what a supervisor would, where there is none."""
    return {"supervisor": None, "rss": resident_bytes(), "workers": [], "wanted": 0, "servers": servers}


def _connections(worker: Served, most: int | None = None) -> list[dict[str, Any]]:
    """All that are open, or the ``most`` oldest of each server."""
    return [
        _plain(record.info())
        for serving in worker.servings()
        for record in sorted(serving.connections, key=lambda record: record.started)[:most]
    ]


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(each) for name, each in asdict(value).items()}
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _kill(worker: Served, connection: str, reason: str = "killed") -> bool:
    return any(server.close_connection(connection, reason) for server in worker.servers)


def _suspend(worker: Served) -> None:
    for server in worker.servers:
        server.suspend()


def _resume(worker: Served) -> None:
    for server in worker.servers:
        server.resume()


def _figures(worker: Served) -> list[Any]:
    """What was counted, for ``observe.figures.Figures``."""
    return worker.collector.collect().plain() if worker.collector is not None else []


def _stalls(worker: Served) -> list[dict[str, Any]]:
    """The places that kept others waiting, costliest first."""
    return worker.collector.stalls.rows() if worker.collector is not None else []


def _settings(worker: Served) -> list[dict[str, Any]]:
    return in_force(worker.settings)


def in_force(settings: Settings) -> list[dict[str, Any]]:
    """The limits and times that can change while a server runs, with their units."""
    declare_all()
    return [
        {"name": name, "value": settings[name], "unit": declared.unit}
        for name, declared in REGISTRY.items()
        if declared.live and (declared.kind.name in ("count", "seconds", "bytes") or name == "overload")
    ]


_STATES = {
    State.NEW: "starting",
    State.SUSPENDED: "suspended",
    State.STOPPED: "stopped",
    State.DRAINING: "draining",
    State.CLOSED: "closed",
}


def _health(worker: Served) -> dict[str, Any]:
    """Whether loops turn, and whether new connections are served; as the supervisor answers for its workers."""
    states = {serving.lifecycle.state for serving in worker.servings()}
    reasons = [reason for state, reason in _STATES.items() if state in states]
    hung = any(serving.overdue() > worker.settings["worker_timeout"] > 0 for serving in worker.servings())
    return {
        "live": not hung,
        "ready": not reasons and not hung,
        "reason": "hung" if hung else reasons[-1] if reasons else "ready",
    }


def _configure(worker: Served, /, **changes: Any) -> None:
    worker.configure(changes)


def _trace(worker: Served, connection: str, token: str, form: str = "text", redact: bool = True) -> bool:
    return worker.traces.begin(worker.servings(), connection, token, form, redact)


def _untrace(worker: Served, token: str) -> None:
    worker.traces.end(token)


def _stacks(worker: Served) -> list[dict[str, Any]]:
    return activity(worker.servings())


VERBS: dict[str, Callable[..., Any]] = {
    "status": _status,
    "connections": _connections,
    "kill": _kill,
    "suspend": _suspend,
    "resume": _resume,
    "configure": _configure,
    "stacks": _stacks,
    "trace": _trace,
    "untrace": _untrace,
    "figures": _figures,
    "stalls": _stalls,
    "settings": _settings,
    "health": _health,
}
"""What can be asked; each takes the worker and keyword arguments."""


SEARCHES = frozenset({"kill", "trace"})
"""Those about one connection, which tell whether it was found."""


def joined(verb: str, answers: list[Any]) -> Any:
    """Make one answer of those of several workers."""
    if verb == "status":
        return _joined_status(answers)
    if verb in SEARCHES:
        return any(answers)
    if verb in {"connections", "stacks"}:
        return [entry for each in answers for entry in each]
    if verb == "stalls":
        return joined_stalls(entry for each in answers for entry in each)
    return None


_SUMMED = ("open", "accepted_total", "rejected_total", "handler_failed_total", "buffered_bytes")
_SUMMED_BY_NAME = ("closed_total", "rejected_by_reason", "stalled_total")


def _joined_status(answers: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One entry an address: counts added up, and the states of all workers when they differ."""
    by_address: dict[str, list[dict[str, Any]]] = {}
    for entry in (entry for each in answers for entry in each):
        by_address.setdefault(entry["address"], []).append(entry)
    return [_sum(entries) for entries in by_address.values()]


def _sum(entries: list[dict[str, Any]]) -> dict[str, Any]:
    total = dict(entries[0])
    total.update({name: sum(entry[name] for entry in entries) for name in _SUMMED})
    for name in _SUMMED_BY_NAME:
        total[name] = dict(sum((Counter(entry[name]) for entry in entries), Counter[str]()))
    total["state"] = "/".join(sorted({entry["state"] for entry in entries}))
    total["paused"] = any(entry["paused"] for entry in entries)
    total["process"] = [entry["process"] for entry in entries]
    return total
