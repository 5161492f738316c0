"""The supervisor: workers come, die, are replaced; code and programs are exchanged; nobody is refused meanwhile."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import time

import pytest

from harken.process.control import replies

PATIENCE = 20.0


def alive(pid):
    """Tell whether a process runs (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it ended before or while that was read
        return False


def wait_gone(pids):
    """Wait until none of the processes runs."""
    end = time.monotonic() + PATIENCE
    while any(map(alive, pids)):
        assert time.monotonic() < end, f"still there: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.01)


def wait_free(port):
    """Wait until the port can be bound."""
    end = time.monotonic() + PATIENCE
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                return
            except OSError:
                assert time.monotonic() < end, f"port {port} is still held"
                time.sleep(0.01)


def test_the_supervisor_serves_nobody_itself(service):
    """Every answer comes from a worker."""
    running = service("--workers", "2")
    workers = running.workers(2)
    assert {running.ask()[1] for _ in range(20)} <= set(workers)
    assert running.pid not in workers


@pytest.mark.parametrize("number,status", [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGQUIT, 0)])
def test_it_ends_with_its_workers(service, number, status):
    """An idle service ends at once, whatever the signal, and the port is free."""
    running = service("--workers", "2")
    workers = running.workers(2)
    os.kill(running.pid, number)
    assert running.end()[0] == status
    assert not any(map(alive, workers))
    wait_free(running.port)


def test_a_drain_that_cuts_ends_with_status_3(service):
    """One worker's cut connection is told by the exit status of all."""
    running = service("--workers", "2", "--drain-timeout", "0.2")
    running.workers(2)
    with running.connect() as client:
        client.recv(100)
        client.sendall(b"busy")
        assert client.recv(100) == b"busy"
        os.kill(running.pid, signal.SIGTERM)
        assert running.end()[0] in (0, 3)  # an idle client leaves first; a busy one is cut


def test_a_worker_that_does_not_even_drain_has_cut_its_connections(service):
    """One that is stopped is killed when its time is over: that is status 3 as well."""
    running = service("--workers", "1", "--drain-timeout", "0.1")
    with running.connect() as client:
        pid = int(client.makefile().readline().split()[1])
        running.ask()  # its loop has turned, and it has told its supervisor that one is open
        os.kill(pid, signal.SIGSTOP)
        os.kill(running.pid, signal.SIGTERM)
        assert running.end()[0] == 3


def test_a_killed_worker_is_replaced(service):
    """kill -9 costs one worker's connections, and nothing else."""
    running = service("--workers", "2")
    first, second = running.workers(2)
    os.kill(first, signal.SIGKILL)
    assert "SIGKILL" in running.wait_log(r"worker exited: pid (\d+).*")[0]
    *_, heir = running.workers(3)
    assert alive(second)
    assert alive(heir)
    assert running.ask()[1] in (second, heir)


def test_connections_of_a_killed_worker_s_children_come_to_their_end(service):
    """Its children live on, whom no limit counts and no drain reaches: they leave as soon as they are idle."""
    running = service("--workers", "1", "--engine", "fork", "--idle-timeout", "none")
    (first,) = running.workers(1)
    with running.connect() as client:
        assert client.recv(100)
        os.kill(first, signal.SIGKILL)
        assert client.recv(100) == b""
    running.workers(2)
    assert running.ask()


def test_a_worker_that_keeps_dying_is_restarted_more_and_more_slowly(service):
    """The second death in a row waits, and the log says how long."""
    running = service("--workers", "1")
    for count in (1, 2):
        running.workers(count)
        with running.connect() as client:
            client.sendall(b"die\n")
            while client.recv(100):
                pass
        running.wait_log("worker exited", count)
    assert "restart_in 0.5" in running.wait_log(r"worker exited.*", 2)[0]
    assert running.workers(3)


@pytest.mark.parametrize("engine", ["thread", "green", "pool", "fork"])
def test_reload_brings_new_code_and_refuses_nobody(service, target, load, engine):
    """HUP under load: the new word is said, the old workers are gone, and no client saw any of it."""
    running = service("--workers", "2", "--engine", engine)
    old = running.workers(2)
    with load(running.port) as clients:
        clients.wait(20)
        for number, word in enumerate(("two", "three", "four"), 2):
            target.write_text(target.read_text().replace('WORD = "', f'WORD = "{word}" or "'))
            os.kill(running.pid, signal.SIGHUP)
            running.wait_log("reloaded", number - 1)
            running.wait_answer(word)
            clients.wait(20)
    assert not clients.failures
    wait_gone(old)


