# SPDX-License-Identifier: MIT
"""Where and with what a result was measured."""

from __future__ import annotations

import datetime as dt
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchkit.build import ROOT


def describe_machine(modules: Iterable[str], python: str) -> dict[str, Any]:
    """Return the head of a result file: machine, kernel, and the versions of what was measured."""
    versions = {name: _module_version(name) for name in sorted(set(modules))}
    return {
        "machine": {
            "processor": _processor(),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "kernel": platform.release(),
        },
        "versions": {
            "python": _said([python, "-V"]) if python != sys.executable else f"Python {platform.python_version()}",
            "cc": _said(["cc", "--version"]),
            "go": _said(["go", "version"]),
            **versions,
        },
    }


def describe_moment() -> dict[str, Any]:
    """Return when and on what commit something is measured, and what else the machine does."""
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def headline(head: Mapping[str, Any]) -> str:
    """Return the head in a sentence, for above a table."""
    machine, versions = head["machine"], head["versions"]
    tools = [versions[name] for name in ("python", "go", "cc") if versions[name]]
    others = versions.keys() - {"python", "cc", "go", "harken"}
    modules = [f"{name} {versions[name]}" for name in sorted(others)]
    return f"{machine['processor']}, {machine['cores']} cores, Linux {machine['kernel']}; {', '.join(tools + modules)}."


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _module_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "from the checkout" if name == "harken" else "not installed"


def _commit() -> str:
    commit = _said(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    changed = _said(["git", "-C", str(ROOT), "status", "--porcelain", "--", "src"])
    return f"{commit} and uncommitted changes" if changed else commit


def _said(command: Sequence[str]) -> str:
    """Return the first line that a command prints; empty when it prints none or cannot run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return ""
    return (result.stdout.splitlines() or [""])[0]
