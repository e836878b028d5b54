"""Typed records in etcd: read, write in transactions, follow.

`follow` is the only way the daemons observe: first the whole of a prefix, then its changes in order, and the whole again
whenever changes may have been missed. A consumer that handles both is correct whatever happens to the watch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from aetcd.rpc import rpc_pb2 as rpc
from attrs import frozen

from etcdreplica.clock import Clock, boottime
from etcdreplica.errors import CorruptValueError, StoreDeniedError, StoreError, StoreUnavailableError
from etcdreplica.store.channel import Connect, EtcdChannel, EtcdOptions
from etcdreplica.store.keys import Corrupt, Entry, Key, Keyspace, Kind, decode
from etcdreplica.store.leases import LeaseKeeper
from etcdreplica.store.lineage import Lineage
from etcdreplica.store.origin import OriginCheck
from etcdreplica.store.txn import Txn, TxnResult, to_request

log = logging.getLogger(__name__)

PROGRESS_S = 5.0  # a quiet watch is asked for a sign of life this often
SILENCE_S = 11.0  # and given up when none came for this long
RETRY_S = (0.1, 2.0)
PAGE = 1000  # keys in one answer: neither etcd nor whoever reads is held up by a cluster of any size
_DELETE = 1  # mvccpb.Event.DELETE


@frozen
class Snapshot:
    """All keys of a prefix at one revision; whatever is not in it does not exist."""

    entries: tuple[Entry, ...]
    revision: int


@frozen
class Changes:
    """What changed since the last batch, in order. `revision` is that of the newest change."""

    entries: tuple[Entry, ...]
    revision: int


class _CompactedError(Exception):
    """The revision to resume from is gone."""


class Store:
    """The records of one cluster in etcd. Make one in the loop that uses it."""

    def __init__(
        self,
        options: EtcdOptions,
        cluster: str,
        clock: Clock = boottime,
        connect: Connect | None = None,
        lineage: Lineage | None = None,
    ) -> None:
        self.keys = Keyspace(cluster)
        check = OriginCheck(self.keys.path(Key(Kind.ORIGIN, (cluster,))), lineage) if lineage is not None else None
        self.channel = EtcdChannel(options, connect, check)
        self.leases = LeaseKeeper(self.channel, clock)

    async def __aenter__(self) -> Store:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leases.close()
        await self.channel.close()

    async def get(self, key: Key) -> Entry | None:
        """Read one record; None when the key does not exist. Raises CorruptValueError for one that cannot be read."""
        path = self.keys.path(key)
        answer = await self.channel.call("KV.Range", rpc.RangeRequest(key=path), repeat=True)
        if not answer.kvs:
            return None
        entry = self._entry(answer.kvs[0])
        assert entry is not None
        if isinstance(entry.value, Corrupt):
            raise CorruptValueError(entry.value.error)
        return entry

    async def list(self, kind: Kind | None = None, *names: str) -> Snapshot:
        """Read all records under a kind (and first names), or of the cluster, at one revision.

        Raises StoreError, also when that revision is compacted before all of it was read.
        """
        prefix = self.keys.prefix(kind, *names)
        start, revision, entries = prefix, 0, list[Entry]()
        while True:
            request = rpc.RangeRequest(key=start, range_end=_end(prefix), limit=PAGE, revision=revision)
            answer = await self.channel.call("KV.Range", request, repeat=True, timeout_s=10.0)
            entries += self._entries(answer.kvs)
            revision = revision or answer.header.revision
            if not answer.more:
                return Snapshot(tuple(entries), revision)
            start = answer.kvs[-1].key + b"\0"

    async def commit(self, txn: Txn) -> TxnResult:
        """Run a transaction. Raises StoreUnavailableError when it is unknown whether it happened."""
        answer = await self.channel.call("KV.Txn", to_request(txn, self.keys))
        return TxnResult(answer.succeeded, answer.header.revision)

    async def follow(self, kind: Kind | None = None, *names: str) -> AsyncGenerator[Snapshot | Changes, None]:
        """Yield a Snapshot, then Changes for ever; again a Snapshot after a compaction. Survives loss of etcd.

        Raises StoreDeniedError only; close it (`contextlib.aclosing`) when leaving early.
        """
        prefix, revision, delay = self.keys.prefix(kind, *names), 0, RETRY_S[0]
        while True:
            try:
                if not revision:
                    snapshot = await self.list(kind, *names)
                    revision, delay = snapshot.revision, RETRY_S[0]
                    yield snapshot
                async with contextlib.aclosing(self._watch(prefix, revision)) as watch:
                    async for changes in watch:
                        revision, delay = changes.revision, RETRY_S[0]
                        yield changes
            except _CompactedError:
                log.warning("watch of %s was compacted; reading it again", prefix.decode())
                revision = 0
            except StoreDeniedError:
                raise
            except StoreError as error:
                log.debug("watch of %s lost: %s", prefix.decode(), error)
                await asyncio.sleep(delay * (0.5 + random.random()))
                delay = min(RETRY_S[1], delay * 2)

    async def _watch(self, prefix: bytes, revision: int) -> AsyncGenerator[Changes, None]:
        """Yield what has changed after a revision.

        The watch begins with that revision, which is known already: else etcd could have been compacted at the one after it,
        and would then not tell of keys that were deleted there, without a word (etcd issues 18089 and 19179).
        """

        async def requests() -> AsyncIterator[Any]:
            create = rpc.WatchCreateRequest(key=prefix, range_end=_end(prefix), start_revision=revision)
            yield rpc.WatchRequest(create_request=create)
            while True:
                await asyncio.sleep(PROGRESS_S)
                yield rpc.WatchRequest(progress_request=rpc.WatchProgressRequest())

        async with contextlib.aclosing(self.channel.stream("Watch.Watch", requests(), SILENCE_S)) as answers:
            async for answer in answers:
                if answer.compact_revision:
                    raise _CompactedError
                if answer.canceled:
                    self.channel.forget_token()
                    raise StoreUnavailableError(f"etcd cancelled a watch: {answer.cancel_reason}")
                events = [event for event in answer.events if event.kv.mod_revision > revision]
                if events:  # the revision of an empty answer is no place to resume from (etcd issue 15220)
                    gone = {i for i, event in enumerate(events) if event.type == _DELETE}
                    yield Changes(self._entries((event.kv for event in events), gone), events[-1].kv.mod_revision)

    def _entries(self, kvs: Any, deleted: set[int] | frozenset[int] = frozenset()) -> tuple[Entry, ...]:
        entries = (self._entry(kv, deleted=i in deleted) for i, kv in enumerate(kvs))
        return tuple(entry for entry in entries if entry is not None)

    def _entry(self, kv: Any, *, deleted: bool = False) -> Entry | None:
        key = self.keys.parse(kv.key)
        if key is None:
            return None
        value = None if deleted else decode(key, kv.value)
        if isinstance(value, Corrupt):
            log.error("%s; it is skipped until it changes", value.error)
        return Entry(key, value, kv.mod_revision, kv.create_revision, kv.lease)


def _end(prefix: bytes) -> bytes:
    return prefix[:-1] + bytes([prefix[-1] + 1])
