"""The green engine: one green thread a connection, in a thread of the engine's own."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import socket
import socketserver
import subprocess
import threading
import time
import urllib.request

import pytest

import harken
from harken import green
from harken._hub import Connection
from harken.engines.green import Engine
from harken.serving import serving_of

PATIENCE = 5.0  # seconds
LOCAL = ("127.0.0.1", 0)


def engine(**options):
    """Return an engine with stdlib's options, changed by ``options``."""
    said = {"daemon_threads": False, "block_on_close": True, "stall_after": None, "max_memory_bytes": None, **options}
    return Engine(said.__getitem__)


def soon():
    """Return a deadline."""
    return time.monotonic() + PATIENCE


class Echo(harken.BaseRequestHandler):
    """Sends back what comes."""

    def handle(self):
        """Echo."""
        while data := self.request.recv(1000):
            self.request.sendall(data)


@contextlib.contextmanager
def serving(server):
    """Serve in a thread."""
    with harken.background(server):
        yield server


def ask(address, data=b"hello"):
    """Send something, end, and return all that comes back."""
    with socket.create_connection(address, PATIENCE) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        got = b""
        while part := client.recv(1000):
            got += part
        return got


# -- spawn and join --------------------------------------------------------------------------------------------------


def test_jobs_run_in_one_thread_that_ends_with_the_last():
    """Without a loop too, as handle_request() needs it."""
    made, seen, gate = engine(), [], green.Event()

    def job(number):
        seen.append((number, threading.current_thread(), green.current()))
        gate.wait()

    for number in range(3):
        assert made.spawn(job, number) == 0
    assert made.join(time.monotonic() + 0.05) == 3
    gate.set()
    assert made.join(soon()) == 0
    threads = {thread for _, thread, _ in seen}
    assert len(threads) == 1
    assert threading.current_thread() not in threads
    assert len({current for *_, current in seen}) == 3
    assert not threads.pop().is_alive()


def test_a_job_does_not_wait_for_itself():
    """join() in a handler waits for the others alone."""
    made, seen, gate = engine(), [], green.Event()

    def other():
        gate.wait()
        seen.append("other")

    def joins():
        gate.set()
        seen.append(made.join(soon()))

    made.spawn(other)
    made.spawn(joins)
    assert made.join(soon()) == 0
    assert seen == ["other", 0]


def test_what_the_hub_cannot_wait_for_gets_a_plain_thread():
    """A foreign object with recv() would keep everybody waiting."""
    made, seen = engine(), []
    near, far = socket.socketpair()
    with near, far:
        made.spawn(lambda request: seen.append((green.current(), request.recv(10))), near)
        made.spawn(lambda request: seen.append((green.current() is not None, request)), (b"datagram", None))
        deadline = soon()
        while not seen and time.monotonic() < deadline:
            time.sleep(0.003)
        far.sendall(b"x")
        assert made.join(soon()) == 0
    assert seen == [(True, (b"datagram", None)), (None, b"x")]


def test_adopt_takes_plain_sockets_alone():
    """Everything else stays as it is."""
    made = engine()
    near, far = socket.socketpair()
    with far, made.adopt(near) as adopted:
        assert type(adopted) is Connection
        assert made.adopt(adopted) is adopted
        for other in (("data", far), object(), None):
            assert made.adopt(other) is other


# -- servers ---------------------------------------------------------------------------------------------------------


def test_requests_are_connections_of_the_hub_from_the_start():
    """The same object passes every hook, so that programs may keep books of it."""
    seen = []

    class Server(harken.GreenTCPServer):
        def verify_request(self, request, client_address):
            seen.append(request)
            return True

        def close_request(self, request):
            seen.append(request)
            super().close_request(request)

    with serving(Server(LOCAL, Echo)) as server:
        assert ask(server.server_address) == b"hello"
    assert len(seen) == 2
    assert seen[0] is seen[1]
    assert type(seen[0]) is Connection


