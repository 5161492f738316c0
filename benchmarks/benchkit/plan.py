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
WORKS = ("echo", "lines", "churn", "udp")
MODES = ("echo", "lines", "pipeline", "churn", "idle", "udp")


class PlanError(ValueError):
    """The declarations or the command line ask for something that does not exist."""


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A question: how the load talks to the server, for how long and how often."""

    name: str
    work: str
    mode: str
    connections: int
    size: int
    seconds: float
    rounds: int
    depth: int = 1
    default: bool = True

    def __post_init__(self) -> None:
        """Refuse kinds that neither the servers nor the load know."""
        _check_one_of(self.name, "work", self.work, WORKS)
        _check_one_of(self.name, "mode", self.mode, MODES)


@dataclasses.dataclass(frozen=True)
class Rival:
    """A server that is measured, and what it needs."""

    name: str
    command: Sequence[str]
    works: Sequence[str]
    modules: Sequence[str] = ()
    tools: Sequence[str] = ()
    sources: Sequence[str] = ()
    target: str = ""
    build: Sequence[str] = ()
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
