# SPDX-License-Identifier: MIT
"""Count the instructions that servers spend on a message in user code, by valgrind: no other program disturbs that.

Each server runs twice, with a short and a longer load, under callgrind; what is counted is the difference, by the
difference in messages. System calls do not count, so read it beside the rates of run.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchkit import build, measure
from benchkit.plan import PlanError, Scenario, choose, load_rivals, load_scenarios
from benchkit.server import ServerError

SHORT_SECONDS, LONG_SECONDS = 1.0, 4.0  # callgrind makes a server some fifty times slower
START_SECONDS = 120.0
VALGRIND = ("valgrind", "--tool=callgrind", "--callgrind-out-file={file}")


def main(words: Sequence[str] | None = None) -> int:
    """Print a line for each server and scenario; 0 counted, 1 something could not be, 2 usage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenario", default="echo-100,lines-100,churn-50", help="names from scenarios.toml")
    parser.add_argument("--rivals", default="floor,harken_green,uvloop_protocol", help="names from rivals.toml")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep callgrind's files, for callgrind_annotate")
    options = parser.parse_args(words)
    try:
        build.require_tools(("valgrind",), "instructions.py")
        scenarios = choose(load_scenarios(), options.scenario.split(","), "scenario")
        rivals = choose(load_rivals(), options.rivals.split(","), "rival")
        bench = measure.Bench(build.build_load(), (None, None), patience=START_SECONDS)
    except (PlanError, build.CannotBuildError) as error:
        print(f"instructions.py: {error}", file=sys.stderr)
        return 2
    failed = 0
    for scenario in scenarios:
        for rival in rivals:
            if rival.takes(scenario):
                try:
                    command = [*build.prepare(rival), *build.words_for(scenario.work)]
                    variables = build.environment(
                        {"PYTHONHASHSEED": "0", **rival.environment}
                    )  # as many probes in each run
                    count = _per_message(bench, scenario, rival.name, command, variables, options.keep)
                    print(f"{scenario.name} {rival.name}: {count:,.0f} instructions a message", flush=True)
                except (build.CannotBuildError, measure.RoundError, ServerError) as error:
                    failed = 1
                    print(f"instructions.py: {scenario.name} {rival.name}: {error}", file=sys.stderr)
    return failed


def _per_message(
    bench: measure.Bench,
    scenario: Scenario,
    rival: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    keep: Path | None,
) -> float:
    short, long = (
        _count(bench, dataclasses.replace(scenario, seconds=seconds), rival, command, environment, keep)
        for seconds in (SHORT_SECONDS, LONG_SECONDS)
    )
    return (long[0] - short[0]) / (long[1] - short[1])


def _count(
    bench: measure.Bench,
    scenario: Scenario,
    rival: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    keep: Path | None,
) -> tuple[int, float]:
    """Return the instructions and the messages of one run."""
    with tempfile.TemporaryDirectory() as folder:
        place = keep or Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        file = place / f"callgrind.{scenario.name}.{rival}.{scenario.seconds:g}"
        words = [word.format(file=file) for word in VALGRIND]
        figures: dict[str, Any] = bench.measure(scenario, [*words, *command], environment)
        # The warm-up has a quarter of the window's messages; the difference of two runs keeps the proportion.
        messages = figures["rate"] * (scenario.seconds + bench.warmup(scenario))
        found = re.search(r"^(?:summary|totals): (\d+)", file.read_text("utf-8"), re.MULTILINE)
    if not found:
        raise measure.RoundError(f"callgrind wrote no total: {figures['complaints'][-200:]}")
    return int(found[1]), messages


if __name__ == "__main__":
    raise SystemExit(main())
