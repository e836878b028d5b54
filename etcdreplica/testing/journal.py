"""Reading a file of lines while another process still writes it."""

from __future__ import annotations

from pathlib import Path


def written_lines(path: Path) -> list[str]:
    """Return the lines that are whole; a reader may see a part of the last. No file, no lines."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    return whole.splitlines()
