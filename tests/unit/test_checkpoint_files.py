"""The checkpoints of one host on its disk: the newest whole one is found, whatever has happened to the others."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from etcdreplica.checkpoint.files import DAMAGED, DRAFT, SUFFIX, Draft, Files, Stored
from etcdreplica.checkpoint.format import CHUNK, Manifest, digests
from etcdreplica.errors import DamagedError, StorageError
from etcdreplica.model import Stamp

APP = "shop"
CHUNKS = b"".join(bytes([i]) * CHUNK for i in range(8))


class Disk:
    """A directory, and what was said of damage there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.told: list[tuple[str, str]] = []
        self.files = self.scan()

    def scan(self, keep: int = 3) -> Files:
        """Look at the directory as a CheckpointServer does that begins."""
        self.files = Files(self.directory, keep, lambda app, what: self.told.append((app, what)))
        self.files.scan()
        return self.files

    def put(self, epoch: int, sequence: int, state: bytes = b"state", app: str = APP) -> Stored:
        """Store a state as one that a peer has sent."""
        draft = self.files.draft(manifest_of(state, epoch, sequence, app))
        draft.put(0, state)
        return draft.commit()

    def state(self, stored: Stored | None) -> bytes:
        """Return what a checkpoint holds."""
        assert stored is not None
        return stored.path.read_bytes()[stored.begin :]

    def spoil(self, stored: Stored, at: int = 0) -> None:
        """Flip one bit of its state."""
        with stored.path.open("r+b") as file:
            file.seek(stored.begin + at)
            found = file.read(1)
            file.seek(stored.begin + at)
            file.write(bytes([found[0] ^ 1]))

    def names(self, app: str = APP) -> set[str]:
        """What is in the directory of an application."""
        return {path.name for path in (self.directory / app).iterdir()}


def manifest_of(state: bytes, epoch: int = 1, sequence: int = 1, app: str = APP) -> Manifest:
    """Return what belongs to a state."""
    return Manifest(app, Stamp(epoch, sequence), "bytes", len(state), digests(state), 1.0)


def stamps(files: Files, app: str = APP) -> list[tuple[int, int]]:
    """Return which checkpoints are known, the newest first."""
    return [(stored.manifest.stamp.epoch, stored.manifest.stamp.sequence) for stored in files.all(app)]


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """Return an empty one."""
    return Disk(tmp_path / "host" / "checkpoints")


# --- storing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, len(CHUNKS)])
def test_what_is_put_is_there(disk: Disk, size: int) -> None:
    """At once, and for the next CheckpointServer."""
    stored = disk.put(1, 1, CHUNKS[:size])
    assert disk.state(disk.files.newest(APP)) == CHUNKS[:size]
    assert disk.files.damage(stored) == ""
    assert disk.scan().newest(APP) == stored
    assert disk.files.verified(APP) == stored


@pytest.mark.parametrize("size", [0, 1, CHUNK + 1, len(CHUNKS)])
def test_what_is_filled_from_a_file_is_there(disk: Disk, size: int) -> None:
    """A state is taken from the memory it was handed over in."""
    fd = os.memfd_create("state")
    try:
        os.write(fd, CHUNKS[:size])
        draft = disk.files.draft(manifest_of(CHUNKS[:size]))
        draft.fill(fd)
        stored = draft.commit()
    finally:
        os.close(fd)
    assert disk.state(stored) == CHUNKS[:size]
    assert disk.files.verified(APP) == stored


def test_state_that_is_too_short_is_not_stored(disk: Disk) -> None:
    """A file that ends before its manifest does is an error, not a wrong checkpoint."""
    fd = os.memfd_create("state")
    try:
        draft = disk.files.draft(manifest_of(CHUNKS))
        with pytest.raises(StorageError, match="cut off"):
            draft.fill(fd)
        draft.discard()
    finally:
        os.close(fd)
    assert disk.names() == set()


