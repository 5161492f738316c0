"""The log: events as lines of text or JSON that no client can forge."""

import io
import json
import logging
import socket
import time
from types import SimpleNamespace

import pytest

import harken
from harken import events
from harken.errors import ConfigError
from harken.observe.log import LogObserver, escape
from harken.peer import Peer
from harken.settings import Settings

LOCAL = ("127.0.0.1", 0)
PATIENCE = 10.0  # seconds
EVIL = "a\nb\r\x1b[31m\x00\x7f\x85\x9b\u2028\u2029é"


@pytest.fixture
def log():
    """Open a log on memory with the settings given; return a function that reads what it wrote."""
    opened = []

    def open_log(**settings):
        observer = LogObserver(Settings(SimpleNamespace(), {"log_level": "debug", **settings}))
        stream = io.StringIO()
        if isinstance(observer.handler, logging.StreamHandler) and not settings.get("log_file"):
            observer.handler.setStream(stream)
        observer.attach()
        opened.append(observer)
        return stream.getvalue

    yield open_log
    for observer in opened:
        observer.detach()


def raised(error):
    """Return an exception with a traceback."""
    try:
        raise error
    except Exception as caught:
        return caught


PEER = Peer("127.0.0.1", 5000, socket.AF_INET)


def test_a_line_of_text(log):
    """Time, level, what happened, and of which connection."""
    read = log()
    events.emit("closed", server="x", connection="ab-1", peer=PEER, reason="peer_closed", seconds=1.23456)
    line = read()
    assert line.endswith("closed: reason peer_closed, seconds 1.23 connection=ab-1 peer=127.0.0.1:5000\n")
    assert time.strptime(line[:19], "%Y-%m-%d %H:%M:%S")
    assert line[20:].startswith("debug")
    assert line.count("\n") == 1


def test_a_line_of_json(log):
    """The fields of the contract, and what the event carries."""
    read = log(log_format="json")
    events.emit("closed", server="x", connection="ab-1", peer=PEER, reason="peer_closed", seconds=1.5)
    entry = json.loads(read())
    assert {"time", "level", "event", "connection", "peer", "message"} <= set(entry)
    assert (entry["level"], entry["event"], entry["connection"], entry["peer"]) == (
        "debug",
        "closed",
        "ab-1",
        "127.0.0.1:5000",
    )
    assert (entry["reason"], entry["seconds"]) == ("peer_closed", 1.5)
    assert time.strptime(entry["time"][:19], "%Y-%m-%dT%H:%M:%S")
    assert entry["time"].endswith("Z")
    assert "server" not in entry


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_every_event_can_be_written(log, log_format):
    """Each name, with and without fields."""
    read = log(log_format=log_format)
    for name in events.NAMES:
        events.emit(name)
        events.emit(name, peer=PEER, reason="r", seconds=0.5, open=3, report=object())
    lines = read().splitlines()
    assert len(lines) == 2 * len(events.NAMES)
    if log_format == "json":
        assert {json.loads(line)["event"] for line in lines} == set(events.NAMES)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_a_peer_says_cannot_leave_its_line(log, log_format):
    """Line breaks, control sequences, C1 controls and Unicode's separators are escaped everywhere."""
    read = log(log_format=log_format)
    events.emit(
        "handler_failed",
        connection="ab-1",
        peer=Peer(EVIL, 0, socket.AF_UNIX),
        error=raised(ValueError(EVIL)),
        reason=EVIL,
    )
    written = read()
    bad = {char for char in written if not char.isprintable()} - {"\n"}
    assert bad == set()
    if log_format == "json":
        assert len(written.splitlines()) == 1
        entry = json.loads(written)
        assert "\\x0a" in entry["peer"]
    else:
        assert all(line.startswith("    ") for line in written.splitlines()[1:])
        assert "a\\x0ab\\x0d\\x1b[31m\\x00\\x7f\\x85\\x9b\\u2028\\u2029é" in written


