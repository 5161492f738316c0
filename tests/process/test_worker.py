"""``serve``: several addresses at once, signals, exit statuses."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time

import pytest

import harken
from harken.errors import ConfigError
from harken.listener import AddressInUse
from harken.process.fitness import fit_handler
from harken.process.service import serve
from harken.process.worker import Worker

PATIENCE = 15.0  # seconds

# A handler that greets, says its process, and answers until its client goes; "stay" keeps it from noticing the end.
PROGRAM = """
import os, sys, threading, time, harken
class Greet(harken.BaseRequestHandler):
    def handle(self):
        if isinstance(self.request, tuple):
            self.request[1].sendto(self.request[0].upper(), self.client_address)
            return
        self.request.sendall(f"hello {os.getpid()}\\n".encode())
        while data := self.request.recv(100):
            if data == b"leave":
                return
            if data == b"work":
                while not self.draining:
                    time.sleep(0.01)
                time.sleep(0.3)
                self.request.sendall(b"worked")
                return
            if data == b"hang":
                threading.Event().wait()
            if data == b"signals":
                import signal
                os.kill(os.getppid() if "fork" in sys.argv[1] else os.getpid(), signal.SIGTERM)
                os.kill(os.getppid() if "fork" in sys.argv[1] else os.getpid(), signal.SIGINT)
            self.request.sendall(data.upper())
options = eval(sys.argv[1])
sys.exit(harken.serve(Greet, *sys.argv[2:], **options))
"""


class Upper(harken.BaseRequestHandler):
    """Answers in capitals."""

    def handle(self):
        if isinstance(self.request, tuple):
            self.request[1].sendto(self.request[0].upper(), self.client_address)
            return
        while data := self.request.recv(100):
            self.request.sendall(data.upper())


@contextlib.contextmanager
def working(worker):
    """Run a worker in a thread; stop and close it when left."""
    results = []
    thread = threading.Thread(target=lambda: results.append(worker.run()), daemon=True)
    thread.start()
    try:
        for server in worker.servers:
            assert server.serving.ready.wait(PATIENCE)
        yield results
    finally:
        worker.stop()
        thread.join(PATIENCE)
        worker.close()
        assert results, "run() did not return"


def ask(address, family=socket.AF_INET):
    """Ask a stream server once."""
    with socket.socket(family) as client:
        client.settimeout(PATIENCE)
        client.connect(address)
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        return client.recv(100)


@pytest.fixture
def start(run_program):
    """Return a function that starts ``serve`` in a process, whose ``ports`` are those that its log names."""

    def started(*addresses, **options):
        options = {"engine": "thread", "workers": 0} | options
        process = run_program(
            "-c", PROGRAM, repr(options), *(addresses or ("tcp://127.0.0.1:0",)), stderr=subprocess.PIPE
        )
        process.ports = []
        for _ in addresses or (None,):
            line = process.stderr.readline()
            assert "listening" in line, line + process.stderr.read()
            process.ports.append(
                int(found[1]) if (found := re.search(r":(\d+)[, ]", line.partition("address")[2])) else 0
            )
        return process

    return started


@pytest.fixture
def greeted():
    """Return a function that connects; it returns a client that its handler has greeted, and the handler's pid."""
    with contextlib.ExitStack() as clients:

        def connect(process, port=None):
            client = clients.enter_context(socket.create_connection(("127.0.0.1", port or process.ports[0]), PATIENCE))
            line = client.recv(100)
            assert line.startswith(b"hello ")
            return client, int(line.split()[1])

        yield connect


def ended(process):
    """Wait for a process and return its exit status and the rest of its log."""
    _, log = process.communicate(timeout=PATIENCE)
    return process.returncode, log


