# SPDX-License-Identifier: MIT
"""What can be run: the scenarios and rivals that the two TOML files declare."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

HOME = Path(__file__).resolve().parent.parent
WORKS = ("echo", "lines", "churn", "udp", "tls")
MODES = ("echo", "lines", "pipeline", "churn", "idle", "silent", "udp")


class PlanError(ValueError):
    """The declarations or the command line ask for something that does not exist."""


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A question: how the load talks to the server, for how long and how often, and what answer is hoped for."""

    name: str
    work: str
    mode: str
    connections: int
    size: int
    rivals: Sequence[str]
    seconds: float = 1.0
    rounds: int = 5
    depth: int = 1
    idle: int = 0
    processes: int = 1
    default: bool = True
    targets: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse kinds that neither the servers nor the load know."""
        _check_one_of(self.name, "work", self.work, WORKS)
        _check_one_of(self.name, "mode", self.mode, MODES)
        if self.connections % self.processes or self.idle % self.processes:
            raise PlanError(f"[{self.name}] processes = {self.processes}: connections and idle are not its multiples")

    @property
    def held(self) -> bool:
        """Whether it asks what silent connections cost, and not how fast the others are."""
        return self.mode in {"idle", "silent"}

    @property
    def asked(self) -> str:
        """What is asked, in words."""
        words = [self.mode, f"{self.connections:,} connections", f"{self.size:,} bytes"]
        words += ["TLS"] if self.work == "tls" else []
        words += [f"{self.depth} in flight on each"] if self.depth > 1 else []
        words += [f"{self.idle:,} idle ones beside them"] if self.idle else []
        words += [f"{self.processes} processes"] if self.processes > 1 else []
        return ", ".join(words)

    def smallest(self, seconds: float) -> Scenario:
        """Return the same question asked of a few connections, once: does it run?"""
        changes: dict[str, Any] = {"connections": min(self.connections, 20), "idle": min(self.idle, 20)}
        changes |= {"processes": min(self.processes, 2), "rounds": 1, "seconds": seconds, "targets": ()}
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Rival:
    """A server that is measured, and what it needs."""

    name: str
    command: Sequence[str]
    works: Sequence[str]
    modules: Sequence[str] = ()
    tools: Sequence[str] = ()
    target: str = ""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    most: int | None = None

    def __post_init__(self) -> None:
        """Refuse kinds of work that no scenario has."""
        for work in self.works:
            _check_one_of(self.name, "works", work, WORKS)

    def takes(self, scenario: Scenario) -> bool:
        """Tell whether this server can do what the scenario asks."""
        return scenario.work in self.works and (self.most is None or scenario.connections <= self.most)


Kind = TypeVar("Kind", Scenario, Rival)


def load_scenarios(path: Path = HOME / "scenarios.toml") -> dict[str, Scenario]:
    """Return the scenarios by name, in the order of the file."""
    return _load(path, Scenario)


def load_rivals(path: Path = HOME / "rivals.toml") -> dict[str, Rival]:
    """Return the rivals by name, in the order of the file."""
    return _load(path, Rival)


def choose(known: Mapping[str, Kind], names: Iterable[str], what: str) -> list[Kind]:
    """Return those named, in the order of the declarations.

    Raises:
        PlanError: a name is not declared; the message suggests the nearest.
    """
    wanted = list(names)
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or list(known)
            raise PlanError(f"no {what} {name!r}: did you mean {', '.join(near)}?")
    return [item for name, item in known.items() if name in wanted]


def _load(path: Path, kind: type[Kind]) -> dict[str, Kind]:
    tables: dict[str, dict[str, Any]] = tomllib.loads(path.read_text("utf-8"))
    loaded = {}
    for name, table in tables.items():
        try:
            loaded[name] = kind(name=name, **table)
        except TypeError as error:
            raise PlanError(f"{path.name}, [{name}]: {error}") from None
    return loaded


def _check_one_of(name: str, field: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise PlanError(f"[{name}] {field} = {value!r}: not one of {', '.join(known)}")
