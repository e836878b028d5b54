"""A process that is killed while it stores checkpoints, and a disk that is full: what was committed stays."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from etcdreplica.checkpoint.files import DRAFT, Files
from etcdreplica.checkpoint.format import CHUNK, Manifest, digests
from etcdreplica.errors import StorageError
from etcdreplica.model import Stamp

ROUNDS = 50
MOST = 5  # checkpoints that a process gets to commit before it is killed
APP = "shop"
STORE = textwrap.dedent(
    '''
    """For each line that comes, have a process store one checkpoint after the other and say so; tell when it is dead."""

    import os, sys
    from pathlib import Path
    from etcdreplica.checkpoint.files import Files
    from etcdreplica.checkpoint.format import Manifest, digests
    from etcdreplica.model import Stamp

    def say(what, number):
        os.write(1, b"%s %d\\n" % (what.encode(), number))  # at once: it may be killed while it does

    def store():
        files = Files(Path(sys.argv[1]), 2)
        files.scan()
        newest = files.newest("shop")
        sequence = newest.manifest.stamp.sequence if newest else 0
        say("pid", os.getpid())
        while True:
            sequence += 1
            state = b"%d\\n" % sequence * (sequence * 7919 % 40_000)
            draft = files.draft(Manifest("shop", Stamp(1, sequence), "bytes", len(state), digests(state)))
            for index in draft.missing():
                draft.put(index, state[65536 * index : 65536 * (index + 1)])
            draft.commit()
            say("stored", sequence)

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            store()
        os.waitpid(child, 0)
        say("dead", child)
    '''
)


def test_killed_at_any_point(tmp_path: Path) -> None:
    """After SIGKILL the newest checkpoint is whole, and is the last one that was committed or a later one."""
    chance, committed = random.Random(1998), 0
    command = [sys.executable, "-c", STORE, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(ROUNDS):
            committed = max(committed, until_killed(process, chance))
            files = Files(tmp_path, 2)
            files.scan()
            newest = files.newest(APP)
            assert newest is not None
            assert newest.manifest.stamp.sequence >= committed
            assert files.verified(APP) == newest
            state = newest.path.read_bytes()[newest.begin :]
            assert state.split(b"\n")[0] == b"%d" % newest.manifest.stamp.sequence
            assert not files.has_lost(APP)
        assert process.stdin is not None
        process.stdin.close()


def until_killed(process: subprocess.Popen[str], chance: random.Random) -> int:
    """Have a process store until it is killed, some instructions after it has said something; return what it said last."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    said, pid, kill_at = 0, 0, chance.randrange(1, MOST)
    for count, line in enumerate(process.stdout):
        what, number = line.split()
        if what == "dead":
            break
        pid, said = (int(number), said) if what == "pid" else (pid, int(number))
        if count == kill_at:
            for _ in range(chance.randrange(200_000)):  # no sleep: it would end at the same points again and again
                pass
            os.kill(pid, signal.SIGKILL)
    return said


# --- a full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a disk of 2 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(directory)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount here: {error}")
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def store(files: Files, sequence: int, state: bytes) -> None:
    """Store a state."""
    draft = files.draft(Manifest(APP, Stamp(1, sequence), "bytes", len(state), digests(state)))
    try:
        draft.put(0, state)
    except BaseException:
        draft.discard()
        raise
    draft.commit()


@pytest.mark.parametrize("size", [1 << 20, 3 << 19], ids=["small", "asked for first"])
def test_full_disk(small_disk: Path, size: int) -> None:
    """It is said clearly, the last good checkpoint is still there, and storing works again once there is room."""
    files = Files(small_disk, 1)
    files.scan()
    store(files, 1, b"good" * CHUNK)
    (small_disk / "ballast").write_bytes(bytes((1 << 20) - (1 << 18)))
    with pytest.raises(
        StorageError, match=r"^shop: checkpoint 1\.2 cannot be stored: the disk is full; the last good one is kept$"
    ):
        store(files, 2, b"x" * size)
    newest = files.verified(APP)
    assert newest is not None
    assert newest.path.read_bytes()[newest.begin :] == b"good" * CHUNK
    assert not (small_disk / APP / DRAFT).exists()
    files.scan()
    assert files.newest(APP) == newest
    (small_disk / "ballast").unlink()
    store(files, 2, b"x" * size)
    newest = files.verified(APP)
    assert newest is not None
    assert newest.manifest.stamp == Stamp(1, 2)


def test_full_disk_where_there_was_nothing(small_disk: Path) -> None:
    """Not even the directory of an application can be made."""
    files = Files(small_disk, 1)
    files.scan()
    with contextlib.suppress(OSError):
        (small_disk / "ballast").write_bytes(bytes(4 << 20))
    with pytest.raises(StorageError, match="the disk is full"):
        store(files, 1, b"state")
    assert files.newest(APP) is None
