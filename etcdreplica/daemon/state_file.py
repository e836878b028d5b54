"""What a node must know of the one before it: what it may have left running, and its lease.

One small JSON file, replaced as a whole, and a lock that a living WatchDog holds. A WatchDog that is restarted learns
everything from its guardian; the file is for when the guardian died too.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
from attrs import frozen

from etcdreplica.errors import ConfigurationError
from etcdreplica.files import replace_file
from etcdreplica.guardian.tree import Tree, end_all, kill_all, start_time

log = logging.getLogger(__name__)

FILE_NAME = "watchdog.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def take_lock(path: Path) -> int:
    """Lock a file for as long as the returned descriptor is open. Raises BlockingIOError when somebody else has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


@frozen
class Leftover:
    """What stands in the file."""

    boot: str
    guardian: str
    lease: int | None
    processes: Mapping[str, tuple[int, int]]  # started by hand, by application: pid and start time


def last_guardian(directory: Path) -> str | None:
    """Return the name of the guardian that runs, or ran last, with this state directory."""
    found = _read(directory / FILE_NAME)
    return found.guardian if found else None


class StateFile:
    """`watchdog.json` and `watchdog.lock` in the state directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / FILE_NAME
        self._lock: int | None = None
        self._boot = _BOOT_ID.read_text().strip()
        self._guardian = ""
        self._lease: int | None = None
        self._processes: dict[str, tuple[int, int]] = {}

    def lock(self) -> None:
        """Become the only WatchDog of this directory. Raises ConfigurationError."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = take_lock(self._directory / "watchdog.lock")
        except BlockingIOError:
            raise ConfigurationError(f"another WatchDog uses {self._directory}: give this one another --state-dir") from None
        except OSError as error:
            raise ConfigurationError(f"cannot use the state directory {self._directory}: {error.strerror}") from None

    def unlock(self) -> None:
        """Let another WatchDog use the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def record_session(self, guardian: str, lease: int) -> None:
        """Note the guardian and the lease of a session. If the disk takes nothing, the lease must expire by itself one day."""
        self._guardian, self._lease = guardian, lease
        with _unless_full(self._path):
            self._write(flush=True)  # nothing runs here yet that a slow disk could harm

    def record_process(self, app: str, pid: int, started: int | None) -> None:
        """Note a replica that was started by hand, which dies with nobody. Raises OSError: who is not noted must not run."""
        if started is not None:
            self._processes[app] = (pid, started)
            self._write()

    def forget_process(self, app: str) -> None:
        """A replica is known dead."""
        if self._processes.pop(app, None):
            with _unless_full(self._path):  # whoever reads it there finds no such process
                self._write()

    def forget(self) -> None:
        """The session ended in order: nothing is left behind."""
        self._lease, self._processes = None, {}
        self._path.unlink(missing_ok=True)

    async def end_leftovers(self, guardian: str) -> int | None:
        """Kill what an earlier guardian's host left running; return its lease once all of it is dead."""
        found = _read(self._path)
        if found is None:
            return None
        if found.guardian == guardian:
            self._guardian, self._lease, self._processes = guardian, found.lease, dict(found.processes)
            return None
        if found.boot == self._boot:
            await asyncio.to_thread(end_all, found.guardian)
            for app, (pid, started) in found.processes.items():
                if start_time(pid) == started:
                    log.warning("%s: ending process %d that an earlier node left", app, pid)
                tree = Tree("", pid, started)
                while kill_all([tree]):  # noqa: ASYNC110  (nothing tells when a whole tree is dead)
                    await asyncio.sleep(0.005)
        return found.lease

    def _write(self, *, flush: bool = False) -> None:
        left = Leftover(self._boot, self._guardian, self._lease, self._processes)
        replace_file(self._path, msgspec.json.encode(left), flush=flush)


@contextlib.contextmanager
def _unless_full(path: Path) -> Iterator[None]:
    """Go on without the file where the disk is full, or fails."""
    try:
        yield
    except OSError as error:
        log.error("cannot write %s: %s", path, error.strerror)


def _read(path: Path) -> Leftover | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Leftover)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        log.warning("cannot read %s (%s): the leases of an earlier WatchDog must expire by themselves", path, error)
        return None
