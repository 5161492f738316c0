"""Docstrings become Markdown."""

from __future__ import annotations

from prose import markdown


def test_sections_become_lists() -> None:
    """Arguments are listed by name, with the lines that continue them."""
    text = "Do it.\n\nArgs:\n    seconds: how long,\n        in seconds.\n    *names: all.\n\nReturns:\n    A report.\n"
    assert markdown(text) == (
        "Do it.\n\n**Args**\n\n* `seconds`: how long,\n  in seconds.\n* `*names`: all.\n\n**Returns**\n\nA report."
    )


def test_roles_become_code() -> None:
    """References keep the last part of their name."""
    assert markdown(":class:`~harken.peer.Peer` and ``x`` and :meth:`join`") == "`Peer` and `x` and `join`"
