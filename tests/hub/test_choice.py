"""Which hub runs, and what is said where the compiled one does not."""

from __future__ import annotations

import importlib

import pytest

from harken import _hub
from harken.engines.green import Engine
from harken.errors import ConfigError


def test_an_extension_that_cannot_be_loaded_is_not_said_to_be_missing(monkeypatch):
    """It was built for another Python, say: the loader's words tell what to look for."""
    load = importlib.import_module

    def refuse(name, *more):
        if name == "harken._hub.compiled":
            raise ImportError("undefined symbol: x")
        return load(name, *more)

    monkeypatch.setattr(importlib, "import_module", refuse)
    monkeypatch.setattr(_hub, "_faults", {})
    monkeypatch.setattr(_hub, "kind", "fallback")
    assert Engine.remark().endswith("which is quicker, cannot be loaded (undefined symbol: x)")
    monkeypatch.setenv("HARKEN_HUB", "compiled")
    with pytest.raises(ConfigError, match="the extension cannot be loaded .undefined symbol: x.; unset it"):
        _hub._chosen()
