"""Datagrams, threads and processes: where a request runs and what it finds there."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from .kit import LOCAL, PATIENCE, ask, connect, join, python, read_all, run, serving

# --- datagrams --------------------------------------------------------------------------------------------------------


def datagram_client() -> socket.socket:
    """A bound datagram socket with a timeout."""
    client = socket.socket(type=socket.SOCK_DGRAM)
    client.settimeout(PATIENCE)
    client.bind(LOCAL)
    return client


@pytest.mark.parametrize("name", ["UDPServer", "ThreadingUDPServer"])
def test_datagram_request_is_bytes_and_the_servers_socket(impl: Any, name: str) -> None:
    """`self.request` is `(bytes, server.socket)`, the very object, and answers go by `sendto`."""
    seen = []

    class Answer(impl.BaseRequestHandler):
        def handle(self) -> None:
            data, sock = self.request
            seen.append((type(self.request), type(data), sock is self.server.socket))
            sock.sendto(data.upper(), self.client_address)

    with serving(getattr(impl, name)(LOCAL, Answer)) as server, datagram_client() as client:
        client.sendto(b"ping", server.server_address)
        assert client.recv(100) == b"PING"
    assert seen == [(tuple, bytes, True)]


def test_datagram_answer_later_from_another_thread(impl: Any) -> None:
    """The answer may come from any thread, after the handler's return, by the handler's or the server's socket."""
    threads = []

    class Later(impl.BaseRequestHandler):
        def handle(self) -> None:
            data, sock = self.request
            threads.append(run(sock.sendto, data + b" one", self.client_address))
            threads.append(run(self.server.socket.sendto, data + b" two", self.client_address))

    with serving(impl.UDPServer(LOCAL, Later)) as server, datagram_client() as client:
        client.sendto(b"ping", server.server_address)
        assert {client.recv(100), client.recv(100)} == {b"ping one", b"ping two"}
    for thread in threads:
        join(thread)


@pytest.mark.parametrize("name", ["UDPServer", "ThreadingUDPServer", "ForkingUDPServer"])
def test_datagram_request_handler(impl: Any, name: str) -> None:
    """DatagramRequestHandler reads the packet from rfile and sends wfile at the end, to each its own."""

    class Answer(impl.DatagramRequestHandler):
        def handle(self) -> None:
            assert self.packet == self.rfile.getvalue()
            assert isinstance(self.socket, socket.socket)
            self.wfile.write(self.rfile.read()[::-1])

    with serving(getattr(impl, name)(LOCAL, Answer)) as server, datagram_client() as one, datagram_client() as two:
        one.sendto(b"abc", server.server_address)
        two.sendto(b"def", server.server_address)
        assert (one.recv(100), two.recv(100)) == (b"cba", b"fed")


def test_empty_datagrams_are_requests(impl: Any) -> None:
    """An empty datagram reaches the handler."""
    got: queue.Queue[bytes] = queue.Queue()

    class Take(impl.BaseRequestHandler):
        def handle(self) -> None:
            got.put(self.request[0])

    with serving(impl.UDPServer(LOCAL, Take)) as server, datagram_client() as client:
        client.sendto(b"", server.server_address)
        client.sendto(b"x", server.server_address)
        assert [got.get(timeout=PATIENCE), got.get(timeout=PATIENCE)] == [b"", b"x"]


def test_max_packet_size_on_the_instance(impl: Any) -> None:
    """`server.max_packet_size` raised or lowered on the instance is what is read at most."""
    got: queue.Queue[int] = queue.Queue()

    class Take(impl.BaseRequestHandler):
        def handle(self) -> None:
            got.put(len(self.request[0]))

    with serving(impl.UDPServer(LOCAL, Take)) as server, datagram_client() as client:
        for size, expected in ((60000, 50000), (100, 100)):
            server.max_packet_size = size
            client.sendto(bytes(50000), server.server_address)
            assert got.get(timeout=PATIENCE) == expected


def test_unix_datagrams(impl: Any, tmp_path: Path) -> None:
    """Unix datagram servers answer clients that have a path."""

    class Answer(impl.DatagramRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.packet.upper())

    with (
        serving(impl.ThreadingUnixDatagramServer(str(tmp_path / "s"), Answer)) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client,
    ):
        client.settimeout(PATIENCE)
        client.bind(str(tmp_path / "c"))
        client.sendto(b"ping", server.server_address)
        assert client.recv(100) == b"PING"


# --- threads ----------------------------------------------------------------------------------------------------------


