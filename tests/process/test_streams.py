"""Standard streams that are closed, or that cannot be written: they cost output, and not the service."""

import os
import signal
import socket
from pathlib import Path

import pytest
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

BUFFERED = {"PYTHONUNBUFFERED": ""}


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


@pytest.fixture
def printing(target):
    """Let the handler print, into a buffer that is written later."""
    code = target.read_text()
    target.write_text(code.replace("    def handle(self):\n", "    def handle(self):\n        print('handled')\n"))
    return target


@pytest.fixture
def full():
    """A stdout on a disk that is full, for a process whose output is buffered."""
    with open("/dev/full", "wb") as stream:
        yield {"stdout": stream, "env": BUFFERED}


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


@pytest.mark.usefixtures("printing")
def test_a_reload_that_cannot_write_its_output_begins_anew(service, full):
    """A handler has printed, the disk is full: the output is lost, one line says so, and who comes is served."""
    running = service("--workers", "0", **full)
    running.ask()
    os.kill(running.pid, signal.SIGHUP)
    running.wait_log("listening: address", 2)
    assert running.ask() == ("one", running.pid)
    assert running.said("harken: cannot write to stdout: No space left on device; output is lost")
    os.kill(running.pid, signal.SIGTERM)
    assert running.end()[0] == 0


@pytest.mark.usefixtures("printing")
@pytest.mark.parametrize("workers", ["0", "1"])
def test_output_that_cannot_be_written_is_no_failed_end(service, full, workers):
    """The status is that of the drain, and there is one line for it, no traceback."""
    running = service("--workers", workers, **full)
    running.ask()
    os.kill(running.pid, signal.SIGTERM)
    status, log = running.end()
    assert status == 0
    assert log.count("cannot write to stdout: No space left on device") == 1
    assert "Traceback" not in log
    assert "Exception ignored" not in log


@pytest.mark.usefixtures("printing")
def test_a_reader_of_stdout_that_has_gone_is_no_failed_end(service):
    """As of a full disk."""
    reader, writer = os.pipe()
    running = service("--workers", "0", stdout=writer, env=BUFFERED)
    os.close(writer)
    os.close(reader)
    running.ask()
    os.kill(running.pid, signal.SIGTERM)
    status, log = running.end()
    assert status == 0
    assert log.count("cannot write to stdout: Broken pipe") == 1


def test_a_command_that_cannot_write_its_output_has_failed(run_program, full):
    """With status 1, not with that of the interpreter."""
    process = run_program("-m", "harken", "--help", **full)
    assert process.wait(PATIENCE) == 1
    assert "Exception ignored" not in process.stderr.read()


def test_the_output_of_an_old_program_is_its_own_affair(run_program, tmp_path, full):
    """``harken run`` ends with the status that ``python`` ends with."""
    program = tmp_path / "old.py"
    program.write_text("print('hello')")
    ours, plain = run_program("-m", "harken", "run", program, **full), run_program(program, **full)
    assert ours.wait(PATIENCE) == plain.wait(PATIENCE) != 0
    assert ours.stderr.read() == plain.stderr.read()
