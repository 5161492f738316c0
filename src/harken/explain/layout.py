"""Lay out a class hierarchy by levels: ancestors above, descendants below, bases from left to right.

Text and SVG share it; they differ in what a unit is (a character, a pixel).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from harken.explain.model import ClassBox

__all__ = ["MAX_PER_LEVEL", "Layout", "Link", "arrange", "ports", "spread", "tracks"]

# Four boxes of the narrowest useful width (22 characters) fit in 100 columns; more go one level higher.
MAX_PER_LEVEL = 4


class Link(NamedTuple):
    """A line between a cell and a cell on the next level below."""

    upper: str
    lower: str


class Layout(NamedTuple):
    """Levels from top to bottom.

    Attributes:
        levels: keys of cells, left to right; a key that is not in ``boxes`` is a line passing the level.
        boxes: the classes by key.
        links: every line, between adjacent levels only.
    """

    levels: tuple[tuple[str, ...], ...]
    boxes: Mapping[str, ClassBox]
    links: tuple[Link, ...]


def arrange(classes: tuple[ClassBox, ...]) -> Layout:
    """Give each class a level below all its bases, and a place on it.

    Args:
        classes: in method resolution order, the most derived first.
    """
    heights = _heights(classes)
    boxes = {box.key: box for box in classes}
    levels: list[list[str]] = [[] for _ in range(max(heights.values()) + 1)]
    links: list[Link] = []

    def visit(key: str) -> None:
        levels[heights[key]].append(key)
        for base in boxes[key].bases:
            lower = key
            for height in range(heights[key] + 1, heights[base]):
                passing = f"{key}>{base}@{height}"
                levels[height].append(passing)
                links.append(Link(passing, lower))
                lower = passing
            links.append(Link(base, lower))
            if base not in levels[heights[base]]:
                visit(base)

    visit(classes[0].key)
    return Layout(tuple(tuple(level) for level in reversed(levels)), boxes, tuple(links))


def _heights(classes: tuple[ClassBox, ...]) -> dict[str, int]:
    """Return levels counted from the most derived class; a class comes after its subclasses in the order given."""
    heights: dict[str, int] = {}
    full: dict[int, int] = {}
    for box in classes:
        below = [heights[other.key] for other in classes if box.key in other.bases and other.key in heights]
        height = max(below, default=-1) + 1
        while full.get(height, 0) >= MAX_PER_LEVEL:
            height += 1
        heights[box.key] = height
        full[height] = full.get(height, 0) + 1
    return heights


def spread(layout: Layout, widths: Mapping[str, int], gap: int, room: float = float("inf")) -> dict[str, int]:
    """Return the horizontal centre of every cell: near its neighbours above and below, overlapping nobody.

    Args:
        layout: what :func:`arrange` gave.
        widths: of every cell.
        gap: the least distance between two cells.
        room: the width of the page; no level may be wider.
    """
    centres: dict[str, float] = {}
    for level in layout.levels:
        left = -(sum(widths[key] for key in level) + gap * (len(level) - 1)) / 2
        for key in level:
            centres[key] = left + widths[key] / 2
            left += widths[key] + gap
    for level in (*layout.levels[::-1], *layout.levels):
        _settle(level, {key: _wish(key, layout, centres) for key in level}, widths, gap, centres, room)
    edge = min(centres[key] - widths[key] / 2 for level in layout.levels for key in level)
    return {key: math.floor(centre - edge) for key, centre in centres.items()}


def _wish(key: str, layout: Layout, centres: Mapping[str, float]) -> float:
    near = [link.upper for link in layout.links if link.lower == key]
    near += [link.lower for link in layout.links if link.upper == key]
    return sum(centres[other] for other in near) / len(near) if near else centres[key]


def _settle(
    level: tuple[str, ...],
    wishes: Mapping[str, float],
    widths: Mapping[str, int],
    gap: int,
    centres: dict[str, float],
    room: float,
) -> None:
    """Put cells side by side, the whole row where it misses the wishes least, within a page around 0."""
    offsets, at = {}, 0.0
    for key in level:
        offsets[key] = at + widths[key] / 2
        at += widths[key] + gap
    shift = sum(wishes[key] - offsets[key] for key in level) / len(level)
    shift = min(max(shift, -room / 2), room / 2 - (at - gap))
    for key in level:
        centres[key] = offsets[key] + shift


def ports(layout: Layout, centres: Mapping[str, int], widths: Mapping[str, int]) -> dict[str, int]:
    """Return where lines enter each cell from above: straight below its only base if it can, else in the middle."""
    entries = dict(centres)
    for key in centres:
        uppers = [link.upper for link in layout.links if link.lower == key]
        if len(uppers) == 1 and abs(centres[uppers[0]] - centres[key]) < widths[key] // 2 - 1:
            entries[key] = centres[uppers[0]]
    return entries


def tracks(
    layout: Layout, upper_level: int, centres: Mapping[str, int], entries: Mapping[str, int]
) -> tuple[dict[str, int], int]:
    """Give the lines below a level their rows, so that no two of them overlap or touch.

    Args:
        layout: what :func:`arrange` gave.
        upper_level: counted from the top.
        centres: what :func:`spread` gave.
        entries: what :func:`ports` gave.

    Returns:
        The row of each lower cell's line, from the top, and how many rows there are.
    """
    spans: dict[str, tuple[int, int]] = {}
    families: dict[str, frozenset[str]] = {}
    for key in layout.levels[upper_level + 1]:
        uppers = [link.upper for link in layout.links if link.lower == key]
        if uppers:
            ends = [entries[key], *(centres[upper] for upper in uppers)]
            spans[key], families[key] = (min(ends), max(ends)), frozenset(uppers)

    def apart(one: str, other: str) -> bool:
        (left, right), (start, end) = spans[one], spans[other]
        return families[one] == families[other] or end + 1 < left or right + 1 < start

    taken: list[list[str]] = []
    rows: dict[str, int] = {}
    for key in spans:
        fitting = (row for row, others in enumerate(taken) if all(apart(key, other) for other in others))
        rows[key] = next(fitting, len(taken))
        if rows[key] == len(taken):
            taken.append([])
        taken[rows[key]].append(key)
    return rows, len(taken)
