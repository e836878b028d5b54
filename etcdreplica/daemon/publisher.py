"""Showing one replica in etcd: always its newest state, under its own lease, however long etcd is away meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from attrs import evolve

from etcdreplica.core.lifecycle import advance
from etcdreplica.daemon.waiting import insist
from etcdreplica.model import Replica
from etcdreplica.store import Key, Lease, Put, Store, Txn


class Publisher:
    """Holds the record of one replica and writes each change of it. Nothing is written before `start` or after `stop`.

    `on_change` is called first.
    """

    def __init__(self, store: Store, key: Key, replica: Replica, on_change: Callable[[], None]) -> None:
        self.replica = replica
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
            await insist(
                f"publishing {self._key}", lambda: self._store.commit(Txn((), (Put(self._key, self.replica, lease.id),)))
            )
            await self._changed.wait()
