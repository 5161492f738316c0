"""Find the code blocks of a page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

FENCE = re.compile(r"(?P<before>[^\n]*\n\s*)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: .+ -->")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, in which language, and whether the page says that it is not run."""

    page: Path
    line: int
    language: str
    text: str
    excused: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages(*folders: str) -> list[Path]:
    """Return the README and the pages of these folders of ``docs/``."""
    return [ROOT / "README.md", *sorted(page for folder in folders for page in (ROOT / "docs" / folder).rglob("*.md"))]


def blocks(language: str, *folders: str) -> list[Block]:
    """Return every block of a language in the README and these folders of ``docs/``."""
    found = []
    for page in pages(*folders):
        text = page.read_text()
        for match in FENCE.finditer(text):
            if match["language"] == language:
                line = text.count("\n", 0, match.start("language")) + 1
                found.append(Block(page, line, language, match["text"], bool(NOT_RUN.search(match["before"] or ""))))
    return found
