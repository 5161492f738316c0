# SPDX-License-Identifier: MIT
"""One round: fresh servers, the load on them, and what both used in the timed window."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchkit.plan import Scenario
from benchkit.server import START_SECONDS, Server, ServerError, Usage, pinned

GRACE_SECONDS = 90.0  # beyond warm-up and window: idle may need a minute to open its connections
WARMUP_SHARE = 0.25  # of the window
ACQUAINTANCES = 20  # connections before memory is measured
MOST_WARMUP = 0.5  # seconds: threads are started and caches warm well before


class RoundError(RuntimeError):
    """A round gave no result; the message says why."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """What every round uses: the load generator, and the cores of server and load; None is no pinning.

    Attributes:
        patience: seconds that a server may take to start.
    """

    load: Path
    cores: tuple[int | None, int | None]
    patience: float = START_SECONDS

    def measure(self, scenario: Scenario, command: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
        """Run one round with fresh servers and return its figures, and as ``complaints`` what they wrote to stderr.

        Args:
            scenario: what the load does.
            command: the server's whole command.
            environment: the server's environment.

        Raises:
            RoundError: a server did not start or the load failed.
        """
        with self.started(scenario, command, environment) as servers:
            figures = self.window(scenario, servers)
        complaints = "\n".join(filter(None, (server.complaints for server in servers)))[-2000:]
        return {**figures, "complaints": complaints}

    @contextlib.contextmanager
    def started(
        self, scenario: Scenario, command: Sequence[str], environment: Mapping[str, str]
    ) -> Iterator[list[Server]]:
        """Start servers that have met a few connections; end them after the body. Arguments and errors as `measure`."""
        servers: list[Server] = []
        try:
            for _ in range(scenario.processes):
                servers.append(Server(command, self.cores[0], environment, self.patience))  # noqa: PERF401 - all that started are ended
            if scenario.mode != "udp":
                self._acquaint(scenario, servers)
            yield servers
        except ServerError as error:
            raise RoundError(str(error)) from None
        finally:
            for server in servers:
                server.end()

    def window(self, scenario: Scenario, servers: Sequence[Server]) -> dict[str, Any]:
        """Let the load talk to started servers for the timed window, and return the figures.

        Raises:
            RoundError: the load failed.
        """
        fresh = _usage(servers)
        reports, begin, end = self._run_loads(scenario, servers)
        return _figures(scenario, reports, fresh, begin, end)

    def _acquaint(self, scenario: Scenario, servers: Sequence[Server]) -> None:
        """Let servers serve a few connections that go again, as in any but the first second of a server's life.

        What is made once is not counted as a connection's, and an allocator that learns from what is given back has
        learned: under TLS uvloop maps and unmaps 256 KiB for each read until the first connection has closed.
        """
        changes: dict[str, Any] = {"connections": ACQUAINTANCES * scenario.processes, "idle": 0}
        changes["seconds"] = min(scenario.seconds / 2, 0.1)
        changes |= {} if scenario.mode in {"lines", "pipeline", "churn"} else {"mode": "echo"}
        self._run_loads(dataclasses.replace(scenario, **changes), servers)

    def _run_loads(self, scenario: Scenario, servers: Sequence[Server]) -> tuple[list[dict[str, Any]], Usage, Usage]:
        with contextlib.ExitStack() as stack:
            with pinned(self.cores[1]):
                commands = [self._words(scenario, server.port) for server in servers]
                loads = [stack.enter_context(_load(words)) for words in commands]
            for load in loads:
                _await_word(load, "ready")
            for load in loads:
                assert load.stdin is not None
                load.stdin.write("go\n")
                load.stdin.flush()
            begin, end = (_usage_at(loads, servers, word) for word in ("begin", "end"))
            reports = []
            for load in loads:
                output, said = load.communicate(timeout=GRACE_SECONDS)
                if load.returncode:
                    raise RoundError(f"the load failed ({load.returncode}): {said.strip()}")
                reports.append(json.loads(output))
        return reports, begin, end

    @staticmethod
    def warmup(scenario: Scenario) -> float:
        """Return the seconds of load before the timed window."""
        return min(scenario.seconds * WARMUP_SHARE, MOST_WARMUP)

    def _words(self, scenario: Scenario, port: int) -> list[str]:
        scheme = {"udp": "udp", "tls": "tls"}.get(scenario.work, "tcp")
        share = scenario.processes
        options = {
            "connections": scenario.connections // share,
            "size": scenario.size,
            "depth": scenario.depth,
            "seconds": scenario.seconds,
            "warmup": self.warmup(scenario),
            "start": "stdin",
        }
        if scenario.idle:
            options["idle"] = scenario.idle // share
        words = [str(self.load), scenario.mode, f"{scheme}://127.0.0.1:{port}"]
        return words + [word for name, value in options.items() for word in (f"--{name}", str(value))]


@contextlib.contextmanager
def _load(words: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _await_word(load: subprocess.Popen[str], word: str) -> None:
    """Read what the load says up to a word; it bounds its own time."""
    assert load.stderr is not None
    said = []
    for line in load.stderr:
        if line.strip() == word:
            return
        said.append(line.strip())
    raise RoundError(f"the load ended before its {word}: {' '.join(said)}")


def _usage_at(loads: Sequence[subprocess.Popen[str]], servers: Sequence[Server], word: str) -> Usage:
    for load in loads:
        _await_word(load, word)
    return _usage(servers)


def _usage(servers: Sequence[Server]) -> Usage:
    each = [server.usage() for server in servers]
    return Usage(each[-1].at, sum(usage.cpu for usage in each), sum(usage.rss for usage in each))


def _figures(
    scenario: Scenario, reports: Sequence[Mapping[str, Any]], fresh: Usage, begin: Usage, end: Usage
) -> dict[str, Any]:
    """Relate the loads' count to the servers' CPU; the two windows differ by the milliseconds of a wake-up."""
    share = (end.cpu - begin.cpu) / (end.at - begin.at)
    rate = sum(report["rate"] for report in reports)
    held = scenario.connections + scenario.idle
    answered = sum(report["open"] for report in reports)
    return {
        "rate": round(rate),
        "rate_per_cpu": round(rate / share) if share else None,
        "cpu_share": round(share, 4),
        "p50_us": round(statistics.median(report["p50_us"] for report in reports), 1),
        "p99_us": round(max(report["p99_us"] for report in reports), 1),
        "rss": end.rss,
        "rss_per_connection": round((end.rss - fresh.rss) / held),
        "opening": round(max(report["opening"] for report in reports), 2),
        "errors": sum(report["errors"] for report in reports),
        "unserved": 0 if scenario.mode == "churn" else held - answered,
    }
