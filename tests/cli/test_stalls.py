"""``harken run`` and ``serve`` say at their end which places kept the other connections waiting."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import Any

import pytest

SECONDS = 20
HANDLER = """
import socketserver, time
class Slow(socketserver.BaseRequestHandler):
    def handle(self):
        time.sleep(0.3)
        self.request.sendall(b"x")
"""
PROGRAM = (
    HANDLER
    + """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Slow) as server:
    print(server.server_address[1], flush=True)
    server.serve_forever()
"""
)


def ask(port: int) -> None:
    """Be served once."""
    with socket.create_connection(("127.0.0.1", port), SECONDS) as client:
        assert client.recv(1) == b"x"


def end(process: Any) -> list[str]:
    """End the process and return what it wrote to stderr."""
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=SECONDS)[1].splitlines()  # type: ignore[no-any-return]


def said(lines: list[str], path: Path) -> bool:
    """Tell whether the report names the sleeping line."""
    return any(line.startswith(f"  {path}:5 handle: 2 times, ") for line in lines)


def run(run_program: Any, path: Path, *words: str) -> list[str]:
    """Run the program by ``harken run``, be served twice, and return what it wrote to stderr."""
    process = run_program("-m", "harken", "run", *words, path)
    port = int(process.stdout.readline())
    ask(port)
    ask(port)
    return end(process)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program with a slow handler."""
    path = tmp_path / "slow.py"
    path.write_text(PROGRAM)
    return path


def test_run_says_so(run_program: Any, program: Path) -> None:
    """On the green engine an unchanged program's slow place is named, and what to do, without being asked."""
    lines = run(run_program, program, "--engine", "green")
    assert said(lines, program), lines
    assert "--engine thread" in lines[-1]


@pytest.mark.parametrize("words", [["--engine", "green", "--stall-after", "none"], ["--engine", "thread"]])
def test_run_is_silent_otherwise(run_program: Any, program: Path, words: list[str]) -> None:
    """Not when it was switched off, and not where nobody had to wait."""
    assert run(run_program, program, *words) == []


def test_serve_says_so(run_program: Any, tmp_path: Path) -> None:
    """The same from ``serve``, whose log has told each as it happened."""
    path = tmp_path / "slow_app.py"
    path.write_text(HANDLER)
    process = run_program("-m", "harken", "serve", f"{path}:Slow", "--engine", "green", "--bind", "tcp://127.0.0.1:0")
    for line in process.stderr:
        if "listening on" in line:
            port = int(line.split(" (")[0].rpartition(":")[2])
            break
    ask(port)
    ask(port)
    lines = end(process)
    assert said(lines, path), lines
    assert sum(f"stalled: {path}:5 in handle kept" in line for line in lines) == 2
