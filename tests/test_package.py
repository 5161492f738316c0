"""The package as a whole: its door, its metadata, and the habits that no linter checks."""

from __future__ import annotations

import ast
import inspect
import os
import re
import socketserver
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import harken

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = sorted((ROOT / "src").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def modules_loaded_by(statement: str) -> set[str]:
    """Return what a fresh interpreter has loaded after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        env={"PYTHONPATH": str(ROOT / "src")},
    )
    return set(done.stdout.split())


def names(path: Path) -> str:
    """Return a path's name for the test's id."""
    return str(path.relative_to(ROOT))


def test_every_name_of_socketserver_is_there() -> None:
    """The door has every public name that the running Python's socketserver has."""
    assert set(socketserver.__all__) - set(dir(harken)) == set()
    for name in socketserver.__all__:
        assert inspect.isclass(getattr(harken, name)), name


@pytest.mark.parametrize("name", sorted(harken.__all__))
def test_every_public_name_can_be_had_and_is_explained(name: str) -> None:
    """Each name of ``harken.__all__`` loads, and says what it promises."""
    value = getattr(harken, name)
    if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
        assert inspect.getdoc(value), f"harken.{name} has no docstring"


def test_an_unknown_name_is_an_attribute_error() -> None:
    """The lazy door refuses what is not there, as any module does, so that hasattr works."""
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = harken.no_such_name


def test_star_import_gives_what_all_says() -> None:
    """``from harken import *`` binds exactly ``__all__``."""
    bound: dict[str, object] = {}
    exec("from harken import *", bound)
    assert set(bound) - {"__builtins__"} == set(harken.__all__)


def test_import_loads_next_to_nothing() -> None:
    """``import harken`` loads none of what makes an import slow, and nothing that socketserver itself does not need."""
    heavy = {"asyncio", "click", "rich", "ssl", "logging", "tomllib", "multiprocessing", "dataclasses", "inspect"}
    assert modules_loaded_by("import harken") & heavy == set()


def test_version_is_written_once() -> None:
    """One source file says the version, and the installed metadata agree with it."""
    quoted = f'"{harken.__version__}"'
    assert [names(path) for path in SOURCES if quoted in path.read_text()] == ["src/harken/__init__.py"]
    assert "version" in PROJECT["project"]["dynamic"]
    try:
        assert metadata.version("harken") == harken.__version__
    except metadata.PackageNotFoundError:
        assert "PYTHONPATH" in os.environ, "harken is neither installed nor on PYTHONPATH"


def test_typing_marker_and_startup_hook_are_packed() -> None:
    """``py.typed``, the door's stub and the start-up hook exist where the package data looks for them."""
    package = ROOT / "src" / "harken"
    assert (package / "py.typed").is_file()
    assert (package / "__init__.pyi").is_file()
    assert list((package / "_startup").glob("*.py"))
    packed = ["py.typed", "*.pyi", "_startup/*", "observe/*.html"]
    assert PROJECT["tool"]["setuptools"]["package-data"]["harken"] == packed
    assert (package / "observe" / "view.html").is_file()


def test_the_source_archive_has_what_a_clone_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub in C, also where it cannot be built; and tests with what they need; nothing that was built."""
    from setuptools.command.egg_info import FileList

    wanted = {"Makefile", "README.md", "src/harken/_hub/hub.c", "src/harken/_hub/hub.h", "tests/conftest.py"}
    for name in (*wanted, "src/harken/_hub/compiled.so", "src/harken/__pycache__/server.pyc", ".venv/pyvenv.cfg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    packed = FileList()
    packed.findall()
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        if not line.startswith("#"):
            packed.process_template_line(line)
    assert set(packed.files) == wanted


def test_every_dependency_is_imported() -> None:
    """No runtime dependency is asked for that no source file imports."""
    imported = {
        word for path in SOURCES for word in re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
    }
    needed = {re.match(r"[\w-]+", wish)[0] for wish in PROJECT["project"]["dependencies"]}  # type: ignore[index]
    assert needed <= imported


def test_no_module_has_a_name_that_means_nothing() -> None:
    """No file is called by one of the words that hide what it is about."""
    vague = {"utils", "util", "common", "core", "manager", "context", "base", "helpers", "misc"}
    assert [names(path) for path in SOURCES if path.stem in vague or path.parent.name in vague] == []


def test_every_module_says_what_it_is() -> None:
    """Each source file begins with a docstring."""
    assert [names(path) for path in SOURCES if ast.get_docstring(ast.parse(path.read_text())) is None] == []


@pytest.mark.parametrize("path", TESTS, ids=names)
def test_every_test_says_what_it_proves(path: Path) -> None:
    """Each test function has a docstring whose first line stands alone."""
    found = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]
    assert [node.name for node in found if not ast.get_docstring(node)] == []
