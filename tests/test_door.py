"""The lazy door: what ``import harken`` loads, and what it has."""

import ast
import importlib
import inspect
import socket
import socketserver
import sys
from pathlib import Path

import pytest

import harken

LIGHT = {"harken"}


def run(run_program, program):
    """Run a program in a fresh interpreter; return what it printed."""
    process = run_program("-c", program)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    return output.split()


def test_importing_loads_the_door_alone(run_program):
    """No module of harken's beside it, and none that is heavy."""
    loaded = set(
        run(run_program, "import sys; before = set(sys.modules); import harken; print(*set(sys.modules) - before)")
    )
    assert {name for name in loaded if name.startswith("harken")} == LIGHT
    heavy = {"socket", "selectors", "threading", "logging", "asyncio", "ssl", "typing", "dataclasses", "tomllib"}
    assert loaded & heavy == set()


def test_a_server_loads_no_more_than_it_needs(run_program):
    """Neither commands nor observers, and only its own engine."""
    program = (
        "import sys, harken\n"
        "server = harken.TCPServer(('127.0.0.1', 0), harken.BaseRequestHandler)\n"
        "server.timeout = 0; server.handle_request(); server.server_close()\n"
        "print(*(name for name in sys.modules if name.startswith('harken')))"
    )
    loaded = set(run(run_program, program))
    assert not {name for name in loaded if name.startswith(("harken.cli", "harken.observe", "harken.process"))}
    assert not loaded & {"harken.engines.pool", "harken.engines.fork", "harken.explain", "harken.testing"}


@pytest.mark.parametrize("name", sorted(harken.__all__))
def test_every_name_resolves_and_stays(name):
    """The second look-up finds what the first loaded."""
    assert getattr(harken, name) is getattr(harken, name)


def test_all_has_no_name_twice():
    """And none that is private."""
    assert len(harken.__all__) == len(set(harken.__all__))
    assert [name for name in harken.__all__ if name.startswith("_")] == []


@pytest.mark.parametrize("name", sorted(socketserver.__all__))
def test_every_name_of_socketserver_is_a_class_of_harkens(name):
    """With the name that it has there."""
    found = getattr(harken, name)
    assert inspect.isclass(found)
    assert found.__name__ == name
    assert found.__module__.startswith("harken.")


def test_type_checkers_are_told_every_name_and_its_home():
    """The stub beside the door says where each name is from, as the door itself does, and names nothing else."""
    stub = ast.parse(Path(harken.__file__).with_suffix(".pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    told = {alias.asname: node.module for node in imports for alias in node.names}
    assert told == {**harken._HOMES, **dict.fromkeys(harken._SUBMODULES, "harken")}
    assert all(alias.name == alias.asname for node in imports for alias in node.names)


def test_dir_lists_what_is_not_loaded_yet(run_program):
    """A fresh interpreter completes every public name."""
    listed = set(run(run_program, "import harken; print(*dir(harken))"))
    assert set(harken.__all__) <= listed
    assert dir(harken) == sorted(dir(harken))


@pytest.mark.parametrize("name", ["no_such_name", "_no_such_private", "Threading", "PurpleMixIn"])
def test_an_unknown_name_is_an_attribute_error(name):
    """``hasattr`` works, and the message says which name of which module."""
    assert not hasattr(harken, name)
    with pytest.raises(AttributeError, match=f"module 'harken' has no attribute '{name}'"):
        getattr(harken, name)


@pytest.mark.parametrize("name", ["socket", "selectors", "os", "sys", "threading"])
def test_modules_that_programs_patch_are_there(name):
    """``mock.patch("socketserver.socket.socket")`` reaches the same module."""
    assert getattr(harken, name) is importlib.import_module(name)


@pytest.mark.parametrize("name", ["_SocketWriter", "_NoThreads", "_ServerSelector"])
def test_private_names_that_programs_use_are_there(name):
    """Where the running Python's socketserver has them too."""
    assert inspect.isclass(getattr(harken, name))
    assert hasattr(socketserver, name)


def test_the_selector_of_the_moment_is_used(monkeypatch):
    """A program that replaces ``_ServerSelector`` replaces it for the loop and for handle_request()."""
    used = []

    class Recording(harken._ServerSelector):
        def select(self, timeout=None):
            used.append(timeout)
            return super().select(timeout)

    monkeypatch.setattr(harken, "_ServerSelector", Recording)
    with harken.TCPServer(("127.0.0.1", 0), harken.BaseRequestHandler) as server:
        server.timeout = 0
        server.handle_request()
        assert used == [0]
        with harken.background(server), socket.create_connection(server.server_address, 5) as client:
            assert client.recv(1) == b""
    assert len(used) > 1


def test_submodules_come_by_attribute(run_program):
    """``harken.events`` needs no import of its own."""
    assert run(run_program, "import harken; print(harken.events.__name__)") == ["harken.events"]


def test_as_socketserver_it_pickles_by_its_own_name():
    """Classes know where they are found."""
    for name in harken.__all__:
        value = getattr(harken, name)
        if inspect.isclass(value):
            assert getattr(sys.modules[value.__module__], value.__qualname__) is value
