"""The fixture ``impl``: the module under test, first stdlib's (which proves the test), then harken."""

from __future__ import annotations

import importlib
import socketserver
from typing import Any

import pytest


@pytest.fixture(params=["stdlib", "harken"])
def impl(request: pytest.FixtureRequest) -> Any:
    """The module that stands as ``socketserver``."""
    return socketserver if request.param == "stdlib" else importlib.import_module("harken")


@pytest.fixture
def harken() -> Any:
    """harken alone, for what it does otherwise than stdlib on purpose."""
    return importlib.import_module("harken")
