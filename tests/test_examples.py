"""Every example runs as its head says."""

from __future__ import annotations

import datetime as dt
import re
import socket
import struct
import threading
from pathlib import Path

import pytest

import harken

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SECONDS = 20
TESTED = {"async_relay.py", "chat.py", "echo.py", "old_server.py", "proxy.py", "udp_time.py"}


def wait_for(stream, pattern, count=1):
    """Read a program's output until ``count`` lines match; return the last match's first group of each."""
    found: list[str] = []
    seen: list[str] = []

    def read():
        for line in stream:
            seen.append(line)
            match = re.search(pattern, line)
            if match:
                found.append(match[1])
            if len(found) == count:
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(SECONDS)
    assert len(found) == count, seen
    return found


def dial(port):
    """Connect to a local port."""
    return socket.create_connection(("127.0.0.1", int(port)), timeout=SECONDS)


def test_no_example_is_forgotten():
    """Each file of the folder is one of those tested here."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == TESTED


@pytest.mark.parametrize("name", sorted(TESTED))
def test_an_example_is_short(name):
    """One screen, and a head that says how to run it."""
    text = (EXAMPLES / name).read_text()
    assert len(text.splitlines()) <= 60
    assert f"examples/{name}" in text.split('"""')[1]


@pytest.mark.parametrize("engine", ["thread", "pool", "fork", "inline"])
def test_echo(run_program, tmp_path, engine):
    """One handler on TCP, Unix and UDP at once."""
    binds = ["--bind", "tcp://127.0.0.1:0", "--bind", f"unix:{tmp_path}/s", "--bind", "udp://127.0.0.1:0"]
    process = run_program("-m", "harken", "serve", EXAMPLES / "echo.py:Echo", "--engine", engine, *binds)
    tcp, _, udp = wait_for(process.stderr, r"^listening on \w+:\S*?(\d*) \(", 3)
    with dial(tcp) as client:
        client.sendall(b"over tcp")
        assert client.recv(100) == b"over tcp"
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS)
        client.connect(f"{tmp_path}/s")
        client.sendall(b"over unix")
        assert client.recv(100) == b"over unix"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(SECONDS)
        client.sendto(b"over udp", ("127.0.0.1", int(udp)))
        assert client.recv(100) == b"over udp"


@pytest.mark.parametrize("prefix", [("-m", "harken", "run"), ()], ids=["harken run", "python"])
def test_old_server(run_program, prefix):
    """The unchanged program, under harken and, to show that it is unchanged, under plain Python."""
    process = run_program(*prefix, EXAMPLES / "old_server.py", "0")
    (port,) = wait_for(process.stdout, r"^serving on 127.0.0.1 (\d+)")
    with dial(port) as first, dial(port) as second:
        second.sendall(b"b")
        first.sendall(b"a")
        assert (first.recv(1), second.recv(1)) == (b"A", b"B")


def test_udp_time(run_program):
    """A datagram is answered with the time."""
    process = run_program(EXAMPLES / "udp_time.py", "0")
    (port,) = wait_for(process.stdout, r"^serving on 127.0.0.1 (\d+)")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(SECONDS)
        client.sendto(b"?", ("127.0.0.1", int(port)))
        told = dt.datetime.fromisoformat(client.recv(100).decode().strip())
    assert abs((dt.datetime.now(dt.UTC) - told).total_seconds()) < SECONDS


def test_chat(run_program):
    """Two in a room hear one another; a name is one person's; who leaves is missed."""
    process = run_program("-m", "harken", "serve", EXAMPLES / "chat.py:Chat", "--bind", "tcp://127.0.0.1:0")
    (port,) = wait_for(process.stderr, r"^listening on tcp://127.0.0.1:(\d+)")
    with dial(port) as ann, ann.makefile("rwb", buffering=0) as anns:
        anns.write(b"ann\n")
        assert anns.readline() == b"your name? * ann is here\n"
        with dial(port) as bob, bob.makefile("rwb", buffering=0) as bobs:
            bobs.write(b"bob\n")
            assert bobs.readline() == b"your name? * bob is here\n"
            assert anns.readline() == b"* bob is here\n"
            anns.write(b"hello\n")
            assert bobs.readline() == anns.readline() == b"ann: hello\n"
            with dial(port) as other, other.makefile("rwb", buffering=0) as others:
                others.write(b"bob\n")
                assert others.readline() == b"your name? that name cannot be had\n"
        assert anns.readline() == b"* bob has left\n"


@pytest.mark.parametrize("workers", ["0", "1"])
def test_async_relay(run_program, workers):
    """What one says the others hear; the engine is found from the handler."""
    program = ("-m", "harken", "serve", EXAMPLES / "async_relay.py:Relay", "--bind", "tcp://127.0.0.1:0")
    process = run_program(*program, "--workers", workers)
    (port,) = wait_for(process.stderr, r"^listening on tcp://127.0.0.1:(\d+) \(engine asyncio\)")
    with dial(port) as ann, ann.makefile("rb") as hers:
        assert hers.readline() == b"1 here\n"
        with dial(port) as bob, bob.makefile("rb") as his:
            assert his.readline() == b"2 here\n"
            bob.sendall(b"hello\n")
            assert hers.readline() == b"hello\n"
            ann.sendall(b"good day\n")
            assert his.readline() == b"good day\n"


class Sum(harken.BaseRequestHandler):
    """Says who asks, reads to the end, and only then says how much it was, and sends it back."""

    def handle(self):
        self.request.sendall(f"{self.client_address}\n".encode())
        data = b""
        while more := self.request.recv(65536):
            data += more
        self.request.sendall(f"{len(data)}\n".encode() + data)


@pytest.mark.parametrize("engine", ["thread", "green", "pool"])
def test_proxy(run_program, engine):
    """The backend sees the client; megabytes pass; an end in one direction leaves the other open."""
    backend = harken.ThreadingTCPServer(("127.0.0.1", 0), Sum, proxy="v2", proxy_from=["127.0.0.1"])
    program = ("-m", "harken", "serve", EXAMPLES / "proxy.py:Proxy", "--engine", engine, "--bind", "tcp://127.0.0.1:0")
    with harken.background(backend):
        process = run_program(*program, env={"BACKEND": f"tcp://127.0.0.1:{backend.server_address[1]}"})
        (port,) = wait_for(process.stderr, r"^listening on tcp://127.0.0.1:(\d+)")
        sent = bytes(range(256)) * 16384
        with dial(port) as client, client.makefile("rb") as answer:
            own = client.getsockname()
            assert answer.readline() == f"{own}\n".encode()
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            assert answer.readline() == b"%d\n" % len(sent)
            assert answer.read() == sent


def test_proxy_whose_backend_goes(run_program):
    """When the backend resets, the client is not left waiting; and the next one is served."""
    with socket.create_server(("127.0.0.1", 0)) as backend:
        backend.settimeout(SECONDS)
        program = ("-m", "harken", "serve", EXAMPLES / "proxy.py:Proxy", "--bind", "tcp://127.0.0.1:0")
        process = run_program(*program, env={"BACKEND": f"tcp://127.0.0.1:{backend.getsockname()[1]}"})
        (port,) = wait_for(process.stderr, r"^listening on tcp://127.0.0.1:(\d+)")
        for _ in range(2):
            with dial(port) as client:
                behind, _ = backend.accept()
                behind.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                behind.close()
                assert client.recv(1) == b""
