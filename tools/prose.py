"""Write Markdown, also from docstrings (Google style, with a little reStructuredText)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

NOTE = "<!-- Made from the code by `make docs`; change the code instead. -->\n"
SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields")
ENTRY = re.compile(r"^(\*{0,2}\w[\w.]*(?:\([^)]*\))?(?: \([^)]*\))?): (.*)$")


def page(title: str, *parts: str) -> str:
    """Put a page together: each part is a paragraph, list or table."""
    return "\n\n".join([NOTE + f"# {title}", *(part.strip("\n") for part in parts if part)]) + "\n"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Make a table; a bar inside a cell is escaped."""
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def doc_of(thing: object) -> str:
    """Return a thing's docstring as Markdown; empty when it has none of its own or of its ancestors'."""
    return markdown(inspect.getdoc(thing) or "")


def summary_of(thing: object) -> str:
    """Return the first paragraph of a docstring, on one line."""
    return " ".join(doc_of(thing).partition("\n\n")[0].split())


def markdown(text: str) -> str:
    """Convert a docstring that is already dedented."""
    lines: list[str] = []
    section = ""
    for line in text.splitlines():
        heading = line.removesuffix(":")
        if line.endswith(":") and heading in SECTIONS:
            section = heading
            lines += [f"**{heading}**", ""]
        elif section and line.startswith("    "):
            lines.append(_entry(line, section))
        else:
            section = "" if line.strip() else section
            lines.append(line)
    return _inline("\n".join(lines)).strip()


def _entry(line: str, section: str) -> str:
    text = line[4:]
    if text.startswith(" "):
        return "  " + text.strip()
    match = ENTRY.match(text)
    if match and section not in ("Returns", "Yields"):
        return f"* `{match[1]}`: {match[2]}"
    return text


def _inline(text: str) -> str:
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return re.sub(r"``(.+?)``", lambda found: f"`{' '.join(found[1].split())}`", text, flags=re.DOTALL)
