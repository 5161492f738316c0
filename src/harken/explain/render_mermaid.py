"""Write an explanation as a Mermaid class diagram; the hooks, warnings and calls follow as comments."""

from __future__ import annotations

import re

from harken.explain.model import Explanation, Family, Trace
from harken.explain.wording import thread_name, title

__all__ = ["render_mermaid"]


def render_mermaid(explanation: Explanation, trace: Trace | None = None) -> str:
    """Return one ``classDiagram`` that names every class, its methods and its bases.

    Args:
        explanation: what ``describe`` gave.
        trace: what ``trace`` gave, added as comments.
    """
    lines = ["classDiagram"]
    taken: set[str] = set()
    for family in explanation.families:
        lines += _family(family, taken)
    lines += ["", "    %% hooks, in call order"]
    for row in explanation.hooks:
        lines.append(f"    %% {'  ' * row.depth}{row.name}: {row.owner} {row.place}, {row.where}")
    lines += [f"    %% {advice.level}: {advice.text}" for advice in explanation.warnings]
    if trace is not None:
        lines += ["", f"    %% {title(trace)}, as it happened"]
        for call in trace:
            took = "not returned" if call.took is None else f"{call.took:.2f} ms"
            lines.append(f"    %% {'  ' * call.depth}{call.name}: at {call.at:.2f} ms, {took}, {thread_name(call)}")
    return "\n".join(_one_line(line) for line in lines) + "\n"


def _one_line(text: str) -> str:
    """A comment that begins with ``%%{`` would be a directive, so braces leave comments."""
    text = text.replace("\n", " ")
    return text.replace("{", "(").replace("}", ")") if text.lstrip().startswith("%%") else text


def _family(family: Family, taken: set[str]) -> list[str]:
    names: dict[str, str] = {}
    for box in reversed(family.classes):
        name = re.sub(r"\W", "_", box.name)
        while name in taken:
            name += "_"
        names[box.key] = name
        taken.add(name)
    lines = []
    for box in reversed(family.classes):
        name = names[box.key]
        label = "" if name == box.name else f'["{box.name}"]'
        lines.append(f"    class {name}{label}" + (" {" if box.methods else ""))
        lines += [f"        {_escape(method)}()" for method in box.methods]
        lines += ["    }"] if box.methods else []
    for box in reversed(family.classes):
        lines += [f"    {names[base]} <|-- {names[box.key]}" for base in box.bases]
    return lines


def _escape(name: str) -> str:
    """Mermaid reads ``__init__`` as bold text unless the underscores are escaped."""
    return name.replace("__", r"\_\_")
