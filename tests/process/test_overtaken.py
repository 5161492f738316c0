"""Signals that overtake one another: a second one while the first is still being obeyed, or when all is over."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import time

import pytest
from slow_code import SLOW, is_gone
from waiting import wait_until

PATIENCE = 20.0


@pytest.fixture
def napping(target):
    """A handler that does not heed the end of its input for a while."""
    target.write_text(
        target.read_text().replace(
            'if data == b"die', 'if data == b"nap\\n": time.sleep(1)\n            if data == b"die'
        )
    )
    return target


def test_a_reload_overtakes_one_that_fails(service, target, tmp_path):
    """The first HUP's code would fail while the second's starts: the newest code serves, alone."""
    running = service("--workers", "2")
    old = running.workers(2)
    good = target.read_text()
    target.write_text(SLOW + "raise RuntimeError('broken')\n")
    os.kill(running.pid, signal.SIGHUP)
    wait_until((tmp_path / "loading").exists)
    target.write_text(good.replace('"one"', '"two"'))
    os.kill(running.pid, signal.SIGHUP)
    running.wait_log(f"worker exited: pid {(tmp_path / 'loading').read_text()}")  # before it can fail
    (tmp_path / "go").touch()
    running.wait_log("reloaded")
    for pid in old:
        running.wait_log(f"worker exited: pid {pid}, status 0")
    assert {running.ask()[0] for _ in range(20)} == {"two"}
    assert not running.said("upgrade failed")


def test_a_failed_reload_leaves_nobody_of_it(service, target, tmp_path):
    """What began for an earlier reload does not come late, when a later one has failed."""
    running = service("--workers", "1")
    (first,) = running.workers(1)
    good = target.read_text()
    target.write_text(SLOW + good.replace('"one"', '"two"'))
    os.kill(running.pid, signal.SIGHUP)
    wait_until((tmp_path / "loading").exists)
    target.write_text("def broken(:\n")
    os.kill(running.pid, signal.SIGHUP)
    running.wait_log("upgrade failed")
    (tmp_path / "go").touch()
    running.wait_log("worker exited", 2)
    assert {running.ask() for _ in range(10)} == {("one", first)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_ends_a_reload_without_workers_ends_the_service(service, napping, tmp_path, number):
    """TERM or INT while HUP drains: no new program begins, and nothing is left."""
    words = ("--workers", "0", "--drain-timeout", "2", "--pidfile", str(tmp_path / "pid"))
    running = service(*words, bind=f"unix:{tmp_path / 'sock'}")
    with _unix(tmp_path / "sock") as client:
        client.makefile().readline()
        client.sendall(b"nap\n")
        os.kill(running.pid, signal.SIGHUP)
        running.wait_log("draining")
        os.kill(running.pid, number)
        assert running.end()[0] in (0, 3)
    assert not running.said("listening", 3)  # the command's own line, and the log's
    assert not (tmp_path / "sock").exists()
    assert not (tmp_path / "pid").exists()


def _unix(path):
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(PATIENCE)
    client.connect(str(path))
    return client


def test_a_reload_while_the_new_program_starts_is_heeded_by_it(service, target, tmp_path):
    """HUP, and HUP again when the same process is a program that has no handlers yet: it does not end by it."""
    running = service("--workers", "0")
    good = target.read_text()
    target.write_text(SLOW + good.replace('"one"', '"two"'))
    os.kill(running.pid, signal.SIGHUP)
    wait_until((tmp_path / "loading").exists)
    target.write_text(good.replace('"one"', '"three"'))
    os.kill(running.pid, signal.SIGHUP)
    (tmp_path / "go").touch()
    assert running.wait_answer("three") == running.pid


def test_commands_may_come_at_any_moment_of_a_reload(service):
    """A storm of HUPs on a process alone ends in a process that serves."""
    running = service("--workers", "0")
    for count in range(1, 4):
        while not running.said("drained", count):
            os.kill(running.pid, signal.SIGHUP)
            time.sleep(0.01)
    assert running.ask()[1] == running.pid


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_upgrade_that_hangs_keeps_no_signal_waiting(service, target, tmp_path, workers, number):
    """TERM and INT end the old program, and the new one that does not get ready with it."""
    running = service("--workers", workers, "--upgrade-timeout", "600")
    target.write_text(SLOW)
    os.kill(running.pid, signal.SIGUSR2)
    wait_until((tmp_path / "loading").exists)
    os.kill(running.pid, number)
    assert running.end()[0] == 0
    wait_until(lambda: is_gone(int((tmp_path / "loading").read_text())))


def test_a_worker_that_still_loads_leaves_with_its_supervisor(service, target, tmp_path):
    """kill -9 of the supervisor while a module waits for something in its import: nobody is left behind."""
    running = service("--workers", "1")
    target.write_text(SLOW)
    os.kill(running.pid, signal.SIGHUP)
    wait_until((tmp_path / "loading").exists)
    os.kill(running.pid, signal.SIGKILL)
    wait_until(lambda: is_gone(int((tmp_path / "loading").read_text())))


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2])
def test_signals_that_come_when_all_is_over_change_no_status(service, workers, number):
    """A second TERM, a second Ctrl-C, a late HUP: the status says how the service ended."""
    running = service("--workers", workers)
    running.workers(int(workers))
    os.kill(running.pid, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
    while running.process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.pid, number)
    status, log = running.end()
    assert status == 0
    assert "Traceback" not in log


TOLD_LATE = """
import os, signal
def told(directory, plain=os.chdir):
    plain(directory)
    os.kill(os.getpid(), signal.{name})
