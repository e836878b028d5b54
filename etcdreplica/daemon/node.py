"""A host's one daemon: the WatchDog, with the manager as a child process that it restarts.

The manager is a process of its own so that planning can never delay detection. When it dies while leading, its lease is
revoked at once, so that a standby takes over in milliseconds instead of a TTL.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping

from etcdreplica.daemon.process import ReplicaProcess
from etcdreplica.daemon.settings import NodeSettings
from etcdreplica.daemon.watchdog import WatchDog
from etcdreplica.errors import StoreError
from etcdreplica.store import Corrupt, Kind, Store

log = logging.getLogger(__name__)

RESTART_S = (0.2, 10.0)
STEADY_S = 30.0  # a manager that ran this long is restarted at once
STOP_S = 5.0


class Node:
    """The WatchDog of a host and its manager child."""

    def __init__(self, settings: NodeSettings, store: Store, manager_environment: Mapping[str, str] | None) -> None:
        self._settings = settings
        self._store = store
        self._environment = manager_environment  # None: this host runs no manager
        self.watchdog = WatchDog(settings, store)

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
                process = self._start_manager()
            except OSError as error:
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
            log.error("the manager process ended (%s); starting it again", reason)
            await self._revoke_leadership(process.pid)
            delay = RESTART_S[0] if asyncio.get_running_loop().time() - started > STEADY_S else min(RESTART_S[1], delay * 2)
            await asyncio.sleep(delay)

    def _start_manager(self) -> ReplicaProcess:
        command = [sys.executable, "-m", "etcdreplica", "manager", "--die-with-parent"]
        child = subprocess.Popen(
            command, env={**os.environ, **(self._environment or {})}, stdin=subprocess.DEVNULL, start_new_session=True
        )
        return ReplicaProcess(child.pid, child)

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
