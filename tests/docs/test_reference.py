"""The reference pages say what the code says."""

from __future__ import annotations

import build_docs
import pytest


@pytest.mark.parametrize("name", build_docs.PAGES)
def test_page_is_fresh(name: str) -> None:
    """A page equals what would be written now; if not, `make docs` writes it."""
    page = build_docs.REFERENCE / name
    assert page.is_file(), f"{name} is missing; run make docs"
    assert page.read_text() == build_docs.PAGES[name](), f"{name} is stale; run make docs"


def test_no_page_is_left_over() -> None:
    """Every file of the reference is generated."""
    assert {page.name for page in build_docs.REFERENCE.iterdir()} == set(build_docs.PAGES)
