# SPDX-License-Identifier: MIT
"""Making what has to be compiled, and telling what cannot be had here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchkit.plan import HOME, Rival

ROOT = HOME.parent
BUILD = ROOT / "build" / "bench"
LOAD_SOURCES = ("load/load.c", "load/wires.c")
LOAD_HEADERS = ("load/load.h", "load/histogram.h")
LOAD_BUILD = ("cc", "-O2", "-Wall", "-o", "{target}", "{sources}")
COMPILE_SECONDS = 300  # a Go rival fetches and compiles its standard library the first time


class CannotBuildError(RuntimeError):
    """A compiler or a package is missing, or the build failed; the message says which."""


def build_load() -> Path:
    """Build the load generator if it is missing or older than its source, and return its path."""
    target = BUILD / "load"
    _require_tools(("cc",), "the load generator")
    _make(target, LOAD_BUILD, LOAD_SOURCES, LOAD_HEADERS)
    return target


def prepare(rival: Rival, python: str = sys.executable) -> list[str]:
    """Return the command that starts the rival, after building what it needs.

    Raises:
        CannotBuildError: a tool or a Python module is missing, or its build fails.
    """
    for module in rival.modules:
        if not _is_importable(module, python):
            raise CannotBuildError(f"Python module {module} is not importable")
    _require_tools(rival.tools, rival.name)
    if rival.build:
        _make(BUILD / rival.target, rival.build, rival.sources)
    places = {"python": python, "rivals": str(HOME / "rivals"), "build": str(BUILD)}
    return [word.format_map(places) for word in rival.command]


def environment() -> dict[str, str]:
    """Return the environment of servers: the checkout's own harken comes first."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _is_importable(module: str, python: str) -> bool:
    if python == sys.executable and importlib.util.find_spec(module):
        return True
    command = [python, "-c", f"import {module}"]
    return subprocess.run(command, env=environment(), capture_output=True, timeout=60, check=False).returncode == 0


def _require_tools(tools: Iterable[str], purpose: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            package = {"cc": "gcc", "go": "golang"}.get(tool, tool)
            raise CannotBuildError(f"{purpose} needs {tool} (Debian package {package})")


def _make(target: Path, command: Sequence[str], sources: Sequence[str], headers: Sequence[str] = ()) -> None:
    paths = [HOME / name for name in sources]
    newest = max(path.stat().st_mtime for path in [*paths, *(HOME / name for name in headers)])
    if target.exists() and target.stat().st_mtime >= newest:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    words: list[str] = []
    for word in command:
        words += map(str, paths) if word == "{sources}" else [word.replace("{target}", str(target))]
    result = subprocess.run(words, cwd=HOME, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    if result.returncode:
        raise CannotBuildError(f"{' '.join(words)} failed:\n{result.stderr.strip()}")