def test_a_program_that_accepts_by_itself_is_served_too():
    """Its plain socket is taken over, with its record."""
    reasons = []

    class Server(harken.GreenTCPServer):
        def get_request(self):
            return self.socket.accept()

    unsubscribe = harken.events.subscribe(lambda event: reasons.append(event.reason), "closed")
    with serving(Server(LOCAL, Echo)) as server:
        assert ask(server.server_address) == b"hello"
        assert server.stats()["engine"] == "green"
    unsubscribe()
    assert reasons == ["peer_closed"]


def test_thousand_idle_clients_in_one_thread():
    """And another is served beside them."""
    with serving(harken.GreenTCPServer(LOCAL, Echo)) as server:
        assert ask(server.server_address) == b"hello"  # from here on its threads are there
        before = threading.active_count()
        clients = [socket.create_connection(server.server_address, PATIENCE) for _ in range(1000)]
        for client in clients[::100]:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        assert ask(server.server_address) == b"hello"
        assert threading.active_count() == before
        for client in clients:
            client.close()


@pytest.mark.parametrize("base", [http.server.HTTPServer, socketserver.TCPServer])
def test_mixin_in_front_of_stdlibs_servers(base):
    """The graft gives them the loop."""
    handler = http.server.SimpleHTTPRequestHandler if base is http.server.HTTPServer else Echo
    server = type("Server", (harken.GreenMixIn, base), {})(LOCAL, handler)
    with serving(server):
        with socket.create_connection(server.server_address):  # an idle one keeps nobody waiting
            if handler is Echo:
                assert ask(server.server_address) == b"hello"
            else:
                url = f"http://127.0.0.1:{server.server_address[1]}/"
                with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                    assert answer.status == 200


def test_the_environment_moves_threading_servers(monkeypatch):
    """HARKEN_ENGINE=green."""
    monkeypatch.setenv("HARKEN_ENGINE", "green")
    with serving(harken.ThreadingTCPServer(LOCAL, Echo)) as server:
        assert server.stats()["engine"] == "green"
        assert ask(server.server_address) == b"hello"


def test_datagrams():
    """A handler that waits does not delay the next datagram."""
    gate = green.Event()

    class Slow(harken.DatagramRequestHandler):
        def handle(self):
            if self.packet == b"slow":
                gate.wait(PATIENCE)
            self.wfile.write(self.packet)

    with serving(harken.GreenUDPServer(LOCAL, Slow)) as server:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(PATIENCE)
            for data in (b"slow", b"quick"):
                client.sendto(data, server.server_address)
            assert client.recv(10) == b"quick"
            gate.set()
            assert client.recv(10) == b"slow"


def test_handlers_have_context_variables_of_their_own():
    """What one sets another does not see, even at the same time."""
    import contextvars

    variable = contextvars.ContextVar("variable", default="unset")

    class Handler(harken.StreamRequestHandler):
        def handle(self):
            for line in self.rfile:
                self.wfile.write(variable.get().encode() + b"\n")
                variable.set(line.decode().strip())

    with serving(harken.GreenTCPServer(LOCAL, Handler)) as server, contextlib.ExitStack() as stack:
        files = []
        for _ in range(2):
            client = stack.enter_context(socket.create_connection(server.server_address, PATIENCE))
            files.append(stack.enter_context(client.makefile("rw")))
        for turn in ("unset", "a 0", "b 0"):
            for number, file in enumerate(files):
                file.write({"unset": "a", "a 0": "b", "b 0": "c"}[turn] + f" {number}\n")
                file.flush()
                assert file.readline().strip() == turn.replace("0", str(number))


# -- stopping --------------------------------------------------------------------------------------------------------


