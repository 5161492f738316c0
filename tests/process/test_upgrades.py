"""Upgrades and reloads that something else meets: an order, a worker's end, a timeout, a shortage."""

import os
import pathlib
import re
import resource
import signal
import socket
import threading
import time

import pytest
from slow_code import SLOW, is_gone
from waiting import wait_until

from harken.process.control import replies

PATIENCE = 20.0

DEAF = 'if data == b"nap\\n": time.sleep(30)\n            if data == b"die'


def children(pid):
    """Return the pids of a process's children."""
    return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ask(path, verb, **arguments):
    """Ask by a control socket; return the reply."""
    with socket.socket(socket.AF_UNIX) as asker:
        asker.connect(str(path))
        return next(replies(asker, verb, arguments, PATIENCE))


def leave_no_descriptors(pid):
    """Let a process open no more than it has; return what puts that right."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))  # 0: poll(2) would fail, too
    return lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def told(control):
    """Ask several times how a service is, and so everybody who takes questions; return the answers."""
    return {ask(control, "health")["result"]["reason"] for _ in range(20)}


def processor_seconds(pid):
    """How long a process has had a processor."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture
def failing(target, tmp_path):
    """Let a service begin an upgrade; return what makes it fail."""
    good = target.read_text()

    def begin(running):
        target.write_text(SLOW + "raise RuntimeError('broken')\n")
        os.kill(running.pid, signal.SIGUSR2)
        wait_until((tmp_path / "loading").exists)
        target.write_text(good)

        def fail():
            (tmp_path / "go").touch()
            running.wait_log("upgrade failed")

        return fail

    return begin


def test_a_worker_that_came_during_a_failed_upgrade_may_go(service, failing):
    """It was forked with the pipe to the successor, of which the supervisor must not hear any more."""
    running = service("--workers", "1")
    running.workers(1)
    fail = failing(running)
    os.kill(running.pid, signal.SIGTTIN)
    running.workers(2)
    fail()
    os.kill(running.pid, signal.SIGTTIN)
    third = running.workers(3)[2]
    os.kill(third, signal.SIGKILL)
    running.wait_log(f"worker exited: pid {third}")
    running.workers(4)
    os.kill(running.pid, signal.SIGTERM)
    status, log = running.end()
    assert status == 0
    assert log.count("Traceback") == 1, log  # the new code's


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_hup_during_an_upgrade_that_fails_is_obeyed_then(service, failing, target, workers):
    """What it would read is read, since there is no successor that has."""
    running = service("--workers", workers)
    fail = failing(running)
    target.write_text(target.read_text().replace('"one"', '"two"'))
    os.kill(running.pid, signal.SIGHUP)
    fail()
    running.wait_answer("two")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_successor_that_is_too_late_takes_nothing_over(service, target, tmp_path, workers):
    """It is killed at once: the Unix paths and the PID file stay those of the one that serves on."""
    paths = [tmp_path / name for name in ("sock", "control", "pid")]
    words = ("--workers", workers, "--control", str(paths[1]), "--pidfile", str(paths[2]), "--upgrade-timeout", "1")
    running = service(*words, bind=f"unix:{paths[0]}")
    running.workers(int(workers))
    code = """
import os, pathlib, time
if "HARKEN_HANDOFF" in os.environ or pathlib.Path("first").exists():
    time.sleep(1.2)  # between the timeout and what is more than enough to end
"""
    (tmp_path / "first").touch()
    target.write_text(code + target.read_text())
    os.kill(running.pid, signal.SIGUSR2)
    late = int(running.wait_log(r"upgrade failed: reason the new program \(pid (\d+)\) was not ready")[1])
    wait_until(lambda: is_gone(late))
    assert [path.exists() for path in paths] == [True, True, True]
    assert int(paths[2].read_text()) == running.pid
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(paths[0]))
        assert client.recv(100).startswith(b"one ")


