"""The access log: a line for each connection, for programs to read."""

import json
import os
import socket
from types import SimpleNamespace

import pytest

import harken
from harken import events
from harken.observe.access import AccessLog
from harken.settings import Settings

PATIENCE = 10.0  # seconds


class Echo(harken.BaseRequestHandler):
    """Sends back what comes."""

    def handle(self):
        """Until the end."""
        while data := self.request.recv(100):
            self.request.sendall(data)


@pytest.fixture
def access(tmp_path):
    """Open an access log with the settings given; return it and its path."""
    opened = []

    def open_access(**settings):
        path = tmp_path / "access"
        log = AccessLog(Settings(SimpleNamespace(), {"access_log": str(path), **settings}))
        log.attach()
        opened.append(log)
        return log, path

    yield open_access
    for log in opened:
        log.detach()


def serve_one(engine):
    """Serve one connection that moves five bytes each way, to its end."""
    with harken.background(harken.TCPServer(("127.0.0.1", 0), Echo, engine=engine)) as server:
        with socket.create_connection(server.server_address, PATIENCE) as client:
            client.sendall(b"12345")
            assert client.recv(5) == b"12345"
        server.drain(PATIENCE)
        return server.server_address


@pytest.mark.parametrize("engine", ["inline", "thread", "green"])
def test_a_connection_leaves_one_line_when_it_has_ended(access, engine):
    """In JSON: who, where, how long, how much, why and by whom."""
    _, path = access(log_format="json")
    _, port = serve_one(engine)
    (line,) = path.read_text().splitlines()
    entry = json.loads(line)
    assert entry["listener"] == f"tcp://127.0.0.1:{port}"
    assert entry["peer"].startswith("127.0.0.1:")
    assert (entry["bytes_in"], entry["bytes_out"]) == (5, 5)
    assert (entry["reason"], entry["worker"]) == ("peer_closed", os.getpid())
    assert 0 < entry["seconds"] < PATIENCE
    assert "-" in entry["connection"]


def test_text_has_the_same_fields_and_nobody_can_forge_one(access):
    """name=value; what is not known is a dash, and what has spaces or quotation marks is quoted."""
    _, path = access()
    events.emit("closed", connection="ab-1", reason="killed", seconds=1.5, detail='by "me" now\nx=1')
    (line,) = path.read_text().splitlines()
    expected = "connection=ab-1 peer=- listener=- seconds=1.500 bytes_in=- bytes_out=- reason=killed "
    assert line[20:] == expected + rf'detail="by \"me\" now\\x0ax=1" worker={os.getpid()}'


def test_the_format_follows_the_setting(access):
    """log_format is live."""
    _, path = access()
    events.emit("closed", reason="killed")
    events.emit("configured", changes={"log_format": "json"})
    events.emit("closed", reason="killed")
    first, second = path.read_text().splitlines()
    assert not first.startswith("{")
    assert json.loads(second)["reason"] == "killed"


def test_a_file_that_was_moved_away_is_opened_anew(access, tmp_path):
    """Under its name, and at once, so that who rotates finds it there."""
    log, path = access()
    events.emit("closed", reason="killed")
    path.rename(tmp_path / "access.1")
    log.reopen()
    assert path.read_text() == ""
    events.emit("closed", reason="shed")
    assert "reason=killed" in (tmp_path / "access.1").read_text()
    assert "reason=shed" in path.read_text()


def test_off_it_costs_nothing():
    """Nobody subscribes."""
    before = events.subscribers["closed"]
    log = AccessLog(Settings(SimpleNamespace()))
    log.attach()
    assert events.subscribers["closed"] == before
    log.reopen()
    log.detach()