def test_a_handler_that_keeps_the_hub_does_not_delay_shutdown():
    """The loop's caller leaves; the handler goes on."""
    begun, seen = threading.Event(), []

    class Sleeper(harken.BaseRequestHandler):
        def handle(self):
            begun.set()
            time.sleep(0.5)
            seen.append("done")

    server = harken.GreenTCPServer(LOCAL, Sleeper)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with socket.create_connection(server.server_address):
        assert begun.wait(PATIENCE)
        began = time.monotonic()
        server.shutdown()
        thread.join(PATIENCE)
        assert time.monotonic() - began < 0.4
    server.server_close()
    assert seen == ["done"]


@pytest.mark.parametrize("verb", ["drain", "server_close", "shutdown"])
def test_a_handler_may_stop_its_server(verb):
    """Others end meanwhile; nothing deadlocks."""
    seen = []

    class Stopper(harken.BaseRequestHandler):
        def handle(self):
            if self.request.recv(10) == b"stop":
                getattr(self.server, verb)(*([1.0] if verb == "drain" else []))
                seen.append("stopped")
                self.request.sendall(b"stopped")
            else:
                self.request.sendall(self.request.recv(10))

    server = harken.GreenTCPServer(LOCAL, Stopper)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    other = socket.create_connection(server.server_address, PATIENCE)
    stopper = socket.create_connection(server.server_address, PATIENCE)
    other.sendall(b"1")
    stopper.sendall(b"stop")
    time.sleep(0.05)
    other.sendall(b"2")
    assert other.recv(10) == b"2"
    other.close()
    stopper.recv(10)  # or its end, when it was cut
    stopper.close()
    if verb == "server_close":
        server.shutdown()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    server.server_close()
    assert seen == ["stopped"]