def test_escape_knows_every_control_character():
    """C0, DEL, C1 and the two separators; all else is left as it is."""
    assert escape("plain é 日本") == "plain é 日本"
    for code in (*range(32), *range(127, 160)):
        assert escape(chr(code)) == f"\\x{code:02x}"
    assert escape("\u2028\u2029") == "\\u2028\\u2029"
    assert escape("\udc80") == "\\udc80"
    assert escape(7) == "7"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_one_record_for_each_exception_of_a_handler(log, log_format, capfd):
    """With peer, id and traceback, and stderr does not get it a second time."""
    read = log(log_format=log_format, log_level="error")
    seen = []

    class Failing(harken.BaseRequestHandler):
        def handle(self):
            seen.append((self.connection_id, str(self.peer)))
            raise ZeroDivisionError("handler's fault")

    with harken.background(harken.TCPServer(LOCAL, Failing)) as server:
        for _ in range(2):
            with socket.create_connection(server.server_address, PATIENCE) as client:
                assert client.recv(1) == b""
    written = read()
    assert capfd.readouterr().err == ""
    assert written.count("ZeroDivisionError: handler's fault") == 2
    if log_format == "json":
        entries = [json.loads(line) for line in written.splitlines()]
        assert [(entry["connection"], entry["peer"]) for entry in entries] == seen
        assert {(entry["level"], entry["event"]) for entry in entries} == {("error", "handler_failed")}
        assert all(entry["traceback"].startswith("Traceback (most recent call last):") for entry in entries)
    else:
        heads = [line for line in written.splitlines() if not line.startswith("    ")]
        assert len(heads) == 2
        for (connection, peer), head in zip(seen, heads, strict=True):
            assert f"connection={connection} peer={peer}" in head


def test_a_peers_fault_is_no_error(log, capfd):
    """A reset by the client leaves no traceback in the log either."""
    read = log()
    import struct

    class Reading(harken.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"hi")
            self.request.recv(1)

    with harken.background(harken.ThreadingTCPServer(LOCAL, Reading)) as server:
        with socket.create_connection(server.server_address, PATIENCE) as client:
            assert client.recv(2) == b"hi"
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end = time.monotonic() + PATIENCE
        while "closed:" not in read() and time.monotonic() < end:
            time.sleep(0.002)
    assert "reason peer_reset" in read()
    assert "Traceback" not in read() + capfd.readouterr().err


@pytest.mark.parametrize(
    "level, told", [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)], ids=lambda value: str(value)
)
def test_levels(log, level, told):
    """One event of each level; those below are not even subscribed to."""
    before = {name: len(found) for name, found in events.subscribers.items()}
    read = log(log_level=level)
    for name in ("opened", "listening", "paused", "handler_failed"):
        events.emit(name)
    assert len(read().splitlines()) == told
    if level != "debug":
        assert len(events.subscribers["opened"]) == before["opened"]


def test_a_handlers_logger_writes_to_the_same_log(log):
    """With the connection's id and peer on each line."""
    read = log(log_format="json")

    class Saying(harken.BaseRequestHandler):
        def handle(self):
            self.logger.info("said %r", "this")

    with harken.background(harken.TCPServer(LOCAL, Saying)) as server:
        with socket.create_connection(server.server_address, PATIENCE) as client:
            assert client.recv(1) == b""
            host, port = client.getsockname()
    (entry,) = [entry for entry in map(json.loads, read().splitlines()) if entry["event"] == "log"]
    assert entry["message"] == "said 'this'"
    assert entry["peer"] == f"{host}:{port}"
    assert entry["connection"]


def test_a_file_is_appended_to(log, tmp_path):
    """Not stderr, and what was in it stays."""
    path = tmp_path / "log"
    path.write_text("before\n")
    log(log_file=str(path))
    events.emit("paused", address="tcp://here", reason="full")
    before, line = path.read_text().splitlines()
    assert before == "before"
    assert "paused: address tcp://here, reason full" in line


