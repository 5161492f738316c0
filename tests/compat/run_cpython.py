"""Run CPython's own suites with harken in the place of `socketserver`, and say what passed.

    python tests/compat/run_cpython.py [--engine NAME] [--scope threading|every] [--json OUT] [MODULE…]

The suites come from the Python that runs this script. Each module has a process of its own, and after a case that hung
another one for the rest. Cases that cannot pass are listed, with reasons, in `excused.toml`; one that passes
all the same is reported, so that the list stays true. The exit status is 1 if anything failed that is not excused.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src"
sys.path.insert(0, str(HERE))

from suites import SUITES

ENGINES = ("default", "thread", "pool", "fork", "green", "asyncio", "inline")
CASE_SECONDS = 60.0  # twice the longest wait in the suites themselves (test.support.SHORT_TIMEOUT, 30 s)
MODULE_SECONDS = 400.0  # a bound for what the clock of a case does not see: imports, and the end of the process


@dataclass
class Report:
    """What became of one module.

    Attributes:
        run: cases begun.
        passed: cases without a complaint.
        skipped: case to reason.
        failed: case to traceback, without the excused.
        excused: case to reason.
        stale: excused cases that passed.
        seconds: wall time.
    """

    run: int = 0
    passed: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    excused: dict[str, str] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)
    seconds: float = 0.0


def excuses(engine: str, scope: str, impl: str) -> dict[str, str]:
    """Read the excused cases that hold for an engine: name to reason."""
    if impl == "stdlib":
        return {}
    table = tomllib.loads((HERE / "excused.toml").read_text())
    return {
        case: ("A race. " if entry.get("races") else "") + entry["reason"]
        for entry in table.get("excused", [])
        for case in entry["cases"]
        if engine in entry["engines"] and scope in entry.get("scopes", ["threading", "every"])
    }


def attempt(module: str, options: argparse.Namespace, journal: Path, before: dict[str, list[str]]) -> str:
    """Run what is left of a module in a fresh process; return what it printed, or nothing if it came to its end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])}
    environment.pop("HARKEN_ENGINE", None)
    if options.engine != "default" and options.scope == "threading":
        environment["HARKEN_ENGINE"] = options.engine
    done = journal.with_suffix(".done")
    done.write_text(json.dumps(before))
    arguments = [module, "--impl", options.impl, "--engine", options.engine, "--scope", options.scope]
    arguments += ["--journal", str(journal), "--seconds", str(options.seconds), "--done", str(done)]
    arguments += ["--quick"] if options.quick else []
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(HERE / "run_suite.py"), *arguments]
    printed = journal.with_suffix(".out")
    with open(printed, "w") as out:
        child = subprocess.Popen(
            command,
            cwd=journal.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            status = child.wait(MODULE_SECONDS)
        except subprocess.TimeoutExpired:
            status = -1
        finally:
            end_group(child)
    return "" if status == 0 else printed.read_text(errors="replace") or f"the process ended with status {status}"


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End a child and whatever it has forked."""
    try:
        os.killpg(child.pid, 9)
    except ProcessLookupError:
        pass
    child.wait()


def read(journal: Path) -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """Return what each case said, and which cases were begun and not ended."""
    said: dict[str, list[tuple[str, str]]] = {}
    pending: list[str] = []
    for line in journal.read_text().splitlines() if journal.exists() else []:
        entry = json.loads(line)
        case, what = entry["case"], entry["what"]
        notes = said.setdefault(case, [])
        if what == "begun":
            pending.append(case)
        elif what == "ended":
            pending = [other for other in pending if other != case]  # 3.12.1 ends skipped cases that it never began
        else:
            notes.append((what, entry["text"]))
    return said, pending


def run_module(module: str, options: argparse.Namespace) -> Report:
    """Run one module to its end, however many processes that takes."""
    excused = excuses(options.engine, options.scope, options.impl)
    hung: dict[str, str] = {}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="harken-compat-") as place:
        journal = Path(place, f"{module}.journal")
        while True:
            said, _ = read(journal)
            before = len(said)
            trouble = attempt(module, options, journal, {"done": [*said], "hasty": [*excused]})
            said, pending = read(journal)
            hung.update((case, f"hung or died:\n{trouble}") for case in pending if case not in hung)
            if not trouble:
                break
            if len(said) == before:
                hung.setdefault(f"test.{module}", trouble)
                break
    report = judge(said, hung, excused)
    report.seconds = round(time.monotonic() - start, 2)
    return report


def judge(said: dict[str, list[tuple[str, str]]], hung: dict[str, str], excused: dict[str, str]) -> Report:
    """Sort the cases."""
    report = Report()
    for case in {**said, **hung}:
        complaints = [text for what, text in said.get(case, []) if what == "failed"]
        complaints += [hung[case]] if case in hung else []
        skips = [text for what, text in said.get(case, []) if what == "skipped"]
        report.run += 1
        if complaints and case in excused:
            report.excused[case] = excused[case]
        elif complaints:
            report.failed[case] = "\n".join(complaints)
        elif skips:
            report.skipped[case] = skips[0]
        else:
            report.passed += 1
            if not excused.get(case, "A race. ").startswith("A race. "):
                report.stale.append(case)
    return report


def show(reports: dict[str, Report], options: argparse.Namespace) -> None:
    """Print a table, then what went wrong."""
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"CPython {version}, socketserver = {options.impl}, engine = {options.engine} ({options.scope} servers)")
    print(f"{'module':<24}{'run':>6}{'passed':>8}{'skipped':>9}{'failed':>8}{'excused':>9}{'seconds':>9}")
    for module, report in reports.items():
        counts = (
            report.run,
            report.passed,
            len(report.skipped),
            len(report.failed) + len(report.stale),
            len(report.excused),
        )
        print("{:<24}{:>6}{:>8}{:>9}{:>8}{:>9}".format(module, *counts) + f"{report.seconds:>9.1f}")
    for report in reports.values():
        for case, reason in report.skipped.items():
            print(f"skipped {case}: {reason}")
        for case, text in report.failed.items():
            print(f"\nFAILED {case}\n{text}")
        for case in report.stale:
            print(f"\nSTALE {case} passes: take it out of excused.toml")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", default=[], help=f"of {', '.join(SUITES)}; default all")
    parser.add_argument("--engine", choices=ENGINES, default="default", help="where servers are moved to")
    parser.add_argument("--scope", choices=("threading", "every"), default="threading", help="which servers are moved")
    parser.add_argument("--impl", choices=("harken", "stdlib"), default="harken", help="stdlib proves this script")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report here")
    parser.add_argument(
        "--quick", action="store_true", help="leave out slow cases: those that CPython marks (walltime), and SLOW"
    )
    parser.add_argument("--seconds", type=float, default=CASE_SECONDS, help="that one case may take")
    options = parser.parse_args(arguments)
    for module in options.modules:
        if module not in SUITES:
            parser.error(f"no suite is called {module!r}; there are {', '.join(SUITES)}")
    options.modules = options.modules or [*SUITES]
    return options


def main() -> int:
    """Run the suites; return the exit status."""
    options = parse()
    try:
        import test.support  # noqa: F401
    except ImportError:
        print("this Python comes without its suites; on Debian install libpython3-testsuite", file=sys.stderr)
        return 2
    reports = {module: run_module(module, options) for module in options.modules}
    show(reports, options)
    if options.json:
        head: dict[str, Any] = {"python": sys.version.split()[0], "impl": options.impl, "engine": options.engine}
        modules = {module: asdict(report) for module, report in reports.items()}
        options.json.write_text(json.dumps({**head, "scope": options.scope, "modules": modules}, indent=2))
    return int(any(report.failed or report.stale for report in reports.values()))


if __name__ == "__main__":
    sys.exit(main())
