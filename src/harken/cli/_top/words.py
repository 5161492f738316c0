"""Numbers as people read them at a glance."""

from __future__ import annotations

__all__ = ["size", "span"]


def size(number: float | None) -> str:
    """Return a number of bytes with its unit; empty when it is not known."""
    if number is None:
        return ""
    if number < 1024:
        return f"{number:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        number /= 1024
        if number < 1024:
            return f"{number:.1f} {unit}"
    return f"{number / 1024:.1f} TiB"


def span(seconds: float | None) -> str:
    """Return a time with its unit; empty when it is not known."""
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
