"""What debuggers, profilers and faulthandler see of green threads: what the how-to guide says they do."""

from __future__ import annotations

import cProfile
import faulthandler
import pstats
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import harken
from harken import green

PATIENCE = 10.0  # seconds
LOCAL = ("127.0.0.1", 0)


def within_a_handler(function: Callable[[], Any]) -> Any:
    """Call something in a green handler, while another handler waits; return what it returned."""
    results: list[Any] = []

    class Handler(harken.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b".")
            if self.request.recv(1) == b"c":
                results.append(function())
                self.request.sendall(b"!")
            else:
                self.wait_for_the_end()

        def wait_for_the_end(self) -> None:
            self.request.recv(1)

    with harken.background(harken.GreenTCPServer(LOCAL, Handler)) as server:
        with (
            socket.create_connection(server.server_address, PATIENCE) as other,
            socket.create_connection(server.server_address, PATIENCE) as client,
        ):
            other.recv(1)
            other.sendall(b"w")
            client.recv(1)
            client.sendall(b"c")
            assert client.recv(1) == b"!"
    return results[0]


def test_faulthandler_shows_the_running_green_thread() -> None:
    """Its whole stack, and nothing of those that wait."""

    def dump() -> str:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return file.read()

    text = within_a_handler(dump)
    assert " in dump" in text
    assert " in handle" in text
    assert "wait_for_the_end" not in text


def test_the_current_frame_of_the_hubs_thread_is_the_handlers() -> None:
    """``sys._current_frames``, which samplers use, names the handler for the hub's thread."""

    def look() -> list[str]:
        frame = sys._current_frames()[threading.get_ident()]
        names = []
        while frame is not None:
            names.append(frame.f_code.co_name)
            frame = frame.f_back  # type: ignore[assignment]
        return names

    names = within_a_handler(look)
    assert "handle" in names
    assert "wait_for_the_end" not in names


def test_a_profile_covers_the_hubs_thread() -> None:
    """What a handler calls is counted, also after it has waited."""

    def counted() -> None:
        green.sleep(0.01)

    def profiled() -> dict[str, int]:
        profile = cProfile.Profile()
        profile.enable()
        counted()
        counted()
        profile.disable()
        stats: Any = pstats.Stats(profile)
        return {name: count for (_, _, name), (count, *_) in stats.stats.items()}

    assert within_a_handler(profiled)["counted"] == 2


PROGRAM = """
import socket, threading
import harken

class Handler(harken.BaseRequestHandler):
    def handle(self):
        secret = self.request.recv(100)
        breakpoint()
        self.request.sendall(secret)

with harken.background(harken.GreenTCPServer(("127.0.0.1", 0), Handler)) as server:
    with socket.create_connection(server.server_address) as client:
        client.sendall(b"a secret")
        print(client.recv(100))
"""


def test_pdb_stops_in_a_handler(run_program: Any) -> None:
    """``breakpoint()`` shows the handler's locals and stack, and lets it go on."""
    import subprocess

    process = run_program("-c", PROGRAM, stdin=subprocess.PIPE)
    out, err = process.communicate("p secret\nwhere\nc\n", timeout=30)
    assert "(Pdb) b'a secret'" in out, err
    assert "handle()" in out
    assert out.rstrip().endswith("b'a secret'")
