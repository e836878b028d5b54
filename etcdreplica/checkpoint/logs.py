"""What copies have printed: the end of a log, and what is added to it.

The path follows from the name of the application, so nothing else can be read. A log grows at its end only; a large one is put
aside as FILE.1 before the next start, and another one begins (`guardian.wards`).
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncGenerator
from pathlib import Path

BLOCK = 64 << 10
FARTHEST = 4 << 20  # so far before the end of a log its last lines are looked for
POLL_S = 0.25  # a file raises no event


async def printed(path: Path, lines: int, follow: bool) -> AsyncGenerator[bytes, None]:
    """Yield the last lines, and with `follow` what comes after them, for ever. Raises OSError, FileNotFoundError for no log.

    Nothing is read before the last block was taken, and a disk that hangs holds up nobody else.
    """
    file = await asyncio.to_thread(_open, path)
    try:
        before, at = await asyncio.to_thread(_end, file, path, lines)
        if before:
            yield before
        while True:
            data = await asyncio.to_thread(os.pread, file, BLOCK, at)
            at += len(data)
            if data:
                yield data
            elif not follow:
                return
            elif await asyncio.to_thread(_has_ended, file, path):
                following = await asyncio.to_thread(_open, path)
                os.close(file)
                file, at = following, 0
            else:
                await asyncio.sleep(POLL_S)
    finally:
        os.close(file)


def _open(path: Path) -> int:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise FileNotFoundError(path)
    return file


def _end(file: int, path: Path, lines: int) -> tuple[bytes, int]:
    """Return what is wanted of the log before this one, and where in this one to begin."""
    at, found = _last_lines(file, lines)
    if found >= lines:
        return b"", at
    try:
        earlier = _open(path.with_name(f"{path.name}.1"))
    except OSError:
        return b"", at
    try:
        begin, _ = _last_lines(earlier, lines - found)
        return os.pread(earlier, FARTHEST, begin), at
    finally:
        os.close(earlier)


def _last_lines(file: int, lines: int) -> tuple[int, int]:
    """Return where the last lines begin, and how many they are."""
    size = os.fstat(file).st_size
    floor, at, tail = max(0, size - FARTHEST), size, b""
    while at > floor and tail.count(b"\n", 0, -1) < lines:
        block = min(BLOCK, at - floor)
        at -= block
        tail = os.pread(file, block, at) + tail
    kept = tail.splitlines(keepends=True)[-lines:] if lines else []
    return size - sum(map(len, kept)), len(kept)


def _has_ended(file: int, path: Path) -> bool:
    """Whether another log has begun in the place of this one."""
    try:
        return not os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False  # put aside, and the next one has not begun
