# SPDX-License-Identifier: MIT
"""The Markdown tables of a result: medians, and ratios to a baseline taken round by round."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchkit.machine import headline

Round = Mapping[str, Any]


def render(result: Mapping[str, Any], baseline: str) -> str:
    """Return the tables of a result file's content.

    Args:
        result: the content of a result file.
        baseline: the rival whose rate is 1.00; a scenario without it has no ratios.
    """
    parts = [f"{headline(result)}\n"]
    parts += ["\n".join(_lines(scenario, baseline)) + "\n" for scenario in result["scenarios"]]
    if result["left_out"]:
        parts.append("\n".join(f"Left out: {name}: {reason}." for name, reason in result["left_out"].items()) + "\n")
    return "\n".join(parts)


def _lines(scenario: Mapping[str, Any], baseline: str) -> Iterator[str]:
    rounds: dict[str, list[Round]] = {}
    for each in scenario["rounds"]:
        rounds.setdefault(each["rival"], []).append(each)
    asked = f"{scenario['mode']}, {scenario['connections']} connections, {scenario['size']} bytes"
    depth = f", {scenario['depth']} in flight on each" if scenario["depth"] > 1 else ""
    count = max((len(of_one) for of_one in rounds.values()), default=0)
    yield f"### {scenario['name']}: {asked}{depth} ({count} rounds of {scenario['seconds']} s)\n"
    held = scenario["mode"] == "idle"
    yield from _memory_rows(rounds) if held else _rate_rows(rounds, rounds.get(baseline, []), baseline)


def _rate_rows(rounds: Mapping[str, Sequence[Round]], base: Sequence[Round], baseline: str) -> Iterator[str]:
    times = f"x {baseline}"
    yield f"| server | messages/s | {times} | per CPU second | {times} (range) | p50 µs | p99 µs | RSS MiB | errors |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for rival, of_one in rounds.items():
        per_cpu, wall = _ratios(of_one, base, "rate_per_cpu"), _ratios(of_one, base, "rate")
        cells = [
            rival,
            f"{_median(of_one, 'rate'):,.0f}",
            f"{statistics.median(wall):.2f}" if wall else "",
            f"{_median(of_one, 'rate_per_cpu'):,.0f}",
            f"**{statistics.median(per_cpu):.2f}** ({min(per_cpu):.2f}-{max(per_cpu):.2f})" if per_cpu else "",
            f"{_median(of_one, 'p50_us'):,.0f}",
            f"{_median(of_one, 'p99_us'):,.0f}",
            f"{_median(of_one, 'rss') / 2**20:.1f}",
            _errors(of_one),
        ]
        yield f"| {' | '.join(cells)} |"


def _memory_rows(rounds: Mapping[str, Sequence[Round]]) -> Iterator[str]:
    yield "| server | bytes a connection | RSS MiB | CPU % while idle | seconds to open | errors |"
    yield "|---|---:|---:|---:|---:|---:|"
    for rival, of_one in rounds.items():
        cells = [
            rival,
            f"{_median(of_one, 'rss_per_connection'):,.0f}",
            f"{_median(of_one, 'rss') / 2**20:.1f}",
            f"{_median(of_one, 'cpu_share') * 100:.1f}",
            f"{_median(of_one, 'opening'):.2f}",
            _errors(of_one),
        ]
        yield f"| {' | '.join(cells)} |"


def _ratios(of_one: Sequence[Round], base: Sequence[Round], figure: str) -> list[float]:
    """Return this rival's figure by the baseline's, for each round that has both: neighbours in time."""
    by_round = {each["round"]: each[figure] for each in base}
    pairs = [(each[figure], by_round.get(each["round"])) for each in of_one]
    return [mine / theirs for mine, theirs in pairs if mine and theirs]


def _median(of_one: Sequence[Round], figure: str) -> float:
    return float(statistics.median([each[figure] for each in of_one if each[figure] is not None] or [0.0]))


def _errors(of_one: Sequence[Round]) -> str:
    errors = sum(each["errors"] for each in of_one)
    missing = sum(each["connections"] - each["open"] for each in of_one if each["mode"] != "churn")
    return f"{errors}" + (f", {missing} connections unserved" if missing else "")