def alive(pid):
    """Tell whether a process runs (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ── addresses ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("engine", ["inline", "thread", "pool", "fork"])
def test_several_addresses_at_once(engine, tmp_path):
    """TCP, a second TCP, Unix and UDP, by one loop and one engine."""
    addresses = ("tcp://127.0.0.1:0", "tcp://127.0.0.1:0", f"unix:{tmp_path}/s", "udp://127.0.0.1:0")
    worker = Worker(Upper, addresses, {"engine": engine})
    with working(worker):
        first, second, unix, udp = worker.servers
        assert ask(first.server_address) == ask(second.server_address) == b"HELLO"
        assert ask(unix.server_address, socket.AF_UNIX) == b"HELLO"
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.settimeout(PATIENCE)
            client.sendto(b"datagram", udp.server_address)
            assert client.recv(100) == b"DATAGRAM"
        assert len({id(server.serving.engine) for server in worker.servers}) == 1
    assert not os.path.exists(f"{tmp_path}/s")


def test_every_address_is_bound_or_none(tmp_path):
    """One that is taken closes those before it; nothing_leaks watches."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressInUse, match=f"tcp://127.0.0.1:{port} is already in use"):
            Worker(Upper, (f"unix:{tmp_path}/s", "tcp://127.0.0.1:0", f"tcp://127.0.0.1:{port}"), {})
    assert not os.path.exists(f"{tmp_path}/s")


def test_a_worker_that_never_ran_can_be_closed():
    """The ports are free."""
    worker = Worker(Upper, ("tcp://127.0.0.1:0",), {})
    address = worker.servers[0].server_address
    worker.close()
    with socket.create_server(address):
        pass


def test_stop_before_run_makes_it_return_at_once():
    """Nothing is served."""
    worker = Worker(Upper, ("tcp://127.0.0.1:0",), {})
    worker.stop()
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    worker.close()


def test_a_forked_child_holds_no_listener_of_the_worker():
    """Neither its own server's nor those of the other addresses: the ports are free when the worker closes."""

    def listening():
        found = 0
        for name in os.listdir("/proc/self/fd"):
            try:
                copy = os.dup(int(name))
            except OSError:
                continue  # the listing's own
            try:
                sock = socket.socket(fileno=copy)
            except OSError:
                os.close(copy)
                continue
            with sock:
                found += sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return str(found).encode()

    class Listening(harken.BaseRequestHandler):
        def handle(self):
            while self.request.recv(100):  # unread input would turn the close into a reset
                pass
            self.request.sendall(listening())

    before = listening()  # whatever else this process has open
    worker = Worker(Listening, ("tcp://127.0.0.1:0", "tcp://127.0.0.1:0", "tcp://127.0.0.1:0"), {"engine": "fork"})
    with working(worker):
        for server in worker.servers:
            assert ask(server.server_address) == before


# ── what is served, and how ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_defaults_are_those_of_serve():
    """Production defaults, in settings and on the listener."""
    worker = Worker(Upper, ("tcp://127.0.0.1:0",), {})
    settings = worker.settings
    assert (settings["engine"], settings["drain_timeout"], settings["reuse_threads"]) == ("thread", 30.0, True)
    (server,) = worker.servers
    assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    assert server.serving.settings["drain_timeout"] == 30.0
    assert server.stats()["engine"] == "thread"
    worker.close()


@pytest.mark.parametrize(
    "handler, said",
    [
        (type("Bare", (), {}), r"Bare is not a handler class: it has no handle\(\)"),
        (harken.BaseRequestHandler, r"BaseRequestHandler does not override handle\(\)"),
        (type("Forgot", (harken.StreamRequestHandler,), {}), r"Forgot does not override handle\(\)"),
    ],
)
def test_a_handler_that_cannot_serve_is_refused(handler, said):
    """At the start, in one line, with nothing bound."""
    with pytest.raises(ConfigError, match=said):
        fit_handler(handler)
    with pytest.raises(ConfigError, match=said):
        serve(handler, "tcp://127.0.0.1:0")


def test_an_async_handle_that_is_none_of_harken_s_is_refused():
    """It would be given a blocking socket; and so is one for which another engine is asked."""

    class Async(harken.BaseRequestHandler):
        async def handle(self):
            pass

    with pytest.raises(ConfigError, match=r"Async\.handle is async: derive it from harken\.AsyncRequestHandler"):
        serve(Async, "tcp://127.0.0.1:0")
    with pytest.raises(ConfigError, match=r"Async\.handle is async, and handlers of this engine block"):
        serve(Async, "tcp://127.0.0.1:0", engine="green")