os.chdir = told  # the last step but one of those before the program begins anew
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGQUIT"])
def test_who_is_told_to_end_while_it_begins_anew_ends(service, target, tmp_path, name):
    """HUP to a process alone, and TERM when it has drained already."""
    target.write_text(TOLD_LATE.format(name=name) + target.read_text())
    running = service("--workers", "0", "--pidfile", str(tmp_path / "pid"))
    os.kill(running.pid, signal.SIGHUP)
    status, log = running.end()
    assert (status, log.count("info    listening")) == (0, 1), log
    assert not (tmp_path / "pid").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_who_is_told_to_end_before_it_serves_drains(service, target, workers):
    """TERM while a worker attaches to its listeners; it was "cannot serve a server that is draining"."""
    attaching = """
import os, signal, time, harken.serving as serving
plain = serving.Serving._check_fit
def told(self):
    os.kill({pid}, signal.SIGTERM)
    time.sleep(0.2)  # whoever obeys at once has the time to
    plain(self)
serving.Serving._check_fit = told
"""
    pid = "os.getpid()" if workers == "0" else "os.getppid()"
    target.write_text(attaching.format(pid=pid) + target.read_text())
    status, log = service("--workers", workers).end()
    assert status == 0, log
    assert "cannot" not in log


TOLD_IN_UPGRADE = """
import contextlib, os, pathlib, signal, subprocess, time
class Popen(subprocess.Popen):
    def __init__(self, *args, pass_fds, **options):
        super().__init__(*args, pass_fds=pass_fds, **options)
        pathlib.Path("successor").write_text(str(self.pid))
        os.kill(os.getpid(), signal.SIGTERM)
        end = time.monotonic() + 10
        with contextlib.suppress(OSError):
            while time.monotonic() < end:
                [os.fstat(fd) for fd in pass_fds[1:]]
                time.sleep(0.01)
subprocess.Popen = Popen
"""


def test_who_is_told_to_end_as_its_successor_starts_takes_it_along(service, target, tmp_path):
    """USR2 to a process alone, and TERM: the listeners are closed when the new program has just begun."""
    target.write_text(TOLD_IN_UPGRADE + target.read_text())
    running = service("--workers", "0")
    os.kill(running.pid, signal.SIGUSR2)
    status, log = running.end()
    wait_until(lambda: is_gone(int((tmp_path / "successor").read_text())))
    assert status == 0
    assert "Traceback" not in log
    assert "upgrade failed" not in log


