"""The blocks of code in the pages of docs/ and README.md, for tests that do what these say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "compose/README.md")
SHELLS = ("", "bash", "console", "sh", "shell")
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


@frozen
class Shown:
    """One command that a page shows. `whole`: it stands in a block, and is no mere mention."""

    page: str
    line: int
    text: str
    whole: bool

    def __str__(self) -> str:
        """Return it with its place."""
        return f"{self.page}:{self.line}: {self.text}"


_PROGRAMS = r"(?:etcdreplica|make|python3?|pip|\.venv/bin/\S+|[A-Z_]+=\S+ (?:make|\.venv))"
_MENTION = re.compile(rf"`({_PROGRAMS} [^`]+)`")
_INDENTED = re.compile(rf"^    (?={_PROGRAMS} )((?:.*\\\n)*.*)", re.MULTILINE)


def commands(page: Path) -> Iterator[Shown]:
    """Yield what a page shows as commands: each line of its shell blocks, and what is quoted in its text."""
    name, text = str(page.relative_to(ROOT)), page.read_text()
    for block in blocks(page):
        if block.language in SHELLS and not block.text.startswith(("etcd refused", "^C")):
            yield from _lines(name, block.line + 1, block.text)
        text = text.replace(block.text, "\n" * block.text.count("\n"))  # what is left is text, line by line
    for found in _INDENTED.finditer(text):
        yield from _lines(name, text.count("\n", 0, found.start()) + 1, found[1])
    for found in _MENTION.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        head, *others = found[1].split(" | ")  # `etcdreplica list | status`
        yield Shown(name, line, head, whole=False)
        for other in others:
            yield Shown(name, line, f"{head.rpartition(' ')[0]} {other}", whole=False)


def _lines(page: str, at: int, text: str) -> Iterator[Shown]:
    is_session = re.search(r"^\$ ", text, re.MULTILINE)  # with what is printed between the commands
    for number, line in enumerate(re.sub(r"\\\n\s*", lambda _: "\0", text).splitlines()):
        bare = re.sub(r"(^|\s)#.*", "", line).replace("\0", "").strip()
        at_line = at + number
        at += line.count("\0")
        if bare and (not is_session or bare.startswith("$ ")):
            yield Shown(page, at_line, bare.removeprefix("$ "), whole=True)
