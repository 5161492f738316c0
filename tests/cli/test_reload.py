"""``--reload``: code that changes is loaded anew, and code that is wrong is shown and survived."""

import socket
import time

import pytest

from harken.process.watch import _name

SECONDS = 20.0

APP = """
import harken
class Tell(harken.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"one")
"""


@pytest.fixture
def watched(run_program, tmp_path, free_port):
    """A program under ``--reload``: its process, its file and its port."""
    target = tmp_path / "app.py"
    target.write_text(APP)
    words = ("--bind", f"tcp://127.0.0.1:{free_port}", "--reload", "--control", "none")
    process = run_program("-X", "dev", "-m", "harken", "serve", "app.py:Tell", *words, cwd=tmp_path)
    said = read_until(process, "reloading when code changes")
    assert "ResourceWarning" not in said  # of a watcher that nobody waits for
    return process, target


def read_until(process, word):
    """Read the log up to a line with this word; return what was read."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if word in line:
            return "".join(lines)
    raise AssertionError(f"no {word!r} in:\n" + "".join(lines))


def ask(port):
    """Return what a client is told."""
    with socket.create_connection(("127.0.0.1", port), SECONDS) as client:
        client.settimeout(SECONDS)
        return client.makefile("rb").read()


def wait_answer(port, word):
    """Ask until ``word`` answers: an old worker may still take who comes while it is told to leave."""
    end = time.monotonic() + SECONDS
    while ask(port) != word:
        assert time.monotonic() < end


def test_changes_are_loaded_and_errors_survived(watched, free_port):
    """A change; a syntax error, shown with its place while the old code serves on; and its repair."""
    process, target = watched
    assert ask(free_port) == b"one"
    target.write_text(APP.replace("one", "second"))
    read_until(process, "reloaded")
    wait_answer(free_port, b"second")
    target.write_text(APP + "def broken(:\n")
    shown = read_until(process, "the new code does not start")
    assert "app.py changed: reloading" in shown
    assert "app.py:6: invalid syntax; the old workers serve on" in shown
    assert ask(free_port) == b"second"
    target.write_text(APP.replace("one", "the third"))
    read_until(process, "reloaded")
    wait_answer(free_port, b"the third")


def test_the_watcher_ends_with_the_server(watched):
    """Its standard error is the server's, and comes to an end."""
    process, _ = watched
    process.terminate()
    assert process.wait(SECONDS) == 0
    process.stderr.read()


def test_without_workers_there_is_nothing_to_fall_back_on(run_program, tmp_path):
    """Usage."""
    (tmp_path / "app.py").write_text(APP)
    process = run_program("-m", "harken", "serve", "app.py:Tell", "--reload", "--workers", "0", cwd=tmp_path)
    assert "--reload needs workers" in process.communicate(timeout=SECONDS)[1]
    assert process.returncode != 0


def test_a_change_has_a_name_where_the_working_directory_has_gone(tmp_path, monkeypatch):
    """Its whole path, since there is nothing to see it from."""
    monkeypatch.chdir(tmp_path)
    assert _name(str(tmp_path / "app.py")) == "app.py"
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert _name("/srv/app.py") == "/srv/app.py"