def test_workers_that_the_terminal_told_too_end_as_asked(service):
    """Ctrl-C reaches every process of a terminal, and the supervisor tells its workers once more."""
    running = service("--workers", "4")
    running.workers(4)
    os.killpg(running.pid, signal.SIGINT)
    status, log = running.end()
    assert status == 0
    assert log.count("worker exited") == log.count(", status 0") == 4


INTERRUPTED = """
import os, signal, sys
import harken
from harken.process.workers import Workers

class Echo(harken.BaseRequestHandler):
    def handle(self):
        self.request.sendall(self.request.recv(100))

def ended(self, child, status, ended=Workers._ended):
    os.kill(os.getpid(), signal.SIGINT)  # as a terminal does, of whose signal the worker has heard first
    ended(self, child, status)

Workers._ended = ended
sys.exit(harken.serve(Echo, "tcp://127.0.0.1:0", workers=1))
"""


def test_nobody_takes_the_place_of_a_worker_that_heeded_ctrl_c_first(run_program):
    """The supervisor sees its end before it has read its own signal."""
    process = run_program("-c", INTERRUPTED)
    said = []
    for line in process.stderr:
        said.append(line)
        if started := re.search(r"worker started: pid (\d+)", line):
            os.kill(int(started[1]), signal.SIGINT)
    assert process.wait(PATIENCE) == 0
    assert "".join(said).count("worker exited") == 1, "".join(said)


def test_a_new_worker_of_a_suspended_service_takes_nobody(service, run_program, tmp_path):
    """Who waits in the backlog waits on, when a worker is replaced meanwhile, until there is a resume."""
    control = str(tmp_path / "control")
    running = service("--workers", "1", "--control", control)
    (first,) = running.workers(1)

    def order(verb):
        asking = run_program("-m", "harken", "ctl", "--socket", control, verb, stderr=subprocess.STDOUT)
        assert asking.wait(PATIENCE) == 0, asking.stdout.read()

    order("suspend")
    with running.connect() as client:
        client.setblocking(False)
        os.kill(first, signal.SIGKILL)
        running.workers(2)
        os.kill(running.pid, signal.SIGHUP)
        running.wait_log("reloaded")
        with pytest.raises(BlockingIOError):
            client.recv(1)
        client.settimeout(PATIENCE)
        order("resume")
        assert client.recv(100).startswith(b"one ")


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGHUP", "SIGUSR2", "SIGTTIN", "SIGWINCH"])
def test_a_worker_that_still_loads_bears_every_command(service, target, tmp_path, name):
    """A rotation of the log, or a terminal's HUP, while new code loads does not end it, and so fail the reload."""
    running = service("--workers", "1")
    old = running.ask()
    target.write_text(SLOW + target.read_text().replace('"one"', '"two"'))
    os.kill(running.pid, signal.SIGHUP)
    wait_until((tmp_path / "loading").exists)
    os.kill(int((tmp_path / "loading").read_text()), getattr(signal, name))
    assert running.ask() == old
    (tmp_path / "go").touch()
    running.wait_answer("two")


def test_a_worker_that_still_loads_writes_to_the_new_log(service, target, tmp_path):
    """It was told by USR1 before it served, and its lines go where those of the others go."""
    log = tmp_path / "access"
    running = service("--workers", "1", "--access-log", str(log))
    running.ask()
    target.write_text(SLOW + target.read_text().replace('"one"', '"two"'))
    os.kill(running.pid, signal.SIGHUP)
    wait_until((tmp_path / "loading").exists)
    log.rename(tmp_path / "rotated")
    os.kill(running.pid, signal.SIGUSR1)
    wait_until(log.exists)  # or the worker might serve before the supervisor has heard of it
    (tmp_path / "go").touch()
    running.wait_answer("two")
    os.kill(running.pid, signal.SIGTERM)
    assert running.end()[0] == 0
    worker = (tmp_path / "loading").read_text()
    assert f"worker={worker}" in log.read_text()
    assert f"worker={worker}" not in (tmp_path / "rotated").read_text()
