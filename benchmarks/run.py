# SPDX-License-Identifier: MIT
"""Measure servers side by side; benchmarks/README.md tells how to run it and how to read the result."""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchkit import build, machine, measure, table
from benchkit.plan import HOME, PlanError, Rival, Scenario, choose, load_rivals, load_scenarios

QUICK_SECONDS = 0.3
WARMUP_SHARE = 0.25  # of the window
MOST_WARMUP = 0.5  # seconds: threads are started and caches warm well before


def main(words: Sequence[str] | None = None) -> int:
    """Run the chosen scenarios and return the exit status: 0 measured, 1 nothing measured, 2 usage."""
    signal.signal(signal.SIGTERM, _leave)  # an exception: servers are ended on the way out
    options = _parse(words)
    try:
        scenarios = _choose_scenarios(options)
        rivals = choose(load_rivals(), options.only or load_rivals(), "rival")
        load = build.build_load()
    except (PlanError, build.CannotBuildError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    if options.list:
        _print_list(scenarios, rivals)
        return 0
    left_out: dict[str, str] = {}
    commands = _prepare(rivals, options.python, left_out)
    modules = [module for rival in rivals if rival.name in commands for module in rival.modules]
    head = machine.describe_run(["python", "benchmarks/run.py", *(words or sys.argv[1:])], modules, options.python)
    runner = _Runner(load, commands, _cores(options), left_out)
    measured = [runner.run(scenario, [rival for rival in rivals if rival.takes(scenario)]) for scenario in scenarios]
    result = {**head, "left_out": left_out, "scenarios": measured}
    text = table.render(result, options.baseline or _default_baseline(commands))
    _write(result, text, options)
    print(text)
    return 0 if any(scenario["rounds"] for scenario in measured) else 1


class _Runner:
    """Runs a scenario's rounds in turn over the rivals, so that what else the machine does meets all alike."""

    def __init__(
        self,
        load: Path,
        commands: dict[str, list[str]],
        cores: tuple[int | None, int | None],
        left_out: dict[str, str],
    ) -> None:
        self._load, self._commands, self._cores, self._left_out = load, commands, cores, left_out
        self._environment = build.environment()

    def run(self, scenario: Scenario, rivals: Sequence[Rival]) -> dict[str, Any]:
        rounds = []
        for number in range(scenario.rounds):
            for rival in rivals:
                if rival.name in self._commands:
                    rounds += self._round(scenario, rival.name, number)
        return {**dataclasses.asdict(scenario), "rounds": rounds}

    def _round(self, scenario: Scenario, rival: str, number: int) -> list[dict[str, Any]]:
        try:
            figures = measure.measure(
                scenario,
                self._commands[rival],
                self._load,
                seconds=scenario.seconds,
                warmup=min(scenario.seconds * WARMUP_SHARE, MOST_WARMUP),
                cores=self._cores,
                environment=self._environment,
            )
        except measure.RoundError as error:
            self._left_out[f"{rival} in {scenario.name}, round {number + 1}"] = str(error)
            print(f"run.py: {error}", file=sys.stderr)
            return []
        per_cpu = figures["rate_per_cpu"] or 0
        print(
            f"{scenario.name} {number + 1}/{scenario.rounds} {rival}: {figures['rate']:,.0f}/s, "
            f"{per_cpu:,.0f} per CPU second, {figures['errors']} errors",
            file=sys.stderr,
        )
        return [{"rival": rival, "round": number, **figures}]


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="RIVAL", help="measure only these (see rivals.toml)")
    parser.add_argument("--scenario", nargs="+", metavar="NAME", help="only these (see scenarios.toml)")
    parser.add_argument("--rounds", type=int, help="rounds of each, in turn, instead of the scenario's")
    parser.add_argument("--seconds", type=float, help="length of the timed window, instead of the scenario's")
    parser.add_argument("--baseline", metavar="RIVAL", help="whose rate is 1.00 (default: the floor, if it is built)")
    parser.add_argument("--quick", action="store_true", help=f"one round of {QUICK_SECONDS} s: does it run?")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the Python servers")
    parser.add_argument("--cores", type=int, nargs=2, metavar=("SERVER", "LOAD"), help="cores to pin to")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/DATE.json); the table goes beside it")
    parser.add_argument("--list", action="store_true", help="print the scenarios and rivals, and stop")
    options = parser.parse_args(words)
    if options.seconds is not None and not 0.01 <= options.seconds <= 600:
        parser.error(f"--seconds {options.seconds}: not from 0.01 to 600")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: not 1 or more")
    return options


def _choose_scenarios(options: argparse.Namespace) -> list[Scenario]:
    known = load_scenarios()
    names = options.scenario or [name for name, scenario in known.items() if scenario.default]
    changes: dict[str, Any] = {"rounds": 1, "seconds": QUICK_SECONDS} if options.quick else {}
    changes |= {name: getattr(options, name) for name in ("rounds", "seconds") if getattr(options, name) is not None}
    return [dataclasses.replace(scenario, **changes) for scenario in choose(known, names, "scenario")]


def _prepare(rivals: Sequence[Rival], python: str, left_out: dict[str, str]) -> dict[str, list[str]]:
    commands = {}
    for rival in rivals:
        try:
            commands[rival.name] = build.prepare(rival, python)
        except build.CannotBuildError as error:
            left_out[rival.name] = str(error)
            print(f"run.py: {rival.name} left out: {error}", file=sys.stderr)
    return commands


def _cores(options: argparse.Namespace) -> tuple[int | None, int | None]:
    if options.cores:
        return options.cores[0], options.cores[1]
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        print("run.py: one core only: server and load share it, nothing is pinned", file=sys.stderr)
        return None, None
    return usable[0], usable[1]


def _default_baseline(commands: dict[str, list[str]]) -> str:
    return "floor" if "floor" in commands else next(iter(commands), "floor")


def _write(result: dict[str, Any], text: str, options: argparse.Namespace) -> None:
    date = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d-%H%M%S")
    place = build.BUILD if options.quick else HOME / "results"
    path: Path = options.output or place / f"{date}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    path.with_suffix(".md").write_text(text, "utf-8")
    print(f"run.py: wrote {path} and {path.with_suffix('.md').name}", file=sys.stderr)


def _print_list(scenarios: Sequence[Scenario], rivals: Sequence[Rival]) -> None:
    for scenario in scenarios:
        takers = ", ".join(rival.name for rival in rivals if rival.takes(scenario))
        print(f"{scenario.name}: {scenario.mode}, {scenario.connections} connections, {scenario.size} bytes: {takers}")


def _leave(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
