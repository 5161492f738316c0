"""Running servers, clients and programs for the tests beside this file."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from waiting import wait_until

import harken
from harken import events
from harken.testing._clients import opening

LOCAL = ("127.0.0.1", 0)
PATIENCE = 15.0  # seconds that anything may take before the test fails


class Seen(list[events.Event]):
    """The events of one server, as they come."""

    engine = ""

    def of(self, name: str) -> list[events.Event]:
        """Return those of one name."""
        return [event for event in list(self) if event.name == name]

    def wait(self, name: str, count: int = 1) -> list[events.Event]:
        """Wait until there are ``count`` of one name, and return them."""
        wait_until(lambda: len(self.of(name)) >= count)
        return self.of(name)


@contextlib.contextmanager
def seeing(*names: str) -> Iterator[Seen]:
    """Gather the events of these names (all, when none is given) while the block runs."""
    seen = Seen()
    unsubscribe = events.subscribe(seen.append, *names)
    try:
        yield seen
    finally:
        unsubscribe()


@contextlib.contextmanager
def running(server: Any, poll_interval: float = 30.0) -> Iterator[Any]:
    """Serve in a thread while the block runs; the loop's own turns are too rare to help."""
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            server.serve_forever(poll_interval)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        assert server.wait_ready(PATIENCE)
        yield server
    finally:
        stopper = threading.Thread(target=server.shutdown, daemon=True)
        stopper.start()
        stopper.join(PATIENCE)
        thread.join(PATIENCE)
        closer = threading.Thread(target=server.server_close, daemon=True)
        closer.start()
        closer.join(PATIENCE)
        alive = [name for name, each in (("shutdown", stopper), ("loop", thread), ("close", closer)) if each.is_alive()]
    assert not alive, f"did not end: {alive}"
    assert not failures, f"serve_forever() raised {failures}"


def connect(address: Any) -> socket.socket:
    """Return a connected client with a timeout, of which forked children keep no copy."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with opening() as ours:
        client = socket.socket(family)
        ours.add(client)
    client.settimeout(PATIENCE)
    try:
        client.connect(address)
    except OSError:
        client.close()
        raise
    return client


def receive(client: socket.socket, size: int) -> bytes:
    """Read ``size`` bytes, or to the end if that comes before."""
    data = b""
    while len(data) < size and (part := client.recv(size - len(data))):
        data += part
    return data


def exchange(client: socket.socket, data: bytes = b"hello") -> None:
    """Send something to an echo handler.

    Raises:
        AssertionError: it does not come back.
    """
    client.sendall(data)
    assert receive(client, len(data)) == data


def ends(client: socket.socket, patience: float = PATIENCE) -> str:
    """Wait for the connection's end and say which it was: ``closed`` or ``reset``."""
    client.settimeout(patience)
    try:
        while client.recv(65536):
            pass
    except ConnectionResetError:
        return "reset"
    return "closed"


def fate(address: Any) -> str:
    """Connect, wait for the end and say which it was: ``closed`` or ``reset``, which may come within connect()."""
    try:
        client = connect(address)
    except ConnectionResetError:
        return "reset"
    with client:
        return ends(client)


def is_silent(client: socket.socket, seconds: float = 0.2) -> bool:
    """Tell whether nothing comes for a while."""
    return not select.select([client], [], [], seconds)[0]


def reset(client: socket.socket) -> None:
    """Close so that the other end gets RST."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


class Echo(harken.BaseRequestHandler):
    """Sends back what it reads."""

    def handle(self) -> None:
        """Echo to the end."""
        while data := self.request.recv(65536):
            self.request.sendall(data)


# What a program under test begins with: its events go to stdout, a JSON object a line.
PRELUDE = """
import json, os, signal, sys, threading, time
import harken
from harken import events

def tell(event):
    told = {name: getattr(event, name) for name in ("name", "address", "reason", "shed", "connection")}
    os.write(1, (json.dumps(told) + "\\n").encode())

events.subscribe(tell, "listening", "opened", "closed", "paused", "resumed", "handler_failed")

class Echo(harken.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)
"""


class Program:
    """A program under test, whose events are read as they come."""

    def __init__(self, start: Callable[..., subprocess.Popen[str]], folder: Path, text: str, *words: str) -> None:
        script = folder / "program.py"
        script.write_text(PRELUDE + text)
        self.process = start(script, *words)
        self.seen: list[dict[str, Any]] = []
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._errors: list[str] = []
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_errors)]
        for reader in self._readers:
            reader.start()
        url = self.wait("listening")["address"]
        host, _, port = url.removeprefix("tcp://").rpartition(":")
        self.address = (host, int(port))

    def wait(self, name: str, count: int = 1) -> dict[str, Any]:
        """Wait for the event of this name, the ``count``-th of all, and return it."""
        end = time.monotonic() + PATIENCE
        while len(found := self.of(name)) < count:
            try:
                line = self._lines.get(timeout=max(0.01, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {name!r} number {count} among {self.seen}") from None
            assert line is not None, f"the program ended: {''.join(self._errors)}"
            self.seen.append(line)
        return found[count - 1]

    def of(self, name: str) -> list[dict[str, Any]]:
        """Return the events of this name so far."""
        while True:
            try:
                line = self._lines.get_nowait()
            except queue.Empty:
                return [event for event in self.seen if event["name"] == name]
            if line is not None:
                self.seen.append(line)

    def send(self, signum: int) -> None:
        """Send a signal to the program's own process."""
        os.kill(self.process.pid, signum)

    def expect_exit(self, status: int, within: float) -> str:
        """Wait for its end and return what it wrote to stderr.

        Raises:
            AssertionError: it ended with another status, or not in time.
        """
        try:
            found = self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the program still ran after {within:g} s") from None
        for reader in self._readers:
            reader.join(PATIENCE)
        errors = "".join(self._errors)
        assert found == status, f"exit status {found}, not {status}: {errors}"
        return errors

    def cpu_seconds(self) -> float:
        """Return the CPU time that it has used, in seconds."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _read(self) -> None:
        for line in _lines_of(self.process.stdout):
            self._lines.put(json.loads(line))
        self._lines.put(None)

    def _read_errors(self) -> None:
        self._errors.extend(_lines_of(self.process.stderr))


def _lines_of(stream: Any) -> Iterator[str]:
    with contextlib.suppress(ValueError):  # the test is over: whoever ended the process has closed the file
        yield from stream
