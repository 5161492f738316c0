"""What a machine has not got any more: descriptors, processes, room on a disk, somebody who reads stderr."""

import os
import resource
import signal
import socket
import subprocess

import pytest
from waiting import wait_until

from harken import events
from harken.process.workers import MOST_WORKERS

PATIENCE = 20.0


def leave_descriptors(pid, number):
    """Let a process open only so many more; return what puts that right."""
    held = len(os.listdir(f"/proc/{pid}/fd"))
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (held + number, before[1]))
    return lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("left", range(4))
def test_a_supervisor_without_descriptors_keeps_its_workers(service, left):
    """No worker can be started: those that are there serve on, and the next try comes later, and succeeds."""
    running = service("--workers", "1")
    running.workers(1)
    mend = leave_descriptors(running.pid, left)
    os.kill(running.pid, signal.SIGTTIN)
    assert "Too many open files" in running.wait_log("worker failed.*restart_in 0.5")[0]
    held = os.listdir(f"/proc/{running.pid}/fd")
    assert running.ask()
    running.wait_log("worker failed.*restart_in 1")
    wait_until(lambda: os.listdir(f"/proc/{running.pid}/fd") == held)  # or it is trying once more
    mend()
    running.workers(2)
    os.kill(running.pid, signal.SIGTERM)
    assert running.end()[0] == 0


@pytest.mark.parametrize(
    "number,word,workers", [("USR2", "upgrade", "0"), ("USR2", "upgrade", "1"), ("HUP", "reload", "0")]
)
def test_what_needs_more_descriptors_than_there_are_is_refused(service, number, word, workers):
    """The old one serves on, and still heeds what it is told."""
    running = service("--workers", workers)
    running.workers(int(workers))
    running.ask()  # it has all that it needs
    leave_descriptors(running.pid, 0)
    os.kill(running.pid, signal.Signals[f"SIG{number}"])
    assert "Too many open files" in running.wait_log(f"{word} failed.*")[0]
    os.kill(running.pid, signal.SIGTERM)
    assert running.end()[0] == 0


WITHOUT_THREADS = """
import threading
start = threading.Thread.start
def refuse(thread):
    if thread.name == "harken-upgrade" and tried.append(thread) is None and len(tried) == 1:
        raise RuntimeError("can't start new thread")
    start(thread)
tried = []
threading.Thread.start = refuse
"""


def test_an_upgrade_without_a_thread_is_refused(service, target):
    """What is ordered afterwards is heeded: another upgrade."""
    target.write_text(target.read_text() + WITHOUT_THREADS)
    running = service("--workers", "0")
    os.kill(running.pid, signal.SIGUSR2)
    running.wait_log("upgrade failed: reason the new program cannot be started: can't start new thread; this one")
    os.kill(running.pid, signal.SIGUSR2)
    assert running.status() == 0
    os.kill(running.ask()[1], signal.SIGTERM)


def test_no_more_workers_than_there_are_places_for(service, run_program, tmp_path):
    """The number is refused, as a flag and on a running service."""
    wrong = run_program("-m", "harken", "serve", "nobody:Nothing", "--workers", str(MOST_WORKERS + 1))
    assert wrong.wait(PATIENCE) == 2
    assert f"largest value allowed, {MOST_WORKERS}" in wrong.stderr.read()
    control = str(tmp_path / "control")
    running = service("--control", control)
    for words in (("workers", "100000"), ("set", "workers", "100000")):
        asking = run_program("-m", "harken", "ctl", "--socket", control, *words)
        assert asking.wait(PATIENCE) == 1
        assert f"largest value allowed, {MOST_WORKERS}" in asking.stderr.read()
    assert running.ask()


