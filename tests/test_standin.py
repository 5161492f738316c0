"""Harken in the place of socketserver, in this process and in its children."""

from __future__ import annotations

import json
import os
import socketserver
import subprocess
import sys
from pathlib import Path

import pytest

from harken import settings, standin

SRC = Path(standin.__file__).resolve().parents[1]


def python(code, *, path=(), flags=(), **environment):
    """Run code in a new interpreter and return what it printed."""
    found = [*map(str, path), str(SRC), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(found), **environment},
        check=False,
    )
    assert result.stderr == ""
    return result.stdout.split()


PASSED = json.dumps({"flags": {"pool_size": "9"}, "file": {}, "path": ""})


def test_modules_built_on_the_old_one_are_imported_anew():
    """What was imported before the stand-in came is forgotten, in both ways in which it can be found again."""
    code = """
import http.server, logging.config, xmlrpc.server, wsgiref.simple_server, json, socketserver
old = http.server
from harken import standin
standin.install()
import sys
print(*(m in sys.modules for m in ("http.server", "logging.config", "xmlrpc.server", "wsgiref.simple_server")))
print(*(m in sys.modules for m in ("json", "http", "logging", "threading", "selectors")))
from http import server
print(server is old, sys.modules["socketserver"].__name__)
standin.install()
from http import server as again
print(again is server)
"""
    assert python(code) == ["False"] * 4 + ["True"] * 5 + ["False", "harken", "True"]


def test_all_of_it_is_what_was_there_before():
    """`from socketserver import *` overwrites no name of the program's that socketserver would not have."""
    code = "from harken import standin\nstandin.install()\nserve = start = events = green = 1\n"
    names = python(
        code
        + "from socketserver import *\nprint(serve, start, events, green, *sorted(n for n in globals() if n[0] != '_'))"
    )
    assert names[:4] == ["1"] * 4
    assert set(socketserver.__all__) <= set(names)
    assert not {"background", "testing", "Peer", "TLS", "GreenMixIn", "PoolTCPServer"} & set(names)


def test_modules_of_others_keep_what_they_have(tmp_path):
    """Only the standard library's modules are forgotten: others may hold state, or be half imported."""
    tmp_path.joinpath("theirs.py").write_text("import socketserver\nclass S(socketserver.TCPServer): pass\n")
    code = "import theirs, sys\nfrom harken import standin\nstandin.install()\nprint(sys.modules['theirs'] is theirs)"
    assert python(code, path=[tmp_path]) == ["True"]


def test_a_child_takes_over():
    """With the variable set, a new interpreter has the stand-in and the settings before its first line."""
    code = "import socketserver, harken.settings as s; print(socketserver.__name__, s.operator.flags)"
    out = python(code, path=[standin.STARTUP], HARKEN_RUN=PASSED)
    assert out == ["harken", "{'pool_size':", "'9'}"]


def test_a_child_without_the_variable_is_left_alone():
    """The path alone does nothing."""
    environment = {"HARKEN_RUN": ""}
    code = "import socketserver, sys; print(socketserver.__name__)"
    assert python("import os; os.environ.pop('HARKEN_RUN');" + code, path=[standin.STARTUP], **environment) == [
        "socketserver"
    ]


@pytest.mark.parametrize("passed", ["", "{", "[]", '{"flags": 1}'])
def test_a_child_never_breaks(passed):
    """Whatever the variable holds, the child runs and stderr stays clean."""
    assert python("print('fine')", path=[standin.STARTUP], HARKEN_RUN=passed) == ["fine"]


def test_a_child_that_has_no_harken_runs_as_ever():
    """Another interpreter, or one that ignores the environment, is not touched."""
    path = standin.STARTUP + "/sitecustomize.py"
    result = subprocess.run(
        [sys.executable, "-S", "-c", f"import runpy; runpy.run_path({path!r}); print(1)"],
        capture_output=True,
        text=True,
        timeout=30,
        env={"HARKEN_RUN": PASSED, "PATH": os.environ["PATH"]},
        check=False,
    )
    assert (result.stdout, result.stderr) == ("1\n", "")


def test_the_hidden_sitecustomize_has_its_turn(tmp_path):
    """Another tool's ``sitecustomize`` further down the path still runs, under its own name."""
    tmp_path.joinpath("sitecustomize.py").write_text("import socketserver\nseen = socketserver.__name__\n")
    code = "import sitecustomize as s; print(s.seen, s.__file__)"
    out = python(code, path=[standin.STARTUP, tmp_path], HARKEN_RUN=PASSED)
    assert out == ["harken", str(tmp_path / "sitecustomize.py")]


def test_passing_on_is_put_first_once(monkeypatch):
    """Passing on twice, as a program under ``run`` that starts ``run`` does, names the directory once."""
    monkeypatch.setattr(settings, "operator", settings.Operator(flags={"engine": "pool"}))
    monkeypatch.setenv("PYTHONPATH", "/a" + os.pathsep + "/b")
    monkeypatch.setenv(standin.VARIABLE, "")
    standin.pass_on()
    standin.pass_on()
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [standin.STARTUP, "/a", "/b"]
    assert json.loads(os.environ[standin.VARIABLE]) == {"flags": {"engine": "pool"}, "file": {}, "path": ""}


def test_passing_on_without_a_path_adds_no_working_directory(monkeypatch):
    """An empty entry of PYTHONPATH would mean the working directory."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv(standin.VARIABLE, "")
    standin.pass_on()
    assert os.environ["PYTHONPATH"] == standin.STARTUP
    monkeypatch.setenv("PYTHONPATH", "")
