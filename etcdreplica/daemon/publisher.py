"""Showing one replica in etcd: always its newest state, under its own lease, however long etcd is away meanwhile.

Each write is conditional on the one before it. A write whose answer was lost may be carried out much later, and must not put an
older state in the place of a newer one: nothing would ever correct it. The first one, the claim, is conditional on the
placement as well: what a host learns of too late, when it is placed elsewhere or removed already, is never begun.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from attrs import evolve

from etcdreplica.core.lifecycle import advance
from etcdreplica.daemon.waiting import insist
from etcdreplica.model import Replica
from etcdreplica.store import Key, Lease, Put, Store, Txn, Unchanged

CLAIM_AGAIN_S = 0.1  # after a claim that failed, unless a newer placement comes before


class Publisher:
    """Holds the record of one replica and writes each change of it. Nothing is written before `start` or after `stop`.

    `on_change` is called first. `standing` returns the placement as it is known here, as a condition; `claimed` is set once the
    replica has been shown while it held.
    """

    def __init__(
        self, store: Store, key: Key, replica: Replica, on_change: Callable[[], None], standing: Callable[[], Unchanged]
    ) -> None:
        self.replica = replica
        self.revision: int | None = 0  # mod revision of what stands there; None: to be read first
        self.claimed = asyncio.Event()
        self._standing = standing
        self._placed = asyncio.Event()
        self._on_change = on_change
        self._store = store
        self._key = key
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def show(self, **changes: Any) -> None:
        """Change what is shown. Raises IllegalTransitionError for a state that cannot follow."""
        if "state" in changes:
            advance(self.replica.state, changes["state"])
        self.replica = evolve(self.replica, **changes)
        self._changed.set()
        if self._task is not None:
            self._on_change()

    def placed(self) -> None:
        """There is a newer placement."""
        self._placed.set()

    def start(self, lease: Lease) -> None:
        """Begin to write, at once and then at each change."""
        if not self._stopped:
            self._task = asyncio.create_task(self._run(lease))

    def stop(self) -> None:
        """Write nothing more, ever."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()

    async def _run(self, lease: Lease) -> None:
        while not lease.lost.done():
            self._changed.clear()
            await insist(f"publishing {self._key}", lambda: self._write(lease.id))
            await self._changed.wait()

    async def _write(self, lease: int) -> None:
        while True:
            if self.revision is None:
                shown = await self._store.list(self._key.kind, self._key.names[0])  # a corrupt one has a revision, too
                self.revision = next((entry.mod_revision for entry in shown.entries if entry.key == self._key), 0)
            put, is_claim = Put(self._key, self.replica, lease), not self.claimed.is_set()
            self._placed.clear()
            claim = (self._standing(),) if is_claim else ()
            result = await self._store.commit(Txn((Unchanged(self._key, self.revision), *claim), (put,)))
            self.revision = result.revision if result.succeeded else None
            if result.succeeded:
                self.claimed.set()
                return
            if is_claim:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CLAIM_AGAIN_S):
                        await self._placed.wait()
