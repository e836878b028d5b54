"""A host's one daemon: the WatchDog, and the manager as a process of its own that it watches.

The manager is a separate process so that planning can never delay detection. When it dies while leading, its lease is
revoked at once, so that a standby takes over in milliseconds instead of a TTL. Both are children of the guardian.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from etcdreplica.daemon.guard import Guard
from etcdreplica.daemon.memo import MANAGER
from etcdreplica.daemon.process import ReplicaProcess
from etcdreplica.daemon.settings import NodeSettings
from etcdreplica.daemon.watchdog import WatchDog
from etcdreplica.errors import RefusedError, StoreError
from etcdreplica.model import Program
from etcdreplica.store import Corrupt, Kind, Store

log = logging.getLogger(__name__)

RESTART_S = (0.2, 10.0)
STEADY_S = 30.0  # a manager that ran this long is restarted at once
STOP_S = 5.0


class Node:
    """The WatchDog of a host and its manager child."""

    def __init__(
        self, settings: NodeSettings, store: Store, guard: Guard, manager_environment: Mapping[str, str] | None
    ) -> None:
        self._settings = settings
        self._store = store
        self._guard = guard
        self._environment = manager_environment  # None: this host runs no manager
        self.watchdog = WatchDog(settings, store, guard)

    async def run(self) -> None:
        """Serve until cancelled."""
        manager = asyncio.create_task(self._keep_manager()) if self._environment is not None else None
        try:
            await self.watchdog.run()
        finally:
            if manager is not None:
                manager.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await manager

    async def _keep_manager(self) -> None:
        await self.watchdog.ready.wait()
        delay = RESTART_S[0]
        while True:
            started = asyncio.get_running_loop().time()
            try:
                process = await self._manager()
            except RefusedError as error:
                log.error("cannot start a manager process: %s; trying again", error)
                await asyncio.sleep(RESTART_S[1])
                continue
            try:
                reason = await asyncio.shield(process.exited)
            finally:
                process.signal(signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(STOP_S):
                        await asyncio.shield(process.exited)
                await process.kill()
                self._guard.release(MANAGER)
            log.error("the manager process ended (%s); starting it again", reason)
            await self._revoke_leadership(process.pid)
            delay = RESTART_S[0] if asyncio.get_running_loop().time() - started > STEADY_S else min(RESTART_S[1], delay * 2)
            await asyncio.sleep(delay)

    async def _manager(self) -> ReplicaProcess:
        """Return the manager that an earlier WatchDog started, or a new one. Raises RefusedError."""
        kept = self._guard.wards.pop(MANAGER, None)
        if kept is not None and kept.pid is not None:
            return ReplicaProcess(self._guard, kept)
        command = (sys.executable, "-m", "etcdreplica", "manager")
        program = Program(command, str(Path.cwd()), {**os.environ, **(self._environment or {})})
        number = int(self.watchdog.clock() * 1000)
        return await ReplicaProcess.spawn(self._guard, MANAGER, number, program, {}, None)

    async def _revoke_leadership(self, pid: int) -> None:
        """Free what the dead manager held. If etcd is away, its lease expires by itself."""
        try:
            snapshot = await self._store.list(Kind.LEADERS)
            for entry in snapshot.entries:
                leader = entry.value
                if not isinstance(leader, Corrupt) and (leader.host, leader.pid) == (self._settings.host, pid):
                    await self._store.leases.revoke_id(entry.lease)
        except StoreError as error:
            log.warning("cannot revoke the lease of the manager that ended: %s", error)
