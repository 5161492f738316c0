"""What every test is held to: it leaves no descriptor, thread or child behind, and under CI it does not skip.

Also fixtures that more than one room needs: a free port, and a program in a process of its own.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

SETTLE_SECONDS = 10.0  # a thread or child that is told to end has this long to be gone: 250 threads, on a busy machine
PROMPT_SECONDS = 0.1  # and nearly all need less; only what is left then is worth a collection
ROOT = Path(__file__).resolve().parent.parent

# Reasons for which a test may skip even where nothing should: what no machine of that kind can have.
SKIPS_ALLOWED = (
    r"Python 3\.\d+ (or newer|has no)",  # a name or case of another version of Python
    r"only (on|with) Python",
    r"needs a kernel",
)

_skipped: list[tuple[str, str]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--skips``, which CI sets by its environment."""
    default = "fail" if os.environ.get("CI") == "true" else "allow"
    parser.addoption(
        "--skips",
        choices=("allow", "fail"),
        default=default,
        help="whether a skipped test fails the run (default: fail when CI=true)",
    )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note each skip; an expected failure is none."""
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped.append((report.nodeid, _reason(report.longrepr)))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note each module that skipped as a whole."""
    if report.skipped:
        _skipped.append((report.nodeid, _reason(report.longrepr)))


def _reason(longrepr: object) -> str:
    reason = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return str(reason).removeprefix("Skipped: ")


def _skips_that_fail(config: pytest.Config) -> list[tuple[str, str]]:
    if config.getoption("--skips") == "allow":
        return []
    return [(test, reason) for test, reason in _skipped if not any(re.search(p, reason) for p in SKIPS_ALLOWED)]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run whose only fault is that it skipped."""
    if exitstatus == pytest.ExitCode.OK and _skips_that_fail(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which skips made the run fail."""
    wrong = _skips_that_fail(config)
    if wrong:
        terminalreporter.section("skips that fail this run: install what is missing, or allow the reason in conftest")
        for test, reason in wrong:
            terminalreporter.line(f"{test}: {reason}")


def pytest_collection_finish() -> None:
    """Take what the tests are made of out of the collector's sight: many tests collect, and many fork."""
    gc.collect()
    gc.freeze()


# ── leaks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def descriptors() -> dict[int, str]:
    """Return what is open in this process: number and what it leads to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor that lists the folder
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def children() -> dict[int, str]:
    """Return this process's children, dead but unreaped ones too: pid and name."""
    found = {}
    own = str(os.getpid())
    for name in _maybe_children():
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{name}/stat").read_text()
            command, _, rest = stat.partition(" (")[2].rpartition(") ")
            state, parent = rest.split()[:2]
            if parent == own:
                found[int(name)] = f"{command} ({'zombie' if state == 'Z' else state})"
    return found


def _maybe_children() -> list[str]:
    """Return the pids among which all children are: those that the kernel lists by thread, or else all there are.

    Looking at every process of the machine, three times for each test, would be a tenth of the run.
    """
    if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):  # a kernel without CONFIG_PROC_CHILDREN
        return list(filter(str.isdigit, os.listdir("/proc")))
    while True:
        tasks = [Path(f"/proc/self/task/{task}/children") for task in os.listdir("/proc/self/task")]
        try:
            return " ".join(task.read_text() for task in tasks).split()
        except (FileNotFoundError, ProcessLookupError):
            pass  # a thread has ended meanwhile, and another that was read already may have its children now


with contextlib.suppress(ImportError):  # libuv makes a pipe at its first loop and keeps it
    __import__("uvloop").new_event_loop().close()

# Made once for the life of the process by the standard library; no test can close them.
LASTING = re.compile(r"/dev/u?random|multiprocessing\.(resource_tracker|forkserver)|\.pyc?$")


def _leaks(fds: dict[int, str], threads: set[threading.Thread], pids: dict[int, str]) -> list[str]:
    new_fds = [f"fd {fd} -> {to}" for fd, to in descriptors().items() if fds.get(fd) != to and not LASTING.search(to)]
    new_threads = [f"thread {t.name}" for t in threading.enumerate() if t not in threads]
    new_pids = [f"child {pid} {what}" for pid, what in children().items() if pid not in pids]
    return new_fds + new_threads + new_pids


PASSED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note whether the test's own part passed: one that failed half-way has not come to its closing lines."""
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


Before = tuple[dict[int, str], set[threading.Thread], dict[int, str]]


def _end_children(before: dict[int, str]) -> None:
    """End children that a test left, so that they harm no other test and do not outlive the run."""
    for pid in children().keys() - before.keys():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that passed and left a descriptor, thread or child, after giving each a bounded time to go."""
    before = descriptors(), set(threading.enumerate()), children()
    yield
    try:
        _judge(request, before)
    finally:
        _end_children(before[2])


def _settle(before: Before, deadline: float) -> list[str]:
    """Wait until nothing is left, and return what still is."""
    while (leaks := _leaks(*before)) and time.monotonic() < deadline:
        time.sleep(0.002)
    return leaks


def _judge(request: pytest.FixtureRequest, before: Before) -> None:
    if request.node.get_closest_marker("no_leak_check") or not request.node.stash.get(PASSED, False):
        return
    now = time.monotonic()
    leaks = _settle(before, now + PROMPT_SECONDS)
    if leaks:
        gc.collect()  # a caught exception's traceback keeps a closed-over socket in a cycle
        leaks = _settle(before, now + SETTLE_SECONDS)
    if leaks:
        pytest.fail("left behind: " + "; ".join(leaks), pytrace=False)


# ── fixtures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def free_port() -> int:
    """Return a TCP port that nobody had a moment ago; prefer port 0 where one can.

    It is below those that the kernel gives to clients and for port 0 (32768 on, net.ipv4.ip_local_port_range): tests
    beside this one open connections all the time.
    """
    for port in random.sample(range(20000, 32768), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("no port of a hundred is free")


RunProgram = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def run_program() -> Iterator[RunProgram]:
    """Return a function that starts ``python ARGS…`` in a process of its own, which ends with the test.

    The process finds this checkout's harken, writes text to pipes, and leads a session of its own,
    so that what it starts ends too. Keywords go to :class:`subprocess.Popen`; ``env`` adds to the environment.
    """
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str | os.PathLike[str], env: dict[str, str] | None = None, **options: object) -> object:
        paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        inherited = {name: value for name, value in os.environ.items() if name != "HARKEN_SOAK"}  # unknown to harken
        environment = {**inherited, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **(env or {})}
        settings = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "start_new_session": True,
            **options,
        }
        process = subprocess.Popen([sys.executable, *map(os.fspath, arguments)], env=environment, **settings)
        started.append(process)
        return process

    yield start
    for process in started:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=10)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()
