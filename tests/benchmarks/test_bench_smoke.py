"""The benchmarks build, measure and report; how fast anything is, is not asked here."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "benchmarks"
RUN = HOME / "run.py"
LOAD = ROOT / "build" / "bench" / "load"
RIVALS = tomllib.loads((HOME / "rivals.toml").read_text())
SCENARIOS = tomllib.loads((HOME / "scenarios.toml").read_text())
# The kinds of work, each by the scenario that starts quickest.
WORKS = {"echo": "echo-1", "lines": "lines-100", "churn": "churn-50", "udp": "udp-32", "tls": "tls-echo"}
FULL = os.environ.get("HARKEN_SOAK") == "full"

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: apt-get install gcc"),
    pytest.mark.skipif(shutil.which("make") is None, reason="no make: apt-get install make"),
]


def run_benchmarks(*words):
    """Run benchmarks/run.py and return the finished process."""
    command = [sys.executable, RUN, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=58, check=False)


def measure(output, scenarios, rivals):
    """Measure for a moment and return the result file's content; every answer must have been right."""
    result = run_benchmarks(
        "--quick", "--scenario", ",".join(scenarios), "--rivals", ",".join(rivals), "--output", output
    )
    assert result.returncode == 0, result.stderr
    content = json.loads(output.read_text())
    assert content["left_out"] == {}
    for scenario in scenarios:
        measured = content["scenarios"][scenario]["rivals"]
        assert measured, scenario
        for rival, figures in measured.items():
            assert (figures["errors"], figures["unserved"]) == ([0], [0]), (scenario, rival)
            assert figures["rate"] > [0] or content["scenarios"][scenario]["held"], (scenario, rival)
    return content


def run_load(mode, address, *words):
    """Run the load generator and return its report."""
    command = [LOAD, mode, address, *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return json.loads(result.stdout)


@pytest.mark.parametrize("rival", RIVALS)
def test_every_rival_does_its_works(rival, tmp_path):
    """Each declared server starts and answers rightly: in the first and last kind of its works, or in full in all."""
    for tool in RIVALS[rival].get("tools", []):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}: apt-get install {'golang-go' if tool == 'go' else tool}")
    for module in RIVALS[rival].get("modules", []):
        pytest.importorskip(module)
    works = RIVALS[rival]["works"]
    works = works if FULL else sorted({works[0], works[-1]})
    content = measure(tmp_path / "result.json", [WORKS[work] for work in works], [rival])
    assert all(rival in scenario["rivals"] for scenario in content["scenarios"].values())


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_scenario_runs(scenario, tmp_path):
    """Each scenario gives a result, and its table, for the floor, or the first that takes part where there is none."""
    first = SCENARIOS[scenario]["rivals"][0]
    content = measure(tmp_path / "result.json", [scenario], [first])
    assert list(content["scenarios"][scenario]["rivals"]) == [first]
    assert f"| {first} |" in (tmp_path / "result.md").read_text()


def test_names_the_nearest_rival():
    """A misspelt rival is one clear line and status 2."""
    result = run_benchmarks("--rivals", "stdlib_thread")
    assert result.returncode == 2
    assert result.stderr.strip() == "run.py: no rival 'stdlib_thread': did you mean stdlib_threads?"


def test_targets_are_judged(tmp_path):
    """A result says of each target what was found; figures measured before stay when a scenario is added."""
    output = tmp_path / "result.json"
    rivals = "--rivals", "floor,harken_green,stdlib_inline", "--output", output, "--seconds", "0.1", "--rounds", "1"
    for scenario in ("echo-1", "udp-32"):
        result = run_benchmarks("--update", "--scenario", scenario, *rivals)
        assert result.returncode == 0, result.stderr
    assert list(json.loads(output.read_text())["scenarios"]) == ["echo-1", "udp-32"]
    table = output.with_suffix(".md").read_text()
    assert "* `harken_green rate >= 0.97 floor`: " in table
    assert "* `harken_green >= 1.6 stdlib_inline`: " in table
    assert "uvloop" not in table  # not measured, not judged


def test_servers_can_stay_alive_over_the_rounds(tmp_path):
    """With --alive one server of each kind meets all windows; what a connection keeps is not asked that way."""
    output = tmp_path / "result.json"
    words = "--alive", "--scenario", "echo-1", "--rivals", "floor,harken_green", "--output", output
    result = run_benchmarks(*words, "--rounds", "3", "--seconds", "0.05")
    assert result.returncode == 0, result.stderr
    rivals = json.loads(output.read_text())["scenarios"]["echo-1"]["rivals"]
    assert {name: len(figures["rate"]) for name, figures in rivals.items()} == {"floor": 3, "harken_green": 3}
    assert not any(any(figures["errors"]) for figures in rivals.values())
    refused = run_benchmarks("--alive", "--scenario", "idle-10k")
    assert refused.returncode == 2
    assert refused.stderr.startswith("run.py: --alive, and idle-10k: ")


def test_counts_a_wrong_answer_as_an_error():
    """A server that answers with other bytes than were sent yields errors and no messages."""
    subprocess.run(["make", "-s", "-C", HOME, "load"], check=True, timeout=50)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_in_capitals():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(connection.recv(1000).upper())

        thread = threading.Thread(target=answer_in_capitals)
        thread.start()
        port = listener.getsockname()[1]
        report = run_load("echo", f"tcp://127.0.0.1:{port}", "--warmup", "0", "--seconds", "0.2")
        thread.join(10)
    assert (report["errors"], report["messages"]) == (1, 0)


def test_the_page_shows_the_current_result():
    """docs/explanation/performance.md has the table that benchmarks/report.py makes of results/current.json."""
    command = [sys.executable, "-c", "import report; page = report.PAGE.read_text(); assert report.write(page) == page"]
    subprocess.run(command, cwd=HOME, check=True, timeout=50)


def test_every_rival_file_is_declared():
    """A server file that rivals.toml does not name would never be measured."""
    declared = (HOME / "rivals.toml").read_text()
    files = [path.name for path in (HOME / "rivals").glob("[!_]*.py")]
    assert files
    assert [name for name in files if name not in declared] == []


def test_every_rival_takes_part_somewhere():
    """A rival that no scenario names would never be measured by default."""
    taking_part = {name for scenario in SCENARIOS.values() for name in scenario["rivals"]}
    assert set(RIVALS) - taking_part == {"stdlib_threads_daemon"}
    assert taking_part <= set(RIVALS)


def test_import_time_compares_two_modules():
    """The import comparison prints both medians and their ratio."""
    command = [sys.executable, RUN.with_name("importtime.py"), "--times", "1", "--subject", "http.server"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    report = json.loads(result.stdout)
    assert report["http.server"] > 0
    assert report["socketserver"] > 0
    assert report["ratio"] == pytest.approx(report["http.server"] / report["socketserver"], abs=0.01)