def test_chunks_may_come_in_any_order(disk: Disk) -> None:
    """Each piece stands for itself."""
    draft = disk.files.draft(manifest_of(CHUNKS))
    for first in (6, 0, 4, 2):
        draft.put(first, CHUNKS[CHUNK * first :][: 2 * CHUNK])
    assert disk.state(draft.commit()) == CHUNKS


@pytest.mark.parametrize("first", [0, 2, 8, 1 << 50, -1])
def test_piece_that_came_damaged_is_refused(disk: Disk, first: int) -> None:
    """So is one that belongs elsewhere, or nowhere."""
    draft = disk.files.draft(manifest_of(CHUNKS))
    with pytest.raises(DamagedError, match="came damaged"):
        draft.put(first, CHUNKS[CHUNK:][:CHUNK])
    draft.discard()


def test_nothing_is_there_before_it_is_committed(disk: Disk) -> None:
    """A draft is no checkpoint."""
    draft = disk.files.draft(manifest_of(b"new", 1, 2))
    draft.put(0, b"new")
    assert disk.files.newest(APP) is None
    assert disk.scan().newest(APP) is None
    draft.discard()


def test_the_last_ones_are_kept(disk: Disk) -> None:
    """The newest few stay, by epoch and then sequence, whatever the order they came in."""
    for epoch, sequence in ((2, 1), (1, 9), (1, 8), (2, 2), (2, 10)):
        disk.put(epoch, sequence)
    assert stamps(disk.files) == [(2, 10), (2, 2), (2, 1)]
    assert len(disk.names()) == 3
    assert stamps(disk.scan()) == [(2, 10), (2, 2), (2, 1)]


def test_what_is_older_than_the_application_does_not_count(disk: Disk) -> None:
    """An earlier application of the same name had lower epochs."""
    disk.put(4, 9)
    assert disk.files.newest(APP, 4) is not None
    assert disk.files.newest(APP, 5) is None
    assert disk.files.verified(APP, 5) is None
    disk.put(6, 1)
    assert disk.files.newest(APP, 5) == disk.files.newest(APP)


def test_applications_are_apart(disk: Disk) -> None:
    """Each has its own, and forgetting one leaves the others."""
    disk.put(1, 1, b"mine")
    disk.put(1, 1, b"yours", "other")
    assert disk.files.apps == ["other", APP]
    disk.files.forget(APP)
    assert disk.files.apps == ["other"]
    assert disk.state(disk.scan().newest("other")) == b"yours"
    assert disk.files.apps == ["other"]
    disk.files.forget("unknown")


# --- damage ------------------------------------------------------------------------------------------------------------


def tear(disk: Disk, stored: Stored) -> None:
    """Have only zeros where the state should be, as after a crash of a machine that does not flush."""
    data = stored.path.read_bytes()
    stored.path.write_bytes(data[: stored.begin] + bytes(len(data) - stored.begin))


def cut_off(disk: Disk, stored: Stored) -> None:
    """Lose the end."""
    os.truncate(stored.path, stored.begin + 2)


def cut_off_early(disk: Disk, stored: Stored) -> None:
    """Lose nearly all."""
    os.truncate(stored.path, 30)


def empty(disk: Disk, stored: Stored) -> None:
    """Lose all."""
    os.truncate(stored.path, 0)


def flip(disk: Disk, stored: Stored) -> None:
    """Change one bit."""
    disk.spoil(stored)


HARM = [tear, cut_off, cut_off_early, empty, flip]


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("again", [False, True], ids=["running", "after a start"])
def test_damaged_one_is_put_aside(disk: Disk, harm: object, again: bool) -> None:
    """The next older one is used, somebody is told, and that something is lost is known until a newer one is stored."""
    disk.put(1, 1, b"older")
    newest = disk.put(1, 2, b"newest")
    assert callable(harm)
    harm(disk, newest)
    if again:
        disk.scan()
    assert disk.state(disk.files.verified(APP)) == b"older"
    assert [app for app, _ in disk.told] == [APP]
    assert disk.told[0][1].startswith("1.2: ")
    assert disk.files.has_lost(APP)
    assert disk.names() == {disk.files.all(APP)[0].path.name, newest.path.with_suffix(DAMAGED).name}
    disk.scan()
    assert disk.files.has_lost(APP)
    disk.put(1, 3)
    assert not disk.files.has_lost(APP)
    assert not disk.scan().has_lost(APP)
    assert not [name for name in disk.names() if name.endswith(DAMAGED)]