@pytest.mark.parametrize("engine", ["thread", "green"])
def test_who_comes_alone_during_a_reload_is_served(service, engine):
    """One client after the other: the worker that the kernel woke for it may be about to leave, and nobody else was."""
    running = service("--workers", "3", "--engine", engine)
    running.workers(3)
    for number in range(1, 4):
        os.kill(running.pid, signal.SIGHUP)
        while not running.said("reloaded", number):
            running.ask()
        for _ in range(100):  # the old ones leave meanwhile
            running.ask()


def test_code_that_does_not_load_changes_nothing(service, target):
    """A syntax error keeps the old workers, the log says why, and a later reload with good code succeeds."""
    running = service("--workers", "2")
    old = running.workers(2)
    good = target.read_text()
    target.write_text("def broken(:\n")
    os.kill(running.pid, signal.SIGHUP)
    assert "syntax error" in running.wait_log(r"upgrade failed.*")[0]
    assert running.ask()[1] in old
    target.write_text(good.replace('"one"', '"mended"'))
    os.kill(running.pid, signal.SIGHUP)
    running.wait_answer("mended")
    wait_gone(old)


def test_more_workers_and_fewer(service):
    """TTIN and TTOU, but never below one."""
    running = service("--workers", "1")
    running.workers(1)
    os.kill(running.pid, signal.SIGTTIN)
    assert len(running.workers(2)) == 2
    os.kill(running.pid, signal.SIGTTOU)
    running.wait_log("worker exited")
    os.kill(running.pid, signal.SIGTTOU)
    assert running.ask()[0] == "one"


def test_workers_are_sent_home_and_called_back(service):
    """WINCH lets all go; TTOU calls none back, TTIN one."""
    nowhere = subprocess.DEVNULL  # a terminal sends WINCH to say something else
    running = service("--workers", "1", stdin=nowhere, stdout=nowhere)
    running.workers(1)
    os.kill(running.pid, signal.SIGWINCH)
    running.wait_log("worker exited")
    os.kill(running.pid, signal.SIGTTOU)
    os.kill(running.pid, signal.SIGTTIN)
    assert running.ask()[1] == running.workers(2)[1]
    os.kill(running.pid, signal.SIGTERM)
    status, log = running.end()
    assert status == 0
    assert log.count("worker exited") == 2


def test_upgrade_hands_the_listener_to_a_new_program(service, load, tmp_path):
    """USR2 under load: a new supervisor with another pid, the old one gone by itself, nobody refused; and again."""
    pidfile = tmp_path / "pid"
    running = service("--workers", "2", "--pidfile", str(pidfile))
    old = [running.pid, *running.workers(2)]
    assert int(pidfile.read_text()) == running.pid
    with load(running.port) as clients:
        clients.wait(20)
        os.kill(running.pid, signal.SIGUSR2)
        assert running.process.wait(PATIENCE) == 0
        clients.wait(20)
        wait_gone(old)
        heir = int(pidfile.read_text())
        assert heir != running.pid
        clients.wait(20)
    assert not clients.failures
    os.kill(heir, signal.SIGTERM)
    wait_gone([heir])
    assert not pidfile.exists()
    wait_free(running.port)


def test_an_upgrade_that_fails_is_rolled_back(service, target):
    """A new program that cannot load its target leaves everything as it was."""
    running = service("--workers", "1")
    running.workers(1)
    target.write_text("raise RuntimeError('not today')\n")
    os.kill(running.pid, signal.SIGUSR2)
    assert "ended with status 1" in running.wait_log(r"upgrade failed.*")[0]
    assert running.ask()[0] == "one"


