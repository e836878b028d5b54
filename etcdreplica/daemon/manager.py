"""The manager process: a candidate for ReplicaManager and SuperWatchDog, and both of them while it leads.

Nothing is held in memory alone: whoever leads next reads everything again and carries on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterable

from etcdreplica.clock import Clock, boottime
from etcdreplica.core.plan import PlannerSettings
from etcdreplica.core.view import ClusterView
from etcdreplica.daemon.peer_watch import PeerWatch, watching
from etcdreplica.daemon.peers import PeerClient
from etcdreplica.daemon.replica_manager import ReplicaManager
from etcdreplica.daemon.super_watchdog import SuperWatchDog
from etcdreplica.daemon.understudy import Understudy, depose, take
from etcdreplica.errors import LeaseLostError, StoreDeniedError, StoreError
from etcdreplica.model import Leader
from etcdreplica.store import Election, Lease, Store

log = logging.getLogger(__name__)

MANAGER = "manager"
SUPER_WATCHDOG = "superwatchdog"
RETRY_S = 0.3


class Manager:
    """One candidate. `run` campaigns and leads until cancelled; then it gives its lease up, so a standby leads at once."""

    def __init__(
        self,
        store: Store,
        host: str,
        lease_ttl_s: float,
        clock: Clock = boottime,
        settings: PlannerSettings | None = None,
        peers: PeerClient | None = None,
        pid: int | None = None,
    ) -> None:
        self._store = store
        self._me = Leader(host, os.getpid() if pid is None else pid)
        self._ttl_s = lease_ttl_s
        self._clock = clock
        self._settings = settings or PlannerSettings()
        self._peers = PeerWatch(self._me.host, clock, peers or PeerClient())

    async def run(self) -> None:
        """Serve. Raises StoreDeniedError only."""
        async with watching(self._peers):
            await self._run()

    async def _run(self) -> None:
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
            finally:
                self._peers.rest()

    async def _serve(self, lease: Lease) -> None:
        understudy = Understudy(self._store, self._peers)
        try:
            leadership = await Election(self._store, MANAGER, self._me).campaign(lease, understudy.stand_by)
        finally:
            await understudy.close()
        log.info("elected ReplicaManager")
        view = ClusterView(losses=self._peers.losses)
        manager = ReplicaManager(self._store, leadership, view, self._clock, self._settings)
        leading = asyncio.create_task(self._lead(view, manager, lease))
        try:
            await asyncio.wait((leading, lease.lost), return_when=asyncio.FIRST_COMPLETED)
            if leading.done():
                leading.result()
            raise LeaseLostError(f"the leadership lease was lost: {lease.lost.result()}")
        finally:
            self._peers.on_change = lambda _: None
            leading.cancel()
            with contextlib.suppress(asyncio.CancelledError, StoreError):
                await leading

    async def _lead(self, view: ClusterView, manager: ReplicaManager, lease: Lease) -> None:
        leadership = await Election(self._store, SUPER_WATCHDOG, self._me).campaign(lease)
        watchdog = SuperWatchDog(self._store, leadership, view, self._clock, self._me.host, self._ttl_s)
        async with asyncio.TaskGroup() as roles:
            roles.create_task(manager.run())
            roles.create_task(watchdog.run())
            roles.create_task(self._observe(view, manager, watchdog, roles))

    async def _observe(
        self, view: ClusterView, manager: ReplicaManager, watchdog: SuperWatchDog, roles: asyncio.TaskGroup
    ) -> None:
        def touch(apps: Iterable[str]) -> None:
            manager.touch(apps)
            watchdog.touch(apps)

        def changed(host: str) -> None:
            view.offer()
            touch(view.seated_on(host))
            if host in self._peers.losses:
                roles.create_task(depose(self._store, host))

        self._peers.on_change = changed
        async with contextlib.aclosing(self._store.follow()) as batches:
            async for batch in batches:
                touch(take(view, batch))
                self._peers.observe(view)
