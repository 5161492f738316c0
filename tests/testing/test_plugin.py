"""The fixtures that come by ``harken.testing.plugin``, in a test run of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = """
import harken

class Upper(harken.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line.upper())

class Failing(harken.BaseRequestHandler):
    def handle(self):
        raise ValueError("on purpose")

def test_server(harken_server):
    first, second = harken_server(Upper), harken_server(Upper, engine="pool")
    for served in (first, second):
        with served.connect() as client:
            client.sendall(b"hello\\n")
            assert client.recv(10) == b"HELLO\\n"

def test_client(harken_client):
    client = harken_client(Upper)
    client.sendall(b"hello\\n")
    assert client.recv(10) == b"HELLO\\n"

def test_failing_handler(harken_client):
    assert harken_client(Failing).recv(10) == b""
"""


def test_fixtures(run_program: Callable[..., Any], tmp_path: Path) -> None:
    """Both fixtures work in a project that has nothing but pytest, and a handler that raised makes its test fail."""
    (tmp_path / "test_it.py").write_text(TESTS)
    words = ("-m", "pytest", "-q", "-p", "harken.testing.plugin", "-p", "no:cacheprovider", "test_it.py")
    process = run_program(*words, cwd=tmp_path, env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    output, _ = process.communicate(timeout=50)
    assert "3 passed, 1 error" in output, output
    assert "ValueError: on purpose" in output


def test_the_plugin_is_light() -> None:
    """pytest loads it in every project that has harken installed: it brings in no server."""
    code = (
        "import sys, harken.testing.plugin; print([n for n in ('harken.server', 'harken.serving') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == "[]\n"
