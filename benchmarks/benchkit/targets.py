# SPDX-License-Identifier: MIT
"""What a scenario hopes for, and whether a result has it: `SERVER [FIGURE] >=|<= NUMBER [SERVER [in SCENARIO]]`.

`harken_green >= 0.92 floor` compares rates per CPU second, round by round; `harken_green rss_per_connection <= 5120`
takes a figure as it is; `… <= 2 harken_green in NAME` compares the medians of two scenarios.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Mapping
from typing import Any

from benchkit.plan import PlanError
from benchkit.results import median, ratios

FIGURES = ("rate", "rate_per_cpu", "p50_us", "p99_us", "rss_per_connection")
_PATTERN = re.compile(r"(\w+)(?: (\w+))? (>=|<=) ([\d.]+)(?: (\w+)(?: in (\S+))?)?")


@dataclasses.dataclass(frozen=True)
class Target:
    """One thing hoped for."""

    text: str
    subject: str
    figure: str
    least: bool
    bound: float
    other: str | None
    scenario: str | None

    def reached(self, found: float) -> bool:
        """Tell whether a figure, or a ratio, is what was hoped for."""
        return found >= self.bound if self.least else found <= self.bound


def parse(text: str) -> Target:
    """Return what a line of a scenario's `targets` asks.

    Raises:
        PlanError: it is not of the form that this module's docstring tells.
    """
    match = _PATTERN.fullmatch(text)
    figure = (match and match[2]) or "rate_per_cpu"
    if not match or figure not in FIGURES:
        raise PlanError(f"target {text!r}: not SERVER [FIGURE] >=|<= NUMBER [SERVER [in SCENARIO]]")
    return Target(text, match[1], figure, match[3] == ">=", float(match[4]), match[5], match[6])


def find(target: Target, name: str, scenarios: Mapping[str, Any]) -> float | None:
    """Return the figure or ratio that a target is about, in a result's scenarios; None where it was not measured."""
    mine = scenarios[name]["rivals"].get(target.subject, {})
    if target.other is None:
        return median(mine, target.figure)
    theirs = scenarios.get(target.scenario or name, {"rivals": {}})["rivals"].get(target.other, {})
    if target.scenario is None:
        found = ratios(mine, theirs, target.figure)
        return statistics.median(found) if found else None
    one, other = median(mine, target.figure), median(theirs, target.figure)
    return one / other if one and other else None
