# SPDX-License-Identifier: MIT
"""Measure servers side by side; benchmarks/README.md tells how to run it and how to read the result."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchkit import build, machine, measure, results, table, targets
from benchkit.plan import PlanError, Rival, Scenario, choose, load_rivals, load_scenarios

QUICK_SECONDS = 0.2


def main(words: Sequence[str] | None = None) -> int:
    """Run the chosen scenarios and return the exit status: 0 measured, 1 nothing measured, 2 usage."""
    signal.signal(signal.SIGTERM, _leave)  # an exception: servers are ended on the way out
    options = _parse(words)
    try:
        scenarios = _choose_scenarios(options)
        known = load_rivals()
        asked = {scenario.name: _choose_rivals(scenario, known, options) for scenario in scenarios}
        if options.list:
            return _print_list(scenarios, asked)
        load = build.build_load()
    except (PlanError, build.CannotBuildError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    runner = _Runner(measure.Bench(load, _cores(options)), options.python, alive=options.alive)
    runner.prepare({rival.name: rival for rivals in asked.values() for rival in rivals}.values())
    measured = {scenario.name: runner.run(scenario, asked[scenario.name]) for scenario in scenarios}
    head = machine.describe_machine(runner.modules, options.python)
    result = {**head, "left_out": runner.left_out, "scenarios": measured}
    text = table.render(result, options.baseline)
    _write(result, options)
    print(text)
    return 0 if any(scenario["rivals"] for scenario in measured.values()) else 1


class _Runner:
    """Runs a scenario's rounds in turn over the rivals, so that what else the machine does meets all alike."""

    def __init__(self, bench: measure.Bench, python: str, *, alive: bool) -> None:
        self._bench, self._python, self._alive = bench, python, alive
        self._commands: dict[str, list[str]] = {}
        self._environments: dict[str, dict[str, str]] = {}
        self.left_out: dict[str, str] = {}
        self.modules: list[str] = []

    def prepare(self, rivals: Sequence[Rival]) -> None:
        """Build what the rivals need; those that cannot run here are left out with a word."""
        for rival in rivals:
            try:
                self._commands[rival.name] = build.prepare(rival, self._python)
            except build.CannotBuildError as error:
                self._leave_out(rival.name, str(error))
            else:
                self._environments[rival.name] = build.environment(rival.environment)
                self.modules += rival.modules

    def run(self, scenario: Scenario, rivals: Sequence[Rival]) -> dict[str, Any]:
        """Return what a result file says of a scenario."""
        about: dict[str, Any] = {
            name: getattr(scenario, name) for name in ("asked", "held", "processes", "seconds", "targets")
        }
        about |= machine.describe_moment()
        names = [rival.name for rival in rivals if rival.name in self._commands]
        taken: dict[str, list[dict[str, Any] | None]] = {name: [] for name in names}
        try:
            words = build.words_for(scenario.work)
        except build.CannotBuildError as error:
            self._leave_out(scenario.name, str(error))
            return {**about, "rivals": {}}
        with contextlib.ExitStack() as stack:
            windows = {name: self._window(scenario, name, words, stack) for name in names}
            for number in range(scenario.rounds):
                for name in random.sample(names, len(names)):  # nobody always follows the same
                    taken[name].append(self._round(scenario, name, number, windows[name]))
        figures = {name: results.gather(rounds) for name, rounds in taken.items()}
        return {**about, "rivals": {name: each for name, each in figures.items() if each}}

    def _window(
        self, scenario: Scenario, rival: str, words: Sequence[str], stack: contextlib.ExitStack
    ) -> Callable[[], dict[str, Any]]:
        """Return what gives a round's figures: with fresh servers, or with those that live as long as `stack`."""
        command, environment = [*self._commands[rival], *words], self._environments[rival]
        if not self._alive:
            return lambda: self._bench.measure(scenario, command, environment)
        try:
            servers = stack.enter_context(self._bench.started(scenario, command, environment))
        except measure.RoundError as error:
            told = str(error)
            return lambda: _raise(told)
        return lambda: self._bench.window(scenario, servers)

    def _round(
        self, scenario: Scenario, rival: str, number: int, window: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | None:
        where = f"{scenario.name} {number + 1}/{scenario.rounds} {rival}"
        try:
            figures = window()
        except measure.RoundError as error:
            self._leave_out(where, str(error))
            return None
        per_cpu, complaints = figures["rate_per_cpu"] or 0, figures.get("complaints", "").splitlines()
        said = f", says {complaints[-1]}" if complaints else ""
        wrong = f"{figures['errors']} errors, {figures['unserved']} unserved"
        print(f"{where}: {figures['rate']:,}/s, {per_cpu:,} per CPU second, {wrong}{said}", file=sys.stderr)
        return figures

    def _leave_out(self, what: str, why: str) -> None:
        self.left_out[what] = why
        print(f"run.py: {what} left out: {why}", file=sys.stderr)


def _raise(why: str) -> NoReturn:
    raise measure.RoundError(why)


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenario", type=_names, metavar="NAME,…", help="only these (see scenarios.toml)")
    parser.add_argument("--rivals", type=_names, metavar="NAME,…", help="these, not the scenario's (see rivals.toml)")
    parser.add_argument("--rounds", type=int, help="rounds of each, in turn, instead of the scenario's")
    parser.add_argument("--seconds", type=float, help="length of the timed window, instead of the scenario's")
    parser.add_argument("--baseline", metavar="RIVAL", default="floor", help="whose rate is 1.00 (default: the floor)")
    parser.add_argument("--quick", action="store_true", help="a round of a moment and few connections: does it run?")
    parser.add_argument(
        "--alive",
        action="store_true",
        help="keep all servers alive over the rounds: short windows, many of them, and no fresh start in between",
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter of the Python servers")
    parser.add_argument("--cores", type=int, nargs=2, metavar=("SERVER", "LOAD"), help="cores to pin to")
    parser.add_argument("--output", type=Path, help="JSON file (default: build/bench/DATE.json), tables beside it")
    parser.add_argument("--update", action="store_true", help="keep what --output says of scenarios not measured now")
    parser.add_argument("--list", action="store_true", help="print the scenarios and rivals, and stop")
    options = parser.parse_args(words)
    if options.seconds is not None and not 0.01 <= options.seconds <= 600:
        parser.error(f"--seconds {options.seconds}: not from 0.01 to 600")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: not 1 or more")
    if options.update and not options.output:
        parser.error("--update needs --output")
    return options


def _names(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _choose_scenarios(options: argparse.Namespace) -> list[Scenario]:
    known = load_scenarios()
    for scenario in known.values():
        for text in scenario.targets:
            targets.parse(text)
    names = options.scenario or [name for name, scenario in known.items() if scenario.default]
    chosen = choose(known, names, "scenario")
    if options.alive and (held := [scenario.name for scenario in chosen if scenario.held]):
        raise PlanError(f"--alive, and {held[0]}: what a connection keeps is seen in a fresh server only")
    if options.quick:
        chosen = [scenario.smallest(QUICK_SECONDS) for scenario in chosen]
    changes = {name: getattr(options, name) for name in ("rounds", "seconds") if getattr(options, name) is not None}
    return [dataclasses.replace(scenario, **changes) for scenario in chosen]


def _choose_rivals(scenario: Scenario, known: dict[str, Rival], options: argparse.Namespace) -> list[Rival]:
    chosen = choose(known, options.rivals or scenario.rivals, "rival")
    return [rival for rival in chosen if rival.takes(scenario)]


def _cores(options: argparse.Namespace) -> tuple[int | None, int | None]:
    if options.cores:
        return options.cores[0], options.cores[1]
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        print("run.py: one core only: server and load share it, nothing is pinned", file=sys.stderr)
        return None, None
    return usable[0], usable[1]


def _write(result: dict[str, Any], options: argparse.Namespace) -> None:
    date = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d-%H%M%S")
    path: Path = options.output or build.BUILD / f"{date}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if options.update and path.exists():
        result = results.merge(results.load(path), result)
    path.write_text(results.dump(result), "utf-8")
    path.with_suffix(".md").write_text(table.render(result, options.baseline), "utf-8")
    print(f"run.py: wrote {path} and {path.with_suffix('.md').name}", file=sys.stderr)


def _print_list(scenarios: Sequence[Scenario], asked: dict[str, list[Rival]]) -> int:
    for scenario in scenarios:
        print(f"{scenario.name}: {scenario.asked}: {', '.join(rival.name for rival in asked[scenario.name])}")
    return 0


def _leave(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