@pytest.mark.parametrize("error", [OSError("hook"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_what_the_loops_hooks_raise_leaves_serve_forever(error):
    """In the caller's thread."""

    class Server(harken.GreenTCPServer):
        def service_actions(self):
            raise error

    with Server(LOCAL, Echo) as server, pytest.raises(type(error)):
        server.serve_forever(0.01)


def test_a_stop_by_the_private_flag_is_seen():
    """Programs set it and wake nobody."""
    with harken.GreenTCPServer(LOCAL, Echo) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        assert server.wait_ready(PATIENCE)
        server._BaseServer__shutdown_request = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


PROGRAM = """
import harken, os, signal, socket, sys, threading, time
class Echo(harken.BaseRequestHandler):
    def handle(self):
        try:
            while data := self.request.recv(1000):
                self.request.sendall(data)
        finally:
            print("ended", flush=True)
server = harken.GreenTCPServer(("127.0.0.1", 0), Echo)
server.daemon_threads = {daemon}
def connect():
    client = socket.create_connection(server.server_address)
    client.sendall(b"x")
    client.recv(1)
    return client
"""


def test_ctrl_c_with_idle_clients_ends_the_process(run_program, tmp_path):
    """At once; the handlers are told."""
    program = tmp_path / "program.py"
    program.write_text(
        PROGRAM.format(daemon=False)
        + """
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored by what runs in its background
def press():
    global client
    client = connect()
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=press).start()
server.serve_forever()
"""
    )
    process = run_program(program)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT, errors
    assert output == "ended\n"


def test_ctrl_c_while_the_loop_begins_leaves_nothing_running():
    """The hub has just been started: it does not go on for a loop that nobody runs any more."""
    with harken.GreenTCPServer(LOCAL, Echo) as server:
        engine = serving_of(server).engine
        need_hub = engine._need_hub

        def interrupted():
            need_hub()
            raise KeyboardInterrupt

        engine._need_hub = interrupted
        with pytest.raises(KeyboardInterrupt):
            server.serve_forever(0.01)
        del engine._need_hub
        thread = engine._thread
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.mark.parametrize("daemon", [True, False])
def test_a_loop_in_a_daemon_thread_does_not_keep_the_process(run_program, tmp_path, daemon):
    """Daemon handlers end with it; others are waited for."""
    program = tmp_path / "program.py"
    program.write_text(
        PROGRAM.format(daemon=daemon)
        + """
threading.Thread(target=server.serve_forever, daemon=True).start()
client = connect()
if not server.daemon_threads:
    threading.Timer(0.3, client.close).start()
"""
    )
    process = run_program(program)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert output == "ended\n"
    assert not errors


@pytest.mark.parametrize("signum, status", [(signal.SIGTERM, 0), (signal.SIGINT, 0)])
def test_serve(run_program, tmp_path, signum, status):
    """`harken serve --engine green` on two addresses; TERM drains, INT stops."""
    program = tmp_path / "program.py"
    program.write_text(
        "import harken\nclass Echo(harken.BaseRequestHandler):\n    def handle(self):\n"
        "        while data := self.request.recv(1000):\n            self.request.sendall(data)\n"
    )
    process = run_program(
        "-m", "harken", "serve", f"{program}:Echo", "--engine", "green",
        "--bind", "tcp://127.0.0.1:0", "--bind", f"unix:{tmp_path}/s", "--drain-timeout", "0.2",
    )  # fmt: skip
    line = process.stderr.readline()
    while "tcp://" not in line:
        line = process.stderr.readline()
    port = int(line.rpartition("tcp://127.0.0.1:")[2].split()[0].strip(".,"))
    assert ask(("127.0.0.1", port)) == b"hello"
    process.send_signal(signum)
    process.communicate(timeout=20)
    assert process.returncode == status


def test_a_handler_may_fork():
    """The child has its copy of the connection, and ends with its handler."""

    class Forker(harken.BaseRequestHandler):
        def handle(self):
            pid = os.fork()
            if pid == 0:
                self.request.sendall(self.request.recv(10) + b" from the child")
                return
            green.offload(os.waitpid, pid, 0)

    with serving(harken.GreenTCPServer(LOCAL, Forker)) as server:
        for _ in range(2):
            with socket.create_connection(server.server_address, PATIENCE) as client:
                client.sendall(b"hello")
                assert client.recv(100) == b"hello from the child"


def test_a_program_may_be_started_on_a_connection():
    """It waits for what comes later; so do ``os.read`` and a socket that is made of the descriptor."""

    class Lender(harken.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"1")
            self.request.sendall(green.offload(os.read, self.request.fileno(), 10))
            with socket.fromfd(self.request.fileno(), socket.AF_INET, socket.SOCK_STREAM) as other:
                self.request.sendall(green.offload(other.recv, 10))
            self.request.sendall(self.request.recv(10))
            green.offload(lambda: subprocess.run(["cat"], stdin=self.request, stdout=self.request, check=True))

    with serving(harken.GreenTCPServer(LOCAL, Lender)) as server:
        with socket.create_connection(server.server_address, PATIENCE) as client:
            for data in (b"1", b"2", b"3", b"4", b"5", b"6"):
                assert client.recv(10) == data
                client.sendall(b"%d" % (int(data) + 1))
            client.shutdown(socket.SHUT_WR)
            assert client.recv(10) == b"7"
            assert client.recv(10) == b""


def test_waiting_for_a_handler_keeps_nobody_busy(monkeypatch):
    """The hub takes a turn when it is to tell of ends, and then when there is one: it is not asked again and again."""
    asked = []
    plain = Engine._is_over
    monkeypatch.setattr(Engine, "_is_over", lambda engine: asked.append(True) or plain(engine))

    class Waits(harken.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"x")
            self.request.recv(1)

    with harken.background(harken.GreenTCPServer(("127.0.0.1", 0), Waits)) as server:
        with socket.create_connection(server.server_address, 10) as client:
            assert client.recv(1) == b"x"
            engine = serving_of(server).engine
            before = len(asked)
            assert engine.join(time.monotonic() + 0.3) == 1
            assert len(asked) - before < 20
