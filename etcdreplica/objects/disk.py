"""The log of a durable object on the disk of one host: a snapshot, and the records after it.

One thread writes; whatever has been asked of it meanwhile goes to the disk together, with one flush. Each record carries its
index and a digest, so what a crash has torn off is found and left away. A record with an index that was there already makes
everything after that void, as a new primary does.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import struct
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from attrs import frozen

from etcdreplica.errors import EtcdReplicaError, StorageError

LOG, SNAPSHOT, DRAFT, LOCK = "log", "snapshot", "draft", "lock"
COMPACT_BYTES = 64 << 20  # of a log, from which on a new snapshot is worth while
_HEAD = struct.Struct(">QI16s")  # index, length, digest
_ABOUT = struct.Struct(">QQ16s")  # of a snapshot: index, commit, digest


@frozen
class Recovered:
    """What was found. `commit`: as far as it was known to be committed when the snapshot was made."""

    index: int
    commit: int
    snapshot: bytes
    records: list[bytes]


@frozen
class Ask:
    """Write these bytes to the log, after putting a snapshot in the place of everything; and then do something."""

    data: bytes
    snapshot: bytes | None
    then: Callable[[], None]


class DiskLog:
    """One copy's directory. What is to be done once something is on the disk is done in the loop, in order.

    `fail(error)` is called when the disk is full or broken: this copy can promise nothing any more.
    """

    def __init__(self, directory: Path, fail: Callable[[EtcdReplicaError], None]) -> None:
        self._directory = directory
        self._fail = fail
        self._loop = asyncio.get_running_loop()
        self._asked: list[Ask] = []
        self._waiting = threading.Condition()
        self._closed = False
        self._fd = self._lock = -1
        self.size = 0  # of the log, with what is asked for
        self._thread: threading.Thread | None = None

    def recover(self) -> Recovered | None:
        """Read what is there, and be ready to go on after it; None if there is nothing. Raises StorageError."""
        directory = self._directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = _read_snapshot(directory / SNAPSHOT)
            records: dict[int, bytes] = {}
            end = 0
            if found is not None and (directory / LOG).exists():
                records, end = _read_log((directory / LOG).read_bytes(), found.index)
            self._open(truncate=end)
            self.size = end
        except OSError as error:
            raise StorageError(f"the log in {directory} cannot be read: {error.strerror or error}") from error
        self._thread = threading.Thread(target=self._run, name="etcdreplica object log", daemon=True)
        self._thread.start()
        if found is None:
            return None
        return Recovered(found.index, found.commit, found.snapshot, [records[i] for i in sorted(records)])

    def append(self, first: int, records: Iterable[bytes], then: Callable[[], None]) -> None:
        """Have records written, from index `first` on: what was there from that index on is void."""
        self._ask(Ask(_frames(first, records), None, then))

    def compact(self, index: int, commit: int, snapshot: bytes, records: Iterable[bytes]) -> None:
        """Have all replaced by a snapshot and the records after it."""
        about = _ABOUT.pack(index, commit, _digest(b"%d %d" % (index, commit), snapshot))
        self.size = 0
        self._ask(Ask(_frames(index + 1, records), about + snapshot, _nothing))

    async def flushed(self) -> None:
        """Wait until all that was asked for is on the disk."""
        done = self._loop.create_future()
        self._ask(Ask(b"", None, lambda: None if done.done() else done.set_result(None)))
        await done

    def close(self) -> None:
        """Write what was asked for, and end."""
        with self._waiting:
            self._closed = True
            self._waiting.notify()
        if self._thread is not None:
            self._thread.join(5.0)

    def _ask(self, ask: Ask) -> None:
        self.size += len(ask.data)
        with self._waiting:
            self._asked.append(ask)
            self._waiting.notify()

    def _run(self) -> None:
        while True:
            with self._waiting:
                while not self._asked and not self._closed:
                    self._waiting.wait()
                asked, self._asked = self._asked, []
            if not asked:
                os.close(self._fd)
                os.close(self._lock)
                return
            try:
                self._write(asked)
            except OSError as error:
                self._tell(self._fail, StorageError(f"the log in {self._directory} cannot be written: {error.strerror}"))
                return
            self._tell(_do, asked)

    def _write(self, asked: list[Ask]) -> None:
        pending: list[bytes] = []
        for ask in asked:
            if ask.snapshot is None:
                pending.append(ask.data)
            else:
                pending.clear()  # what stands before it is in it, or void
                self._replace(ask.snapshot, ask.data)
        view = memoryview(b"".join(pending))
        if not view:
            return
        while view:
            view = view[os.write(self._fd, view) :]
        os.fdatasync(self._fd)

    def _replace(self, snapshot: bytes, log: bytes) -> None:
        """Put a snapshot, and then the log after it, in the place of everything.

        A crash in between leaves the old log, of which what the snapshot has already is left away.
        """
        for name, data in ((SNAPSHOT, snapshot), (LOG, log)):
            draft = self._directory / DRAFT
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._directory / name)
            self._flush_directory()
        os.close(self._fd)
        self._open(truncate=len(log))

    def _open(self, truncate: int) -> None:
        self._fd = os.open(self._directory / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, truncate)
        os.fsync(self._fd)
        self._flush_directory()

    def _flush_directory(self) -> None:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _tell(self, what: Callable[..., None], value: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(what, value)


def _nothing() -> None:
    """Nobody waits for it."""


def _frames(first: int, records: Iterable[bytes]) -> bytes:
    found: list[bytes] = []
    for index, record in enumerate(records, first):
        found += (_HEAD.pack(index, len(record), _digest(b"%d" % index, record)), record)
    return b"".join(found)


def _do(asked: list[Ask]) -> None:
    for ask in asked:
        ask.then()


def _read_snapshot(path: Path) -> Recovered | None:
    if not path.exists():
        return None
    data = path.read_bytes()
    if len(data) >= _ABOUT.size:
        index, commit, digest = _ABOUT.unpack_from(data)
        snapshot = data[_ABOUT.size :]
        if digest == _digest(b"%d %d" % (index, commit), snapshot):
            return Recovered(index, commit, snapshot, [])
    raise StorageError(f"{path} is damaged: remove its directory to have this host begin with a copy from another one")


def _read_log(data: bytes, after: int) -> tuple[dict[int, bytes], int]:
    """Return the records after that index, and where the log ends."""
    records: dict[int, bytes] = {}
    at, last = 0, after
    while at + _HEAD.size <= len(data):
        index, length, digest = _HEAD.unpack_from(data, at)
        record = data[at + _HEAD.size : at + _HEAD.size + length]
        if len(record) < length or digest != _digest(b"%d" % index, record):
            break  # torn off by a crash: nobody was told that it is held
        at += _HEAD.size + length
        if index <= after:
            continue
        if index > last + 1:
            raise StorageError(f"record {last + 1} is missing from the log of an object")
        for void in range(index, last + 1):
            records.pop(void, None)
        records[index], last = record, index
    return records, at


def _digest(*parts: bytes) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.digest()
