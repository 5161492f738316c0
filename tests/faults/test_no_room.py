"""The kernel has no room for a door in its epoll set: those who come there are served once it has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: apt-get install gcc")

# An epoll_ctl(2) whose next `failing` additions meet max_user_watches.
SHORT_OF_ROOM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/epoll.h>

int failing;

int epoll_ctl(int set, int operation, int fd, struct epoll_event *event) {
    int (*real)(int, int, int, struct epoll_event *) = dlsym(RTLD_NEXT, "epoll_ctl");
    if (operation == EPOLL_CTL_ADD && failing > 0) {
        failing--;
        errno = ENOSPC;
        return -1;
    }
    return real(set, operation, fd, event);
}
"""

# A door that other processes share: whoever was woken leaves the set, and enters it anew.
PROGRAM = """
import contextlib, ctypes, socket, sys, time

failing = ctypes.c_int.in_dll(ctypes.CDLL(None), "failing")
lacking = iter([0, 1, 2, 0])
clients, seen = [], []
end = time.monotonic() + 20


def take():
    with contextlib.suppress(BlockingIOError):
        seen.append(door.accept())


def anew():
    pass


def over():
    if len(seen) == len(clients) and not failing.value:
        times = next(lacking, None)
        if times is None:
            return True
        failing.value = times
        anew()
        clients.append(socket.create_connection(door.getsockname()))
    return time.monotonic() > end


def run_hub(kind):
    from harken import _hub

    hub = _hub.kinds()[kind].Hub()
    hub.watch(door, take, True)
    hub.run(over, lambda: 0.05, lambda: None)


def run_selector(pauses):
    global anew
    from harken.engines import _selector

    class Engine(_selector.SelectorEngine):
        spawn = join = None

    engine = Engine({}.get)
    engine.shares_doors = True
    engine.watch(door, take)
    if pauses:
        anew = lambda: engine.watch(door, take)
    engine.run(over, lambda: None, lambda: 0.05)


with socket.create_server(("127.0.0.1", 0)) as door:
    door.setblocking(False)
    run_hub(sys.argv[1]) if sys.argv[1] in ("compiled", "fallback") else run_selector(sys.argv[1] == "pauses")
    print("served", len(seen))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile what fails."""
    folder = tmp_path_factory.mktemp("room")
    source, library = folder / "room.c", folder / "room.so"
    source.write_text(SHORT_OF_ROOM)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.mark.parametrize("kind", ["compiled", "fallback", "selector", "pauses"])
def test_a_shared_door_is_watched_again_once_there_is_room(library: Path, kind: str) -> None:
    """Although it had left the set already, and nobody else would be told of it."""
    if kind == "compiled":
        pytest.importorskip("harken._hub.compiled")
    before = os.environ.get("LD_PRELOAD")
    environment = {**os.environ, "LD_PRELOAD": f"{before}:{library}" if before else str(library)}
    command = [sys.executable, "-c", PROGRAM, kind]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=58, check=False)
    assert told.stdout == "served 4\n", told.stderr
