"""Writes the pages of docs/ that come from the code. `python docs/generate.py` (make docs); `--check` only compares."""

from __future__ import annotations

import sys
from pathlib import Path

from reference import api_page, cli_page

from etcdreplica.cli.settings import docs_table
from etcdreplica.core.lifecycle import PROMOTABLE, diagram

HERE = Path(__file__).parent

STATE_MACHINES = f"""# State machines

Written by `make docs` from `etcdreplica/core/lifecycle.py`; do not edit.

## A replica on its host

```mermaid
{diagram()}```

A backup can take over without waiting in the states {", ".join(sorted(PROMOTABLE))}.
"""


def configuration() -> str:
    """Return the written page with the table of settings in its place."""
    before, mark, rest = (HERE / "configuration.md").read_text().partition("<!-- settings:")
    note, end, after = rest.partition("<!-- end -->")
    assert end, "docs/configuration.md has lost the place of its table"
    return f"{before}{mark}{note.splitlines()[0]}\n{docs_table()}{end}{after}"


PAGES = {
    "state-machines.md": STATE_MACHINES,
    "configuration.md": configuration(),
    "cli.md": cli_page(),
    "api.md": api_page(),
}


def main() -> int:
    """Write, or compare and return 1 if a page is not up to date."""
    stale = [name for name, text in PAGES.items() if not (HERE / name).exists() or (HERE / name).read_text() != text]
    if "--check" not in sys.argv:
        for name in stale:
            (HERE / name).write_text(PAGES[name])
        return 0
    for name in stale:
        print(f"docs/{name} is not up to date: run 'make docs'", file=sys.stderr)  # noqa: T201
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