def test_a_drain_during_an_upgrade_ends_the_successor(service, target, tmp_path):
    """Also one that would be ready while somebody is still served."""
    target.write_text(target.read_text().replace('if data == b"die', DEAF))
    running = service("--workers", "1", "--drain-timeout", "3", "--pidfile", str(tmp_path / "pid"))
    with running.connect() as client:
        client.makefile().readline()
        client.sendall(b"nap\n")
        target.write_text(SLOW + target.read_text())
        os.kill(running.pid, signal.SIGUSR2)
        wait_until((tmp_path / "loading").exists)
        os.kill(running.pid, signal.SIGTERM)
        successor = int((tmp_path / "loading").read_text())
        wait_until(lambda: is_gone(successor))
        assert running.process.poll() is None
        assert running.end()[0] == 3
    assert not (tmp_path / "pid").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_orders_reach_the_successor_alone(service, tmp_path, workers):
    """As soon as it is ready, also while the one before still serves somebody; and never before."""
    control, pid = tmp_path / "control", tmp_path / "pid"
    words = ("--workers", workers, "--drain-timeout", "20", "--control", str(control), "--pidfile", str(pid))
    running = service(*words)
    running.workers(int(workers))
    with running.connect() as client:
        client.makefile().readline()
        os.kill(running.pid, signal.SIGUSR2)
        running.wait_log("draining")
        successor = int(pid.read_text())
        assert successor != running.pid
        if workers == "0":  # its thread shuts the door, and is told just before
            wait_until(lambda: told(control) == {"ready"})
        assert told(control) == {"ready"}
    assert running.status() == 0
    assert "error" not in ask(control, "drain")
    wait_until(lambda: is_gone(successor))


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_relative_path_is_found_from_elsewhere(service, tmp_path, workers):
    """The service was started here, and has gone: its successor looks here whether it can be reached."""
    (tmp_path / "elsewhere").mkdir()
    words = ("--chdir", "elsewhere", "--pidfile", "pid")
    running = service("--workers", workers, *words, bind="unix:sock")
    os.kill(running.pid, signal.SIGUSR2)
    assert running.status() == 0
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(tmp_path / "sock"))
        assert client.recv(100).startswith(b"one ")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)


def test_orders_reach_the_old_one_until_the_new_one_is_ready(service, target, tmp_path):
    """A successor that still loads has nobody to order about."""
    control = tmp_path / "control"
    running = service("--workers", "1", "--control", str(control))
    running.workers(1)
    target.write_text(SLOW + target.read_text())
    os.kill(running.pid, signal.SIGUSR2)
    wait_until((tmp_path / "loading").exists)
    assert told(control) == {"ready"}


@pytest.mark.parametrize("before", ["failed", "HUP", "USR2"])
def test_a_drain_resets_nobody_whatever_was_before(service, failing, target, tmp_path, before):
    """The listener is the service's alone again: who is on the way comes in, before it is closed."""
    pid = tmp_path / "pid"
    running = service("--workers", "0" if before == "HUP" else "1", "--pidfile", str(pid))
    target.write_text(target.read_text())
    if before == "failed":
        failing(running)()
    elif before == "HUP":
        target.write_text(target.read_text().replace('"one"', '"two"'))
        os.kill(running.pid, signal.SIGHUP)
        running.wait_answer("two")
    else:
        os.kill(running.pid, signal.SIGUSR2)
        assert running.status() == 0
    harm, started = [], threading.Barrier(9)

    def come():
        started.wait()
        while True:
            try:
                with socket.create_connection(("127.0.0.1", running.port), 0.9) as client:
                    client.settimeout(PATIENCE)
                    if not client.recv(100):
                        harm.append("the end")
            except (ConnectionRefusedError, TimeoutError):
                return
            except OSError as error:
                harm.append(repr(error))

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    started.wait()
    time.sleep(0.3)  # they come and go
    os.kill(int(pid.read_text()), signal.SIGTERM)
    for thread in threads:
        thread.join(PATIENCE)
    assert harm == []


def test_one_worker_less_spares_those_that_serve(service, target, tmp_path):
    """Of one that serves and one that still loads the second goes."""
    running = service("--workers", "1")
    running.workers(1)
    target.write_text(SLOW + target.read_text())
    os.kill(running.pid, signal.SIGTTIN)
    wait_until((tmp_path / "loading").exists)
    os.kill(running.pid, signal.SIGTTOU)
    running.wait_log(f"worker exited: pid {(tmp_path / 'loading').read_text()}")
    assert running.ask()[0] == "one"


def test_a_handler_that_outlives_a_drain_does_not_keep_it_from_beginning_anew(service, target):
    """HUP to a process alone whose main thread is in a handler of the inline engine."""
    good = target.read_text()
    target.write_text(good.replace('if data == b"die', DEAF))
    running = service("--workers", "0", "--engine", "inline", "--drain-timeout", "0.2")
    with running.connect() as client:
        client.makefile().readline()
        client.sendall(b"nap\n")
        target.write_text(good.replace('"one"', '"two"'))
        os.kill(running.pid, signal.SIGHUP)
        running.wait_answer("two")


def test_what_a_reload_cut_is_not_told_at_the_end(service, target):
    """The status speaks of the end alone."""
    target.write_text(target.read_text().replace('if data == b"die', DEAF))
    running = service("--workers", "1", "--drain-timeout", "0.2")
    with running.connect() as client:
        client.makefile().readline()
        client.sendall(b"nap\n")
        os.kill(running.pid, signal.SIGHUP)
        running.wait_log("worker exited.*status 3")
    os.kill(running.pid, signal.SIGTERM)
    assert running.end()[0] == 0


