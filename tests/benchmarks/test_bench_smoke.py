"""The benchmark kit builds, measures and reports; how fast anything is, is not asked here."""

import json
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "benchmarks" / "run.py"
LOAD = ROOT / "build" / "bench" / "load"

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: apt-get install gcc")


def run_benchmarks(*words):
    """Run benchmarks/run.py and return the finished process."""
    command = [sys.executable, RUN, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


def run_load(mode, address, *words):
    """Run the load generator and return its report."""
    command = [LOAD, mode, address, *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return json.loads(result.stdout)


@needs_compiler
def test_measures_stdlib_and_the_floor(tmp_path):
    """One short round of each leaves figures in the JSON, a row in the table, and no error."""
    output = tmp_path / "result.json"
    rivals = ["floor", "stdlib_threads"]
    result = run_benchmarks("--quick", "--only", *rivals, "--scenario", "echo-1", "churn-50", "--output", output)
    assert result.returncode == 0, result.stderr
    content = json.loads(output.read_text())
    for scenario in content["scenarios"]:
        assert [each["rival"] for each in scenario["rounds"]] == rivals
        for each in scenario["rounds"]:
            assert each["messages"] > 0
            assert each["rate_per_cpu"] > 0
            assert each["errors"] == 0, each
    assert content["machine"]["kernel"]
    assert "| stdlib_threads |" in result.stdout
    assert output.with_suffix(".md").read_text() in result.stdout


@needs_compiler
def test_counts_a_wrong_answer_as_an_error():
    """A server that answers with other bytes than were sent yields errors and no messages."""
    assert run_benchmarks("--list").returncode == 0  # builds the load generator
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


@needs_compiler
def test_names_the_nearest_rival():
    """A misspelt rival is one clear line and status 2."""
    result = run_benchmarks("--only", "stdlib_thread")
    assert result.returncode == 2
    assert result.stderr.strip() == "run.py: no rival 'stdlib_thread': did you mean stdlib_threads?"


def test_every_rival_file_is_declared():
    """A server file that rivals.toml does not name would never be measured."""
    declared = (ROOT / "benchmarks" / "rivals.toml").read_text()
    files = [path.name for path in (ROOT / "benchmarks" / "rivals").glob("[!_]*.py")]
    assert files
    assert [name for name in files if name not in declared] == []


def test_import_time_compares_two_modules():
    """The import comparison prints both medians and their ratio."""
    command = [sys.executable, RUN.with_name("importtime.py"), "--times", "1", "--subject", "http.server"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    report = json.loads(result.stdout)
    assert report["http.server"] > 0
    assert report["socketserver"] > 0
    assert report["ratio"] == pytest.approx(report["http.server"] / report["socketserver"], abs=0.01)
