"""Standard streams that are closed: they cost output, and not the service."""

import os
import signal
import socket
from pathlib import Path

from waiting import wait_until

PATIENCE = 20.0

OWN_PROGRAM = """
import harken
class Word(harken.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"word")
raise SystemExit(harken.serve(Word, "tcp://127.0.0.1:{port}", workers=0, control=None))
"""

CHILD = """
import os, subprocess, harken
class Tell(harken.BaseRequestHandler):
    def handle(self):
        with subprocess.Popen(["sleep", "60"]) as child:
            places = [os.readlink(f"/proc/{child.pid}/fd/{fd}") for fd in (0, 1, 2)]
            child.kill()
        self.request.sendall(" ".join(places).encode())
"""


def close(*fds):
    """Return what closes descriptors in a process that starts."""

    def preexec():
        for fd in fds:
            os.close(fd)

    return preexec


def word(port):
    """Return what the service says; None while nobody listens."""
    try:
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
            return client.recv(100) or None
    except ConnectionRefusedError:
        return None


def test_closed_descriptors_lead_nowhere(run_program, target, free_port):
    """Neither a socket nor the log gets their numbers, and so no child of a handler writes there."""
    target.write_text(CHILD)
    words = ("--bind", f"tcp://127.0.0.1:{free_port}", "--control", "none", "--workers", "0", "--log-file", "log")
    run_program("-m", "harken", "serve", f"{target}:Tell", *words, cwd=target.parent, preexec_fn=close(0, 1, 2))
    wait_until(lambda: word(free_port) is not None)
    assert word(free_port) == b"/dev/null /dev/null /dev/null"
    assert "listening" in target.parent.joinpath("log").read_text()


def test_a_reload_without_stdout_begins_anew(service):
    """HUP to a process alone that was started with stdout closed."""
    running = service("--workers", "0", preexec_fn=close(1))
    os.kill(running.pid, signal.SIGHUP)
    running.wait_log("listening: address", 2)
    assert running.ask() == ("one", running.pid)
    os.kill(running.pid, signal.SIGTERM)
    assert running.end()[0] == 0


def test_a_program_of_ones_own_without_stdout_begins_anew(run_program, tmp_path, free_port):
    """There it is the program's affair what has the number, and the stream is none."""
    program = tmp_path / "own.py"
    program.write_text(OWN_PROGRAM.format(port=free_port))
    process = run_program(program, preexec_fn=close(1))
    wait_until(lambda: word(free_port) is not None)
    os.kill(process.pid, signal.SIGHUP)
    wait_until(lambda: "HARKEN_HANDOFF" in Path(f"/proc/{process.pid}/environ").read_text())
    wait_until(lambda: word(free_port) is not None)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    assert "Traceback" not in process.stderr.read()
