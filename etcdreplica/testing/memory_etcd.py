"""An etcd in memory: keys, transactions, leases, watches and compaction of version 3, one request after the other.

It takes and returns etcd's own messages, so that the whole of `etcdreplica.store` can run on it. There is no clock, no network
and no thread in it: whoever owns it says what time it is (`simulated_etcd` does). What is here was compared with real ones by
a state machine (tests/integration/store/test_memory_etcd.py). Not here, because the store does not use it: reading old
revisions, sorting, limits, nested transactions, filters of watches, users.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable
from random import Random
from typing import Any

import grpc
from aetcd.rpc import kv_pb2 as kv
from aetcd.rpc import rpc_pb2 as rpc
from attrs import define, field

MIN_TTL_S = 2  # with etcd's default election timings
MAX_OPERATIONS = 128  # in one branch of a transaction
_NO_END = b"\0"


class EtcdError(Exception):
    """What etcd answers instead."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = f"etcdserver: {text}"


@define
class HeldLease:
    """A lease as etcd knows it. `until`: when it can end, unless it is renewed."""

    id: int
    ttl_s: int
    until: float
    keys: set[bytes] = field(factory=set)


@define(eq=False)
class Watcher:
    """One watch of one stream. `send` takes each answer; `synced_to` is the last revision it was told of."""

    id: int
    key: bytes
    end: bytes
    send: Callable[[Any], None]
    synced_to: int

    def wants(self, key: bytes) -> bool:
        """Whether a key is among those that are watched."""
        return key == self.key if not self.end else key >= self.key and (self.end == _NO_END or key < self.end)


