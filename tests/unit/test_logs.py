"""The end of a log, what is added to it, and logs that were put aside."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from etcdreplica.checkpoint.logs import BLOCK, printed


async def all_of(path: Path, lines: int) -> bytes:
    """Return what is there now."""
    return b"".join([data async for data in printed(path, lines, follow=False)])


@pytest.mark.parametrize("lines", [0, 1, 3, 5000])
@pytest.mark.parametrize("end", [b"\n", b""])
async def test_last_lines(tmp_path: Path, lines: int, end: bytes) -> None:
    """So many, however long they are, and whether the last one is finished or not."""
    path = tmp_path / "app.log"
    text = [b"%d " % number + b"x" * (number * 97 % 300) for number in range(2000)]
    path.write_bytes(b"\n".join(text) + end)
    assert path.stat().st_size > 3 * BLOCK
    wanted = text[len(text) - min(lines, len(text)) :]
    assert await all_of(path, lines) == (b"\n".join(wanted) + end if wanted else b"")


async def test_what_was_put_aside_comes_before(tmp_path: Path) -> None:
    """A start has put the log aside: what is wanted beyond the new one is there."""
    path = tmp_path / "app.log"
    path.with_name("app.log.1").write_bytes(b"a\nb\n")
    path.write_bytes(b"c\n")
    assert await all_of(path, 2) == b"b\nc\n"
    assert await all_of(path, 1) == b"c\n"
    assert await all_of(path, 9) == b"a\nb\nc\n"


async def test_follow_goes_on_in_the_next_log(tmp_path: Path) -> None:
    """Nothing is lost and nothing comes twice when the log is put aside meanwhile."""
    path = tmp_path / "app.log"
    path.write_bytes(b"a\n")
    async with asyncio.timeout(30), contextlib.aclosing(printed(path, 1, follow=True)) as following:
        assert await anext(following) == b"a\n"
        with path.open("ab") as out:
            out.write(b"b\n")
        assert await anext(following) == b"b\n"
        path.rename(path.with_name("app.log.1"))
        path.write_bytes(b"c\n")
        assert await anext(following) == b"c\n"


async def test_only_a_log_is_read(tmp_path: Path) -> None:
    """Neither what a link leads to, nor a pipe that somebody has put there, nor a directory."""
    (tmp_path / "secret").write_text("s3cret")
    (tmp_path / "link.log").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "pipe.log")
    (tmp_path / "directory.log").mkdir()
    for name in ("link", "pipe", "directory", "none"):
        with pytest.raises(OSError, match=r"\.log"):
            await all_of(tmp_path / f"{name}.log", 5)
