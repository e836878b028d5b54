"""Builds the site: `python docs/build.py` (make docs). Its pages are those of docs/, and README.md is the first one.

They are links among files, made for readers of the repository. What leads out of docs/ is made to fit the site here, and every
link to a file must lead to one. Links to pages and headings are checked by Zensical, whose --strict fails on a wrong one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
SITE = ROOT / "build" / "docs"
ELSEWHERE = {ROOT / "README.md": "index.md", ROOT / "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:|#)([^)#]+)(#[^)]*)?\)")


def pages() -> dict[str, str]:
    """Return every page of the site by its name. Raises FileNotFoundError for a link to nothing."""
    sources = {**{path: path.name for path in DOCS.glob("*.md")}, **ELSEWHERE}
    return {name: _fit(path, sources) for path, name in sources.items()}


def _fit(path: Path, sources: dict[Path, str]) -> str:
    """Return a page with its links as the site needs them: those to source code, which is not in it, become plain text."""

    def link(found: re.Match[str]) -> str:
        target = (path.parent / found[2]).resolve()
        if not target.exists():
            raise FileNotFoundError(f"{path.relative_to(ROOT)} links to {found[2]}, which is not there")
        return f"[{found[1]}]({sources[target]}{found[3] or ''})" if target in sources else found[1]

    return _LINK.sub(link, path.read_text())


def main() -> int:
    """Write the pages, and have Zensical build them; return its exit code."""
    shutil.rmtree(SITE, ignore_errors=True)
    (SITE / "docs").mkdir(parents=True)
    shutil.copy(DOCS / "mkdocs.yml", SITE)
    for name, text in pages().items():
        (SITE / "docs" / name).write_text(text)
    menu = set(re.findall(r"([\w-]+\.md)", (DOCS / "mkdocs.yml").read_text()))
    if missing := menu ^ set(pages()):
        print(f"in the menu (docs/mkdocs.yml) or in docs/, but not in both: {', '.join(sorted(missing))}", file=sys.stderr)  # noqa: T201
        return 1
    return subprocess.run([Path(sys.executable).with_name("zensical"), "build", "--strict"], cwd=SITE, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
