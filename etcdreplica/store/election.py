"""Leader election as etcd's own recipe does it: the oldest candidate key leads.

Being leader is only a hint: a deposed leader may believe in itself for a while. What makes that harmless is `Leadership.
condition`, which every write of an elected role must carry, so that a deposed leader can write nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from attrs import frozen

from etcdreplica.errors import LeaseLostError, StoreError, StoreUnavailableError
from etcdreplica.model import Leader
from etcdreplica.store.keys import Entry, Key, Kind
from etcdreplica.store.leases import Lease
from etcdreplica.store.store import Snapshot, Store
from etcdreplica.store.txn import Exists, Put, Txn, Unchanged

log = logging.getLogger(__name__)

OnLine = Callable[[tuple[Entry, ...]], None]


@frozen
class Leadership:
    """Proof of having been elected, good as long as `condition` holds in etcd."""

    key: Key
    create_revision: int
    lease: Lease

    @property
    def condition(self) -> Exists:
        """What every write of the elected role must be conditional on."""
        return Exists(self.key, self.create_revision)


class Election:
    """One candidate for one elected role."""

    def __init__(self, store: Store, role: str, me: Leader) -> None:
        self._store = store
        self._role = role
        self._me = me

    async def campaign(self, lease: Lease, on_line: OnLine = lambda _: None) -> Leadership:
        """Wait until elected; `on_line` is told who is ahead, the leader first, whenever that may have changed.

        Raises LeaseLostError when the lease ends first; then campaign again with a new one.
        """
        key = Key(Kind.LEADERS, (self._role, f"{lease.id:x}"))
        created = await self._enter(key, lease)
        elected = asyncio.create_task(self._wait_for_turn(key, created, on_line))
        try:
            await asyncio.wait((elected, lease.lost), return_when=asyncio.FIRST_COMPLETED)
            if not elected.done():
                raise LeaseLostError(f"candidate for {self._role} lost its lease: {lease.lost.result()}")
            elected.result()
        finally:
            elected.cancel()
            with contextlib.suppress(asyncio.CancelledError, LeaseLostError):
                await elected
        return Leadership(key, created, lease)

    async def _enter(self, key: Key, lease: Lease) -> int:
        put = Put(key, self._me, lease.id)
        try:
            await self._store.commit(Txn(when=(Unchanged(key, 0),), then=(put,)))
        except StoreUnavailableError:
            log.debug("entering the election of %s: no answer; the read tells", self._role)
        except StoreError as error:
            if "lease not found" in str(error):
                raise LeaseLostError(f"candidate for {self._role} has no lease: {error}") from None
            raise
        entry = await self._store.get(key)
        if entry is None:
            raise StoreUnavailableError(f"could not enter the election of {self._role}")
        return entry.create_revision

    async def _wait_for_turn(self, key: Key, created: int, on_line: OnLine) -> None:
        candidates: dict[Key, Entry] = {}
        async with contextlib.aclosing(self._store.follow(Kind.LEADERS, self._role)) as batches:
            async for batch in batches:
                if isinstance(batch, Snapshot):
                    candidates.clear()
                for entry in batch.entries:
                    if entry.value is None or not entry.lease:  # a corrupt one with a lease may lead
                        candidates.pop(entry.key, None)
                    else:
                        candidates[entry.key] = entry
                if key not in candidates:
                    raise LeaseLostError(f"candidate for {self._role} was removed")
                line = sorted(candidates.values(), key=lambda candidate: candidate.create_revision)
                ahead = tuple(candidate for candidate in line if candidate.create_revision < created)
                on_line(ahead)
                if not ahead:
                    return