def test_thread_locals_are_fresh_and_dropped(impl: Any) -> None:
    """Each request finds an empty threading.local(), and what it put there is dropped after it."""
    local = threading.local()
    found = []
    dropped = threading.Semaphore(0)

    class Resource:
        def __del__(self) -> None:
            dropped.release()

    class Use(impl.StreamRequestHandler):
        def handle(self) -> None:
            found.append(hasattr(local, "resource"))
            local.resource = Resource()
            self.wfile.write(self.rfile.readline())

    with serving(impl.ThreadingTCPServer(LOCAL, Use)) as server:
        for _ in range(5):
            assert ask(server.server_address) == b"hello\n"
            assert dropped.acquire(timeout=PATIENCE)
    assert found == [False] * 5


def test_any_number_of_handlers_at_once(impl: Any) -> None:
    """150 connections held open each have a handler running, each in a thread of its own that enumerate() shows."""
    count = 150
    everybody = threading.Barrier(count + 1)
    threads = []

    class Hold(impl.StreamRequestHandler):
        def handle(self) -> None:
            threads.append(threading.current_thread())
            everybody.wait(PATIENCE)
            self.wfile.write(b"together")

    roomy = type("Roomy", (impl.ThreadingTCPServer,), {"request_queue_size": 2 * count})
    with serving(roomy(LOCAL, Hold)) as server:
        clients = [connect(server.server_address) for _ in range(count)]
        wait_until(lambda: len(threads) == count)
        assert set(threads) <= set(threading.enumerate())
        assert len({thread.ident for thread in threads}) == count
        everybody.wait(PATIENCE)
        assert all(read_all(client) == b"together" for client in clients)
        for client in clients:
            client.close()


def test_state_keyed_by_thread(impl: Any) -> None:
    """Handlers that find their state by `threading.current_thread()` do not meet one another's."""
    states: dict[str, bytes] = {}

    class Keyed(impl.StreamRequestHandler):
        def handle(self) -> None:
            name = threading.current_thread().name
            assert name not in states
            states[name] = self.rfile.readline()
            both.wait(PATIENCE)
            self.wfile.write(states.pop(name))

    both = threading.Barrier(2)
    with serving(impl.ThreadingTCPServer(LOCAL, Keyed)) as server:
        answers: dict[bytes, bytes] = {}

        def client(word: bytes) -> None:
            answers[word] = ask(server.server_address, word)

        for thread in [run(client, b"one\n"), run(client, b"two\n")]:
            join(thread)
    assert answers == {b"one\n": b"one\n", b"two\n": b"two\n"}


def test_plain_server_runs_in_its_own_thread_one_after_the_other(impl: Any) -> None:
    """TCPServer runs handlers in the thread of serve_forever; a second client waits for the first."""
    first, gate = threading.Event(), threading.Event()
    threads = []

    class Slow(impl.StreamRequestHandler):
        def handle(self) -> None:
            threads.append(threading.get_ident())
            first.set()
            gate.wait(PATIENCE)
            self.wfile.write(self.rfile.readline())

    server = impl.TCPServer(LOCAL, Slow)
    loop = run(server.serve_forever, 0.05)
    with connect(server.server_address) as one, connect(server.server_address) as two:
        one.sendall(b"1\n")
        two.sendall(b"2\n")
        assert first.wait(PATIENCE)
        two.settimeout(0.1)
        with pytest.raises(TimeoutError):
            two.recv(1)
        assert len(threads) == 1
        gate.set()
        two.settimeout(PATIENCE)
        assert (read_all(one), read_all(two)) == (b"1\n", b"2\n")
    server.shutdown()
    join(loop)
    server.server_close()
    assert threads == [loop.ident] * 2


def test_program_with_non_daemon_threads_waits_for_them() -> None:
    """A program whose main thread ends waits for handlers that are no daemons, and not for daemons."""
    program = """
import socketserver, socket, threading, sys, time
daemon = sys.argv[1] == "daemon"
started = threading.Event()
class Slow(socketserver.BaseRequestHandler):
    def handle(self):
        started.set()
        time.sleep(0.3 if not daemon else 30)
        print("finished", flush=True)
class Server(socketserver.ThreadingTCPServer):
    daemon_threads = daemon
server = Server(("127.0.0.1", 0), Slow)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = socket.create_connection(server.server_address)
started.wait()
"""
    for name in ("stdlib", "harken"):
        for way, expected in (("daemon", ""), ("plain", "finished\n")):
            child = python(name, program, way)
            try:
                out, _ = child.communicate(timeout=PATIENCE)
            finally:
                child.kill()
            assert (name, way, out) == (name, way, expected)


