"""The manager process: a candidate for ReplicaManager and SuperWatchDog, and both of them while it leads.

Nothing is held in memory alone: whoever leads next reads everything again and carries on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os

from etcdreplica.clock import Clock, boottime
from etcdreplica.core.plan import PlannerSettings
from etcdreplica.core.view import ClusterView
from etcdreplica.daemon.replica_manager import ReplicaManager
from etcdreplica.daemon.super_watchdog import SuperWatchDog
from etcdreplica.errors import LeaseLostError, StoreDeniedError, StoreError
from etcdreplica.model import Leader
from etcdreplica.store import Corrupt, Election, Lease, Snapshot, Store

log = logging.getLogger(__name__)

MANAGER = "manager"
SUPER_WATCHDOG = "superwatchdog"
RETRY_S = 0.3


class Manager:
    """One candidate. `run` campaigns and leads until cancelled; then it gives its lease up, so a standby leads at once."""

    def __init__(
        self, store: Store, host: str, lease_ttl_s: float, clock: Clock = boottime, settings: PlannerSettings | None = None
    ) -> None:
        self._store = store
        self._me = Leader(host, os.getpid())
        self._ttl_s = lease_ttl_s
        self._clock = clock
        self._settings = settings or PlannerSettings()

    async def run(self) -> None:
        """Serve. Raises StoreDeniedError only."""
        while True:
            try:
                lease = await self._store.leases.grant(self._ttl_s)
                try:
                    await self._serve(lease)
                finally:
                    with contextlib.suppress(StoreError):
                        await self._store.leases.revoke(lease)
            except StoreDeniedError:
                raise
            except (StoreError, LeaseLostError) as error:
                log.warning("not leading: %s", error)
                await asyncio.sleep(RETRY_S)

    async def _serve(self, lease: Lease) -> None:
        leadership = await Election(self._store, MANAGER, self._me).campaign(lease)
        log.info("elected ReplicaManager")
        view = ClusterView()
        manager = ReplicaManager(self._store, leadership, view, self._clock, self._settings)
        leading = asyncio.create_task(self._lead(view, manager, lease))
        try:
            await asyncio.wait((leading, lease.lost), return_when=asyncio.FIRST_COMPLETED)
            if leading.done():
                leading.result()
            raise LeaseLostError(f"the leadership lease was lost: {lease.lost.result()}")
        finally:
            leading.cancel()
            with contextlib.suppress(asyncio.CancelledError, StoreError):
                await leading

    async def _lead(self, view: ClusterView, manager: ReplicaManager, lease: Lease) -> None:
        leadership = await Election(self._store, SUPER_WATCHDOG, self._me).campaign(lease)
        watchdog = SuperWatchDog(self._store, leadership, view, self._clock, self._me.host, self._ttl_s)
        async with asyncio.TaskGroup() as roles:
            roles.create_task(manager.run())
            roles.create_task(watchdog.run())
            roles.create_task(self._observe(view, manager, watchdog))

    async def _observe(self, view: ClusterView, manager: ReplicaManager, watchdog: SuperWatchDog) -> None:
        async with contextlib.aclosing(self._store.follow()) as batches:
            async for batch in batches:
                touched: set[str] = set()
                if isinstance(batch, Snapshot):
                    touched.update(view.apps)
                    view.clear()
                for entry in batch.entries:
                    corrupt = isinstance(entry.value, Corrupt)
                    touched |= view.apply(
                        entry.key.kind,
                        entry.key.names,
                        None if corrupt else entry.value,
                        entry.mod_revision,
                        entry.create_revision,
                        entry.value.error if corrupt else "",
                    )
                view.revision = batch.revision
                manager.touch(touched)
                watchdog.touch(touched)
