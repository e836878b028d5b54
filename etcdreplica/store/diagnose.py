"""What an operator wants to know of an etcd before trusting it: who answers, how fast, and what is running out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator

from aetcd.rpc import rpc_pb2 as rpc
from attrs import evolve, frozen

from etcdreplica.errors import StoreError
from etcdreplica.store.channel import EtcdChannel, EtcdOptions

ROUNDS = 10
_ALARMS = {rpc.NOSPACE: "NOSPACE", rpc.CORRUPT: "CORRUPT"}
_GET = 0  # AlarmRequest.AlarmAction


@frozen
class Member:
    """What one endpoint says of itself."""

    endpoint: str
    version: str
    cluster: int  # equal for the members of one etcd
    has_leader: bool
    db_size: int
    db_in_use: int
    errors: tuple[str, ...] = ()


@contextlib.asynccontextmanager
async def _connected(options: EtcdOptions) -> AsyncIterator[EtcdChannel]:
    channel = EtcdChannel(options)
    try:
        yield channel
    finally:
        await channel.close()


async def member(options: EtcdOptions, endpoint: str) -> Member:
    """Ask one endpoint. Raises StoreError."""
    async with _connected(evolve(options, endpoints=(endpoint,))) as channel:
        said = await channel.call("Maintenance.Status", rpc.StatusRequest())
    number, in_use = said.header.cluster_id, said.dbSizeInUse or said.dbSize
    return Member(endpoint, said.version, number, bool(said.leader), said.dbSize, in_use, tuple(said.errors))


async def alarms(options: EtcdOptions) -> list[str]:
    """Return the alarms that are raised. Raises StoreError."""
    async with _connected(options) as channel:
        said = await channel.call("Maintenance.Alarm", rpc.AlarmRequest(action=_GET), repeat=True)
    return sorted({_ALARMS.get(alarm.alarm, str(alarm.alarm)) for alarm in said.alarms})


async def round_trips(options: EtcdOptions, cluster: str) -> tuple[list[float], list[float]]:
    """Return how many seconds linearizable reads took, and writes, which etcd flushes to its disks. Raises StoreError.

    What is written is no record, expires, and is taken back.
    """
    key = f"/etcdreplica/{cluster}/doctor".encode()
    reads, writes = list[float](), list[float]()
    async with _connected(options) as channel:
        lease = (await channel.call("Lease.LeaseGrant", rpc.LeaseGrantRequest(TTL=60), repeat=True)).ID
        for _ in range(ROUNDS):
            began = time.perf_counter()
            await channel.call("KV.Range", rpc.RangeRequest(key=key))
            read = time.perf_counter()
            await channel.call("KV.Put", rpc.PutRequest(key=key, value=b"", lease=lease))
            reads.append(read - began)
            writes.append(time.perf_counter() - read)
        await channel.call("Lease.LeaseRevoke", rpc.LeaseRevokeRequest(ID=lease))
    return reads, writes


async def is_compacted(options: EtcdOptions, cluster: str, young: int) -> bool | None:
    """Whether old revisions are gone; None for an etcd of less than `young` revisions. Raises StoreError."""
    key = f"/etcdreplica/{cluster}/doctor".encode()
    async with _connected(options) as channel:
        now = (await channel.call("KV.Range", rpc.RangeRequest(key=key), repeat=True)).header.revision
        if now < young:
            return None
        try:
            await channel.call("KV.Range", rpc.RangeRequest(key=key, revision=2))
        except StoreError as error:
            if "compacted" not in str(error):
                raise
            return True
    return False
