"""Loading what the operator named, and what is said when that cannot be."""

from __future__ import annotations

import functools
import socket
import sys
import threading
import traceback

import pytest

from harken.cli import target as loading
from harken.cli.target import is_handler, is_server, load_handler, load_target
from harken.errors import ConfigError
from harken.stalls import sight

HANDLER = "class Echo:\n    def handle(self): pass\n"
BELONGS = "what makes a server belongs under `if __name__ == '__main__':`, or start the program by `harken run`"
pytestmark = pytest.mark.usefixtures("clean")


def refusal(target, load=load_target):
    """Return the one line with which a target is refused."""
    with pytest.raises(ConfigError) as caught:
        load(target)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_module_of_the_working_directory(tmp_path):
    """``module:Name`` finds modules of the working directory."""
    tmp_path.joinpath("tgt_app.py").write_text(HANDLER)
    assert load_target("tgt_app:Echo").__name__ == "Echo"


def test_a_module_in_a_package_and_a_nested_name(tmp_path):
    """``package.module:Outer.Name`` is followed all the way."""
    tmp_path.joinpath("tgt_pkg").mkdir()
    tmp_path.joinpath("tgt_pkg", "mod.py").write_text("class Outer:\n    class H:\n        def handle(self): pass\n")
    assert load_handler("tgt_pkg.mod:Outer.H").__qualname__ == "Outer.H"


def test_a_file_is_imported_under_its_stem_and_finds_its_neighbours(tmp_path):
    """``path/file.py:Name`` imports as ``python path/file.py`` would, with its own directory first on the path."""
    folder = tmp_path / "deep"
    folder.mkdir()
    folder.joinpath("tgt_neighbour.py").write_text(HANDLER)
    folder.joinpath("tgt_file.py").write_text("from tgt_neighbour import Echo\n")
    assert load_target("deep/tgt_file.py:Echo").__module__ == "tgt_neighbour"
    assert sys.modules["tgt_file"].__file__ == str(folder / "tgt_file.py")
    assert sys.path[0] == str(folder)


def test_a_file_that_would_hide_a_module_in_use_is_refused(tmp_path):
    """A file called like a loaded module would pull that away from under its users."""
    tmp_path.joinpath("socket.py").write_text(HANDLER)
    assert "would hide the module 'socket'" in refusal("socket.py:Echo")


def test_a_partial_of_a_handler_counts(tmp_path):
    """Programs write ``partial(Handler, directory=…)``."""
    text = HANDLER + "import functools\nBound = functools.partial(Echo, root='/')\n"
    tmp_path.joinpath("tgt_partial.py").write_text(text)
    assert isinstance(load_handler("tgt_partial:Bound"), functools.partial)


@pytest.mark.parametrize(
    "target,line",
    [
        ("tgt_ap:Echo", "no module named 'tgt_ap'; did you mean 'tgt_app'?"),
        ("tgt_app.Echo", "no module named 'tgt_app.Echo'; did you mean 'tgt_app:Echo'?"),
        ("tgt_app.sub:Echo", "no module named 'tgt_app.sub'"),
        ("http.servr:HTTPServer", "no module named 'http.servr'; did you mean 'http.server'?"),
        ("tgt_app:Ecko", "tgt_app has no 'Ecko'; did you mean 'Echo'?"),
        ("tgt_app:Zzz", "tgt_app has no 'Zzz'; say which: tgt_app:Echo"),
        ("tgt_app", "target 'tgt_app' names no class; say which: tgt_app:Echo"),
        ("tgt_app:", "target 'tgt_app:' names no class; say which: tgt_app:Echo"),
        ("tgt_ap.py:Echo", "no file 'tgt_ap.py'; did you mean 'tgt_app.py'?"),
        ("no/such.py:Echo", "no file 'no/such.py'"),
        ("folder.py:Echo", "'folder.py' is a directory, not a Python file"),
        ("tgt app:Echo", "target 'tgt app:Echo' is neither module:Name nor path/file.py:Name"),
        (":Echo", "target ':Echo' is neither module:Name nor path/file.py:Name"),
        ("tgt_app:plain", "tgt_app:plain is a function, not a handler class: give a class with handle()"),
        ("tgt_app:made", "tgt_app:made is an instance of Echo, not a handler class: give a class with handle()"),
        ("tgt_app:number", "tgt_app:number is an int, not a handler class: give a class with handle()"),
        ("tgt_app:sys", "tgt_app:sys is a module, not a handler class: give a class with handle()"),
    ],
)
def test_a_wrong_target_is_one_line_with_the_remedy(tmp_path, target, line):
    """Each way to miss says what was missed and what is near."""
    more = "import sys\ndef plain(): pass\nmade = Echo()\nnumber = 7\n"
    tmp_path.joinpath("tgt_app.py").write_text(HANDLER + more)
    tmp_path.joinpath("folder.py").mkdir()
    assert refusal(target).startswith(line)


