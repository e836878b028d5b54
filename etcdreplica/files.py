"""Replacing a small file as a whole."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, data: bytes, *, flush: bool = False) -> None:
    """Have either the old content or the new one there; with `flush` the new one also after a power loss. Raises OSError.

    Without it a power loss may leave an empty file, or the old one.
    """
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        if flush:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)
    if flush:
        fd = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
