"""A served program whose log can be followed, and clients that say who answers them."""

import contextlib
import re
import socket
import subprocess
import threading
import time

import pytest

PATIENCE = 20.0  # seconds; a worker's start and a drain take far less

HANDLER = """
import os, sys, time, harken
WORD = "one"
class Tell(harken.BaseRequestHandler):
    def handle(self):
        if isinstance(self.request, tuple):
            self.request[1].sendto(f"{WORD} {os.getpid()}".encode(), self.client_address)
            return
        self.request.sendall(f"{WORD} {os.getpid()}\\n".encode())
        while data := self.request.recv(100):
            if data == b"spin\\n":
                while True:
                    pass
            if data == b"die\\n":
                os._exit(7)
            self.request.sendall(data)
"""


class Service:
    """A running ``harken serve``."""

    def __init__(self, process, port, lines):
        self.process = process
        self.pid = process.pid
        self.port = port
        self._lines = lines
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self):
        with contextlib.suppress(ValueError):  # the test is over: whoever ended the process has closed the file
            for line in self.process.stderr:
                with self._news:
                    self._lines.append(line)
                    self._news.notify_all()

    def wait_log(self, pattern, count=1):
        """Wait until the log has ``count`` lines that match; return the last of them."""
        with self._news:
            found = self._news.wait_for(lambda: len(self._found(pattern)) >= count, PATIENCE)
            assert found, f"no {pattern!r} (times {count}) in the log:\n{self.log}"
            return self._found(pattern)[count - 1] if count else None

    @property
    def log(self):
        """The log so far."""
        return "".join(self._lines)

    def said(self, pattern, count=1):
        """Whether the log has ``count`` lines that match by now."""
        return len(self._found(pattern)) >= count

    def _found(self, pattern):
        return [match for line in list(self._lines) if (match := re.search(pattern, line))]

    def workers(self, count):
        """Wait until ``count`` workers have started; return their pids."""
        self.wait_log(r"worker started: pid (\d+)", count)
        return [int(match[1]) for match in self._found(r"worker started: pid (\d+)")]

    def connect(self):
        """Return a client."""
        client = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        client.settimeout(PATIENCE)
        return client

    def ask(self):
        """Return the word and the pid of whoever answers."""
        with self.connect() as client:
            word, pid = client.makefile().readline().split()
            return word, int(pid)

    def wait_answer(self, word):
        """Ask until ``word`` answers."""
        end = time.monotonic() + PATIENCE
        while (answer := self.ask())[0] != word:
            assert time.monotonic() < end, f"still {answer}"
        return answer[1]

    def status(self):
        """Wait for the process; return its status. Its log goes on where a successor lives, which writes to it too."""
        return self.process.wait(PATIENCE)

    def end(self):
        """Wait for the process, and for whoever else writes to its log; return its status and its whole log."""
        status = self.status()
        self._thread.join(PATIENCE)
        return status, "".join(self._lines)


@pytest.fixture
def target(tmp_path):
    """The file with the handler class ``Tell``."""
    path = tmp_path / "telling.py"
    path.write_text(HANDLER)
    return path


@pytest.fixture
def service(run_program, target):
    """Return a function that starts ``harken serve`` on the handler and waits until it listens."""

    def start(*words, bind="tcp://127.0.0.1:0", **options):
        words = (*(() if bind is None else ("--bind", bind)), *words)
        process = run_program(
            "-m", "harken", "serve", f"{target}:Tell", *words, stderr=subprocess.PIPE, cwd=target.parent, **options
        )
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"info +listening: address (\S+?),", line):
                break
        else:
            raise AssertionError("it did not start:\n" + "".join(lines))
        port = int(found[1].rpartition(":")[2]) if found[1].startswith(("tcp", "tls", "udp")) else 0
        return Service(process, port, lines)

    return start


class Load:
    """Short connections, one after the other in several threads, until told to stop."""

    def __init__(self, port, threads=3):
        self.answers = 0
        self.failures = []
        self._stop = threading.Event()
        self._port = port
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]

    def _run(self):
        while not self._stop.is_set():
            try:
                with socket.create_connection(("127.0.0.1", self._port), PATIENCE) as client:
                    client.sendall(b"x")
                    client.shutdown(socket.SHUT_WR)
                    said = b""
                    while data := client.recv(100):
                        said += data
                assert said.endswith(b"\nx"), said
                with self._lock:
                    self.answers += 1
            except (OSError, AssertionError) as error:
                self.failures.append(repr(error))
                return

    def wait(self, more):
        """Wait for ``more`` answers."""
        goal = self.answers + more
        end = time.monotonic() + PATIENCE
        while self.answers < goal:
            assert not self.failures, self.failures
            assert time.monotonic() < end, f"{self.answers} of {goal} answers"
            time.sleep(0.01)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc):
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE)


@pytest.fixture
def load():
    """The class of clients that keep coming."""
    return Load
