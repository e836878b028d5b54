"""The manager that is next in line: it watches the hosts as the leading one does, and takes its place when that is lost.

Else the loss of the very host on which the leader runs would be noticed only when the leader's lease ends. Deposing a leader
is always harmless: every write of an elected role is conditional on its election key.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from etcdreplica.core.view import ClusterView
from etcdreplica.daemon.peer_watch import PeerWatch
from etcdreplica.errors import StoreError
from etcdreplica.store import Changes, Corrupt, Entry, Kind, Snapshot, Store

log = logging.getLogger(__name__)

RETRY_S = 0.1


def take(view: ClusterView, batch: Snapshot | Changes) -> set[str]:
    """Bring a view up to date with a batch of changes; return the applications touched."""
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
    return touched


async def depose(store: Store, host: str) -> None:
    """Take the managers of a lost host out of the line, the leader or not, so that a live one is next. They may queue again."""
    while True:
        try:
            line = await store.list(Kind.LEADERS)
            for lease in {e.lease for e in line.entries if not isinstance(e.value, Corrupt) and e.value.host == host}:
                await store.leases.revoke_id(lease)
        except StoreError as error:
            log.warning("cannot depose the manager of the lost host %s yet: %s", host, error)
            await asyncio.sleep(RETRY_S)
        else:
            return


class Understudy:
    """One candidate's wait for its turn. `stand_by` is told who is ahead of it."""

    def __init__(self, store: Store, peers: PeerWatch) -> None:
        self._store = store
        self._peers = peers
        self._leader: Entry | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def stand_by(self, ahead: tuple[Entry, ...]) -> None:
        """Watch if only the leader is ahead, else rest."""
        leader = ahead[0] if len(ahead) == 1 and not isinstance(ahead[0].value, Corrupt) else None
        if not ahead or leader == self._leader:
            return  # elected: what has been found so far is of use to the new leader
        self._cancel()
        self._leader = leader
        if leader is None:
            self._peers.rest()
            return
        lost = asyncio.Event()
        self._peers.on_change = lambda _: lost.set()
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._depose(leader, lost))]

    async def close(self) -> None:
        """End the wait, one way or the other."""
        tasks = self._cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError, StoreError):
                await task

    def _cancel(self) -> list[asyncio.Task[None]]:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        return tasks

    async def _watch(self) -> None:
        view = ClusterView()
        async with contextlib.aclosing(self._store.follow()) as batches:
            async for batch in batches:
                take(view, batch)
                self._peers.observe(view)

    async def _depose(self, leader: Entry, lost: asyncio.Event) -> None:
        while True:
            await lost.wait()
            lost.clear()
            if leader.value.host not in self._peers.losses:
                continue
            log.warning("the leading manager is on the lost host %s: taking its place", leader.value.host)
            await depose(self._store, leader.value.host)
