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


def describe_run(command: Sequence[str], modules: Iterable[str], python: str) -> dict[str, Any]:
    """Return the head of a result file: machine, kernel, versions, date and command."""
    versions = {name: _module_version(name) for name in sorted(set(modules))}
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": " ".join(command),
        "machine": {
            "processor": _processor(),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "kernel": platform.release(),
            "load_average": [round(load, 2) for load in os.getloadavg()],
        },
        "versions": {
            "python": _said([python, "-V"]) if python != sys.executable else f"Python {platform.python_version()}",
            "cc": _said(["cc", "--version"]),
            "commit": _commit(),
            **versions,
        },
    }


def headline(head: Mapping[str, Any]) -> str:
    """Return the same in a sentence, for above a table."""
    machine, versions = head["machine"], head["versions"]
    return (
        f"{head['date']}, {machine['processor']}, {machine['cores']} cores, Linux {machine['kernel']}, "
        f"{versions['python']}, commit {versions['commit']}, load average before {machine['load_average'][0]}. "
        f"`{head['command']}`"
    )


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