def test_an_upgrade_that_is_never_ready_is_killed(service, target):
    """After ``upgrade_timeout`` the old one goes on alone."""
    running = service("--workers", "1", "--upgrade-timeout", "1")
    running.workers(1)
    target.write_text("import time\ntime.sleep(3600)\n")
    os.kill(running.pid, signal.SIGUSR2)
    assert "was not ready within 1 s" in running.wait_log(r"upgrade failed.*")[0]
    assert running.ask()[0] == "one"


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("code", ["raise RuntimeError", "while True: pass"])
def test_unix_paths_survive_an_upgrade_that_fails(service, target, tmp_path, code, workers):
    """A successor that ends, or is ended, removes none of the sockets that it was handed."""
    paths = [tmp_path / name for name in ("sock", "control", "metrics")]
    words = ("--workers", workers, "--control", str(paths[1]), "--metrics", f"unix:{paths[2]}")
    running = service(*words, "--upgrade-timeout", "2", bind=f"unix:{paths[0]}")
    running.workers(int(workers))
    target.write_text(code)
    for count in (1, 2):
        os.kill(running.pid, signal.SIGUSR2)
        running.wait_log("upgrade failed", count)
    for path in paths:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(path))
    os.kill(running.pid, signal.SIGTERM)
    assert running.end()[0] == 0
    assert not any(map(os.path.exists, paths))


def test_a_unix_path_survives_an_upgrade(service, tmp_path):
    """The successor answers for the path: it stays while that runs, and goes with it."""
    path, pidfile = tmp_path / "socket", tmp_path / "pid"
    running = service("--pidfile", str(pidfile), bind=f"unix:{path}")
    running.workers(1)
    os.kill(running.pid, signal.SIGUSR2)
    assert running.process.wait(PATIENCE) == 0
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(path))
        assert client.recv(100).startswith(b"one")
    heir = int(pidfile.read_text())
    os.kill(heir, signal.SIGTERM)
    wait_gone([heir])
    assert not path.exists()


def test_workers_leave_when_their_supervisor_is_killed(service):
    """kill -9 of the supervisor: connections end, the port gets free, no process is left."""
    running = service("--workers", "3", "--drain-timeout", "1")
    workers = running.workers(3)
    os.kill(running.pid, signal.SIGKILL)
    running.process.wait(PATIENCE)
    wait_gone(workers)
    wait_free(running.port)


def test_a_hung_worker_is_found_shown_and_replaced(service):
    """A handler that never gives the green engine's loop back: its stack is in the log, and others are served again."""
    running = service("--engine", "green", "--worker-timeout", "1")
    (hung,) = running.workers(1)
    with running.connect() as client:
        client.recv(100)
        client.sendall(b"spin\n")
        line = running.wait_log(r"worker exited: .*hung.*")[0]
        assert str(hung) in line
        assert "telling.py" in line
        assert "handle" in line
    assert running.workers(2)[1] == running.ask()[1]


@pytest.mark.parametrize("engine", ["green", "thread"])
def test_what_came_while_a_service_was_stopped_is_served(service, engine):
    """Its bytes have lain there for longer than the deadline when anybody can look: not by their client's fault."""
    running = service("--workers", "0", "--engine", engine, "--idle-timeout", "0.5")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect()) for _ in range(20)]
        for client in clients:
            assert client.recv(100)
        os.kill(running.pid, signal.SIGSTOP)
        for client in clients:
            client.sendall(b"meanwhile")
        time.sleep(1.2)  # longer than the deadline, and later than a busy machine is
        os.kill(running.pid, signal.SIGCONT)
        assert [client.recv(100) for client in clients] == [b"meanwhile"] * len(clients)
    os.kill(running.pid, signal.SIGTERM)
    status, log = running.end()
    assert status == 0
    assert not re.search(r"timed out: which idle_timeout, seconds [1-9]", log)


def test_a_service_that_was_stopped_as_a_whole_keeps_its_workers(service, tmp_path):
    """Ctrl-Z, or a container that is paused: the workers were silent because nobody ran."""
    control = tmp_path / "control"
    running = service("--workers", "2", "--worker-timeout", "3", "--control", str(control))
    workers = running.workers(2)
    with running.connect() as client:
        assert client.recv(100)
        for pid in (running.pid, *workers):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(4)  # longer than the timeout
        os.kill(running.pid, signal.SIGCONT)
        with socket.socket(socket.AF_UNIX) as asker:
            asker.connect(str(control))
            for _ in range(2):  # it has looked at the workers in between
                assert next(replies(asker, "health", {}, PATIENCE))["result"]["ready"]
            for pid in workers:
                os.kill(pid, signal.SIGCONT)
            told = next(replies(asker, "status", {}, PATIENCE))["result"]["workers"]
        assert {each["pid"]: each["leaving"] for each in told} == dict.fromkeys(workers, False)
        client.sendall(b"still here")
        assert client.recv(100) == b"still here"


