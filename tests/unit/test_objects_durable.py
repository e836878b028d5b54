"""Objects whose log is on disks: all copies may end at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from etcdreplica.errors import StorageError
from etcdreplica.objects import disk as disk_module
from etcdreplica.objects.disk import LOG, SNAPSHOT, DiskLog
from etcdreplica.testing.objects import Copies, values
from tests.unit.test_objects import Ledger


@pytest.mark.parametrize("compact_bytes", [disk_module.COMPACT_BYTES, 2000])
async def test_all_copies_end_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compact_bytes: int) -> None:
    """What was acknowledged is there when they start again, in any order, and goes on."""
    monkeypatch.setattr("etcdreplica.objects.server.COMPACT_BYTES", compact_bytes)
    async with Copies(Ledger, tmp_path, durable=tmp_path / "disks") as copies:
        for host in "abc":
            await copies.start(host)
        await copies.in_sync(3)
        for life in range(1, 4):
            ledger = await copies.client()
            for _ in range(30):
                await asyncio.gather(*(ledger.deposit(name, 1) for name in ("ann", "bob")))
            await asyncio.sleep(0.15)  # a turn of the clock that compacts
            for copy in list(copies.copies):
                await copies.kill(copy)
            for host in ("bca", "cab", "abc")[life - 1]:
                await copies.start(host)
            await copies.in_sync(3)
            wanted = {"ann": 30 * life, "bob": 30 * life}
            await copies.until(lambda wanted=wanted: values(copies.copies, "accounts") == [wanted] * 3)
        assert [copy.error for copy in copies.copies] == [None] * 3


async def test_a_host_that_lost_its_disk_does_not_lead(tmp_path: Path) -> None:
    """It says so instead of beginning anew."""
    async with Copies(Ledger, tmp_path, durable=tmp_path / "disks") as copies:
        first = await copies.start("a")
        await copies.in_sync(1)
        await (await copies.client()).deposit("ann", 1)
        await copies.kill(first)
        for path in (tmp_path / "disks" / "a").iterdir():
            path.unlink()
        again = await copies.start("a")
        await copies.until(lambda: again.error is not None)
        assert "has no state" in str(again.error)


# --- the disk ------------------------------------------------------------------------------------------------------


def fail(error: Exception) -> None:
    """No disk fails here."""
    raise error


async def opened(directory: Path) -> tuple[DiskLog, tuple[int, int, bytes, list[bytes]] | None]:
    """Open a log; return what was found."""
    disk = DiskLog(directory, fail)
    found = disk.recover()
    return disk, None if found is None else (found.index, found.commit, found.snapshot, found.records)


async def test_records_after_a_snapshot(tmp_path: Path) -> None:
    """They are found, less what a later record has made void, and less what a crash has torn off."""
    disk, found = await opened(tmp_path)
    assert found is None
    disk.compact(10, 8, b"state", ())
    done: list[int] = []
    disk.append(11, [b"a", b"b", b"c"], lambda: done.append(1))
    disk.append(12, [b"B"], lambda: done.append(2))
    await disk.flushed()
    assert done == [1, 2]
    disk.close()
    with (tmp_path / LOG).open("ab") as file:
        file.write(b"torn")
    disk, found = await opened(tmp_path)
    assert found == (10, 8, b"state", [b"a", b"B"])
    disk.append(13, [b"C"], lambda: None)
    await disk.flushed()
    disk.close()
    disk, found = await opened(tmp_path)
    assert found == (10, 8, b"state", [b"a", b"B", b"C"])
    disk.close()


async def test_crash_between_a_snapshot_and_its_log(tmp_path: Path) -> None:
    """Records that the snapshot has already are left away."""
    disk, _ = await opened(tmp_path)
    disk.compact(0, 0, b"empty", [b"a", b"b", b"c"])
    await disk.flushed()
    disk.close()
    log = (tmp_path / LOG).read_bytes()
    disk, _ = await opened(tmp_path)
    disk.compact(2, 2, b"two", [b"c"])
    await disk.flushed()
    disk.close()
    (tmp_path / LOG).write_bytes(log)
    disk, found = await opened(tmp_path)
    assert found == (2, 2, b"two", [b"c"])
    disk.close()


async def test_damage_is_an_error(tmp_path: Path) -> None:
    """A snapshot that is not what was written is not used."""
    disk, _ = await opened(tmp_path)
    disk.compact(1, 1, b"state", ())
    await disk.flushed()
    disk.close()
    path = tmp_path / SNAPSHOT
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StorageError, match="is damaged"):
        await opened(tmp_path)