def test_a_question_nested_without_end_is_no_question(service, tmp_path):
    """The asker is hung up on, and the service goes on."""
    control = str(tmp_path / "control")
    running = service("--control", control)
    with socket.socket(socket.AF_UNIX) as asker:
        asker.settimeout(PATIENCE)
        asker.connect(control)
        asker.sendall(b'{"version": 1, "verb": "status", "arguments": ' + b"[" * 30_000 + b"]" * 30_000 + b"}\n")
        assert asker.recv(100) == b""
    assert running.ask()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_full_disk_costs_the_log_and_nothing_else(run_program, target, workers):
    """One line on stderr from each process says what is lost; the service ends with its own status."""
    words = ("-m", "harken", "serve", f"{target}:Tell", "--bind", "tcp://127.0.0.1:0", "--workers", workers)
    process = run_program(*words, "--log-file", "/dev/full", "--access-log", "/dev/full", cwd=target.parent)
    line = process.stderr.readline()
    port = int(line.split(" (")[0].rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        assert client.makefile().readline().startswith("one ")
    process.terminate()
    assert process.wait(PATIENCE) == 0
    log = process.stderr.read()
    assert "cannot write the log to /dev/full: No space left on device" in log
    assert "Traceback" not in log
    assert len(log.splitlines()) <= 4


@pytest.mark.parametrize("workers", ["0", "1"])
def test_nobody_reads_stderr(run_program, target, tmp_path, workers):
    """A broken pipe, from the start: it serves all the same."""
    path = tmp_path / "sock"
    reader, writer = os.pipe()
    os.close(reader)
    words = ("-m", "harken", "serve", f"{target}:Tell", "--bind", f"unix:{path}", "--workers", workers)
    process = run_program(*words, cwd=target.parent, stdout=writer, stderr=writer)
    os.close(writer)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        wait_until(lambda: process.poll() is not None or client.connect_ex(str(path)) == 0)
        assert client.recv(100).startswith(b"one ")
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0


def test_emit_raises_nothing_when_stderr_is_gone(monkeypatch):
    """Neither what an observer raises nor the word about it reaches who emits."""

    class Broken:
        def write(self, text):
            raise BrokenPipeError

        flush = write

    def observer(event):
        raise RuntimeError

    monkeypatch.setattr("sys.stderr", Broken())
    forget = events.subscribe(observer, "resumed")
    try:
        events.emit("resumed")
    finally:
        forget()


def test_a_log_whose_folder_is_gone_is_no_reason_to_stop(run_program, target, tmp_path):
    """USR1 when the file cannot be opened anew: a line says so; once it can, the log goes on."""
    folder = tmp_path / "log"
    folder.mkdir()
    words = ("-m", "harken", "serve", f"{target}:Tell", "--bind", "tcp://127.0.0.1:0", "--log-file", str(folder / "a"))
    process = run_program(*words, cwd=target.parent)
    process.stderr.readline()
    (folder / "a").unlink()
    folder.rmdir()
    process.send_signal(signal.SIGUSR1)
    assert "cannot write the log" in process.stderr.readline()
    folder.mkdir()
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    assert "Traceback" not in process.stderr.read()
    assert "worker exited" in (folder / "a").read_text()


def test_what_a_start_that_fails_has_made_is_removed(run_program, target, tmp_path):
    """No control socket stays, and no half a PID file."""
    (tmp_path / "pid").mkdir()
    words = (
        "-m",
        "harken",
        "serve",
        f"{target}:Tell",
        "--bind",
        "tcp://127.0.0.1:0",
        "--pidfile",
        str(tmp_path / "pid"),
    )
    process = run_program(*words, "--control", str(tmp_path / "control"), stderr=subprocess.STDOUT)
    assert process.wait(PATIENCE) == 1
    assert "Is a directory" in process.stdout.read()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pid", target.name]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_start_that_fails_late_leaves_no_pid_file(run_program, target, tmp_path, workers):
    """Nor anything else, when the directory to go to is not there."""
    words = ("-m", "harken", "serve", f"{target}:Tell", "--bind", f"unix:{tmp_path / 'sock'}", "--workers", workers)
    more = ("--pidfile", str(tmp_path / "pid"), "--control", str(tmp_path / "control"))
    process = run_program(*words, *more, "--chdir", str(tmp_path / "none"))
    assert process.wait(PATIENCE) == 1
    assert "chdir = " in process.stderr.read()
    left = {path.name for path in tmp_path.iterdir()} - {target.name, "__pycache__"}
    assert not left


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_pid_file_stays_where_it_was_asked_for(service, tmp_path, workers):
    """A name without a folder is meant from where the service was started, also when it goes elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "telling.py").write_text((tmp_path / "telling.py").read_text())
    running = service("--pidfile", "own.pid", "--chdir", str(tmp_path / "elsewhere"), "--workers", workers)
    assert (tmp_path / "own.pid").read_text() == f"{running.pid}\n"
    os.kill(running.pid, signal.SIGTERM)
    assert running.end()[0] == 0
    assert not (tmp_path / "own.pid").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_the_target_is_loaded_where_the_service_goes(target, run_program, tmp_path, workers):
    """A name without a folder is that of a file there; `check` finds it too, and addresses are meant from here."""
    (tmp_path / "elsewhere").mkdir()
    target.rename(tmp_path / "elsewhere" / "other.py")
    there = ("--chdir", "elsewhere")
    words = ("--bind", "unix:sock", *there)
    process = run_program("-m", "harken", "serve", "other.py:Tell", *words, "--workers", workers, cwd=tmp_path)
    assert "listening" in process.stderr.readline()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(tmp_path / "sock"))
        assert client.recv(100).startswith(b"one ")
        process.terminate()
    assert process.wait(PATIENCE) == 0
    words = ("--bind", "tcp://127.0.0.1:0", *there, "--control", "none")
    check = run_program("-m", "harken", "check", "other.py:Tell", *words, cwd=tmp_path)
    assert check.wait(PATIENCE) == 0


def test_a_process_alone_does_not_begin_anew_without_its_log(service, tmp_path):
    """The new program could not open it, and nobody would be left to serve."""
    (tmp_path / "logs").mkdir()
    running = service("--workers", "0", "--access-log", "logs/access")
    (tmp_path / "logs").rename(tmp_path / "moved")
    os.kill(running.pid, signal.SIGHUP)
    running.wait_log("reload failed: what code, reason the log '.*logs/access' cannot be opened: No such file")
    assert running.ask()[1] == running.pid
    (tmp_path / "moved").rename(tmp_path / "logs")
    os.kill(running.pid, signal.SIGHUP)
    running.wait_log("listening: ", 2)
    assert running.ask()[1] == running.pid


def test_a_reload_heeds_what_the_file_says_anew(service, tmp_path):
    """The number of workers and the log's level; what an operator said meanwhile holds when the file says the same."""
    file = tmp_path / "harken.toml"
    file.write_text("workers = 1\n")
    running = service("--config", str(file))
    running.workers(1)
    os.kill(running.pid, signal.SIGTTIN)
    running.workers(2)
    os.kill(running.pid, signal.SIGHUP)
    assert "2 new workers" in running.wait_log("reloaded.*")[0]
    file.write_text("workers = 3\nlog_level = 'debug'\n")
    os.kill(running.pid, signal.SIGHUP)
    assert "3 new workers" in running.wait_log("reloaded.*", 2)[0]
    running.wait_log("worker exited", 4)  # the old ones are gone
    running.ask()
    running.wait_log("debug +closed")


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("engine", ["thread", "green"])
def test_a_drain_for_which_there_is_no_thread(service, target, engine, workers):
    """It is done all the same, by the thread that heard of it."""
    target.write_text(
        target.read_text()
        + """
import threading
start = threading.Thread.start
def no_more(thread):
    if thread.name == "harken-drain":
        raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = no_more
"""
    )
    running = service("--workers", workers, "--engine", engine)
    with running.connect() as client:
        lines = client.makefile()
        assert lines.readline().startswith("one ")
        os.kill(running.pid, signal.SIGTERM)
        assert lines.readline() == ""
    assert running.end()[0] == 0
