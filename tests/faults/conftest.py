"""The fixture ``program``: a program under test in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .kit import Program


@pytest.fixture
def program(run_program: Callable[..., Any], tmp_path: Path) -> Callable[..., Program]:
    """Return a function that starts a program from its text, which follows the prelude, and waits until it listens."""
    return lambda text, *words: Program(run_program, tmp_path, text, *words)