class MemoryEtcd:
    """One store. `random` only makes the identities of leases."""

    def __init__(self, random: Random | None = None, min_ttl_s: int = MIN_TTL_S) -> None:
        self.revision = 1
        self.compacted = 0
        self.leases: dict[int, HeldLease] = {}
        self.on_commit: Callable[[list[Any]], None] = lambda _: None  # is told the events of each revision
        self._random = random or Random(0)
        self._min_ttl_s = min_ttl_s
        self._keys: list[bytes] = []
        self._records: dict[bytes, Any] = {}
        self._log: list[list[Any]] = []  # the events of each revision after `_log_from`
        self._log_from = 1
        self._watchers: list[Watcher] = []
        self._handlers: dict[str, Callable[[Any, float], Any]] = {
            "KV.Range": self._range,
            "KV.Put": self._put,
            "KV.DeleteRange": self._delete_range,
            "KV.Txn": self._txn,
            "KV.Compact": self._compact,
            "Lease.LeaseGrant": self._grant,
            "Lease.LeaseRevoke": self._revoke,
            "Lease.LeaseKeepAlive": self._keep_alive,
            "Lease.LeaseTimeToLive": self._time_to_live,
        }

    def handle(self, name: str, request: Any, now: float) -> Any:
        """Answer one request, such as `KV.Txn`. Raises EtcdError."""
        return self._handlers[name](request, now)

    # --- keys ----------------------------------------------------------------------------------------------------------

    def keys(self, prefix: bytes = b"") -> list[bytes]:
        """Return all keys that begin so."""
        return [key for key in self._keys if key.startswith(prefix)]

    def record(self, key: bytes) -> Any:
        """Return what stands under a key, or None."""
        return self._records.get(key)

    def _header(self) -> Any:
        return rpc.ResponseHeader(revision=self.revision)

    def _within(self, key: bytes, end: bytes) -> list[bytes]:
        if not end:
            return [key] if key in self._records else []
        first = bisect_left(self._keys, key)
        return self._keys[first:] if end == _NO_END else self._keys[first : bisect_left(self._keys, end)]

    def _range(self, request: Any, now: float) -> Any:
        found = self._within(request.key, request.range_end)
        answer = rpc.RangeResponse(header=self._header(), count=len(found))
        if not request.count_only:
            answer.kvs.extend([self._records[key] for key in found])
        return answer

    def _put(self, request: Any, now: float) -> Any:
        return self._write(rpc.RequestOp(request_put=request)).response_put

    def _delete_range(self, request: Any, now: float) -> Any:
        return self._write(rpc.RequestOp(request_delete_range=request)).response_delete_range

    def _write(self, operation: Any) -> Any:
        self._check([operation])
        events: list[Any] = []
        answer = self._apply(operation, events)
        self._commit(events)
        getattr(answer, answer.WhichOneof("response")).header.revision = self.revision
        return answer

    def _txn(self, request: Any, now: float) -> Any:
        for branch in (request.success, request.failure):
            _check_once(branch)
        succeeded = all(self._holds(compare) for compare in request.compare)
        branch = request.success if succeeded else request.failure
        self._check(branch)
        events: list[Any] = []
        answers = [self._apply(operation, events) for operation in branch]
        self._commit(events)
        return rpc.TxnResponse(header=self._header(), succeeded=succeeded, responses=answers)

    def _holds(self, compare: Any) -> bool:
        record = self._records.get(compare.key)
        target = compare.target
        if target == rpc.Compare.VALUE:
            if record is None:
                return False
            have, want = record.value, compare.value
        else:
            name = {0: "version", 1: "create_revision", 2: "mod_revision", 4: "lease"}[target]
            have, want = getattr(record, name) if record is not None else 0, getattr(compare, name)
        return bool({0: have == want, 1: have > want, 2: have < want, 3: have != want}[compare.result])

    def _check(self, branch: Any) -> None:
        """Refuse a branch as a whole before anything of it is done."""
        for operation in branch:
            lease = operation.request_put.lease
            if lease and lease not in self.leases:
                raise EtcdError(grpc.StatusCode.NOT_FOUND, "requested lease not found")

    def _apply(self, operation: Any, events: list[Any]) -> Any:
        kind = operation.WhichOneof("request")
        revision = self.revision + 1
        if kind == "request_put":
            self._set(operation.request_put, revision, events)
            return rpc.ResponseOp(response_put=rpc.PutResponse(header=rpc.ResponseHeader(revision=revision)))
        if kind == "request_delete_range":
            request = operation.request_delete_range
            gone = list(self._within(request.key, request.range_end))
            for key in gone:
                self._drop(key, revision, events)
            answer = rpc.DeleteRangeResponse(header=rpc.ResponseHeader(), deleted=len(gone))
            return rpc.ResponseOp(response_delete_range=answer)
        if kind == "request_range":
            return rpc.ResponseOp(response_range=self._range(operation.request_range, 0.0))
        raise EtcdError(grpc.StatusCode.UNIMPLEMENTED, f"{kind} is not simulated")

    def _set(self, put: Any, revision: int, events: list[Any]) -> None:
        key, before = put.key, self._records.get(put.key)
        if before is None:
            insort(self._keys, key)
        elif before.lease and before.lease in self.leases:
            self.leases[before.lease].keys.discard(key)
        record = kv.KeyValue(
            key=key,
            value=put.value,
            create_revision=before.create_revision if before is not None else revision,
            mod_revision=revision,
            version=before.version + 1 if before is not None else 1,
            lease=put.lease,
        )
        self._records[key] = record
        if put.lease:
            self.leases[put.lease].keys.add(key)
        events.append(kv.Event(type=kv.Event.PUT, kv=record))

    def _drop(self, key: bytes, revision: int, events: list[Any]) -> None:
        record = self._records.pop(key)
        del self._keys[bisect_left(self._keys, key)]
        if record.lease in self.leases:
            self.leases[record.lease].keys.discard(key)
        events.append(kv.Event(type=kv.Event.DELETE, kv=kv.KeyValue(key=key, mod_revision=revision)))

    def _commit(self, events: list[Any]) -> None:
        if not events:
            return
        self.revision += 1
        self._log.append(events)
        self.on_commit(events)
        for watcher in list(self._watchers):
            if watcher.synced_to < self.revision:
                self._tell(watcher, events)

    def _compact(self, request: Any, now: float) -> Any:
        if request.revision <= self.compacted:
            raise EtcdError(grpc.StatusCode.OUT_OF_RANGE, "mvcc: required revision has been compacted")
        if request.revision > self.revision:
            raise EtcdError(grpc.StatusCode.OUT_OF_RANGE, "mvcc: required revision is a future revision")
        self.compacted = request.revision
        del self._log[: self.compacted - 1 - self._log_from]
        self._log_from = max(self._log_from, self.compacted - 1)
        if self._log:  # before 3.4.37 and 3.5.18 a deletion at that very revision is forgotten too (etcd issues 18089, 19179)
            self._log[0] = [event for event in self._log[0] if event.type != kv.Event.DELETE]
        return rpc.CompactionResponse(header=self._header())

    # --- leases --------------------------------------------------------------------------------------------------------

    def expire(self, now: float) -> list[int]:
        """End the leases that are over, and return which."""
        over = [lease.id for lease in self.leases.values() if lease.until <= now]
        for lease in over:
            self._end(lease)
        return over

    def extend_all(self, now: float, extra_s: float = 0.0) -> None:
        """Give every lease its whole time again, as a new leader of etcd does."""
        for lease in self.leases.values():
            lease.until = now + lease.ttl_s + extra_s

    def _grant(self, request: Any, now: float) -> Any:
        lease_id = request.ID or self._random.getrandbits(62) + 1
        if lease_id in self.leases:
            raise EtcdError(grpc.StatusCode.FAILED_PRECONDITION, "lease already exists")
        ttl_s = max(request.TTL, self._min_ttl_s)
        self.leases[lease_id] = HeldLease(lease_id, ttl_s, now + ttl_s)
        return rpc.LeaseGrantResponse(header=self._header(), ID=lease_id, TTL=ttl_s)

    def _revoke(self, request: Any, now: float) -> Any:
        if request.ID not in self.leases:
            raise EtcdError(grpc.StatusCode.NOT_FOUND, "requested lease not found")
        self._end(request.ID)
        return rpc.LeaseRevokeResponse(header=self._header())

    def _end(self, lease_id: int) -> None:
        lease = self.leases.pop(lease_id)
        events: list[Any] = []
        for key in sorted(lease.keys):
            self._drop(key, self.revision + 1, events)
        self._commit(events)

    def _keep_alive(self, request: Any, now: float) -> Any:
        lease = self.leases.get(request.ID)
        if lease is not None:
            lease.until = now + lease.ttl_s
        ttl_s = lease.ttl_s if lease is not None else 0
        return rpc.LeaseKeepAliveResponse(header=self._header(), ID=request.ID, TTL=ttl_s)

    def _time_to_live(self, request: Any, now: float) -> Any:
        lease = self.leases.get(request.ID)
        answer = rpc.LeaseTimeToLiveResponse(header=self._header(), ID=request.ID, TTL=-1)
        if lease is not None:
            answer.TTL, answer.grantedTTL = math.floor(lease.until - now), lease.ttl_s
            answer.keys.extend(sorted(lease.keys) if request.keys else ())
        return answer

    # --- watches -------------------------------------------------------------------------------------------------------

    def watch(self, request: Any, watch_id: int, send: Callable[[Any], None]) -> Watcher | None:
        """Begin a watch: `send` is given the answers, what was missed first. None if it cannot begin where it wants to."""
        start = request.start_revision or self.revision + 1
        send(rpc.WatchResponse(header=self._header(), watch_id=watch_id, created=True))
        if start < self.compacted:
            answer = rpc.WatchResponse(header=self._header(), watch_id=watch_id, canceled=True)
            answer.compact_revision = self.compacted
            send(answer)
            return None
        watcher = Watcher(watch_id, request.key, request.range_end, send, start - 1)
        self._watchers.append(watcher)
        if start <= self.revision:
            missed = [event for revision in self._log[start - 1 - self._log_from :] for event in revision]
            self._tell(watcher, missed)
        return watcher

    def forget(self, watcher: Watcher) -> None:
        """End a watch without an answer."""
        if watcher in self._watchers:
            self._watchers.remove(watcher)

    def progress(self) -> Any:
        """Answer the question how far the watches of a stream are."""
        return rpc.WatchResponse(header=self._header(), watch_id=-1)

    def _tell(self, watcher: Watcher, events: list[Any]) -> None:
        watcher.synced_to = self.revision
        wanted = [event for event in events if watcher.wants(event.kv.key)]
        if wanted:
            watcher.send(rpc.WatchResponse(header=self._header(), watch_id=watcher.id, events=wanted))


def _check_once(branch: Any) -> None:
    """Refuse what writes a key twice, and what is too long."""
    if len(branch) > MAX_OPERATIONS:
        raise EtcdError(grpc.StatusCode.INVALID_ARGUMENT, "too many operations in txn request")
    puts: set[bytes] = set()
    for operation in branch:
        if operation.WhichOneof("request") == "request_put":
            key = operation.request_put.key
            if not key:
                raise EtcdError(grpc.StatusCode.INVALID_ARGUMENT, "key is not provided")
            if key in puts:
                raise EtcdError(grpc.StatusCode.INVALID_ARGUMENT, "duplicate key given in txn request")
            puts.add(key)
    for operation in branch:
        if operation.WhichOneof("request") == "request_delete_range":
            deleted = Watcher(0, operation.request_delete_range.key, operation.request_delete_range.range_end, print, 0)
            if any(deleted.wants(key) for key in puts):
                raise EtcdError(grpc.StatusCode.INVALID_ARGUMENT, "duplicate key given in txn request")
