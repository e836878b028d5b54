"""What a host does for an application while its primary runs there: hand checkpoints out, and say when they are durable.

It begins once this host is known to have all that was ever acknowledged: it is a holder, or has restored, or has been given a
state of this very epoch. Until then nothing is handed out, and nobody's word in etcd is changed.

One task for each other host offers it the newest checkpoint whenever it has an older one; what is made meanwhile is passed
over. One task keeps the set of holders in etcd (`core.holders`), by transactions that fail once this host's placement has
changed or somebody else has written. Acknowledging takes no etcd while the set stays as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable

from attrs import define

from etcdreplica.checkpoint.format import Manifest
from etcdreplica.checkpoint.holding import Context, Holding, Source
from etcdreplica.checkpoint.peers import INLINE
from etcdreplica.core.holders import NOTHING, acknowledged, durable, next_holders
from etcdreplica.daemon.waiting import insist
from etcdreplica.errors import CheckpointError, CorruptValueError, StaleEpochError, StoreError
from etcdreplica.model import Checkpoint, Stamp
from etcdreplica.store import Entry, Key, Kind, Put, Txn, Unchanged

log = logging.getLogger(__name__)

RETRY_S = (0.05, 2.0)
SILENCE_S = 2.0  # a host that has held nothing for so long, although it was asked, is no holder any more
FIRST_S = 1.0  # for so long the first record waits for all hosts to hold what it is about
MANIFESTS = 64  # that are known until etcd has learned of them
RECORD_S = 1.0  # how often a record that only names a newer checkpoint is written


@define
class Waiter:
    """Somebody who wants to know when `stamp` is on `copies` hosts. `tell(reached, trouble, done)`; `refuse(reason)`."""

    stamp: Stamp
    copies: int
    tell: Callable[[int, str, bool], None]
    refuse: Callable[[str], None]
    told: tuple[int, str] | None = None


class Reign:
    """One epoch of one application. `start` it, and `stop` it when the epoch is over."""

    def __init__(self, context: Context, holding: Holding, epoch: int) -> None:
        self.epoch = epoch
        self.over = ""  # why nothing is acknowledged any more
        self._context = context
        self._holding = holding
        self._source: Source | None = None
        self._held: dict[str, Stamp] = {}
        self._silent: set[str] = set()
        self._trouble: dict[str, str] = {}
        self._waiters: list[Waiter] = []
        self._manifests: dict[Stamp, Manifest] = {}
        self._entry: Entry | None = None
        self._changing: frozenset[str] = frozenset()  # holders that may stand in etcd by now, or still get there
        self._acknowledged = NOTHING  # or what was restored: it may have been acknowledged before
        self._copies: int | None = None  # on how many hosts the application wants each; None before it has said so
        self._began_at = context.clock()
        self._next_record_at = 0.0
        self._touched = asyncio.Event()
        self._offering: dict[str, asyncio.Task[None]] = {}
        self._wake: dict[str, asyncio.Event] = {}
        self._work: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin."""
        self.seated()
        self._work = [asyncio.create_task(self._prepare()), asyncio.create_task(self._record())]

    async def _prepare(self) -> None:
        """Begin with the newest checkpoint there is. Nothing is said of it before it was seen to be whole."""
        holding = self._holding
        while not self.over:
            try:
                stored = await holding.restore(self.epoch, NOTHING, float("inf"))
                if stored is not None and (self._source is None or self._source.manifest.stamp < stored.manifest.stamp):
                    self.hand_out(Source.of(stored))
                if stored is not None:
                    self._acknowledged = max(self._acknowledged, stored.manifest.stamp)
                    self.held_here()
            except StaleEpochError as error:
                self._end(str(error))
            except OSError as error:
                log.error("%s: its checkpoint cannot be read: %s", holding.app, error)
                await asyncio.sleep(RETRY_S[1])
            else:
                return

    def stop(self) -> None:
        """Hand out nothing more, and acknowledge nothing."""
        self._end("its primary is not on this host any more")
        for task in (*self._offering.values(), *self._work):
            task.cancel()

    def seated(self) -> None:
        """The seats may have changed."""
        placement = self._holding.placement
        peers = set(placement.peers) if placement else set()
        for host in peers - self._offering.keys():
            self._wake[host] = asyncio.Event()
            self._offering[host] = asyncio.create_task(self._offer(host))
        for host in self._offering.keys() - peers:
            self._offering.pop(host).cancel()
            for known in (self._held, self._trouble, self._wake):
                known.pop(host, None)
            self._silent.discard(host)
        self.touch()

    def servers_changed(self, anew: Iterable[str] = ()) -> None:
        """A CheckpointServer has come or gone; those of `anew` may have come back with another disk."""
        for host in anew:
            if host != self._context.host:
                self._held.pop(host, None)
        for wake in self._wake.values():
            wake.set()

    def hand_out(self, source: Source, copies: int | None = None) -> None:
        """Offer this from now on; the application wants it on `copies` hosts."""
        self._copies = copies or self._copies
        self._source = self._holding.offered = source
        self._manifests[source.manifest.stamp] = source.manifest
        while len(self._manifests) > MANIFESTS:  # etcd is away
            del self._manifests[min(self._manifests)]
        self.servers_changed()

    def held_here(self) -> None:
        """What this host holds durably has changed."""
        self._held[self._context.host] = self._holding.stamp
        self.touch()

    def wait(self, waiter: Waiter) -> None:
        """Tell somebody when something is durable."""
        if self.over:
            waiter.refuse(self.over)
            return
        self._waiters.append(waiter)
        self.touch()

    def forget(self, waiter: Waiter) -> None:
        """They wait no longer."""
        with contextlib.suppress(ValueError):
            self._waiters.remove(waiter)

    def touch(self) -> None:
        """See who can be told something, and whether the record must change."""
        self._acknowledge()
        self._touched.set()

    @property
    def _trouble_in_words(self) -> str:
        return "; ".join(f"{host}: {reason}" for host, reason in sorted(self._trouble.items()))

    # --- handing out -----------------------------------------------------------------------------------------------

    async def _offer(self, host: str) -> None:
        context, wake = self._context, self._wake[host]
        delay, began_at = RETRY_S[0], None
        while True:
            source = self._source
            if source is None or self._held.get(host, NOTHING) >= source.manifest.stamp:
                wake.clear()
                await wake.wait()
                continue
            began_at = context.clock() if began_at is None else began_at
            try:
                await self._offer_once(host, source)
            except StaleEpochError as error:
                self._end(str(error))
                return
            except CheckpointError as error:
                if self._trouble.get(host) != str(error):
                    log.warning("%s: %s does not hold %s: %s", self._holding.app, host, source.manifest.stamp, error)
                self._trouble[host] = str(error)
                if context.clock() - began_at >= SILENCE_S:
                    self._silent.add(host)
                self.touch()
                wake.clear()
                await _wait(wake, delay)
                delay = min(RETRY_S[1], 2 * delay)
            else:
                delay, began_at = RETRY_S[0], None
                self._held[host] = max(source.manifest.stamp, self._held.get(host, NOTHING))
                self._silent.discard(host)
                self._trouble.pop(host, None)
                self.touch()

    async def _offer_once(self, host: str, source: Source) -> None:
        server = self._context.servers.get(host)
        if server is None:
            raise CheckpointError("it has no CheckpointServer just now")
        data = None
        if source.manifest.size <= INLINE:
            try:
                data = bytes(source.read(0, source.manifest.size))
            except OSError as error:
                raise CheckpointError(f"it cannot be read here: {error}") from None
        await self._context.peers.offer(host, server.address, self._context.host, self.epoch, source.manifest, data)

    # --- acknowledging ---------------------------------------------------------------------------------------------

    @property
    def _holders(self) -> frozenset[str]:
        return frozenset(self._entry.value.holders) if self._entry is not None else frozenset()

    def _acknowledge(self) -> None:
        self._check_fence()
        if self.over:
            return
        for waiter in list(self._waiters):
            done = acknowledged(self._holders, self._changing, self._held, waiter.copies) >= waiter.stamp
            reached = sum(stamp >= waiter.stamp for stamp in self._held.values())
            if done:
                self._waiters.remove(waiter)
                self._acknowledged = max(self._acknowledged, waiter.stamp)
            if done or waiter.told != (reached, self._trouble_in_words):
                waiter.told = reached, self._trouble_in_words
                waiter.tell(*waiter.told, done)

    def _check_fence(self) -> None:
        """Who restores has asked this host, and takes what it was told for all that will ever be acknowledged."""
        if self._holding.epoch > self.epoch and not self.over:
            self._end(f"epoch {self.epoch} is over: {self._context.host} knows of {self._holding.epoch}")

    def _end(self, reason: str) -> None:
        self.over = self.over or reason
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.refuse(self.over)

    # --- the record in etcd ----------------------------------------------------------------------------------------

    async def _record(self) -> None:
        await self._read()
        while not self.over:
            self._touched.clear()
            wait_s = await self._record_once()
            await _wait(self._touched, wait_s)

    async def _record_once(self) -> float | None:
        """Bring the record up to date; return when to look again even if nothing happens."""
        now, entry, holding = self._context.clock(), self._entry, self._holding
        self._check_fence()
        if self.over:
            return None
        seats = {self._context.host, *(holding.placement.peers if holding.placement else ())}
        recorded = entry.value.stamp if entry is not None else NOTHING
        if entry is None and self._source is not None:
            newest = self._source.manifest.stamp
            waiting = [h for h in seats if self._held.get(h, NOTHING) < newest and h not in self._silent]
            if waiting and now < self._began_at + FIRST_S:
                return self._began_at + FIRST_S - now
        least = max(self._acknowledged, recorded)
        copies = len(self._holders) if self._copies is None else self._copies
        new = next_holders(self._context.host, self._holders, seats, self._silent, self._held, least, copies)
        if new is None and not self._changing:
            if durable(self._holders, self._held) <= recorded:
                return None
            if now < self._next_record_at:
                return self._next_record_at - now
        await self._write(new or self._holders, recorded)
        return None

    async def _write(self, holders: frozenset[str], recorded: Stamp) -> None:
        context, holding = self._context, self._holding
        self._changing |= holders
        stamp = max(durable(holders, self._held), recorded)
        known, old = self._manifests.get(stamp), self._entry.value if self._entry is not None else None
        digest, size = (known.digest, known.size) if known else (old.digest, old.size) if old else ("", 0)
        value = Checkpoint(max(stamp.epoch, 1), stamp.sequence, digest, size, tuple(sorted(holders)), time.time())
        placement = Key(Kind.PLACEMENTS, (context.host, holding.app))
        conditions = (
            Unchanged(holding.key, self._entry.mod_revision if self._entry is not None else 0),
            Unchanged(placement, holding.placement_revision),
        )
        self._next_record_at = context.clock() + RECORD_S
        try:
            result = await context.store.commit(Txn(conditions, (Put(holding.key, value),)))
        except StoreError as error:  # it may happen yet, until another write has succeeded
            log.info("%s: cannot record its checkpoint yet: %s", holding.app, error)
            await asyncio.sleep(RETRY_S[0])
            await self._read()
            return
        if not result.succeeded:
            await asyncio.sleep(RETRY_S[0])  # by then we know of the placement that was in the way
            await self._read()  # an earlier write may have been: only now it is known, and none can follow any more
            self._changing = frozenset()
            self.touch()
            return
        self._changing = frozenset()
        self._entry = Entry(holding.key, value, result.revision)
        self._manifests = {s: m for s, m in self._manifests.items() if s >= stamp}
        self.touch()

    async def _read(self) -> None:
        """Learn what stands in etcd."""
        holding = self._holding
        try:
            entry = await insist(f"reading {holding.key}", lambda: self._context.store.get(holding.key))
        except CorruptValueError as error:
            self._end(str(error))
            return
        if entry is not None and entry.value.epoch < holding.born:
            entry = Entry(entry.key, Checkpoint(1, 0, "", 0, ()), entry.mod_revision)  # of an earlier application
        if entry is not None and entry.value.epoch > self.epoch:
            self._end(f"epoch {self.epoch} is over: a primary of epoch {entry.value.epoch} has stored something")
            return
        self._entry = entry
        self.touch()


async def _wait(event: asyncio.Event, limit_s: float | None) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            await event.wait()
