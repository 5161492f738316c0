"""What a service manager is told, from start to end, by a supervisor and by a process alone; and what it passes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from waiting import wait_until

PATIENCE = 20.0

# Becomes harken with the sockets that systemd would pass, as it passes them: numbered from 3, for this pid.
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": "web"}
os.environ |= {"WATCHDOG_PID": str(os.getpid())}
os.execv(sys.executable, [sys.executable, "-m", "harken", "serve", *sys.argv[2:]])
"""


class Manager:
    """Listens as a service manager does: each datagram is fields, and says by the kernel's word who sent it."""

    def __init__(self, path):
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(self.path)
        self._socket.settimeout(PATIENCE)
        self._heard = []

    def hear(self, name, by=None):
        """Wait for a message with this field, from this pid if one is given; return its fields and who said it.

        What others said meanwhile is kept: two processes speak in no order.
        """
        for number, (fields, pid) in enumerate(self._all()):
            if name in fields and by in (None, pid):
                del self._heard[number]
                return fields, pid
        raise AssertionError(f"nobody said {name}")

    def _all(self):
        yield from list(self._heard)
        while True:
            data, ancillary, *_ = self._socket.recvmsg(4096, 256)
            fields = dict(line.split("=", 1) for line in data.decode().splitlines())
            self._heard.append((fields, int.from_bytes(ancillary[0][2][:4], sys.byteorder)))
            yield self._heard[-1]

    def forget(self):
        """Forget what was heard."""
        self._heard.clear()

    def wait_status(self, status):
        """Wait until this is said."""
        while self.hear("STATUS")[0]["STATUS"] != status:
            pass

    def has_heard(self, word):
        """Whether a status that was heard, and not asked for, says this."""
        return any(word in fields.get("STATUS", "") for fields, _ in self._heard)

    def close(self):
        self._socket.close()


@pytest.fixture
def manager(tmp_path):
    """A service manager that listens."""
    manager = Manager(tmp_path / "notify")
    yield manager
    manager.close()


@pytest.fixture
def activated(run_program, target, manager):
    """Return a function that starts ``harken serve`` on a passed socket; it returns the process and the port."""
    with socket.create_server(("127.0.0.1", 0)) as door:

        def start(*words, bind="systemd:", env=()):
            command = ("-c", ACTIVATE, str(door.fileno()), f"{target}:Tell", "--bind", bind, *words)
            environment = {"NOTIFY_SOCKET": manager.path} | dict(env)
            process = run_program(*command, env=environment, pass_fds=[door.fileno()], stderr=subprocess.DEVNULL)
            return process, door.getsockname()[1]

        yield start