def test_a_worker_that_has_served_enough_is_replaced_without_a_gap(service, load):
    """max_requests: the heir is ready before the old one leaves."""
    running = service("--workers", "1", "--max-requests", "10")
    running.workers(1)
    with load(running.port) as clients:
        assert len(running.workers(4)) >= 4
        clients.wait(5)
    assert not clients.failures


@pytest.mark.parametrize(
    "flag,value,reason", [("--max-worker-age", "0.2", "max_worker_age"), ("--max-worker-rss", "1MiB", "max_worker_rss")]
)
def test_old_and_fat_workers_are_replaced(service, flag, value, reason):
    """By age, and by memory; the log says by which."""
    running = service(flag, value)
    running.workers(2)
    running.wait_log(rf"worker exited: pid \d+, status 0, reason {reason}: it ")


def test_the_log_is_opened_anew(run_program, target, tmp_path):
    """USR1 after a rotation: supervisor and workers write to the new file."""
    log = tmp_path / "log"
    words = ("--bind", "tcp://127.0.0.1:0", "--log-file", log)
    process = run_program("-m", "harken", "serve", f"{target}:Tell", *words, stderr=subprocess.PIPE)
    assert "listening" in process.stderr.readline()
    log.rename(tmp_path / "log.1")
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGHUP)
    end = time.monotonic() + PATIENCE
    while not (log.exists() and "reloaded" in log.read_text()):
        assert time.monotonic() < end, "nothing was written to the new file"
        time.sleep(0.01)
    process.terminate()
    assert process.wait(PATIENCE) == 0


def test_a_datagram_service_has_workers_too(service):
    """UDP: answers come from workers, and go on after a reload."""
    running = service("--workers", "2", bind="udp://127.0.0.1:0")
    workers = running.workers(2)
    with socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.sendto(b"x", ("127.0.0.1", running.port))
        assert int(client.recv(100).split()[1]) in workers
        os.kill(running.pid, signal.SIGHUP)
        running.wait_log("reloaded")
        wait_gone(workers)
        client.sendto(b"x", ("127.0.0.1", running.port))
        assert int(client.recv(100).split()[1]) not in workers


# ── without workers ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_workers_a_reload_keeps_the_pid(service, target, load):
    """HUP: the process drains, becomes the new program, and whoever connects meanwhile waits."""
    running = service("--workers", "0")
    assert running.ask() == ("one", running.pid)
    target.write_text(target.read_text().replace('"one"', '"two"'))
    with load(running.port) as clients:
        clients.wait(5)
        os.kill(running.pid, signal.SIGHUP)
        assert running.wait_answer("two") == running.pid
        clients.wait(5)
    assert not clients.failures
    os.kill(running.pid, signal.SIGTERM)
    assert running.end()[0] == 0


def test_without_workers_an_upgrade_starts_a_second_process(service, load, tmp_path):
    """USR2: the successor serves, the old one has left."""
    pidfile = tmp_path / "pid"
    running = service("--workers", "0", "--pidfile", str(pidfile))
    with load(running.port) as clients:
        clients.wait(5)
        os.kill(running.pid, signal.SIGUSR2)
        assert running.process.wait(PATIENCE) == 0
        clients.wait(5)
    heir = int(pidfile.read_text())
    assert running.ask() == ("one", heir)
    assert not clients.failures
    os.kill(heir, signal.SIGTERM)
    wait_gone([heir])


@pytest.mark.parametrize("engine", ["thread", "fork"])
def test_who_ends_tells_what_its_log_left_out(service, target, engine):
    """A worker's window is not over when it has to go; and it is one with those of the children that it forks."""
    target.write_text("import harken\nclass Tell(harken.BaseRequestHandler):\n    def handle(self):\n        1 / 0\n")
    served = service("--workers", "1", "--engine", engine)
    served.workers(1)
    for _ in range(13):
        with served.connect() as client:
            client.recv(1)
    served.process.terminate()
    _, log = served.end()
    assert log.count("\n    ZeroDivisionError") == 10
    assert "… 3 more like this" in log
