"""Write an explanation for a terminal: the drawing, the hooks, the warnings, and the trace."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

from harken.explain.draw_text import WIDTH, draw
from harken.explain.model import Explanation, HookRow, Trace
from harken.explain.wording import heading, raised_here, thread_name, title

__all__ = ["render_text"]

Paint = Callable[[str, str], str]

# Columns of the table of hooks, and of the trace: together no more than WIDTH.
HOOK, OWNER, PLACE = 35, 21, 24
TIME, CALL, CLASS = 9, 34, 23

_COLOURS = {"heading": "1", "yours": "36", "warning": "33", "note": "2", "error": "31"}


def _plain(text: str, _kind: str) -> str:
    return text


def _coloured(text: str, kind: str) -> str:
    return f"\x1b[{_COLOURS[kind]}m{text}\x1b[0m" if text else text


def render_text(explanation: Explanation, trace: Trace | None = None, *, colour: bool = False) -> str:
    """Return the explanation as text, no line longer than 100 columns.

    Args:
        explanation: what ``describe`` gave.
        trace: what ``trace`` gave, to be shown at the end.
        colour: whether to use the colours of a terminal.
    """
    paint = _coloured if colour else _plain
    lines = [paint(_cut(heading(explanation), WIDTH), "heading")]
    for family in explanation.families:
        if len(explanation.families) > 1:
            lines += ["", paint(f"The {family.title}'s classes", "heading")]
        lines += ["", *draw(family)]
    lines += _hooks(explanation, paint)
    lines += _advice(explanation, paint)
    if trace is not None:
        lines += _trace(trace, paint)
    return "\n".join(lines) + "\n"


def _hooks(explanation: Explanation, paint: Paint) -> list[str]:
    lines = ["", paint("Hooks, in call order", "heading")]
    lines.append(f"{'':{HOOK}}{'class whose method runs':{OWNER + PLACE}}in which thread")
    group = ""
    for row in explanation.hooks:
        if row.group != group:
            group = row.group
            lines.append(paint(group, "heading"))
        lines.append(_hook(row, paint))
    if any(row.yours for row in explanation.hooks):
        lines += ["", "● yours"]
    return lines


def _hook(row: HookRow, paint: Paint) -> str:
    name = f"{'● ' if row.yours else '  '}{'  ' * row.depth}{row.name}{f' ({row.remark})' if row.remark else ''}"
    place = _column(str(row.place) if row.place.file or row.owner else "", PLACE, from_left=True)
    line = f"{_column(name, HOOK)}{_column(row.owner, OWNER)}{place}{_cut(row.where, WIDTH - HOOK - OWNER - PLACE)}"
    return paint(line.rstrip(), "yours") if row.yours else line.rstrip()


def _advice(explanation: Explanation, paint: Paint) -> list[str]:
    if not explanation.warnings:
        return []
    lines = ["", paint("What to look at", "heading")]
    for advice in explanation.warnings:
        wrapped = textwrap.wrap(
            f"{advice.level}: {advice.text}",
            WIDTH,
            subsequent_indent=" " * (len(advice.level) + 2),
            break_on_hyphens=False,
        )
        lines += [paint(line, advice.level) for line in wrapped]
    return lines


def _trace(trace: Trace, paint: Paint) -> list[str]:
    lines = ["", paint(f"{title(trace)}, as it happened (milliseconds)", "heading")]
    lines.append(_cut(f"client sent {trace.sent!r} and got {_seen(trace.received)}", WIDTH))
    lines.append(f"{'at':>{TIME}}{'took':>{TIME}}  {'call':{CALL}}{'class':{CLASS}}in")
    for number, call in enumerate(trace):
        took = "…" if call.took is None else f"{call.took:.2f}"
        name = "  " * call.depth + call.name + (f" ×{call.count}" if call.count > 1 else "")
        line = f"{call.at:{TIME}.2f}{took:>{TIME}}  {_column(name, CALL)}{_column(call.owner, CLASS)}"
        lines.append((line + _cut(thread_name(call), WIDTH - len(line))).rstrip())
        if raised_here(trace, number):
            indent = " " * (2 * TIME + 2 + 2 * call.depth)
            lines.append(paint(_cut(f"{indent}raised {call.error}", WIDTH), "error"))
    if trace.cut:
        lines += ["", *(paint(line, "warning") for line in textwrap.wrap(f"cut: {trace.cut}", WIDTH))]
    return lines


def _seen(data: bytes) -> str:
    return repr(data if len(data) <= 40 else data[:40]) + (f" … ({len(data)} bytes)" if len(data) > 40 else "")


def _column(text: str, width: int, *, from_left: bool = False) -> str:
    """Fit text into a column that ends with two blanks."""
    if len(text) <= width - 2:
        return text.ljust(width)
    return ("…" + text[3 - width :] if from_left else text[: width - 3] + "…") + "  "


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
