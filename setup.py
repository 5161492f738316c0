"""The compiled hub, where it can be built: Linux (epoll), CPython with a GIL, a C compiler, greenlet's header.

All else about harken stands in pyproject.toml. Without the extension harken runs on the hub in Python.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

HUB = Path("src/harken/_hub")


def extensions() -> list[Extension]:
    """Return the extension, or nothing where it cannot work; a failing compiler is no error either (``optional``)."""
    if sys.platform != "linux" or sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return []
    if os.environ.get("HARKEN_NO_EXTENSION"):
        return []
    try:
        import greenlet
    except ImportError:
        return []
    return [
        Extension(
            "harken._hub.compiled",
            sorted(str(path) for path in HUB.glob("*.c")),
            depends=sorted(str(path) for path in HUB.glob("*.h")),
            include_dirs=[str(Path(greenlet.__file__).parent)],
            extra_compile_args=[
                "-std=c11",
                "-D_GNU_SOURCE",
                "-O2",
                "-g0",
                "-ftls-model=initial-exec",
                "-Wall",
                "-Wextra",
                "-Wno-unused-parameter",
            ],
            optional=True,
        )
    ]


setup(ext_modules=extensions())