def ask(port):
    """Return the pid of who answers."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        return int(client.makefile().readline().split()[1])


def wait_other(port, old):
    """Ask until somebody else answers."""
    end = time.monotonic() + PATIENCE
    while ask(port) == old:
        assert time.monotonic() < end, f"{old} still answers"


@pytest.mark.parametrize("bind", ["systemd:", "fd://web", "fd://3"])
@pytest.mark.parametrize("workers", [0, 3])
def test_a_passed_socket_is_served_and_the_manager_told(activated, manager, target, workers, bind):
    """READY with the status once it serves, RELOADING with the clock and READY again, STOPPING; the socket stays."""
    process, port = activated("--workers", str(workers), bind=bind)
    fields, sender = manager.hear("READY")
    assert sender == process.pid == int(fields["MAINPID"])
    assert f"127.0.0.1:{port}" in fields["STATUS"]
    first = ask(port)
    assert (first == process.pid) == (workers == 0)

    before = time.monotonic_ns() // 1000
    process.send_signal(signal.SIGHUP)
    fields, sender = manager.hear("RELOADING")
    assert sender == process.pid
    assert before <= int(fields["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    assert manager.hear("READY")[1] == process.pid
    if workers:  # those that were told to leave may still take who had come
        wait_other(port, first)
    else:
        assert ask(port) == first

    process.terminate()
    fields, sender = manager.hear("STOPPING")
    assert sender == process.pid
    assert fields["STATUS"] == "draining"
    assert process.wait(PATIENCE) == 0
    socket.create_connection(("127.0.0.1", port), PATIENCE).close()  # the manager's socket is not shut by our drain


def test_who_connects_before_the_service_runs_is_served(activated, manager):
    """Socket activation: the connection that is the reason for the start is the first to be answered."""
    with socket.socket() as client:
        client.settimeout(PATIENCE)
        process, port = activated("--workers", "2")
        client.connect(("127.0.0.1", port))
        assert client.recv(100).startswith(b"one ")
    process.terminate()
    assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_the_watchdog_is_fed_by_whoever_is_the_service(activated, manager, tmp_path, workers):
    """Before and after an upgrade, whose process has another pid; the old one does not say that the service stops."""
    pidfile = tmp_path / "pid"
    words = ("--workers", str(workers), "--pidfile", str(pidfile))
    process, port = activated(*words, env={"WATCHDOG_USEC": "4000000"})
    assert manager.hear("WATCHDOG")[1] == process.pid
    assert manager.hear("READY")[1] == process.pid
    process.send_signal(signal.SIGUSR2)
    fields, _ = manager.hear("MAINPID", by=process.pid)  # the main process vouches for the next: NotifyAccess=main
    heir = int(fields["MAINPID"])
    assert heir != process.pid
    assert fields["READY"] == fields["WATCHDOG"] == "1"  # what the heir has said before was not heard
    assert manager.hear("READY", by=heir)[0]["MAINPID"] == str(heir)
    assert process.wait(PATIENCE) == 0
    manager.hear("WATCHDOG", by=heir)
    assert ask(port) == heir or workers
    os.kill(heir, signal.SIGTERM)
    assert manager.hear("STOPPING")[1] == heir


def test_a_reload_that_fails_is_over_for_the_manager_too(activated, manager, target):
    """READY again, by the old code: `systemctl reload` must not wait for ever."""
    process, port = activated("--workers", "1")
    manager.hear("READY")
    old = ask(port)
    target.write_text("raise RuntimeError('not today')\n")
    process.send_signal(signal.SIGHUP)
    manager.hear("RELOADING")
    manager.hear("READY")
    assert ask(port) == old


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reload_that_is_refused_is_one_for_the_manager_too(activated, manager, target, workers):
    """RELOADING and READY: ``Type=notify-reload`` waits for both, whatever became of the reload."""
    settings = target.with_name("settings.toml")
    settings.write_text("lifetime = 60\n")
    process, port = activated("--workers", str(workers), "--config", str(settings))
    manager.hear("READY")
    settings.write_text("lifetime = 'for ever'\n")
    process.send_signal(signal.SIGHUP)
    manager.hear("RELOADING")
    manager.hear("READY", by=process.pid)
    ask(port)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reload_that_an_upgrade_overtakes_is_over_with_it(activated, manager, target, workers):
    """The old process says both: its heir's READY may come before it is known to the manager."""
    came, go = target.with_name("came"), target.with_name("go")
    waits = (
        f"import os, time\nopen({str(came)!r}, 'w').close()\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
    )
    process, _ = activated("--workers", str(workers))
    manager.hear("READY")
    target.write_text(waits + target.read_text())
    process.send_signal(signal.SIGUSR2)
    wait_until(came.exists)  # signals that are pending together come by their numbers, and HUP's is 1
    process.send_signal(signal.SIGHUP)
    manager.hear("RELOADING", by=process.pid)
    go.touch()
    manager.hear("READY", by=process.pid)
    fields, heir = manager.hear("READY")
    assert fields["MAINPID"] == str(heir) != str(process.pid)
    os.kill(heir, signal.SIGTERM)


def test_status_says_how_many_serve(activated, manager):
    """``systemctl status`` shows it, and what becomes of it."""
    process, port = activated("--workers", "2")
    manager.wait_status(f"2 of 2 workers on tcp://127.0.0.1:{port}")
    os.kill(ask(port), signal.SIGKILL)
    manager.wait_status(f"1 of 2 workers on tcp://127.0.0.1:{port}")
    manager.wait_status(f"2 of 2 workers on tcp://127.0.0.1:{port}")
    process.send_signal(signal.SIGTTOU)
    manager.wait_status(f"1 of 1 workers on tcp://127.0.0.1:{port}")
    manager.forget()
    process.send_signal(signal.SIGHUP)
    told = manager.hear("READY")[0]["STATUS"]
    assert told == f"1 of 1 workers on tcp://127.0.0.1:{port}"
    assert not manager.has_heard("0 of 1")  # the old one has served all the while


def test_the_watchdog_is_fed_while_a_process_alone_drains(activated, manager, target):
    """A reload that waits for a handler is not taken for a hang, however long it may wait."""
    go = target.with_name("go")
    waits = f"while not os.path.exists({str(go)!r}): time.sleep(0.01)"
    target.write_text(target.read_text().replace("while data :=", f"{waits}\n        while data :="))
    watchdog = {"WATCHDOG_USEC": "200000"}
    process, port = activated("--workers", "0", env=watchdog)
    manager.hear("READY")
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        client.makefile().readline()
        process.send_signal(signal.SIGHUP)
        manager.hear("RELOADING")
        manager.forget()
        for _ in range(20):
            manager.hear("WATCHDOG", by=process.pid)
    go.touch()
    manager.hear("READY", by=process.pid)
