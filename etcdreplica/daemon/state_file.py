"""What a WatchDog must know of the one before it: which processes and which lease it left behind.

One small JSON file, replaced as a whole, and a lock that a living WatchDog holds. Nothing in it is needed while the
WatchDog lives; it only makes a restart quick and safe.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

from etcdreplica.daemon.process import start_time
from etcdreplica.errors import ConfigurationError

log = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class StateFile:
    """`watchdog.json` and `watchdog.lock` in the state directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / "watchdog.json"
        self._lock: int | None = None
        self._boot = _BOOT_ID.read_text().strip()
        self._lease: int | None = None
        self._replicas: dict[str, tuple[int, int]] = {}  # by application: pid and start time

    def lock(self) -> None:
        """Become the only WatchDog of this directory. Raises ConfigurationError."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self._directory / "watchdog.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(f"another WatchDog uses {self._directory}: give this one another --state-dir") from None
        except OSError as error:
            raise ConfigurationError(f"cannot use the state directory {self._directory}: {error.strerror}") from None

    def unlock(self) -> None:
        """Let another WatchDog use the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def record_lease(self, lease: int) -> None:
        """Note the lease of a session."""
        self._lease = lease
        self._write()

    def record_replica(self, app: str, pid: int) -> None:
        """Note a running replica."""
        started = start_time(pid)
        if started is not None:
            self._replicas[app] = (pid, started)
            self._write()

    def forget_replica(self, app: str) -> None:
        """A replica is known dead."""
        if self._replicas.pop(app, None):
            self._write()

    def forget(self) -> None:
        """The session ended in order: nothing is left behind."""
        self._lease, self._replicas = None, {}
        self._path.unlink(missing_ok=True)

    async def end_leftovers(self) -> int | None:
        """Kill what an earlier WatchDog left running here; return its lease once all of it is dead."""
        found = self._read()
        if found is None:
            return None
        same_boot = found.get("boot") == self._boot
        for app, (pid, started) in found.get("replicas", {}).items() if same_boot else ():
            if start_time(pid) == started:
                log.warning("%s: ending process %d that an earlier WatchDog left", app, pid)
            while start_time(pid) == started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                await asyncio.sleep(0.005)
        lease = found.get("lease")
        return lease if isinstance(lease, int) else None

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("cannot read %s (%s): the leases of an earlier WatchDog must expire by themselves", self._path, error)
            return None
        return found if isinstance(found, dict) else None

    def _write(self) -> None:
        state = {"boot": self._boot, "lease": self._lease, "replicas": self._replicas}
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        temporary.replace(self._path)
