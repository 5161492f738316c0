# SPDX-License-Identifier: MIT
"""Making what has to be compiled, and telling what cannot be had here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchkit.plan import HOME, Rival

ROOT = HOME.parent
BUILD = ROOT / "build" / "bench"
COMPILE_SECONDS = 300  # Go compiles its standard library the first time
PACKAGES = {"cc": "gcc", "go": "golang"}  # Debian's, where its name is not the tool's


class CannotBuildError(RuntimeError):
    """A compiler or a package is missing, or the build failed; the message says which."""


def build_load() -> Path:
    """Build the load generator if it is missing or older than its source, and return its path."""
    require_tools(("cc", "make"), "the load generator")
    return make("load")


def make(target: str) -> Path:
    """Let benchmarks/Makefile build a target, and return its file.

    Raises:
        CannotBuildError: it failed; the message has what the compiler said.
    """
    words = ["make", "--silent", "--no-print-directory", "-C", str(HOME), f"BUILD={BUILD}", target]
    result = subprocess.run(words, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    if result.returncode:
        lines = (result.stdout + result.stderr).strip().splitlines()
        raise CannotBuildError(f"make {target} failed: {' | '.join(lines[:3])}")
    return BUILD / target


def words_for(work: str) -> list[str]:
    """Return what a server is told of its work; for one under TLS a certificate is made.

    Raises:
        CannotBuildError: there is no openssl command.
    """
    words = ["--work", work]
    if work == "tls":
        require_tools(("openssl",), "TLS")
        make("certificate")
        words += ["--certificate", str(BUILD / "certificate.pem"), "--key", str(BUILD / "key.pem")]
    return words


def prepare(rival: Rival, python: str = sys.executable) -> list[str]:
    """Return the command that starts the rival, after building what it needs.

    Raises:
        CannotBuildError: a tool or a Python module is missing, or its build fails.
    """
    for module in rival.modules:
        if not _is_importable(module, python):
            raise CannotBuildError(f"Python module {module} is not importable")
    require_tools(rival.tools, rival.name)
    if rival.target:
        make(rival.target)
    places = {"python": python, "rivals": str(HOME / "rivals"), "build": str(BUILD)}
    return [word.format_map(places) for word in rival.command]


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of servers, with changes to it: the checkout's own harken comes first."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(changes or {})}


def _is_importable(module: str, python: str) -> bool:
    if python == sys.executable and importlib.util.find_spec(module):
        return True
    command = [python, "-c", f"import {module}"]
    return subprocess.run(command, env=environment(), capture_output=True, timeout=60, check=False).returncode == 0


def require_tools(tools: Iterable[str], purpose: str) -> None:
    """Raise CannotBuildError where a program is not on PATH; it names the Debian package."""
    for tool in tools:
        if shutil.which(tool) is None:
            raise CannotBuildError(f"{purpose} needs {tool} (Debian package {PACKAGES.get(tool, tool)})")
