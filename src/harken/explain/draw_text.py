"""Draw a class hierarchy with box characters, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Mapping

from harken.explain.layout import Layout, arrange, ports, spread, tracks
from harken.explain.model import ClassBox, Family

__all__ = ["WIDTH", "draw"]

# Columns. A terminal of 80 is rare now and a file:line beside a hook needs the room; editors' rulers stand at 100.
WIDTH = 100
GAP = 3
# A longer list of methods is broken into lines of about this many columns, so that boxes stay boxes.
PLEASANT = 44

UP, DOWN, LEFT, RIGHT = 1, 2, 4, 8
_LINES = {
    UP: "│",
    DOWN: "│",
    UP | DOWN: "│",
    LEFT: "─",
    RIGHT: "─",
    LEFT | RIGHT: "─",
    DOWN | RIGHT: "┌",
    DOWN | LEFT: "┐",
    UP | RIGHT: "└",
    UP | LEFT: "┘",
    UP | DOWN | RIGHT: "├",
    UP | DOWN | LEFT: "┤",
    DOWN | LEFT | RIGHT: "┬",
    UP | LEFT | RIGHT: "┴",
    UP | DOWN | LEFT | RIGHT: "┼",
}


class Canvas:
    """A sheet of characters; lines that meet are joined, lines that cross pass one behind the other."""

    def __init__(self) -> None:
        """Begin with an empty sheet."""
        self._cells: dict[tuple[int, int], str] = {}
        self._strokes: defaultdict[tuple[int, int], dict[str, int]] = defaultdict(dict)

    def write(self, x: int, y: int, text: str) -> None:
        """Put text on the sheet."""
        for offset, character in enumerate(text):
            self._cells[x + offset, y] = character

    def line(self, net: str, start: tuple[int, int], end: tuple[int, int]) -> None:
        """Draw a straight line, both ends included; lines of one ``net`` belong together."""
        (x1, y1), (x2, y2) = min(start, end), max(start, end)
        before, after = (LEFT, RIGHT) if y1 == y2 else (UP, DOWN)
        cells = [(x, y) for x in range(x1, x2 + 1) for y in range(min(y1, y2), max(y1, y2) + 1)]
        for place, cell in enumerate(cells):
            bits = (before if place else 0) | (after if place < len(cells) - 1 else 0)
            self._strokes[cell][net] = self._strokes[cell].get(net, 0) | bits

    def lines(self) -> list[str]:
        """Return the sheet, one string a line, without trailing blanks."""
        drawn = {cell: self._join(cell, nets) for cell, nets in self._strokes.items()} | self._join_boxes()
        cells = drawn | {cell: text for cell, text in self._cells.items() if cell not in drawn}
        if not cells:
            return []
        right, bottom = max(x for x, _ in cells), max(y for _, y in cells)
        return ["".join(cells.get((x, y), " ") for x in range(right + 1)).rstrip() for y in range(bottom + 1)]

    def _join(self, cell: tuple[int, int], nets: Mapping[str, int]) -> str:
        bits = list(nets.values())
        if LEFT | RIGHT in bits and all(one in (LEFT | RIGHT, UP | DOWN) for one in bits) and len(set(bits)) > 1:
            return "│"
        together = 0
        for one in bits:
            together |= one
        return _LINES.get(together, " ")

    def _join_boxes(self) -> dict[tuple[int, int], str]:
        """A line that ends on the border of a box becomes part of it."""
        joined = {}
        for cell, nets in self._strokes.items():
            if self._cells.get(cell) == "─":
                together = 0
                for one in nets.values():
                    together |= one
                joined[cell] = {DOWN: "┬", UP: "┴"}.get(together, "┼")
        return joined


def draw(family: Family) -> list[str]:
    """Return the drawing of a class and its ancestors, line by line."""
    layout = arrange(family.classes)
    texts = _texts(layout)
    widths = {key: _width(texts.get(key)) for level in layout.levels for key in level}
    centres = spread(layout, widths, GAP, WIDTH)
    entries = ports(layout, centres, widths)
    canvas = Canvas()
    top = 0
    for number, level in enumerate(layout.levels):
        height = max(len(texts[key]) for key in level if key in texts)
        for key in level:
            entry = entries[key] if any(link.lower == key for link in layout.links) else None
            _draw_cell(canvas, key, texts.get(key), centres[key], top, height, entry)
        if number + 1 < len(layout.levels):
            rows, count = tracks(layout, number, centres, entries)
            bottom = top + height
            for link in layout.links:
                if link.lower in rows:
                    _draw_link(canvas, link.lower, centres[link.upper], entries[link.lower], bottom, rows, count)
            top = bottom + count
    return canvas.lines()


def _width(lines: list[str] | None) -> int:
    return len(lines[0]) if lines else 1


def _draw_cell(
    canvas: Canvas, key: str, lines: list[str] | None, centre: int, top: int, height: int, entry: int | None
) -> None:
    """Stand a box on the bottom of its level; the line from above reaches down to it."""
    if lines is None:
        canvas.line(key, (centre, top - 1), (centre, top + height))
        return
    box_top = top + height - len(lines)
    for offset, line in enumerate(lines):
        canvas.write(centre - len(lines[0]) // 2, box_top + offset, line)
    if entry is not None and box_top > top:
        canvas.line(key, (entry, top - 1), (entry, box_top))


def _draw_link(
    canvas: Canvas, net: str, upper: int, lower: int, bottom: int, rows: Mapping[str, int], count: int
) -> None:
    track = bottom + rows[net]
    canvas.line(net, (upper, bottom - 1), (upper, track))
    if upper != lower:
        canvas.line(net, (upper, track), (lower, track))
    canvas.line(net, (lower, track), (lower, bottom + count))


def _texts(layout: Layout) -> dict[str, list[str]]:
    """Return each box as lines, every level within the width of the page."""
    texts = {}
    for level in layout.levels:
        boxes = [layout.boxes[key] for key in level if key in layout.boxes]
        passing = len(level) - len(boxes)
        room = (WIDTH - GAP * (len(level) - 1) - passing) // len(boxes)
        texts.update({box.key: _box(box, room) for box in boxes})
    return texts


def _box(box: ClassBox, room: int) -> list[str]:
    inner = room - 4
    name = f"● {box.name}" if box.yours else box.name
    place = str(box.place)
    methods = textwrap.wrap("  ".join(box.methods), min(inner, PLEASANT), break_on_hyphens=False) or ["(no methods)"]
    one_line = len(name) + 2 + len(place) <= min(inner, PLEASANT)
    head = [(name, place)] if one_line else [*((part, "") for part in textwrap.wrap(name, inner)), (place, "")]
    width = min(inner, max(len(a) + (2 + len(b) if b else 0) for a, b in [*head, *((line, "") for line in methods)]))
    lines = ["┌" + "─" * (width + 2) + "┐"]
    lines += [f"│ {_fit(a, width - len(b), from_left=a == place)}{b} │" for a, b in head]
    lines.append("├" + "─" * (width + 2) + "┤")
    lines += [f"│ {_fit(line, width)} │" for line in methods]
    return [*lines, "└" + "─" * (width + 2) + "┘"]


def _fit(text: str, width: int, *, from_left: bool = False) -> str:
    if len(text) <= width:
        return text.ljust(width)
    return "…" + text[1 - width :] if from_left else text[: width - 1] + "…"
