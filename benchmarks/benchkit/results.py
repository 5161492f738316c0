# SPDX-License-Identifier: MIT
"""Result files: JSON with a line for each server of each scenario, whose figures are lists, one item a round."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Figures = Mapping[str, list[Any]]  # by name; None in a round that failed


def gather(rounds: Iterable[Mapping[str, Any] | None]) -> dict[str, list[Any]]:
    """Return the rounds of one server as lists by figure. What servers wrote to stderr is left out."""
    taken = list(rounds)
    names = {name: None for each in taken if each for name in each if name != "complaints"}
    return {name: [each[name] if each else None for each in taken] for name in names}


def merge(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the new result with the scenarios of the old one that were not measured again."""
    if old is None:
        return dict(new)
    scenarios = {**old["scenarios"], **new["scenarios"]}
    return {**new, "versions": {**old["versions"], **new["versions"]}, "scenarios": scenarios}


def load(path: Path) -> dict[str, Any]:
    """Return a result file's content."""
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def dump(result: Mapping[str, Any]) -> str:
    """Return the text of a result file."""
    head = {name: value for name, value in result.items() if name != "scenarios"}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    scenarios = []
    for name, scenario in result["scenarios"].items():
        rivals = [f"   {json.dumps(rival)}: {json.dumps(figures)}" for rival, figures in scenario["rivals"].items()]
        about = json.dumps({key: value for key, value in scenario.items() if key != "rivals"})[1:-1]
        body = ",\n".join(rivals)
        scenarios.append(f'  {json.dumps(name)}: {{{about}, "rivals": {{\n{body}}}}}')
    return "\n".join(["{", *lines, ' "scenarios": {', ",\n".join(scenarios), " }", "}"]) + "\n"


def median(figures: Figures, name: str) -> float | None:
    """Return the median of a figure over the rounds that have it."""
    values = [value for value in figures.get(name, []) if value is not None]
    return float(statistics.median(values)) if values else None


def ratios(mine: Figures, theirs: Figures, name: str) -> list[float]:
    """Return one server's figure by another's, for each round that has both: neighbours in time."""
    pairs = zip(mine.get(name, []), theirs.get(name, []), strict=False)
    return [one / other for one, other in pairs if one and other]