def test_stopping_again_and_again_puts_no_end_off(service, target):
    """INT every moment to a service whose worker does not heed it."""
    target.write_text(
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGQUIT])\n" + target.read_text()
    )
    running = service("--workers", "1", "--engine", "inline")
    running.workers(1)
    with running.connect() as client:
        client.makefile().readline()
        client.sendall(b"spin\n")
        end = time.monotonic() + PATIENCE
        while running.process.poll() is None:
            os.kill(running.pid, signal.SIGINT)
            assert time.monotonic() < end
            time.sleep(0.2)
    assert running.end()[0] in (0, 3)


def test_a_page_that_cannot_be_started_again_costs_no_service(service, tmp_path):
    """It ended while there are no descriptors; once there are, it comes back."""
    running = service("--workers", "1", "--metrics", f"unix:{tmp_path / 'page'}")
    (worker,) = running.workers(1)
    wait_until(lambda: len(children(running.pid)) == 2)
    (page,) = [child for child in children(running.pid) if child != worker]
    mend = leave_no_descriptors(running.pid)
    os.kill(page, signal.SIGKILL)
    running.wait_log("worker failed: reason the page: Too many open files")
    mend()
    wait_until(lambda: len(children(running.pid)) == 2)
    assert running.ask()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_who_asks_when_there_are_no_descriptors_waits(service, tmp_path, workers):
    """And keeps nobody busy; then there is an answer."""
    control = tmp_path / "control"
    running = service("--workers", workers, "--control", str(control))
    running.workers(int(workers))
    running.ask()
    mend = leave_no_descriptors(running.pid)
    with socket.socket(socket.AF_UNIX) as asker:
        asker.connect(str(control))
        before = processor_seconds(running.pid)
        time.sleep(1)  # of which a loop that spins takes all that it gets
        assert processor_seconds(running.pid) - before < 0.4
        mend()
        assert next(replies(asker, "health", {}, PATIENCE))["result"]["ready"]


HUP, USR2 = signal.SIGHUP, signal.SIGUSR2


@pytest.mark.parametrize(
    "workers, orders",
    [
        ("0", [USR2, USR2, USR2]),
        ("0", [HUP, USR2, HUP, HUP]),
        ("0", [USR2, HUP, USR2]),
        ("1", [USR2, USR2, USR2]),
        ("1", [USR2, HUP, USR2]),
    ],
)
@pytest.mark.parametrize("unix", [False, True])
def test_one_after_the_other(service, target, tmp_path, workers, orders, unix):
    """Each leaves the socket fit for the next: what it had from its predecessor is not its own to shut."""
    path, pidfile = tmp_path / "sock", tmp_path / "pid"
    bind = f"unix:{path}" if unix else "tcp://127.0.0.1:0"
    running = service("--workers", workers, "--pidfile", str(pidfile), bind=bind)

    def ask():
        with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as client:
            client.settimeout(PATIENCE)
            client.connect(str(path) if unix else ("127.0.0.1", running.port))
            return client.recv(100).split()[0].decode()

    word = "one"
    for turn, order in enumerate(orders):
        wait_until(lambda word=word: ask() == word)
        before = int(pidfile.read_text())
        target.write_text(target.read_text().replace(word, f"w{turn}"))
        word = f"w{turn}"
        os.kill(before, order)
        if order == USR2:
            wait_until(lambda before=before: is_gone(before))
            assert int(pidfile.read_text()) != before
    wait_until(lambda word=word: ask() == word)
    assert ask() == word
    last = int(pidfile.read_text())
    os.kill(last, signal.SIGTERM)
    wait_until(lambda: is_gone(last))
    assert not pidfile.exists()
    assert not path.exists()


@pytest.mark.parametrize("order", [HUP, USR2])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_was_ordered_holds_for_those_who_come(service, tmp_path, workers, order):
    """A live setting, and a suspension: neither who leaves nor who comes takes those that wait in the backlog."""
    control, pidfile = tmp_path / "control", tmp_path / "pid"
    running = service("--workers", workers, "--control", str(control), "--pidfile", str(pidfile))
    running.workers(int(workers))
    assert ask(control, "configure", max_connections=7)["result"] is None
    assert ask(control, "suspend")["result"] is None
    with running.connect() as client:
        os.kill(running.pid, order)
        running.wait_log("drained", max(1, int(workers)))
        if order == USR2:
            wait_until(lambda: is_gone(running.pid))
        elif workers == "0":
            running.wait_log("listening: address", 2)
        wait_until(lambda: told(control) == {"suspended"})
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)
        settings = {each["name"]: each["value"] for each in ask(control, "settings")["result"]}
        assert settings["max_connections"] == 7
        assert ask(control, "resume")["result"] is None
        client.settimeout(PATIENCE)
        assert client.recv(100).startswith(b"one ")
    os.kill(int(pidfile.read_text()), signal.SIGTERM)
    wait_until(lambda: not pidfile.exists())


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_suspended_service_that_ends_takes_all_who_wait(service, tmp_path, workers):
    """Nobody else will."""
    control = tmp_path / "control"
    running = service("--workers", workers, "--control", str(control))
    running.workers(int(workers))
    assert ask(control, "suspend")["result"] is None
    with running.connect() as client:
        os.kill(running.pid, signal.SIGTERM)
        assert client.recv(100).startswith(b"one ")
    assert running.end()[0] == 0