def test_when_all_are_damaged_there_is_none(disk: Disk) -> None:
    """That is no error; it is for others to know of better ones."""
    for sequence in (1, 2, 3):
        disk.spoil(disk.put(1, sequence))
    assert disk.files.verified(APP) is None
    assert len(disk.told) == 3
    assert disk.files.has_lost(APP)


def test_the_same_one_again_makes_good_for_the_damaged(disk: Disk) -> None:
    """A peer that still has it gives it back, and then nothing is lost."""
    disk.spoil(disk.put(1, 2))
    assert disk.files.verified(APP) is None
    disk.put(1, 2)
    assert not disk.files.has_lost(APP)
    assert not disk.scan().has_lost(APP)
    assert disk.files.verified(APP) is not None


def test_older_damage_loses_nothing(disk: Disk) -> None:
    """What matters is whether a newer one than all that are here is gone."""
    old = disk.put(1, 1)
    disk.put(1, 2)
    disk.spoil(old)
    assert disk.files.put_aside(old, "1 of 1 chunks are damaged")
    assert not disk.files.has_lost(APP)
    assert stamps(disk.files) == [(1, 2)]


def test_one_that_cannot_be_opened_just_now_is_not_given_up(disk: Disk) -> None:
    """A process that is short of descriptors says so: the checkpoint may be whole."""
    stored = disk.put(1, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(StorageError):
            disk.files.verified(APP)
        with pytest.raises(StorageError):
            disk.scan()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert disk.told == []
    assert disk.scan().verified(APP) == stored


def test_one_that_was_pushed_out_meanwhile_is_no_damage(disk: Disk) -> None:
    """While it is looked at, newer ones may come, and it is removed."""
    disk.scan(keep=1)
    stored = disk.put(1, 1)
    disk.put(1, 2)
    assert "cannot be opened" in disk.files.damage(stored)
    assert not disk.files.put_aside(stored, "cannot be opened")
    assert disk.told == []
    assert stamps(disk.files) == [(1, 2)]


def test_one_that_is_gone_is_damaged(disk: Disk) -> None:
    """Somebody has removed the newest one by hand: what it held is lost."""
    disk.put(1, 1)
    disk.put(1, 2).path.unlink()
    assert disk.files.verified(APP) == disk.files.all(APP)[0]
    assert stamps(disk.files) == [(1, 1)]
    assert disk.files.has_lost(APP)


def test_checkpoint_in_the_directory_of_another_application_is_put_aside(disk: Disk) -> None:
    """It would be restored by the wrong one."""
    stored = disk.put(1, 1)
    disk.put(1, 1, app="other")
    (disk.directory / "other" / f"{7:020d}-{1:020d}{SUFFIX}").write_bytes(stored.path.read_bytes())
    assert stamps(disk.scan(), "other") == [(1, 1)]
    assert "belongs to shop" in disk.told[0][1]


def test_what_is_not_ours_is_left_alone(disk: Disk) -> None:
    """Directories that cannot be an application's, files, and names that say nothing."""
    disk.put(1, 1)
    for name in ("..x", ".hidden", "a b", "-x", "x" * 64, "b\u00f6se", "x\n"):
        (disk.directory / name).mkdir()
        (disk.directory / name / f"1-1{SUFFIX}").write_bytes(b"?")
    (disk.directory / "file").write_bytes(b"")
    (disk.directory / APP / "notes.txt").write_bytes(b"mine")
    (disk.directory / APP / f"strange{SUFFIX}").mkdir()
    (disk.directory / APP / f"x-y{DAMAGED}").write_bytes(b"")
    (disk.directory / "empty").mkdir()
    disk.scan()
    assert disk.files.apps == [APP]
    assert stamps(disk.files) == [(1, 1)]
    assert not disk.files.has_lost(APP)
    assert (disk.directory / "..x" / f"1-1{SUFFIX}").exists()
    assert (disk.directory / APP / "notes.txt").read_bytes() == b"mine"


# --- what is here already ----------------------------------------------------------------------------------------------


@pytest.fixture
def cut(disk: Disk) -> Draft:
    """Return a draft whose transfer was cut after the chunks 0, 1 and 5."""
    draft = disk.files.draft(manifest_of(CHUNKS))
    draft.put(0, CHUNKS[: 2 * CHUNK])
    draft.put(5, CHUNKS[5 * CHUNK :][:CHUNK])
    return draft


@pytest.mark.parametrize("crash", [False, True])
def test_draft_is_used_again(disk: Disk, cut: Draft, crash: bool) -> None:
    """Only what has not come is fetched, also by the next CheckpointServer."""
    cut.keep()
    if crash:
        disk.scan()
    draft = disk.files.draft(manifest_of(CHUNKS))
    assert draft.missing() == [2, 3, 4, 6, 7]
    draft.put(2, CHUNKS[2 * CHUNK : 5 * CHUNK])
    draft.put(6, CHUNKS[6 * CHUNK :])
    assert disk.state(draft.commit()) == CHUNKS
    assert disk.files.verified(APP) is not None


def test_draft_of_another_state_is_used_as_far_as_it_fits(disk: Disk, cut: Draft) -> None:
    """Chunks are told by their digests; what was changed since is missing."""
    cut.keep()
    state = CHUNKS[:CHUNK] + b"x" * CHUNK + CHUNKS[2 * CHUNK : 6 * CHUNK] + b"tail"
    draft = disk.files.draft(manifest_of(state, 1, 2))
    assert draft.missing() == [1, 2, 3, 4, 6]
    draft.discard()
    assert disk.names() == set()


def test_chunks_are_used_wherever_they_were(disk: Disk) -> None:
    """A state whose parts have moved by whole chunks needs only what is new."""
    disk.put(1, 1, CHUNKS)
    state = CHUNKS[3 * CHUNK :] + b"new" * CHUNK + CHUNKS[:CHUNK] + CHUNKS[:CHUNK] + b"end"
    draft = disk.files.draft(manifest_of(state, 1, 2))
    missing = draft.missing()
    assert missing == [5, 6, 7, 10]
    for index in missing:
        draft.put(index, state[CHUNK * index :][:CHUNK])
    assert disk.state(draft.commit()) == state
    assert disk.files.verified(APP) is not None


def test_unchanged_state_needs_nothing(disk: Disk) -> None:
    """All of it is copied."""
    disk.put(1, 1, CHUNKS[:-5])
    draft = disk.files.draft(manifest_of(CHUNKS[:-5], 2, 1))
    assert draft.missing() == []
    assert disk.state(draft.commit()) == CHUNKS[:-5]


def test_damaged_chunk_is_not_used_again(disk: Disk) -> None:
    """It is missing, so that it is fetched."""
    disk.spoil(disk.put(1, 1, CHUNKS), at=3 * CHUNK + 7)
    draft = disk.files.draft(manifest_of(CHUNKS, 1, 2))
    assert draft.missing() == [3]
    draft.put(3, CHUNKS[3 * CHUNK :][:CHUNK])
    assert disk.state(draft.commit()) == CHUNKS
    assert disk.files.verified(APP) is not None


def test_torn_draft_is_not_used_again(disk: Disk, cut: Draft) -> None:
    """Nothing says that a draft was flushed: its digests are looked at."""
    cut.keep()
    path = disk.directory / APP / DRAFT
    data = bytearray(path.read_bytes())
    at = data.find(CHUNKS[5 * CHUNK :][:CHUNK])
    data[at : at + 512] = bytes(512)
    path.write_bytes(data)
    draft = disk.files.draft(manifest_of(CHUNKS))
    assert draft.missing() == [2, 3, 4, 5, 6, 7]
    draft.discard()