@pytest.mark.parametrize("handler", ["not a class", None, 7], ids=repr)
def test_what_cannot_be_called_is_refused(handler):
    """A text or a module is no handler."""
    with pytest.raises(ConfigError, match="handler"):
        fit_handler(handler)


@pytest.mark.parametrize(
    "address, said",
    [
        (("127.0.0.1", 0), r"\('127.0.0.1', 0\) is no address here: write 'tcp://127.0.0.1:0'"),
        (("::1", 8800), r"write 'tcp://\[::1\]:8800'"),
        (8800, "8800 is no address: each is a text"),
        (["tcp://127.0.0.1:0"], "is no address: each is a text of its own"),
        (None, "None is no address"),
    ],
)
def test_an_address_that_is_no_text_is_refused(address, said):
    """socketserver's pair, a port, a list: one line says how it is written."""
    with pytest.raises(ConfigError, match=said):
        serve(Upper, address)
    with pytest.raises(ConfigError, match=said):
        Worker(Upper, (address,), {})


def test_functions_and_partials_may_make_handlers():
    """As socketserver allows."""
    import functools

    fit_handler(lambda request, client_address, server: None)
    fit_handler(functools.partial(Upper))
    fit_handler(Upper)


@pytest.mark.parametrize(
    "address, settings, said",
    [
        ("tcp:/127.0.0.1", {}, "is not an address"),
        ("tpc://127.0.0.1:0", {}, "did you mean 'tcp'"),
        ("tcp://127.0.0.1:0", {"pool_sise": 3}, "did you mean 'pool_size'"),
        ("tcp://127.0.0.1:0", {"pool_size": 0}, "pool_size = 0 "),
        ("tcp://127.0.0.1:0", {"engine": "thred"}, "did you mean 'thread'"),
    ],
)
def test_a_wrong_address_or_setting_is_one_line(address, settings, said):
    """Before anything is served; nothing_leaks watches."""
    with pytest.raises(ConfigError, match=said):
        serve(Upper, address, **settings)


# ── signals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("engine", ["inline", "thread", "pool", "fork"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT], ids=lambda number: number.name)
def test_an_idle_server_ends_with_status_0(start, greeted, engine, number):
    """Whatever the signal, at once, and the port is free."""
    process = start(engine=engine)
    client, _ = greeted(process)
    client.sendall(b"leave")
    assert client.recv(100) == b""
    client.close()
    process.send_signal(number)
    status, log = ended(process)
    assert status == 0
    assert "Traceback" not in log
    with socket.create_server(("127.0.0.1", process.ports[0]), reuse_port=False):
        pass


@pytest.mark.parametrize("engine", ["inline", "thread", "pool", "fork"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT], ids=lambda number: number.name)
def test_stopping_now_cuts_idle_clients_and_leaves_no_process(start, greeted, engine, number):
    """Status 0, within moments, and no child lives on."""
    process = start(engine=engine)
    client, pid = greeted(process)
    began = time.monotonic()
    process.send_signal(number)
    status, log = ended(process)
    assert time.monotonic() - began < PATIENCE / 2
    assert status == 0
    assert "Traceback" not in log
    with client, contextlib.suppress(ConnectionError):
        assert client.recv(1) == b""
    deadline = time.monotonic() + 2
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(pid)


@pytest.mark.parametrize("engine", ["thread", "pool", "fork"])
def test_term_drains(start, greeted, engine):
    """The port closes, the open connection is served to its end, and the status is 0."""
    process = start(engine=engine)
    client, _ = greeted(process)
    client.sendall(b"work")
    process.send_signal(signal.SIGTERM)
    assert "draining" in process.stderr.readline()
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", process.ports[0]), PATIENCE).close()
        except ConnectionRefusedError:
            break
        except ConnectionResetError:
            pass  # it came while the listener was being closed
        time.sleep(0.01)
    else:
        pytest.fail("the port stayed open")
    with client:
        assert client.recv(100) == b"worked"
        assert client.recv(100) == b""
    status, log = ended(process)
    assert status == 0
    assert "1 finished, 0 left, 0 cut" in log


