"""Signals and forks while connections are busy harm neither side."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from .conftest import FULL, HOSTS, PATIENCE, Serve, Served

SIGNALS = 2000 if FULL else 100
FORKS = 1000 if FULL else 40
MANY_AT_ONCE = [host for host in HOSTS if host.values[0] not in {"inline", "fork"}]


def read_line(client: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n") and (part := client.recv(100)):
        line += part
    return line


@contextlib.contextmanager
def busy(served: Served, count: int) -> Iterator[list[int]]:
    """Let some connections start processes without pause; give a list of what each got through so far."""
    done = [0] * count
    wrong: list[object] = []
    over = threading.Event()

    def work(number: int) -> None:
        with served.connect() as client:
            while not over.is_set():
                client.sendall(b"fork\n" if number % 2 else b"run\n")
                line = read_line(client)
                if line != b"7\n":
                    wrong.append(line)
                    return
                done[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        over.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


@pytest.mark.parametrize("engine, hub", MANY_AT_ONCE)
def test_handlers_start_processes_while_signals_come(engine: str, hub: str | None, serve: Serve) -> None:
    """Children of handlers end with their own status, each connection goes on, and each signal is seen by itself."""
    served = serve(engine, hub, "processes")
    with busy(served, 6) as done:
        assert [served.signal() for _ in range(SIGNALS)] == list(range(1, SIGNALS + 1))
        served.wait_until(lambda: min(done) >= FORKS // 6)
    served.wait_until(lambda: served.ask("census")["open"] == 0)
