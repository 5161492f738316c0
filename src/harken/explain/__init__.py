"""Explain a server class: who its ancestors are, which method answers each hook, what looks wrong.

``describe(cls)`` reads the classes and starts nothing. ``trace(cls, handler)`` serves one real connection in a child
process on a loopback port and returns the calls as they happened. The ``render_…`` functions write either as text, as a
Mermaid class diagram or as SVG. ``harken explain`` is these functions on the command line.
"""

from __future__ import annotations

from harken.explain.hierarchy import describe
from harken.explain.model import Advice, Call, ClassBox, Explanation, Family, HookRow, Place, Trace
from harken.explain.render_mermaid import render_mermaid
from harken.explain.render_svg import render_svg
from harken.explain.render_text import render_text
from harken.explain.trace import trace

__all__ = [
    "Advice",
    "Call",
    "ClassBox",
    "Explanation",
    "Family",
    "HookRow",
    "Place",
    "Trace",
    "describe",
    "render_mermaid",
    "render_svg",
    "render_text",
    "trace",
]