@pytest.mark.parametrize("engine", ["inline", "thread", "pool", "fork"])
def test_a_drain_that_cuts_ends_with_status_3(start, greeted, engine):
    """After ``drain_timeout`` the silent client is cut."""
    process = start(engine=engine, drain_timeout=0.1)
    client, pid = greeted(process)
    process.send_signal(signal.SIGTERM)
    status, log = ended(process)
    assert status == 3
    assert "0 finished, 0 left, 1 cut" in log
    client.close()
    deadline = time.monotonic() + 2
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(pid)


@pytest.mark.parametrize("engine", ["thread", "pool", "fork"])
def test_int_ends_a_drain_at_once(start, greeted, engine):
    """TERM, then INT: status 3, since a connection was cut."""
    process = start(engine=engine)
    client, _ = greeted(process)
    client.sendall(b"hang")
    process.send_signal(signal.SIGTERM)
    assert "draining" in process.stderr.readline()
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 3
    assert time.monotonic() - began < PATIENCE / 2
    client.close()


def test_term_and_int_in_one_moment_do_not_wait_for_the_drain(start, greeted):
    """Neither signal is lost, in whichever order the process sees them."""
    process = start(engine="thread")
    client, _ = greeted(process)
    client.sendall(b"signals")
    began = time.monotonic()
    status, log = ended(process)
    assert time.monotonic() - began < PATIENCE / 2
    assert status in (0, 3)
    assert "Traceback" not in log
    client.close()


def test_term_twice_is_term_once(start, greeted):
    """Service managers repeat themselves."""
    process = start(engine="thread")
    client, _ = greeted(process)
    client.sendall(b"work")
    process.send_signal(signal.SIGTERM)
    assert "draining" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert client.recv(100) == b"worked"
    client.close()
    assert ended(process)[0] == 0


def test_all_addresses_drain_together(start, greeted):
    """One silent client on each of two ports: one drain's time, not two."""
    process = start("tcp://127.0.0.1:0", "tcp://127.0.0.1:0", drain_timeout=0.5)
    clients = [greeted(process, port)[0] for port in process.ports]
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 3
    assert time.monotonic() - began < PATIENCE / 2
    for client in clients:
        client.close()


def test_the_log_tells_the_story(start):
    """Listening, draining, drained; on stderr."""
    process = start(engine="pool")
    process.send_signal(signal.SIGTERM)
    status, log = ended(process)
    assert status == 0
    assert [word for word in ("draining", "drained") if word in log] == ["draining", "drained"]


def test_in_another_thread_signals_are_left_alone():
    """serve() there serves until its process ends or it is stopped."""
    before = signal.getsignal(signal.SIGTERM)
    worker = Worker(Upper, ("tcp://127.0.0.1:0",), {})
    with working(worker):
        assert signal.getsignal(signal.SIGTERM) is before
        assert ask(worker.servers[0].server_address) == b"HELLO"


def test_signal_handlers_are_restored(run_program):
    """After serve() the program's own are back."""
    program = """
import harken, os, signal, threading
from harken.process.worker import Worker
class Upper(harken.BaseRequestHandler):
    def handle(self):
        pass
mine = lambda *_: None
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
    signal.signal(number, mine)
worker = Worker(Upper, ("tcp://127.0.0.1:0",), {})
threading.Thread(target=lambda: (worker.servers[0].wait_ready(10), os.kill(os.getpid(), signal.SIGTERM))).start()
print(worker.run(), all(signal.getsignal(n) is mine for n in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)))
worker.close()
"""
    process = run_program("-c", program)
    assert process.communicate(timeout=PATIENCE) == ("0 True\n", "")
