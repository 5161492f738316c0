"""Classes to explain, as users write them, in a file of their own so that their lines are known."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = """\
import http.server
import socketserver

class Log:
    def handle_error(self, request, client_address):
        super().handle_error(request, client_address)

class Auth:
    def verify_request(self, request, client_address):
        return True

class Careful(Log, Auth, socketserver.ThreadingTCPServer):
    def verify_request(self, request, client_address):
        return super().verify_request(request, client_address)

class WrongSide(socketserver.TCPServer, socketserver.ThreadingMixIn):
    pass

class Misspelt(socketserver.TCPServer):
    def verify_requests(self, request, client_address):
        return True

class Upper(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line.upper())
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the program above as a module called ``app``, its file in the working directory."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "app.py"
    file.write_text(PROGRAM)
    spec = importlib.util.spec_from_file_location("app", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "app", module)
    spec.loader.exec_module(module)
    return module


def line_of(text: str) -> int:
    """Return the number of the program's first line that contains the text."""
    return next(number for number, line in enumerate(PROGRAM.splitlines(), 1) if text in line)


@pytest.fixture
def find_line() -> Callable[[str], int]:
    """Return :func:`line_of`."""
    return line_of
