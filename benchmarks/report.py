# SPDX-License-Identifier: MIT
"""Write the table of results/current.json into docs/explanation/performance.md, between its two marks."""

from __future__ import annotations

import sys

from benchkit import results, table
from benchkit.machine import headline
from benchkit.plan import HOME

PAGE = HOME.parent / "docs" / "explanation" / "performance.md"
RESULT = HOME / "results" / "current.json"
BEGIN, END = "<!-- from results/current.json by benchmarks/report.py -->\n", "<!-- end -->\n"
BASELINE = "floor"
COLUMNS = ("harken_green", "uvloop_protocol", "uvloop_streams", "asyncio_streams", "gevent", "go", "stdlib_threads")


def write(page: str) -> str:
    """Return the page with the table of the current result."""
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise SystemExit(f"report.py: {PAGE} lacks the line {BEGIN.strip()} or {END.strip()}")
    result = results.load(RESULT)
    commits = sorted({scenario["commit"] for scenario in result["scenarios"].values()})
    text = f"{table.summary(result, BASELINE, COLUMNS)}\n{headline(result)} Commits: {', '.join(commits)}.\n"
    return before + mark + text + end + after


if __name__ == "__main__":
    PAGE.write_text(write(PAGE.read_text("utf-8")), "utf-8")
    sys.stderr.write(f"report.py: wrote {PAGE}\n")
