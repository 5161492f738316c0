"""``harken ctl``: a running server, with and without workers, seen into and changed from outside."""

import json
import os
import re
import signal
import socket
import subprocess

import pytest
from waiting import wait_until

from harken.cli import asking
from harken.process import control

SECONDS = 20.0

APP = """
import harken
class Echo(harken.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"hello\\n")
        while data := self.request.recv(100):
            self.request.sendall(data)
"""


class Running:
    """A server and its control socket."""

    def __init__(self, process, port, path, run):
        self.process = process
        self.port = port
        self.path = path
        self._run = run

    def ctl(self, *words, status=0):
        """Run one command; return what it printed."""
        process = self._run("-m", "harken", "ctl", "--socket", self.path, *words)
        out, err = process.communicate(timeout=SECONDS)
        assert process.returncode == status, out + err
        return out if status == 0 else err

    def json(self, *words):
        """Run one command; return what it printed as JSON."""
        return json.loads(self.ctl(*words, "--json"))

    def connect(self):
        """Return a client that was greeted."""
        client = socket.create_connection(("127.0.0.1", self.port), SECONDS)
        assert client.recv(100) == b"hello\n"
        return client


@pytest.fixture(params=["0", "2"], ids=["alone", "workers"])
def running(run_program, tmp_path, request):
    """A server of each kind."""
    (tmp_path / "app.py").write_text(APP)
    path = tmp_path / "ctl.sock"
    words = ("--bind", "tcp://127.0.0.1:0", "--workers", request.param, "--control", str(path))
    process = run_program("-m", "harken", "serve", "app:Echo", *words, cwd=tmp_path)
    line = process.stderr.readline()
    found = re.search(r"127\.0\.0\.1:(\d+)", line)
    assert found, line + process.stderr.read()
    for _ in range(int(request.param)):
        while "worker started" not in process.stderr.readline():
            pass
    return Running(process, int(found[1]), path, run_program)


def keep_busy(client):
    """Send until the handler waits for the client to read: no drain sends that away as idle."""
    client.settimeout(0.1)
    with pytest.raises(TimeoutError):
        while True:
            client.sendall(b"x" * 65536)
    client.settimeout(SECONDS)


def test_the_status_names_address_engine_and_state(running):
    """For people and for scripts."""
    assert f"tcp://127.0.0.1:{running.port}" in running.ctl("status")
    (server,) = running.json("status")["servers"]
    assert (server["engine"], server["state"], server["open"]) == ("thread", "serving", 0)


def test_the_status_tells_memory(running):
    """Of the process that answers and of each worker."""
    found = running.json("status")
    assert all(each > 1 << 20 for each in (found["rss"], *(worker["rss"] for worker in found["workers"])))


def test_a_server_that_hangs_is_given_up(running, monkeypatch):
    """After a time, with one line."""
    monkeypatch.setattr(asking, "ANSWER_SECONDS", 0.1)
    os.kill(running.process.pid, signal.SIGSTOP)
    os.waitpid(running.process.pid, os.WUNTRACED)  # until then it may answer
    with pytest.raises(asking.Refused, match="no answer within 0.1 s"), asking.connected(str(running.path)) as sock:
        asking.ask(sock, "status")


def test_connections_are_listed_filtered_and_closed(running):
    """Over all workers; a wrong id is refused with status 1."""
    with running.connect() as one, running.connect() as two:
        found = running.json("connections", "--sort", "age")
        assert len(found) == 2
        assert {each["peer"]["port"] for each in found} == {one.getsockname()[1], two.getsockname()[1]}
        assert running.json("connections", "--peer", "10.0.0.0/8") == []
        assert len(running.json("connections", "--peer", "127.0.0.0/8")) == 2
        (mine,) = [each["id"] for each in found if each["peer"]["port"] == one.getsockname()[1]]
        running.ctl("kill", mine)
        assert one.recv(100) == b""
        assert "no connection" in running.ctl("kill", mine, status=1)
        two.sendall(b"still here")
        assert two.recv(100) == b"still here"


