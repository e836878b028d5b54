"""A host's one daemon: the WatchDog, and beside it the manager and the CheckpointServer, which it watches.

They are processes of their own so that neither planning nor a large checkpoint can ever delay detection. When a manager dies
while leading, its lease is revoked at once, so that a standby takes over in milliseconds instead of a TTL. All of them are
children of the guardian.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from etcdreplica.clock import Clock, boottime
from etcdreplica.daemon.child import Child
from etcdreplica.daemon.guard import Guard
from etcdreplica.daemon.machine import Machine
from etcdreplica.daemon.memo import CHECKPOINTS, MANAGER
from etcdreplica.daemon.settings import NodeSettings
from etcdreplica.daemon.watchdog import WatchDog
from etcdreplica.errors import StoreError
from etcdreplica.store import Corrupt, Kind, Store

log = logging.getLogger(__name__)


class Node:
    """The WatchDog of a host and its children. `manager` and `checkpoints`: their environments; None for none of them."""

    def __init__(
        self,
        settings: NodeSettings,
        store: Store,
        guard: Guard,
        manager: Mapping[str, str] | None,
        checkpoints: Mapping[str, str] | None,
        clock: Clock = boottime,
        machine: Machine | None = None,
    ) -> None:
        self._settings = settings
        self._store = store
        machine = machine or Machine()
        self.watchdog = WatchDog(settings, store, guard, clock, machine)
        start = machine.process
        self._children: list[Child] = []
        if checkpoints is not None:
            self._children.append(Child(guard, CHECKPOINTS, "checkpoint-server", checkpoints, None, 1.0, clock, start))
        if manager is not None:
            self._children.append(Child(guard, MANAGER, "manager", manager, self._revoke_leadership, 10.0, clock, start))

    async def run(self) -> None:
        """Serve until cancelled. The children end last: replicas that end in order still need them."""
        keeping = [asyncio.create_task(self._keep(child)) for child in self._children]
        try:
            await self.watchdog.run()
        finally:
            for task in keeping:
                task.cancel()
            await asyncio.gather(*keeping, return_exceptions=True)

    async def _keep(self, child: Child) -> None:
        await self.watchdog.ready.wait()
        await child.keep()

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
