# SPDX-License-Identifier: MIT
"""The Markdown tables of a result: medians, ratios to a baseline taken round by round, and what was hoped for."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchkit import targets
from benchkit.machine import headline
from benchkit.results import Figures, median, ratios


def render(result: Mapping[str, Any], baseline: str) -> str:
    """Return the tables of a result file's content.

    Args:
        result: the content of a result file.
        baseline: the rival whose rate is 1.00; a scenario without it takes its first rival.
    """
    parts = [f"{headline(result)}\n"]
    parts += ["\n".join(scenario_lines(result, name, baseline)) + "\n" for name in result["scenarios"]]
    if result["left_out"]:
        parts.append("\n".join(f"Left out: {name}: {reason}." for name, reason in result["left_out"].items()) + "\n")
    return "\n".join(parts)


def summary(result: Mapping[str, Any], baseline: str, columns: Sequence[str]) -> str:
    """Return one table of a result: a row a scenario, a column a server, with its rate by the baseline's.

    The baseline's own column has its rate per CPU second. Rows about memory have bytes a connection.
    """
    head = ["", f"{baseline}, per CPU second", *columns]
    rows = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for name, scenario in result["scenarios"].items():
        rivals: Mapping[str, Figures] = scenario["rivals"]
        own = next((each for each in (baseline, f"{baseline}_tls") if each in rivals), None)
        if own is None or scenario["processes"] > 1:
            continue
        figure = "rss_per_connection" if scenario["held"] else "rate_per_cpu"
        cells = [f"`{name}`", "" if scenario["held"] else _cell(rivals[own], figure)]
        for column in columns:
            mine = rivals.get(column, {})
            times = [] if scenario["held"] else ratios(mine, rivals[own], figure)
            ratio = f"{statistics.median(times):.2f}" if times else ""
            cells.append(f"{_cell(mine, figure)} B" if scenario["held"] and mine else ratio)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def scenario_lines(result: Mapping[str, Any], name: str, baseline: str) -> Iterator[str]:
    """Yield the lines of one scenario: heading, table, targets."""
    scenario = result["scenarios"][name]
    rivals: Mapping[str, Figures] = scenario["rivals"]
    count = max((len(figures["rate"]) for figures in rivals.values() if figures), default=0)
    yield f"### {name}: {scenario['asked']}\n"
    yield (
        f"{count} rounds of {scenario['seconds']} s, {scenario['date'][:10]}, commit {scenario['commit']}, "
        f"load average before {scenario['load_average']}.\n"
    )
    if scenario["held"]:
        yield from _memory_rows(rivals)
    else:
        yield from _rate_rows(rivals, baseline if baseline in rivals else next(iter(rivals), baseline))
    lines = list(target_lines(result, name))
    if lines:
        yield ""
        yield from lines


def target_lines(result: Mapping[str, Any], name: str) -> Iterator[str]:
    """Yield a list item for each target of a scenario that was measured."""
    for text in result["scenarios"][name]["targets"]:
        target = targets.parse(text)
        found = targets.find(target, name, result["scenarios"])
        if found is not None:
            figure = f"{found:,.0f}" if target.other is None else f"{found:.2f}"
            yield f"* `{text}`: {figure}, {'reached' if target.reached(found) else '**not reached**'}"


def _rate_rows(rivals: Mapping[str, Figures], baseline: str) -> Iterator[str]:
    base = rivals.get(baseline, {})
    yield f"| server | per CPU second | x {baseline} (range) | messages/s | p50 µs | p99 µs | RSS MiB | errors |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for rival, figures in rivals.items():
        times = ratios(figures, base, "rate_per_cpu")
        cells = [
            rival,
            _cell(figures, "rate_per_cpu"),
            f"**{statistics.median(times):.2f}** ({min(times):.2f}-{max(times):.2f})" if times else "",
            _cell(figures, "rate"),
            _cell(figures, "p50_us"),
            _cell(figures, "p99_us"),
            _cell(figures, "rss", 2**20, 1),
            _errors(figures),
        ]
        yield f"| {' | '.join(cells)} |"


def _memory_rows(rivals: Mapping[str, Figures]) -> Iterator[str]:
    yield "| server | bytes a connection | RSS MiB | CPU % while idle | seconds to open | errors |"
    yield "|---|---:|---:|---:|---:|---:|"
    for rival, figures in rivals.items():
        cells = [
            rival,
            _cell(figures, "rss_per_connection"),
            _cell(figures, "rss", 2**20, 1),
            _cell(figures, "cpu_share", 0.01, 1),
            _cell(figures, "opening", 1, 2),
            _errors(figures),
        ]
        yield f"| {' | '.join(cells)} |"


def _cell(figures: Figures, name: str, unit: float = 1, digits: int = 0) -> str:
    found = median(figures, name)
    return "" if found is None else f"{found / unit:,.{digits}f}"


def _errors(figures: Figures) -> str:
    errors, unserved = (sum(value or 0 for value in figures.get(name, [])) for name in ("errors", "unserved"))
    failed = figures.get("rate", [None]).count(None)
    words = [f"{unserved} connections unserved"] * bool(unserved) + [f"{failed} rounds failed"] * bool(failed)
    return ", ".join([f"{errors}", *words])