def test_a_client_s_name_cannot_leave_its_place(run_program, tmp_path):
    """Of a Unix socket it is the client's to choose: neither a row of its own nor orders to the terminal."""
    (tmp_path / "app.py").write_text(APP)
    address, control = tmp_path / "app.sock", tmp_path / "ctl.sock"
    words = ("--bind", f"unix:{address}", "--control", str(control), "--workers", "0")
    process = run_program("-m", "harken", "serve", "app:Echo", *words, cwd=tmp_path)
    assert "listening" in process.stderr.readline()
    running = Running(process, 0, control, run_program)
    with socket.socket(socket.AF_UNIX) as client:
        client.bind(f"\0{os.getpid()}\x1b]0;owned\x07\nFORGED".encode() + b"\xff")
        client.connect(str(address))
        assert client.recv(100) == b"hello\n"
        name = f"{os.getpid()}\\x1b]0;owned\\x07\\x0aFORGED\\udcff"
        _, line = running.ctl("connections").splitlines()
        assert name in line
        (line,) = [line for line in running.ctl("stacks").splitlines() if "connection" in line and "owned" in line]
        assert name in line


def test_a_live_setting_changes_and_others_are_refused(running):
    """With one line that says why."""
    running.ctl("set", "drain-timeout", "0.5")
    assert "cannot change while the server runs" in running.ctl("set", "backlog", "5", status=1)
    assert "unknown setting 'drain_timeuot'" in running.ctl("set", "drain_timeuot", "5", status=1)
    assert "is not a number of seconds" in running.ctl("set", "drain_timeout", "soon", status=1)


@pytest.mark.parametrize("name", ["verb", "ctx", "sock", "worker", "self"])
def test_no_name_of_a_setting_is_taken_for_something_else(running, name):
    """Whatever words the code uses by itself: it is an unknown setting, in one line."""
    assert f"unknown setting {name!r}" in running.ctl("set", name, "x", status=1)


def test_the_log_follows_its_level(running):
    """What was too little before is logged from now on, by every process that serves."""
    running.ctl("set", "log_level", "debug")
    with running.connect():
        assert any(" opened connection=" in line for line in running.process.stderr)


def test_suspend_and_resume(running):
    """While suspended a client waits in the backlog; resumed, it is served."""
    running.ctl("suspend")
    with socket.create_connection(("127.0.0.1", running.port), SECONDS) as client:
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(100)
        running.ctl("resume")
        client.settimeout(SECONDS)
        assert client.recv(100) == b"hello\n"


def test_stacks_show_what_a_handler_does(running):
    """With its file and function, and whose connection that is."""
    with running.connect() as client:
        (found,) = running.json("connections")
        stacks = running.ctl("stacks")
        assert "in handle" in stacks
        assert f"connection {found['id']} of 127.0.0.1:{client.getsockname()[1]}, open for " in stacks


class Trace:
    """A running ``harken ctl trace``, by its lines of JSON."""

    def __init__(self, running, *words):
        self.process = running._run("-m", "harken", "ctl", "--socket", running.path, "trace", *words, "--json")
        assert self.next()["begin"]

    def next(self):
        """Wait for an entry."""
        return json.loads(self.process.stdout.readline())


def test_a_live_connection_is_traced_to_its_end(running):
    """What it receives and sends, with secrets masked; then why it has ended."""
    with running.connect() as client:
        (found,) = running.json("connections")
        trace = Trace(running, found["id"])
        assert "is traced already" in running.ctl("trace", found["id"], status=1)
        for word in (b"one\r\n", b"password=swordfish\n"):
            client.sendall(word)
            assert client.recv(100) == word
        texts = []
        while len(texts) < 3:  # the first piece came to a call that had begun, and is told by its size
            entry = trace.next()
            if entry["direction"] == "out" or entry["shown"]:
                texts.append((entry["direction"], entry["bytes"], entry["text"]))
        secret = "password=***\n"
        assert texts == [("out", 5, "one\r\n"), ("in", 19, secret), ("out", 19, secret)]
    while "end" not in (entry := trace.next()):
        pass
    assert entry["end"] == "peer_closed"
    assert trace.process.wait(SECONDS) == 0


def test_bytes_in_hexadecimal_and_a_trace_that_is_ended(running):
    """A client that goes ends the trace, and the next may begin."""
    with running.connect() as client:
        (found,) = running.json("connections")
        trace = Trace(running, found["id"], "--hex", "--no-redact")
        client.sendall(b"\x00\xff")
        while (entry := trace.next())["direction"] != "out":
            pass
        assert entry["hex"] == "00ff"
        trace.process.send_signal(signal.SIGINT)
        assert trace.process.wait(SECONDS) == 0
        while True:
            process = running._run("-m", "harken", "ctl", "--socket", running.path, "trace", found["id"])
            line = process.stdout.readline()
            if line:  # the server has noticed that the first one went
                break
        assert line.startswith("following ")
        client.sendall(b"again\n")
        while "out" not in (line := process.stdout.readline()):
            pass
        assert line.endswith("6  again\\n\n")
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0