BUSY = """
import pathlib, time, harken
class Tell(harken.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"begun")
        while not pathlib.Path("done").exists():
            time.sleep(0.01)
        self.request.sendall(b" and done")
"""


@pytest.mark.parametrize(
    "before, after",
    [("drain_timeout = 30", "drain_timeout = 0"), ('engine = "inline"\nworker_timeout = 1', "worker_timeout = 1")],
    ids=["drain_timeout", "engine"],
)
def test_who_leaves_is_judged_by_what_it_was_told(service, target, tmp_path, before, after):
    """A file that is read anew is for those who come: it cuts no drain short, and finds no worker hung."""
    config = tmp_path / "harken.toml"
    config.write_text(before)
    target.write_text(BUSY)
    running = service("--workers", "1", "--config", str(config))
    running.workers(1)
    with running.connect() as client:
        assert client.recv(100) == b"begun"
        config.write_text(after)
        target.write_text((SLOW if "engine" in before else "") + BUSY)
        os.kill(running.pid, signal.SIGHUP)
        if "engine" in before:
            wait_until((tmp_path / "loading").exists)
        else:
            running.wait_log("draining")
        time.sleep(4)  # longer than the file says now, with the grace of 3 s that a worker gets
        (tmp_path / "done").touch()
        (tmp_path / "go").touch()
        assert client.recv(100) == b" and done"
    running.wait_log("worker exited: .* status 0")


# Orders come when the PID file names the successor already, and its predecessor has not been told yet.
ORDERED = """
import pathlib, signal, time
from harken.process import inheritance
tell = inheritance.tell_predecessor
def tell_later():
    ordered = pathlib.Path("ordered")
    if inheritance.upgraded_from() and not ordered.exists():
        ordered.touch()
        os.kill(os.getpid(), signal.{})
        time.sleep(0.3)
    tell()
inheritance.tell_predecessor = tell_later
"""


@pytest.mark.parametrize("order", ["SIGHUP", "SIGUSR2"])
def test_an_order_to_a_successor_that_is_not_yet_one(service, target, tmp_path, order):
    """It is obeyed when the files are the successor's: its socket's path is there afterwards, and goes with it."""
    path, control, pidfile = (tmp_path / name for name in ("sock", "control", "pid"))
    running = service("--workers", "0", "--control", str(control), "--pidfile", str(pidfile), bind=f"unix:{path}")
    target.write_text(target.read_text() + ORDERED.format(order))
    os.kill(running.pid, signal.SIGUSR2)
    running.wait_log("listening: address", 3)
    wait_until(lambda: is_gone(running.pid))
    wait_until(lambda: told(control) == {"ready"})
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(path))
        assert client.recv(100).startswith(b"one ")
    last = int(pidfile.read_text())
    os.kill(last, signal.SIGTERM)
    wait_until(lambda: is_gone(last))
    assert not any(each.exists() for each in (path, control, pidfile))


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_upgrade_while_the_last_one_still_drains(service, target, tmp_path, workers):
    """Three programs have the socket then; the first two leave it to the third."""
    pidfile = tmp_path / "pid"
    target.write_text(target.read_text().replace('if data == b"die', DEAF))
    running = service("--workers", workers, "--pidfile", str(pidfile), "--drain-timeout", "4")
    with running.connect() as client:
        client.makefile().readline()
        client.sendall(b"nap\n")  # keeps the first one for as long as a drain takes
        pids = [running.pid]
        for word in ("two", "three"):
            target.write_text(re.sub('WORD = ".*"', f'WORD = "{word}"', target.read_text()))
            os.kill(pids[-1], USR2)
            running.wait_answer(word)
            wait_until(lambda: int(pidfile.read_text()) not in pids)
            pids.append(int(pidfile.read_text()))
        wait_until(lambda: is_gone(pids[1]))
    wait_until(lambda: is_gone(pids[0]))
    assert running.ask()[0] == "three"
    os.kill(pids[2], signal.SIGTERM)
    wait_until(lambda: is_gone(pids[2]))
