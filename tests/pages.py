"""The blocks of code in the pages of docs/ and README.md, for tests that do what these say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "compose/README.md")
_FENCE = re.compile(r'^( *)```(\w*)(?: title="([^"]*)")?\n(.*?)^\1```$', re.MULTILINE | re.DOTALL)


@frozen
class Block:
    """One block. `title`: the file that it is to be, or the terminal that it is to be typed into."""

    page: str
    line: int
    language: str
    title: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page in order."""
    text = page.read_text()
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        body = re.sub(f"^{found[1]}", "", found[4], flags=re.MULTILINE)
        yield Block(str(page.relative_to(ROOT)), line, found[2], found[3] or "", body)
