"""Put harken in the place of ``socketserver``, so that programs which import that get this.

:func:`install` works in this process; :func:`pass_on` makes Python processes that the program starts do the same, by a
``sitecustomize`` of harken's own on their path (``_startup/``).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import harken
from harken import settings

__all__ = ["VARIABLE", "install", "pass_on", "take_over"]

VARIABLE = "HARKEN_RUN"
"""The environment variable that tells a child process to run on harken, and with which settings (JSON)."""

STARTUP = str(Path(__file__).with_name("_startup"))
REPLACED = "socketserver"


def install() -> None:
    """Make ``import socketserver`` give harken from now on, in this process.

    Modules of the standard library that were already imported on top of the old one (``http.server``,
    ``logging.config`` …) are forgotten, so that the next import builds them anew on harken. Modules of others keep what
    they have. Installing twice is harmless.
    """
    old = sys.modules.get(REPLACED)
    sys.modules[REPLACED] = harken
    settings.operator.unaware = True
    door: Any = harken
    door.__all__ = [name for name in door.__all__ if _is_old(name)]  # what `from socketserver import *` gives
    if old is not None and old is not harken:
        for name in _built_on(old):
            _forget(name)


def _is_old(name: str) -> bool:
    """Whether a name is of socketserver's kind: others would overwrite what a program has under them."""
    return name.endswith(("Server", "MixIn", "RequestHandler")) and not name.startswith(("Async", "Green", "Pool"))


def _built_on(old: ModuleType) -> list[str]:
    """Name the modules of the standard library that hold something of ``old``."""
    return [
        name
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in sys.stdlib_module_names and module is not old and _holds(module, old)
    ]


def _holds(module: ModuleType, old: ModuleType) -> bool:
    return any(value is old or _descends(value) for value in list(getattr(module, "__dict__", {}).values()))


def _descends(value: object) -> bool:
    lineage = type.mro(value) if isinstance(value, type) and value is not type else (value,)
    return any(getattr(ancestor, "__module__", None) == REPLACED for ancestor in lineage)


def _forget(name: str) -> None:
    """Drop a module, and its parent's attribute too: ``from http import server`` would find it there."""
    module = sys.modules.pop(name, None)
    parent, _, last = name.rpartition(".")
    if parent in sys.modules and getattr(sys.modules[parent], last, None) is module:
        delattr(sys.modules[parent], last)


def pass_on() -> None:
    """Make Python processes that this one starts run on harken too, with the same settings.

    Sets :data:`VARIABLE` and puts ``_startup`` first on ``PYTHONPATH``; reloaders and ``multiprocessing`` start their
    children by ``sys.executable`` and inherit both.
    """
    held = settings.operator
    os.environ[VARIABLE] = json.dumps({"flags": held.flags, "file": held.file, "path": held.path}, default=str)
    path = os.environ.get("PYTHONPATH")
    others = [entry for entry in path.split(os.pathsep) if entry != STARTUP] if path else []
    os.environ["PYTHONPATH"] = os.pathsep.join([STARTUP, *others])


def take_over() -> None:
    """In a child process: take the settings from :data:`VARIABLE` and install harken. Called by ``_startup``."""
    passed = json.loads(os.environ[VARIABLE])
    settings.operator.flags.update(passed["flags"])
    settings.operator.file.update(passed["file"])
    settings.operator.path = passed["path"]
    install()
