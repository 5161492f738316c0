"""Lanes are the compiled hub's: where that is not in use, harken.straight serves, which has tests of its own."""

from __future__ import annotations

from typing import Any

import pytest

from harken import _hub
from harken.books import Books


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if _hub.Lane is None:
        pytest.skip("the compiled hub is not in use: build it")


@pytest.fixture
def closed_by_python(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The connections of whose end Python was told."""
    closed: list[Any] = []
    close = Books.close

    def note(self: Books, request: Any) -> None:
        closed.append(request)
        close(self, request)

    monkeypatch.setattr(Books, "close", note)
    return closed