def test_a_syntax_error_is_one_line_with_its_place(tmp_path):
    """The file and line of a syntax error, wherever among the imported files it is."""
    tmp_path.joinpath("tgt_bad.py").write_text("x = 1\ndef (:\n")
    tmp_path.joinpath("tgt_user.py").write_text("import tgt_bad\n")
    for target in ("tgt_bad.py:X", "tgt_bad:X", "tgt_user:X"):
        assert refusal(target).startswith(f"syntax error in {tmp_path / 'tgt_bad.py'}:2: ")


@pytest.mark.parametrize("statement", ["1 / 0", "import tgt_no_such_module", "raise SystemExit(3)"])
def test_a_target_that_fails_shows_the_users_frames_alone(tmp_path, statement):
    """The traceback begins in the user's file; the last line names the error and its place."""
    path = tmp_path / "tgt_fails.py"
    path.write_text(f"def load():\n    {statement}\nload()\n")
    with pytest.raises(ConfigError) as caught:
        load_target("tgt_fails:Echo")
    frames = traceback.extract_tb(caught.value.__cause__.__traceback__)
    assert [(frame.filename, frame.lineno) for frame in frames] == [(str(path), 3), (str(path), 2)]
    assert str(caught.value).startswith("module 'tgt_fails' failed while it was imported: ")
    assert str(caught.value).endswith(f"({path}:2)")


def test_a_target_that_serves_while_it_is_imported_is_told_of(tmp_path, monkeypatch, capsys):
    """It never ends: whoever waits learns where it is, and what to do."""
    told = threading.Event()
    monkeypatch.setattr(loading, "SLOW_SECONDS", 0.01)
    monkeypatch.setattr(loading, "sight", lambda thread: (sight(thread), told.set())[0])
    path = tmp_path / "tgt_serves.py"
    path.write_text(f"import threading\n{HANDLER}told = threading.tgt_told\nassert told.wait(20)\n")
    monkeypatch.setattr(threading, "tgt_told", told, raising=False)
    assert load_target("tgt_serves.py:Echo").__name__ == "Echo"
    said = capsys.readouterr().err
    assert said == f"harken: file '{path}' is still being imported, at {path}:5; {BELONGS}\n"


@pytest.mark.parametrize("module", ["socketserver", "harken"])
def test_a_target_that_cannot_have_its_port_is_told_where_servers_belong(tmp_path, module):
    """A program that serves by itself, named as a target: the port is taken by harken, or by its first copy."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        making = f"{module}.TCPServer(('127.0.0.1', {taken.getsockname()[1]}), Echo)\n"
        tmp_path.joinpath(f"tgt_{module}.py").write_text(f"import {module}\n{HANDLER}{making}")
        line = refusal(f"tgt_{module}:Echo")
    assert "Address already in use" in line
    assert line.endswith(f"; {BELONGS}")


def test_servers_and_handlers_are_told_apart():
    """A server class is no handler, and a class without ``handle`` is neither."""
    import http.server

    assert is_server(http.server.HTTPServer)
    assert not is_handler(http.server.HTTPServer)
    assert is_handler(http.server.SimpleHTTPRequestHandler)
    assert not is_server(http.server.SimpleHTTPRequestHandler)
    assert "is a server class" in refusal("http.server:HTTPServer", load_handler)
    assert "has no handle()" in refusal("json:JSONDecoder", load_handler)