def test_a_file_that_cannot_be_opened_says_so(tmp_path):
    """At the start, not at the first line."""
    with pytest.raises(ConfigError, match="no_such_folder"):
        LogObserver(Settings(SimpleNamespace(), {"log_file": str(tmp_path / "no_such_folder" / "log")}))


def test_a_detached_log_leaves_nothing_behind(capfd):
    """Subscriptions, handlers and level are as before, and handle_error prints again."""
    logger = logging.getLogger("harken")
    before = dict(events.subscribers), list(logger.handlers), logger.level, logger.propagate
    observer = LogObserver(Settings(SimpleNamespace(), {}))
    observer.attach()
    assert events.logged
    observer.detach()
    assert (dict(events.subscribers), list(logger.handlers), logger.level, logger.propagate) == before
    assert not events.logged


def test_a_log_that_cannot_be_written_does_not_break_the_server(log, monkeypatch, capfd):
    """A full disk: the handler goes on."""

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    observer = LogObserver(Settings(SimpleNamespace(), {"log_level": "debug"}))
    observer.handler.setStream(Full())
    monkeypatch.setattr(logging, "raiseExceptions", False)
    observer.attach()
    try:
        with harken.background(harken.TCPServer(LOCAL, harken.BaseRequestHandler)) as server:
            for _ in range(2):
                with socket.create_connection(server.server_address, PATIENCE) as client:
                    assert client.recv(1) == b""
    finally:
        observer.detach()


def tell_of_a_stall(**more):
    """Emit what the watchdog of a loop does."""
    fields = {"place": "/srv/app.py:12", "file": "/srv/app.py", "line": 12, "function": "handle", "seconds": 0.3149}
    events.emit("stalled", stack="  File one\n  File two\n", **{"ongoing": False, **fields, **more})


def test_a_stall_is_one_line(log):
    """The line says where, by file and line, and how long; the stack is left to machines."""
    read = log()
    tell_of_a_stall(connection="ab-1", peer=PEER)
    tell_of_a_stall(ongoing=True)
    first, second = read().splitlines()
    assert first.endswith(
        "stalled: /srv/app.py:12 in handle kept other connections waiting for 0.31 s "
        "connection=ab-1 peer=127.0.0.1:5000"
    )
    assert "warning" in first
    assert second.endswith("stalled: /srv/app.py:12 in handle keeps other connections waiting for 0.31 s")


def test_a_stack_for_machines(log):
    """In JSON the stack is a list of lines."""
    read = log(log_format="json")
    tell_of_a_stall()
    entry = json.loads(read())
    assert entry["stack"] == ["  File one", "  File two"]
    assert (entry["file"], entry["line"], entry["function"]) == ("/srv/app.py", 12, "handle")


def test_the_level_and_the_format_follow_the_settings(log):
    """Live: what was too little is logged from now on, and the other way round."""
    read = log(log_level="warning")
    events.emit("closed", reason="killed")
    assert not read()
    events.emit("configured", changes={"log_level": "debug", "log_format": "json", "idle_timeout": 3})
    events.emit("closed", reason="killed")
    assert json.loads(read().splitlines()[-1])["reason"] == "killed"
    before = len(read())
    events.emit("configured", changes={"log_level": "error"})
    events.emit("closed", reason="killed")
    events.emit("rejected", reason="max_connections")
    assert len(read()) == before


def test_warnings_that_repeat_are_counted():
    """The first ten are there, and one line for the rest."""
    observer = LogObserver(Settings(SimpleNamespace(), {}))
    stream = io.StringIO()
    observer.handler.setStream(stream)
    observer.attach()
    for _ in range(10 + 1234):
        events.emit("rejected", connection="ab-1", peer=PEER, reason="max_accept_rate")
    events.emit("rejected", connection="ab-1", peer=PEER, reason="deny")
    observer.detach()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 12
    assert lines[-1].endswith("warning rejected max accept rate: … 1,234 more like this in 10 s")
