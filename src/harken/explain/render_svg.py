"""Write an explanation as an SVG picture: the hierarchy with boxes and arrows, then the hooks, warnings and calls."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from xml.sax.saxutils import escape

from harken.explain.layout import Layout, arrange, ports, spread, tracks
from harken.explain.model import ClassBox, Explanation, Family, HookRow, Trace
from harken.explain.wording import heading, raised_here, thread_name, title as trace_title

__all__ = ["render_svg"]

# Pixels. 0.61 em is the advance of the widest usual monospace fonts (Courier 0.60, DejaVu Sans Mono 0.602).
FONT = 12
CHAR = FONT * 0.61
LINE = 17
PAD = 10
GAP = 28
TRACK = 16
MARGIN = 24
METHODS = 42  # characters in a line of methods

_STYLE = (
    f"text{{font:{FONT}px ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,monospace;fill:#1f2937;white-space:pre}}"
    ".h{font-weight:bold}.dim{fill:#6b7280}.warning{fill:#b45309}.error{fill:#b91c1c}"
    ".yours{fill:#0f766e;font-weight:bold}"
    ".box{fill:#f8fafc;stroke:#475569}.box.mine{fill:#f0fdfa;stroke:#0f766e;stroke-width:2}"
    ".line{fill:none;stroke:#475569}.bar{fill:#93c5fd}"
)


class Sheet:
    """An SVG picture in the making; it grows with what is put on it."""

    def __init__(self) -> None:
        """Begin with an empty picture."""
        self.parts: list[str] = []
        self.right = 0.0
        self.y = float(MARGIN)

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        """Put one line of text with its baseline at ``y``."""
        mark = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}"{mark}>{escape(_printable(text))}</text>')
        self.right = max(self.right, x + len(text) * CHAR * (1.02 if kind in ("h", "yours") else 1))

    def line(self, text: str, kind: str = "", indent: int = 0) -> None:
        """Put one line of text below what is there."""
        self.y += LINE
        self.text(MARGIN + indent * CHAR, self.y, text, kind)

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """Put a rectangle with slightly rounded corners."""
        shape = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        self.parts.append(f'<rect {shape} rx="4" class="{kind}"/>')
        self.right = max(self.right, x + width)

    def path(self, points: list[tuple[float, float]], *, arrow: bool = False) -> None:
        """Put a line through the points, with an open triangle at its end for an ancestor."""
        drawn = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        head = ' marker-end="url(#a)"' if arrow else ""
        self.parts.append(f'<path d="{drawn}" class="line"{head}/>')

    def finish(self, title: str) -> str:
        """Return the whole document."""
        width, height = self.right + MARGIN, self.y + MARGIN
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" xml:space="preserve">'
        )
        marker = (
            '<defs><marker id="a" viewBox="0 0 12 12" refX="11" refY="6" markerWidth="11" markerHeight="11" '
            'orient="auto-start-reverse"><path d="M1 1 L11 6 L1 11 Z" fill="#ffffff" stroke="#475569"/></marker></defs>'
        )
        title = f"<title>{escape(_printable(title))}</title>"
        page = f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>'
        return "\n".join([head, title, f"<style>{_STYLE}</style>", marker, page, *self.parts, "</svg>"]) + "\n"


def render_svg(explanation: Explanation, trace: Trace | None = None) -> str:
    """Return a picture that needs no other file and no program to lay it out.

    Args:
        explanation: what ``describe`` gave.
        trace: what ``trace`` gave, drawn as bars over time.
    """
    sheet = Sheet()
    title = heading(explanation)
    sheet.line(title, "h")
    sheet.y += LINE
    top, left, bottom = sheet.y, float(MARGIN), 0.0
    for family in explanation.families:
        right, low = _family(sheet, family, left, top)
        left, bottom = right + 2 * GAP, max(bottom, low)
    sheet.y = bottom
    _hooks(sheet, explanation.hooks)
    for advice in explanation.warnings:
        for line in ["", *textwrap.wrap(f"{advice.level}: {advice.text}", 100)]:
            sheet.line(line, "warning" if advice.level == "warning" else "dim")
    if trace is not None:
        _trace(sheet, trace)
    return sheet.finish(title)


def _printable(text: str) -> str:
    """XML has no way to write most control characters."""
    return "".join(character if character.isprintable() else "�" for character in text)


def _methods(box: ClassBox) -> list[str]:
    return textwrap.wrap("  ".join(box.methods), METHODS, break_on_hyphens=False)


def _size(box: ClassBox | None) -> tuple[int, int]:
    """Return the width and height of a box; a line that passes a level is one pixel wide."""
    if box is None:
        return 1, 0
    methods = _methods(box)
    longest = max(len(line) for line in (box.name + "  ", str(box.place), *methods))
    return round(longest * CHAR + 2 * PAD), round(LINE * (2 + len(methods)) + PAD * (2 if methods else 1))


def _family(sheet: Sheet, family: Family, left: float, top: float) -> tuple[float, float]:
    """Draw a hierarchy with its upper left corner there, and return its lower right one."""
    layout = arrange(family.classes)
    sizes = {key: _size(layout.boxes.get(key)) for level in layout.levels for key in level}
    widths = {key: size[0] for key, size in sizes.items()}
    centres = {key: centre + round(left) for key, centre in spread(layout, widths, GAP).items()}
    entries = ports(layout, centres, widths)
    bottom = top
    for number, level in enumerate(layout.levels):
        height = max(sizes[key][1] for key in level)
        bottom = top + height
        for key in level:
            if key in layout.boxes:
                _box(sheet, layout.boxes[key], centres[key], bottom, sizes[key])
            else:
                sheet.path([(centres[key], top), (centres[key], bottom)])
        if number + 1 < len(layout.levels):
            top = _links(sheet, layout, number, bottom, centres, entries, sizes)
    return max(centres[key] + widths[key] / 2 for key in centres), bottom


def _box(sheet: Sheet, box: ClassBox, centre: float, bottom: float, size: tuple[int, int]) -> None:
    width, height = size
    x, y = centre - width / 2, bottom - height
    sheet.box(x, y, width, height, "box mine" if box.yours else "box")
    sheet.text(x + PAD, y + LINE, box.name, "h")
    sheet.text(x + PAD, y + 2 * LINE, str(box.place), "dim")
    methods = _methods(box)
    if methods:
        rule = y + 2 * LINE + PAD * 0.8
        sheet.path([(x, rule), (x + width, rule)])
    for number, line in enumerate(methods, 3):
        sheet.text(x + PAD, y + number * LINE + PAD * 0.8, line)


def _links(
    sheet: Sheet,
    layout: Layout,
    number: int,
    bottom: float,
    centres: Mapping[str, int],
    entries: Mapping[str, int],
    sizes: Mapping[str, tuple[int, int]],
) -> float:
    """Draw the lines between a level and the next, and return where the next begins."""
    rows, count = tracks(layout, number, centres, entries)
    following = bottom + TRACK * (count + 1) + 8
    height = max(sizes[key][1] for key in layout.levels[number + 1])
    for link in layout.links:
        if link.lower in rows:
            track = bottom + TRACK * (rows[link.lower] + 1) + 4
            own = sizes[link.lower][1] if link.lower in layout.boxes else height
            lower, upper = entries[link.lower], centres[link.upper]
            path: list[tuple[float, float]] = [(lower, following + height - own), (lower, track)]
            path += [(upper, track), (upper, bottom)]
            sheet.path(path, arrow=link.upper in layout.boxes)
    return following


def _hooks(sheet: Sheet, hooks: tuple[HookRow, ...]) -> None:
    sheet.y += LINE
    sheet.line("Hooks, in call order", "h")
    group = ""
    for row in hooks:
        if row.group != group:
            group = row.group
            sheet.line(group, "dim")
        kind = "yours" if row.yours else ""
        remark = f" ({row.remark})" if row.remark else ""
        sheet.line(row.name + remark, kind, indent=2 + 2 * row.depth)
        for column, text in ((38, row.owner), (62, str(row.place) if row.owner else ""), (92, row.where)):
            sheet.text(MARGIN + column * CHAR, sheet.y, text, kind or "dim")


def _trace(sheet: Sheet, trace: Trace) -> None:
    sheet.y += LINE
    sheet.line(f"{trace_title(trace)}, as it happened (milliseconds)", "h")
    ends = [call.at + (call.took or 0) for call in trace] or [0.0]
    scale = 300 / (max(ends) or 1)
    for place, call in enumerate(trace):
        sheet.line(call.name + (f" ×{call.count}" if call.count > 1 else ""), indent=2 + 2 * call.depth)
        sheet.text(MARGIN + 38 * CHAR, sheet.y, call.owner, "dim")
        sheet.text(MARGIN + 62 * CHAR, sheet.y, f"{call.at:.2f}", "dim")
        start = MARGIN + 72 * CHAR
        took = max(ends) - call.at if call.took is None else call.took
        sheet.box(start + call.at * scale, sheet.y - 9, max(took * scale, 1.5), 10, "bar")
        sheet.text(start + 310, sheet.y, "not returned" if call.took is None else f"{call.took:.2f}", "dim")
        sheet.text(start + 400, sheet.y, thread_name(call), "dim")
        if raised_here(trace, place):
            sheet.line(f"raised {call.error}", "error", indent=2 + 2 * call.depth)
    if trace.cut:
        sheet.line(f"cut: {trace.cut}", "warning")
