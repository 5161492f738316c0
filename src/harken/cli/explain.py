"""``harken explain``: a server's classes, its hooks in call order, what looks wrong, and one connection's calls."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from harken.errors import ConfigError
from harken.explain.lookup import unfilled
from harken.explain.pairing import ENGINES

__all__ = ["command"]

_PLAIN = str.maketrans("┌┐└┘├┤┬┴┼│─●…×", "++++++++" + "+|-*~x")


@click.command("explain", short_help="Show a server's classes and its hooks in call order.")
@click.argument("target")
@click.option("--engine", type=click.Choice(list(ENGINES)), help="Explain with this engine's mix-in in front.")
@click.option("--trace", "traced", is_flag=True, help="Serve one real connection on loopback and show its calls.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "mermaid", "svg"]),
    default="text",
    show_default=True,
    help="What to write.",
)
def command(target: str, engine: str | None, traced: bool, form: str) -> int:
    """Show the classes of a server as a drawing, which method answers each hook, and what looks wrong.

    TARGET is module:Name or file.py:Name, a server class or a handler class. For a handler a server class is made:
    a threading one, unless its handle() is async or --engine names another.
    """
    from harken import explain
    from harken.cli.target import load_target

    found = load_target(target)
    cls = _class_of(found, target)
    explanation = explain.describe(cls, engine=engine)
    calls = explain.trace(found, engine=engine) if traced else None
    if form == "text":
        _say(explain.render_text(explanation, calls, colour=_has_colours()))
    else:
        _say((explain.render_mermaid if form == "mermaid" else explain.render_svg)(explanation, calls))
    return 0


def _has_colours() -> bool:
    """Whether stdout is a terminal that shows colours to somebody who wants them (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain


def _class_of(found: Any, target: str) -> type:
    """A handler with some arguments filled in is explained by its class."""
    found = unfilled(found)
    if not isinstance(found, type):
        raise ConfigError(f"{target} is {found!r}, not a class; name a server class or a handler class")
    return found


def _say(text: str) -> None:
    """Write to stdout; where its encoding has no box characters, with plain ones."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(_PLAIN).encode(encoding, "replace").decode(encoding)
    click.echo(text, nl=False, color=None)