# --- processes --------------------------------------------------------------------------------------------------------


def test_fork_a_process_each(impl: Any) -> None:
    """ForkingMixIn runs each handler in a child of its own; globals changed there do not change here."""
    state = {"count": 0}

    class Count(impl.StreamRequestHandler):
        def handle(self) -> None:
            state["count"] += 1
            self.wfile.write(b"%d %d" % (os.getpid(), state["count"]))

    with serving(impl.ForkingTCPServer(LOCAL, Count)) as server:
        answers = [ask(server.server_address, b"").split() for _ in range(3)]
    assert [count for _, count in answers] == [b"1"] * 3
    assert len({pid for pid, _ in answers}) == 3
    assert state == {"count": 0}


def test_fork_child_never_returns() -> None:
    """The child ends by os._exit: no atexit, no `finally` of the caller, no buffered output twice."""
    program = """
import atexit, os, socket, socketserver, sys, threading
atexit.register(lambda: print("atexit", flush=True))
class Say(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(b"hi")
server = socketserver.ForkingTCPServer(("127.0.0.1", 0), Say)
client = socket.create_connection(server.server_address)
try:
    server.handle_request()
    assert client.recv(10) == b"hi" and client.recv(10) == b""
    server.server_close()
finally:
    print("finally", flush=True)
"""
    for name in ("stdlib", "harken"):
        child = python(name, program)
        try:
            out, err = child.communicate(timeout=PATIENCE)
        finally:
            child.kill()
        assert (name, out, err) == (name, "finally\natexit\n", "")


def test_fork_leaves_other_children_alone(impl: Any) -> None:
    """Children that the program started are not waited for: their status is there when the program asks."""
    other = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])

    class Say(impl.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"hi")

    with serving(impl.ForkingTCPServer(LOCAL, Say), poll_interval=0.02) as server:
        wait_until(lambda: zombie(other.pid))
        for _ in range(3):
            assert ask(server.server_address, b"") == b"hi"
    assert other.wait(PATIENCE) == 7


def zombie(pid: int) -> bool:
    """Tell whether a child has ended and waits to be asked."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_fork_reaps_while_idle(impl: Any) -> None:
    """Children that have ended are reaped by the loop without another request."""

    class Say(impl.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"%d" % os.getpid())

    with serving(impl.ForkingTCPServer(LOCAL, Say), poll_interval=0.02) as server:
        pid = int(ask(server.server_address, b""))
        wait_until(lambda: not Path(f"/proc/{pid}").exists())
        wait_until(lambda: not server.active_children)


def test_fork_shows_and_swallows_exceptions(impl: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """An exception in the child is printed there, the client sees the end, and the server goes on."""

    class Fail(impl.StreamRequestHandler):
        def handle(self) -> None:
            raise ValueError("in the child")

    with serving(impl.ForkingTCPServer(LOCAL, Fail)) as server:
        assert ask(server.server_address, b"") == b""
        assert ask(server.server_address, b"") == b""
    assert capfd.readouterr().err.count("ValueError: in the child") == 2


def test_fork_closes_the_connection_in_the_parent(impl: Any) -> None:
    """The parent keeps no descriptor of a child's connection: the child's end is the connection's end."""
    before = set(os.listdir("/proc/self/fd"))

    class Hold(impl.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"%d" % os.getpid())
            time.sleep(PATIENCE)

    with serving(impl.ForkingTCPServer(LOCAL, Hold)) as server:
        with connect(server.server_address) as client:
            pid = int(client.recv(100))
            os.kill(pid, signal.SIGKILL)
            assert client.recv(1) == b""
    assert set(os.listdir("/proc/self/fd")) == before


def test_fork_close_waits_as_told(impl: Any) -> None:
    """`server_close` waits for the children unless `block_on_close` is false."""

    class Slow(impl.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"started")
            self.rfile.readline()

    for block in (True, False):
        server = type("Server", (impl.ForkingTCPServer,), {"block_on_close": block})(LOCAL, Slow)
        loop = run(server.serve_forever, 0.02)
        with connect(server.server_address) as client:
            assert client.recv(100) == b"started"
            server.shutdown()
            join(loop)
            closer = run(server.server_close)
            closer.join(0.2)
            assert closer.is_alive() is block
            client.sendall(b"go\n")
            assert client.recv(1) == b""
            join(closer)
        server.collect_children(blocking=True)
        assert not server.active_children
