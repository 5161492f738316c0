"""A service that is reloaded, upgraded, made larger and smaller, and hurt, while clients come and stay."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Self

import pytest

from .conftest import FULL, PATIENCE

SHORT, LONG = (8, 60) if FULL else (3, 10)
ANSWERS = 3000 if FULL else 150  # between two of the operator's acts
SPREAD = 1000 if FULL else 200

HANDLER = """
import os, harken
class Tell(harken.StreamRequestHandler):
    def handle(self):
        self.wfile.write(b"%d\\n" % os.getpid())
        for line in self.rfile:
            self.wfile.write(line)
"""


class Service:
    """A running ``harken serve``; the log tells what it does, and the PID file who it is now."""

    def __init__(self, run_program: Any, folder: Path, *words: str) -> None:
        (folder / "telling.py").write_text(HANDLER)
        self.target, self._pidfile, self._log = folder / "telling.py", folder / "pid", folder / "log"
        options = ("--pidfile", str(self._pidfile), "--log-file", str(self._log), "--control", "none", *words)
        self.process = run_program(
            "-m", "harken", "serve", "telling.py:Tell", "--bind", "tcp://127.0.0.1:0", *options, cwd=folder
        )
        self.port = int(self.wait(r"listening: address \S+:(\d+)")[0])

    @property
    def pid(self) -> int:
        return int(self._pidfile.read_text())

    def said(self, pattern: str) -> list[str]:
        return re.findall(pattern, self._log.read_text()) if self._log.exists() else []

    def wait(self, pattern: str, count: int = 1) -> list[str]:
        """Wait until the log has ``count`` matches; return them."""
        wait_until(lambda: len(self.said(pattern)) >= count, f"{count} times {pattern}")
        return self.said(pattern)

    def connect(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        client.settimeout(PATIENCE)
        return client


def wait_until(condition: Any, what: str) -> None:
    """Wait for what nobody announces."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"not in time: {what}"
        time.sleep(0.01)


class Crowd:
    """Clients of both kinds, and what became of each thing that they tried."""

    def __init__(self, service: Service) -> None:
        self.counts: Counter[str] = Counter()
        self.hurt: list[tuple[str, str, int]] = []
        self._service = service
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._live, args=("short", 1)) for _ in range(SHORT)]
        self._threads += [threading.Thread(target=self._live, args=("long", 10**9)) for _ in range(LONG)]

    def _live(self, kind: str, exchanges: int) -> None:
        while not self._over.is_set():
            pid = 0
            try:
                with self._service.connect() as client, client.makefile("rb") as answers:
                    pid = int(answers.readline() or 0)
                    self._exchange(kind, client, answers, exchanges)
            except (OSError, ValueError) as error:
                self.hurt.append((kind, type(error).__name__, pid))

    def _exchange(self, kind: str, client: socket.socket, answers: Any, most: int) -> None:
        for number in range(most):
            client.sendall(b"%d\n" % number)
            answer = answers.readline()
            if not answer and kind == "long":
                self.counts["long, told to leave"] += 1  # a drain: it comes back
                return
            if answer != b"%d\n" % number:
                raise ValueError(answer)
            self.counts[kind] += 1
            if self._over.is_set() or (kind == "long" and self._over.wait(0.02)):
                return

    def wait(self) -> None:
        """Wait until both kinds have had answers since."""
        before = Counter(self.counts)
        wait_until(
            lambda: all(self.counts[kind] - before[kind] >= ANSWERS for kind in ("short", "long")), str(self.counts)
        )

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE)


@pytest.mark.parametrize("engine", ["thread", "green"])
def test_nothing_is_refused_or_reset_whatever_the_operator_does(engine: str, run_program: Any, tmp_path: Path) -> None:
    """Three reloads, two upgrades, a worker more and less, a new version that is broken, a worker killed."""
    service = Service(run_program, tmp_path, "--engine", engine, "--workers", "3", "--drain-timeout", "20")
    first = service.pid
    good = service.target.read_text()
    try:
        with Crowd(service) as crowd:
            crowd.wait()
            for number in range(1, 4):
                os.kill(service.pid, signal.SIGHUP)
                service.wait(r"reloaded:", number)
                crowd.wait()
            for _ in range(2):
                before = service.pid
                os.kill(before, signal.SIGUSR2)
                wait_until(lambda before=before: service.pid != before, "a successor")
                crowd.wait()
            for number in (signal.SIGTTIN, signal.SIGTTOU):
                os.kill(service.pid, number)
                crowd.wait()
            service.target.write_text("def broken(:\n")
            for count, number in enumerate((signal.SIGHUP, signal.SIGUSR2), 1):
                before = service.pid
                os.kill(before, number)
                service.wait(r"upgrade failed", count)
                crowd.wait()
                assert service.pid == before
            service.target.write_text(good)
            assert crowd.hurt == []
            with service.connect() as client:
                victim = int(client.makefile().readline())
            os.kill(victim, signal.SIGKILL)
            service.wait(rf"worker exited: pid {victim}")
            crowd.wait()
        assert service.pid != first
        # Whom the killed worker had; 0 for those whom it had taken but not yet greeted.
        assert {pid for _, _, pid in crowd.hurt} <= {victim, 0}
        print(engine, dict(crowd.counts), "refused 0, reset 0; hurt by the kill:", len(crowd.hurt))
    finally:
        end(service)


def end(service: Service) -> None:
    """Let the service, whoever it is now, go."""
    pid = service.pid
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not alive(pid), "its end")


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("engine", ["thread", "green"])
def test_long_connections_spread_evenly(engine: str, run_program: Any, tmp_path: Path) -> None:
    """Over 4 workers: none has twice its share, or less than half. Then the supervisor is killed, and all go."""
    words = ("--engine", engine, "--workers", "4", "--drain-timeout", "1")
    service = Service(run_program, tmp_path, *words)
    workers = [int(pid) for pid in service.wait(r"worker started: pid (\d+)", 4)]
    with contextlib.ExitStack() as clients:
        served = Counter[int]()
        for _ in range(SPREAD):
            client = clients.enter_context(service.connect())
            served[int(client.makefile().readline())] += 1
        shares = sorted(served[pid] for pid in workers)
        print(engine, "spread of", SPREAD, "over 4 workers:", shares)
        assert sum(shares) == SPREAD
        assert shares[0] >= SPREAD / 8
        assert shares[-1] <= SPREAD / 2
        service.process.kill()
        wait_until(lambda: not any(map(alive, workers)), "the workers' end")
        gone = time.monotonic()
        with contextlib.ExitStack() as doors:
            wait_until(lambda: bound(doors, service.port), "a free port")
        print(engine, f"port free {time.monotonic() - gone:.3f} s after the last worker")


def bound(doors: contextlib.ExitStack, port: int) -> bool:
    """Try to have the port."""
    try:
        doors.enter_context(socket.create_server(("127.0.0.1", port)))
    except OSError:
        return False
    return True