def test_whoever_traces_cannot_name_the_trace(running):
    """It would not find its way to them, nor its end when they hang up."""
    with running.connect():
        (found,) = running.json("connections")
        for _ in range(2):
            wait_until(lambda: traced(running, {"connection": found["id"], "token": "mine"}))


def traced(running, arguments):
    """Begin a trace and hang up; tell whether it began."""
    with asking.connected(str(running.path)) as sock:
        told = next(control.replies(sock, "trace", arguments, SECONDS))
        return "result" in told and told["result"]["begin"]


def test_a_connection_that_is_not_there_cannot_be_traced(running):
    """Status 1, and a word why."""
    assert "no connection 'nobody-1' is open" in running.ctl("trace", "nobody-1", status=1)


def test_drain_ends_the_server(running):
    """As SIGTERM does, with status 0, and the socket is gone."""
    running.ctl("drain")
    assert running.process.wait(SECONDS) == 0
    assert not running.path.exists()
    assert "no server answers" in running.ctl("status", status=1)


def test_workers_are_added(running):
    """With a supervisor; a server alone says that it has none to add them."""
    if running.json("status")["supervisor"] is None:
        assert "serves by itself (workers = 0)" in running.ctl("workers", "3", status=1)
        return
    running.ctl("workers", "3")
    while "worker started" not in running.process.stderr.readline():
        pass
    assert len(running.json("status")["workers"]) == 3


def test_workers_that_leave_are_shown_while_they_serve(running):
    """A drain is looked into, too: nobody is ready, and one has a client still."""
    if running.json("status")["supervisor"] is None:
        return
    with running.connect() as client:
        keep_busy(client)
        running.ctl("drain")
        wait_until(
            lambda: [(each["leaving"], each["open"]) for each in running.json("status")["workers"]] == [(True, 1)]
        )
        assert "0 of 2 workers, 1 leaving" in running.ctl("status")
        assert client.recv(100) == b"x" * 100


def test_a_service_that_ends_takes_no_orders_for_later(running):
    """Each would say that it is done, and nothing would come of it."""
    with running.connect() as client, asking.connected(str(running.path)) as sock:
        keep_busy(client)
        asking.ask(sock, "drain")
        verbs = {"reload": {}, "upgrade": {}}
        if asking.ask(sock, "status")["supervisor"] is not None:
            verbs["workers"] = {"count": 3}
        for verb, arguments in verbs.items():
            with pytest.raises(asking.Refused, match=f"drains and ends: {verb} has no effect"):
                asking.ask(sock, verb, **arguments)


def test_the_socket_is_its_owners_alone(running):
    """Mode 0600."""
    assert running.path.stat().st_mode & 0o777 == 0o600


def test_nonsense_on_the_socket_harms_nobody(running):
    """Garbage, another version, too long a line: refused or hung up on, and the server goes on."""
    for garbage in (b"GET / HTTP/1.0\r\n\r\n", b"[]\n", b"x" * 200_000):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(SECONDS)
            client.connect(str(running.path))
            try:
                client.sendall(garbage)
                assert client.recv(1000) == b""
            except (BrokenPipeError, ConnectionResetError):
                pass
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS)
        client.connect(str(running.path))
        client.sendall(b'{"version": 9, "verb": "status", "number": 4}\n')
        reply = json.loads(client.recv(1000))
        assert reply["number"] == 4
        assert "version 1" in reply["error"]
    running.ctl("status")


def test_what_is_wrong_on_the_line_is_usage(running):
    """Status 2."""
    assert "No such command 'frob'" in running.ctl("frob", status=2)
    assert "nonsense" in running.ctl("connections", "--peer", "nonsense", status=2)


def test_the_only_server_is_found_by_itself(run_program, tmp_path):
    """Without --socket, by the directory of sockets named after handlers."""
    (tmp_path / "app.py").write_text(APP)
    runtime = {"XDG_RUNTIME_DIR": str(tmp_path)}
    process = run_program("-m", "harken", "serve", "app:Echo", "--bind", "tcp://127.0.0.1:0", cwd=tmp_path, env=runtime)
    assert "listening" in process.stderr.readline()
    assert (tmp_path / "harken" / "Echo.sock").exists()
    asked = run_program("-m", "harken", "ctl", "status", env=runtime)
    out, err = asked.communicate(timeout=SECONDS)
    assert asked.returncode == 0, err
    assert "thread" in out
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 0
    asked = run_program("-m", "harken", "ctl", "status", env=runtime, stderr=subprocess.STDOUT)
    assert "no server with a control socket runs" in asked.communicate(timeout=SECONDS)[0]
    assert not os.listdir(tmp_path / "harken")
