"""CPython's own suites pass with harken in the place of `socketserver`, on every engine that a case does not forbid."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
RUNNER = HERE / "run_cpython.py"
MODULES = (
    "test_socketserver",
    "test_httpservers",
    "test_xmlrpc",
    "test_docxmlrpc",
    "test_wsgiref",
    "test_urllib2_localnet",
    "test_logging",
)
ENGINES = ("default", "thread", "pool", "inline", "fork", "green", "asyncio")

# As the classes say; every server moved as `harken run --engine` does; ThreadingMixIn servers moved by HARKEN_ENGINE.
# Two engines leave test_logging out, where nearly all of its cases are excused: fork, since they look at what the
# handler left in memory, and asyncio, which logs lines of its own.
RUNS = [
    *[("default", "threading", module) for module in MODULES],
    *[
        (engine, "every", module)
        for engine in ENGINES[1:]
        for module in MODULES
        if (engine, module) not in (("fork", "test_logging"), ("asyncio", "test_logging"))
    ],
    *[(engine, "threading", "test_socketserver") for engine in ENGINES[2:]],
]

FULL = os.environ.get("HARKEN_SOAK") == "full"  # with the cases that take seconds to wait for nobody

pytestmark = pytest.mark.timeout(500)


def has_suites() -> bool:
    """Tell whether this Python was installed with its tests."""
    try:
        return importlib.util.find_spec("test.test_socketserver") is not None
    except ModuleNotFoundError:
        return False


def run(place: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Start the runner; return its report and what it printed."""
    if not has_suites():
        pytest.skip("CPython's suites are missing; on Debian install libpython3-testsuite")
    out = place / "report.json"
    done = subprocess.run(
        [sys.executable, str(RUNNER), "--json", str(out), *arguments],
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert out.exists(), done.stdout + done.stderr
    return json.loads(out.read_text())["modules"], done.stdout


@pytest.mark.parametrize("engine,scope,module", RUNS)
def test_suite_passes(engine: str, scope: str, module: str, tmp_path: Path) -> None:
    """No case fails that is not excused by name, and no excused case passes."""
    quick = [] if FULL and engine == "default" else ["--quick"]
    modules, printed = run(tmp_path, "--engine", engine, "--scope", scope, *quick, module)
    report = modules[module]
    assert report["passed"] > 0, printed
    assert not report["failed"], printed
    assert not report["stale"], printed


def test_runner_is_true_to_stdlib(tmp_path: Path) -> None:
    """Without harken the runner finds no failure: what it finds with harken is harken's."""
    modules, printed = run(tmp_path, "--impl", "stdlib", "test_socketserver", "test_wsgiref")
    assert all(not report["failed"] and report["passed"] > 20 for report in modules.values()), printed


def test_runner_survives_a_case_that_hangs(tmp_path: Path) -> None:
    """With a clock too short for every case the runner still ends, and names cases as failed."""
    modules, printed = run(tmp_path, "--impl", "stdlib", "--seconds", "0.7", "test_logging")
    result = modules["test_logging"]
    assert any("test_listen_" in name for name in result["failed"]), printed
    assert result["passed"] < result["run"], printed


def test_excuses_say_what_and_why() -> None:
    """Every excuse names a full case, engines that exist, and a reason."""
    table = tomllib.loads((HERE / "excused.toml").read_text())
    for entry in table.get("excused", []):
        assert all(case.startswith("test.test_") for case in entry["cases"])
        assert entry["engines"]
        assert set(entry["engines"]) <= set(ENGINES)
        assert len(entry["reason"]) > 20
