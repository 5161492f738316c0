"""What the tests of the commands share: a command run in this process, with nothing of it left behind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from harken import events, settings
from harken.cli import main


class Outcome(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


Harken = Callable[..., Outcome]


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Work in an empty directory, and forget settings, subscribers, paths and modules afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings, "operator", settings.Operator())
    monkeypatch.setattr(events, "subscribers", dict(events.subscribers))
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and file.startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def harken(clean: Path, capsys: pytest.CaptureFixture[str]) -> Harken:
    """Return a function that runs ``harken WORDS…`` in this process, in an empty directory."""

    def run(*words: str) -> Outcome:
        with pytest.raises(SystemExit) as ended:
            main(words)
        out, err = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), out, err)

    return run
