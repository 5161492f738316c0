# SPDX-License-Identifier: MIT
"""One round: a fresh server, the load on it, and what both used in the timed window."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchkit.plan import Scenario
from benchkit.server import Server, ServerError, Usage, pinned

GRACE_SECONDS = 90.0  # beyond warm-up and window: idle may need a minute to open its connections


class RoundError(RuntimeError):
    """A round gave no result; the message says why."""


def measure(
    scenario: Scenario,
    command: Sequence[str],
    load: Path,
    *,
    seconds: float,
    warmup: float,
    cores: tuple[int | None, int | None],
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """Run one round and return its figures.

    Args:
        scenario: what the load does.
        command: the server's command, without `--work`.
        load: the load generator.
        seconds: length of the timed window.
        warmup: seconds of load before it.
        cores: the server's core and the load's; None is no pinning.
        environment: the server's environment.

    Raises:
        RoundError: the server did not start or the load failed.
    """
    try:
        server = Server([*command, "--work", scenario.work], cores[0], environment)
    except ServerError as error:
        raise RoundError(str(error)) from None
    try:
        fresh = server.usage()
        words = _load_words(scenario, load, server.port, seconds, warmup)
        report, begin, end = _run_load(words, server, cores[1])
    finally:
        server.end()
    return {**report, **_figures(report, fresh, begin, end), "complaints": server.complaints[-2000:]}


def _load_words(scenario: Scenario, load: Path, port: int, seconds: float, warmup: float) -> list[str]:
    scheme = "udp" if scenario.mode == "udp" else "tcp"
    words = [str(load), scenario.mode, f"{scheme}://127.0.0.1:{port}"]
    words += ["--connections", str(scenario.connections), "--size", str(scenario.size)]
    return [*words, "--depth", str(scenario.depth), "--seconds", str(seconds), "--warmup", str(warmup)]


def _run_load(words: Sequence[str], server: Server, core: int | None) -> tuple[dict[str, Any], Usage, Usage]:
    marks: dict[str, Usage] = {}
    said = []
    with pinned(core), subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:  # ends with the load, which bounds its own time
                if line.strip() in {"begin", "end"}:
                    marks[line.strip()] = server.usage()
                else:
                    said.append(line.strip())
            output, _ = process.communicate(timeout=GRACE_SECONDS)
        finally:
            process.kill()
    if process.returncode or len(marks) < 2:
        raise RoundError(f"{' '.join(words)} failed ({process.returncode}): {' '.join(said)}")
    report: dict[str, Any] = json.loads(output)
    return report, marks["begin"], marks["end"]


def _figures(report: Mapping[str, Any], fresh: Usage, begin: Usage, end: Usage) -> dict[str, Any]:
    """Relate the load's count to the server's CPU; the two windows differ by the milliseconds of a wake-up."""
    share = (end.cpu - begin.cpu) / (end.at - begin.at)
    return {
        "cpu_seconds": round(end.cpu - begin.cpu, 3),
        "cpu_share": round(share, 4),
        "rate_per_cpu": round(report["rate"] / share, 1) if share else None,
        "rss": end.rss,
        "rss_per_connection": round((end.rss - fresh.rss) / report["connections"]),
    }
