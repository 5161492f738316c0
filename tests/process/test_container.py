"""As process 1 of a pid namespace, which is what a container is to it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import wait_until

PATIENCE = 20.0
UNSHARE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
ENTER = "import os, sys; os.execvp('unshare', sys.argv[1:])"

# Leaves an orphan behind, which ends a moment later; the kernel makes it a child of process 1.
LEAVES = """
import subprocess, harken
class Leave(harken.StreamRequestHandler):
    def handle(self):
        self.rfile.readline()
        subprocess.run(["sh", "-c", "sleep 0.3 &"], stdin=subprocess.DEVNULL)
        self.wfile.write(b"left\\n")
"""


def may_unshare():
    """Whether a pid namespace can be made here."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0


def children_of(pid):
    """Return the children of a process and their states."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(") ")
            if int(rest.split()[1]) == pid:
                found[int(entry.name)] = (name, rest.split()[0])
    return found


@pytest.fixture
def contained(run_program, tmp_path):
    """``harken serve`` as process 1: the process that waits for it, its pid out here, its port and its log."""
    if not may_unshare():
        pytest.skip("needs a kernel that lets us make a pid namespace")
    (tmp_path / "leaves.py").write_text(LEAVES)
    serve = ("-m", "harken", "serve", "leaves.py:Leave", "--bind", "tcp://127.0.0.1:0", "--control", "none")
    process = run_program("-c", ENTER, *UNSHARE, sys.executable, *serve, cwd=tmp_path)
    for line in process.stderr:
        if found := re.search(r"info +listening: address \S+:(\d+)", line):
            break
    else:
        raise AssertionError("it did not start")
    (pid,) = children_of(process.pid)
    return process, pid, int(found[1])


def test_process_1_reaps_orphans_refuses_to_be_replaced_and_drains(contained):
    """What the kernel and a container's user expect of it."""
    process, pid, port = contained
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        client.sendall(b"go\n")
        assert client.recv(100) == b"left\n"
        wait_until(lambda: ("sleep", "S") in children_of(pid).values())
    wait_until(lambda: not any(name == "sleep" for name, _ in children_of(pid).values()))

    os.kill(pid, signal.SIGUSR2)
    assert any("this is process 1 of a container" in line for line in process.stderr)
    os.kill(pid, signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
