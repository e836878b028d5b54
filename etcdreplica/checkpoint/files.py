"""The checkpoints of one host on its disk: a directory for each application, a file for each checkpoint.

A checkpoint is written beside its place, flushed, renamed and its directory flushed: it is there as a whole or not at all.
What a crash leaves is a draft, whose chunks are used again by the next one. All calls may block on the disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from attrs import frozen

from etcdreplica.checkpoint.format import CHUNK, Manifest, chunk_count, damaged_chunks, digest, prefix, read_prefix
from etcdreplica.core.holders import NOTHING
from etcdreplica.errors import DamagedError, StorageError
from etcdreplica.model import Stamp
from etcdreplica.words import NAME

log = logging.getLogger(__name__)

SUFFIX, DRAFT, DAMAGED = ".checkpoint", "draft", ".damaged"
FLUSH = 8 << 20  # bytes: a large state begins its way to the disk while it is written, so that the last flush is short
RESERVE = 1 << 20  # bytes from which on the room for all of it is asked for first
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None)
_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # says nothing of the file


@frozen
class Stored:
    """One whole checkpoint on the disk; its state begins at byte `begin` of the file."""

    manifest: Manifest
    path: Path
    begin: int


class Files:
    """Those of one host. `keep`: how many of each application stay.

    `on_damage` is told the application and what is wrong; nothing once a newer checkpoint has made it good.
    """

    def __init__(self, directory: Path, keep: int, on_damage: Callable[[str, str], None] = lambda *_: None) -> None:
        self._directory = directory
        self._keep = keep
        self._on_damage = on_damage
        self._known: dict[str, dict[Stamp, Stored]] = {}
        self._damaged: dict[str, Stamp] = {}  # the newest one that was put aside
        self._changing = threading.Lock()

    def scan(self) -> None:
        """Find what is there, and put aside what is damaged. Raises StorageError."""
        with storing("the checkpoints of this host"):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            flush_directory(self._directory.parent)
            for directory in self._directory.iterdir():
                if directory.is_dir() and NAME.fullmatch(directory.name):
                    for path in directory.glob(f"*{DAMAGED}"):
                        self._note_damage(directory.name, path)
                        self._on_damage(directory.name, f"{_stamp_of(path) or path.stem}: it was put aside")
                    self._known[directory.name] = dict(self._scan(directory))

    def _scan(self, directory: Path) -> Iterator[tuple[Stamp, Stored]]:
        for path in directory.glob(f"*{SUFFIX}"):
            try:
                found = read(path)
                if found.manifest.app != directory.name:
                    raise DamagedError(f"it belongs to {found.manifest.app}")
            except (DamagedError, OSError) as error:
                if isinstance(error, OSError) and error.errno in _SCARCE:
                    raise
                self._put_aside(directory.name, path, str(error))
            else:
                yield found.manifest.stamp, found

    @property
    def apps(self) -> list[str]:
        """The applications of which something is here."""
        return sorted(app for app, known in self._known.items() if known)

    def all(self, app: str) -> list[Stored]:
        """Return the checkpoints of an application, the newest first."""
        known = self._known.get(app, {})
        return [known[stamp] for stamp in sorted(known, reverse=True)]

    def newest(self, app: str, born: int = 0) -> Stored | None:
        """Return the newest one since the epoch `born`, its state not looked at."""
        return next((stored for stored in self.all(app) if stored.manifest.stamp.epoch >= born), None)

    def age_s(self, app: str) -> float:
        """How long ago the newest one was written, by the wall clock: for housekeeping only."""
        newest = self.newest(app)
        try:
            return time.time() - newest.path.stat().st_mtime if newest is not None else 0.0
        except OSError:
            return 0.0

    def has_lost(self, app: str) -> bool:
        """Whether a newer checkpoint than all that are here was found damaged."""
        newest = self.newest(app)
        return self._damaged.get(app, NOTHING) > (newest.manifest.stamp if newest else NOTHING)

    def verified(self, app: str, born: int = 0) -> Stored | None:
        """Return the newest one that is whole, and put aside those that are not. Raises StorageError."""
        while (stored := self.newest(app, born)) is not None:
            if not (what := self.damage(stored)):
                return stored
            self.put_aside(stored, what)
        return None

    def damage(self, stored: Stored) -> str:
        """Look at every byte, and say what is wrong, or nothing. Raises StorageError when it cannot be looked at just now."""
        try:
            fd = os.open(stored.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in _SCARCE:
                raise StorageError(f"{stored.path.name} cannot be read now: {error.strerror}") from error
            return f"cannot be opened: {error.strerror}"
        try:
            manifest, begin = read_prefix(fd)
            bad = sum(1 for _ in damaged_chunks(fd, begin, manifest))
        except DamagedError as error:
            return str(error)
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        finally:
            os.close(fd)
        return f"{bad} of {manifest.count} chunks are damaged" if bad else ""

    def put_aside(self, stored: Stored, what: str) -> bool:
        """Never use this one again; the next older one counts from now on. False: newer ones have pushed it out already."""
        with self._changing:
            known = self._known.get(stored.manifest.app, {})
            if known.get(stored.manifest.stamp) != stored:
                return False
            del known[stored.manifest.stamp]
        self._put_aside(stored.manifest.app, stored.path, what)
        return True

    def _put_aside(self, app: str, path: Path, what: str) -> None:
        log.error("%s: checkpoint %s is damaged: %s; the next older one is used", app, path.name, what)
        self._note_damage(app, path)
        with contextlib.suppress(OSError):
            path.rename(path.with_suffix(DAMAGED))
        self._on_damage(app, f"{_stamp_of(path) or path.stem}: {what}")

    def _note_damage(self, app: str, path: Path) -> None:
        stamp = _stamp_of(path)
        if stamp is not None:
            self._damaged[app] = max(stamp, self._damaged.get(app, NOTHING))

    def draft(self, manifest: Manifest) -> Draft:
        """Begin to write a checkpoint. Raises StorageError."""
        with storing(f"{manifest.app}: checkpoint {manifest.stamp}"):
            directory = self._directory / manifest.app
            if not directory.is_dir():
                directory.mkdir(mode=0o700, exist_ok=True)
                flush_directory(self._directory)
            return Draft(self, directory, manifest)

    def add(self, stored: Stored) -> None:
        """Count one that was just written, and remove those that are one too many."""
        app = stored.manifest.app
        with self._changing:
            known = self._known.setdefault(app, {})
            known[stored.manifest.stamp] = stored
            old = [known.pop(stamp).path for stamp in sorted(known, reverse=True)[self._keep :]]
            mended = app in self._damaged and self._damaged[app] < stored.manifest.stamp
            if mended:
                del self._damaged[app]
                old += stored.path.parent.glob(f"*{DAMAGED}")
        for path in old:
            with contextlib.suppress(OSError):
                path.unlink()
        if mended:
            self._on_damage(app, "")

    def forget(self, app: str) -> None:
        """Remove everything of an application."""
        with self._changing:
            self._known.pop(app, None)
            self._damaged.pop(app, None)
        shutil.rmtree(self._directory / app, ignore_errors=True)


class Draft:
    """A checkpoint that is being written; one at a time for each application. Give it all chunks, then `commit`."""

    def __init__(self, files: Files, directory: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._files = files
        self._directory = directory
        self._path = directory / DRAFT
        self._prefix = prefix(manifest)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._found = os.fstat(self._fd).st_size  # bytes that an earlier draft has left
        try:
            size = len(self._prefix) + manifest.size
            os.ftruncate(self._fd, size)
            if size > RESERVE:
                os.posix_fallocate(self._fd, 0, size)
        except OSError:
            self.discard()
            raise

    def missing(self) -> list[int]:
        """Take what is here already, from an earlier draft or the newest checkpoint, and return which chunks are not."""
        newest = self._files.newest(self.manifest.app)
        if newest is None and not self._found:
            return list(range(self.manifest.count))
        known = {newest.manifest.chunk(i): i for i in range(newest.manifest.count)} if newest is not None else {}
        source = os.open(newest.path, os.O_RDONLY | os.O_CLOEXEC) if newest is not None else None
        try:
            return [i for i in range(self.manifest.count) if not (self._has(i) or self._copy(i, known, source, newest))]
        finally:
            if source is not None:
                os.close(source)

    def _has(self, index: int) -> bool:
        at, length = len(self._prefix) + CHUNK * index, self.manifest.length(index)
        return at + length <= self._found and digest(os.pread(self._fd, length, at)) == self.manifest.chunk(index)

    def _copy(self, index: int, known: dict[bytes, int], source: int | None, newest: Stored | None) -> bool:
        there = known.get(self.manifest.chunk(index))
        if there is None or source is None or newest is None:
            return False
        data = os.pread(source, self.manifest.length(index), newest.begin + CHUNK * there)
        if digest(data) != self.manifest.chunk(index):
            return False  # damaged: whoever needs that checkpoint will find out
        with storing(f"{self.manifest.app}: checkpoint {self.manifest.stamp}"):
            self._write(data, CHUNK * index)
        return True

    def put(self, first: int, data: bytes | memoryview) -> None:
        """Write chunks that belong together; several threads may do so at a time. Raises DamagedError, StorageError."""
        view = memoryview(data)
        count = chunk_count(len(view))
        for i in range(count):
            if digest(view[CHUNK * i : CHUNK * (i + 1)]) != self.manifest.chunk(first + i):
                raise DamagedError(f"{self.manifest.app}: chunk {first + i} of checkpoint {self.manifest.stamp} came damaged")
        with storing(f"{self.manifest.app}: checkpoint {self.manifest.stamp}"):
            self._write(view, CHUNK * first)

    def fill(self, source: int) -> None:
        """Take all of the state from a file, whose chunks the manifest was made of. Raises StorageError."""
        with storing(f"{self.manifest.app}: checkpoint {self.manifest.stamp}"):
            done = 0
            os.lseek(self._fd, len(self._prefix), os.SEEK_SET)
            while done < self.manifest.size:
                moved = os.sendfile(self._fd, source, done, min(FLUSH, self.manifest.size - done))
                if not moved:
                    raise OSError(errno.EIO, "the state was cut off")
                _begin_flush(self._fd, len(self._prefix) + done, moved)
                done += moved

    def commit(self) -> Stored:
        """Make it durable. Raises StorageError."""
        stamp = self.manifest.stamp
        path = self._directory / f"{stamp.epoch:020d}-{stamp.sequence:020d}{SUFFIX}"
        try:
            with storing(f"{self.manifest.app}: checkpoint {stamp}"):
                os.pwrite(self._fd, self._prefix, 0)
                os.fsync(self._fd)
                self._path.rename(path)
                flush_directory(self._directory)
        except StorageError:
            self.discard()
            raise
        os.close(self._fd)
        stored = Stored(self.manifest, path, len(self._prefix))
        self._files.add(stored)
        return stored

    def keep(self) -> None:
        """Stop here; the next draft goes on with what has been written."""
        os.close(self._fd)

    def discard(self) -> None:
        """Give it up, and the room it takes."""
        with contextlib.suppress(OSError):
            os.close(self._fd)
            self._path.unlink()

    def _write(self, data: bytes | memoryview, at: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, len(self._prefix) + at)
            _begin_flush(self._fd, len(self._prefix) + at, written)
            view, at = view[written:], at + written


def read(path: Path) -> Stored:
    """Look at a file's beginning. Raises DamagedError, OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        manifest, begin = read_prefix(fd)
    finally:
        os.close(fd)
    return Stored(manifest, path, begin)


def _stamp_of(path: Path) -> Stamp | None:
    """Return which checkpoint a file's name says it is."""
    epoch, _, sequence = path.stem.partition("-")
    return Stamp(int(epoch), int(sequence)) if epoch.isdecimal() and sequence.isdecimal() else None


def flush_directory(directory: Path) -> None:
    """Make names in it durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _begin_flush(fd: int, at: int, count: int) -> None:
    """Have the kernel begin to write a part of a large file to the disk, without waiting for it."""
    if count >= RESERVE:
        with contextlib.suppress(AttributeError):  # a C library without it
            _libc.sync_file_range(fd, ctypes.c_int64(at), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE)


@contextlib.contextmanager
def storing(what: str) -> Iterator[None]:
    """Say what a disk that fails, or is full, means."""
    try:
        yield
    except OSError as error:
        full = "the disk is full" if error.errno in _FULL else f"the disk fails ({error.strerror})"
        raise StorageError(f"{what} cannot be stored: {full}; the last good one is kept") from error
