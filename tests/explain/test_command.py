"""``harken explain`` as one types it."""

from __future__ import annotations

import contextlib
import os
import sys
import xml.etree.ElementTree as ET

import pytest

from harken.cli import main


@pytest.fixture
def explain(program, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Return a function that runs ``harken explain WORDS…`` beside the program's file: status, output, errors."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["explain", *words])
        return int(ended.value.code or 0), *capfd.readouterr()

    return run


@pytest.mark.parametrize(
    "target",
    ["socketserver:ThreadingTCPServer", "http.server:ThreadingHTTPServer", "harken:TCPServer", "app.py:Careful"],
)
def test_explains(explain, target: str) -> None:
    """stdlib's classes, harken's and a user's are explained, with no warning."""
    status, out, err = explain(target)
    assert (status, err) == (0, "")
    assert f" {target.partition(':')[2]} " in out
    assert "verify_request" in out
    assert "warning" not in out


def test_warns(explain) -> None:
    """Warnings are part of the output, and no failure."""
    status, out, _ = explain("app:WrongSide")
    assert status == 0
    assert "warning: ThreadingMixIn stands behind TCPServer" in out


def test_handler_with_an_engine(explain) -> None:
    """A handler is explained on the engine that is asked for."""
    status, out, _ = explain("app.py:Upper", "--engine", "fork")
    assert status == 0
    assert out.startswith("ForkingTCPServer: tcp, engine fork, handler Upper\n")


def test_trace(explain) -> None:
    """``--trace`` serves a connection and shows the calls."""
    status, out, _ = explain("app.py:Upper", "--trace")
    assert status == 0
    assert "got b'HELLO\\r\\n'" in out
    assert "process_request_thread" in out.partition("as it happened")[2]


def test_svg_is_all_that_is_written(explain, program) -> None:
    """What a handler prints while it is traced does not get into the picture."""
    with open("app.py", "a") as file:
        file.write("\nclass Chatty(socketserver.BaseRequestHandler):\n    def handle(self):\n        print('chat')\n")
    del sys.modules["app"]
    status, out, err = explain("app.py:Chatty", "--trace", "--format", "svg")
    assert status == 0
    assert ET.fromstring(out).tag.endswith("svg")
    assert err == "chat\n"


@pytest.mark.parametrize("target", ["app.py:Nobody", "nowhere:Nobody", "socketserver:ThreadingMixIn", "app.py"])
def test_bad_target_is_one_line(explain, target: str) -> None:
    """A target that is no class of the right kind: status 1 and one line."""
    status, out, err = explain(target)
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("words", [("app:Upper", "--format", "png"), ("app:Upper", "--engine", "steam"), ()])
def test_usage_errors(explain, words: tuple[str, ...]) -> None:
    """What click refuses has status 2."""
    assert explain(*words)[0] == 2


def test_plain_characters_where_there_are_no_others(program, run_program) -> None:
    """An output that has no box characters gets plain ones."""
    process = run_program("-m", "harken", "explain", "socketserver:TCPServer", env={"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert out.isascii()
    assert "+----" in out


@pytest.mark.parametrize(
    "environment, coloured",
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)],
)
def test_colours_are_for_terminals_whose_user_wants_them(program, run_program, environment, coloured) -> None:
    """NO_COLOR and a terminal that knows none are heeded, as elsewhere."""
    near, far = os.openpty()
    with open(near, "rb", buffering=0) as shown:
        settings = {"TERM": "xterm", "NO_COLOR": "", **environment}
        words = ("-m", "harken", "explain", "app.py:Upper")
        process = run_program(*words, env=settings, stdout=far)
        os.close(far)
        written = b""
        with contextlib.suppress(OSError):  # EIO: the other end has gone
            while piece := shown.read(65536):
                written += piece
    assert process.wait(20) == 0
    assert b"handler Upper" in written
    assert (b"\x1b[" in written) is coloured
