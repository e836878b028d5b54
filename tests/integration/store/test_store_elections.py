"""Elections in a real etcd: one leader, the oldest candidate; a deposed one writes nothing; a lost lease is an error."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from aetcd.rpc import rpc_pb2 as rpc

from etcdreplica.errors import LeaseLostError
from etcdreplica.model import Leader
from etcdreplica.store import Delete, Election, Key, Kind, Lease, Put, Store, Txn
from etcdreplica.store.election import Leadership
from etcdreplica.testing.etcd import EmbeddedEtcd
from tests.integration.store.store_harness import (
    BOUND_S,
    POLL_S,
    Connect,
    eventually,
    host,
    host_key,
    metric,
    paused,
    renewed,
    until,
    write,
)

pytestmark = pytest.mark.integration

ROLE = "manager"
A = host_key("a")


def _watches(store: Store) -> float:
    name = 'grpc_server_started_total{grpc_method="Watch",grpc_service="etcdserverpb.Watch",grpc_type="bidi_stream"}'
    return metric(store.channel.endpoint, name)


class Candidate:
    """One candidate with a store and a lease of its own."""

    def __init__(self, store: Store, name: str, lease: Lease) -> None:
        self._watches = _watches(store)
        self.store = store
        self.name = name
        self.lease = lease
        self.key = Key(Kind.LEADERS, (ROLE, f"{lease.id:x}"))
        self.campaign = asyncio.create_task(Election(store, ROLE, Leader(name, 1)).campaign(lease))

    async def entered(self) -> None:
        """Wait until it leads, or watches those who are before it."""
        await until(lambda: self.campaign.done() or _watches(self.store) > self._watches, f"{self.name} has entered")

    async def elected(self) -> Leadership:
        """Wait until it leads."""
        async with asyncio.timeout(BOUND_S):
            return await self.campaign


@contextlib.asynccontextmanager
async def candidates(connect: Connect, count: int, ttl_s: float = 10.0) -> AsyncIterator[list[Candidate]]:
    """So many candidates, which entered one after the other."""
    found: list[Candidate] = []
    try:
        for number in range(count):
            store = connect()
            found.append(Candidate(store, f"host-{number}", await store.leases.grant(ttl_s)))
            await found[-1].entered()
        yield found
    finally:
        for candidate in found:
            candidate.campaign.cancel()
        if found:
            await asyncio.wait([candidate.campaign for candidate in found])


async def test_of_five_one_leads(connect: Connect) -> None:
    """Exactly one leads at a time; each time its lease is revoked the next oldest is promoted."""
    async with candidates(connect, 5) as five:
        revisions = []
        for number, candidate in enumerate(five):
            leadership = await candidate.elected()
            revisions.append(leadership.create_revision)
            assert [each.campaign.done() for each in five] == [each <= number for each in range(5)]
            assert (leadership.key, leadership.lease) == (candidate.key, candidate.lease)
            assert [name for _, name in await _listed(candidate.store)] == [each.name for each in five[number:]]
            await candidate.store.leases.revoke(candidate.lease)
        assert revisions == sorted(set(revisions))


async def _listed(store: Store) -> list[tuple[int, str]]:
    listed = await store.list(Kind.LEADERS, ROLE)
    return sorted((entry.create_revision, entry.value.host) for entry in listed.entries)


async def test_all_at_once(connect: Connect) -> None:
    """However candidates race to enter, the one whose key was created first leads, and the others follow in that order."""
    stores = [connect() for _ in range(6)]
    leases = await asyncio.gather(*(store.leases.grant(10) for store in stores))
    racing = [Candidate(store, f"host-{n}", lease) for n, (store, lease) in enumerate(zip(stores, leases, strict=True))]
    try:
        by_name = {candidate.name: candidate for candidate in racing}
        async with asyncio.timeout(BOUND_S):
            while len(order := await _listed(stores[0])) < 6:  # noqa: ASYNC110 - a read is what is wanted
                await asyncio.sleep(POLL_S)
        for revision, name in order:
            assert (await by_name[name].elected()).create_revision == revision
            assert sum(candidate.campaign.done() for candidate in racing) == 1
            racing.remove(by_name[name])
            await by_name[name].store.leases.revoke(by_name[name].lease)
    finally:
        for candidate in racing:
            candidate.campaign.cancel()


async def test_a_waiting_candidate_leaves(connect: Connect) -> None:
    """A waiting candidate whose lease is revoked gets LeaseLostError, and is passed over later."""
    async with candidates(connect, 3) as (first, second, third):
        await first.elected()
        await second.store.leases.revoke(second.lease)
        with pytest.raises(LeaseLostError, match=ROLE):
            await second.elected()
        assert not third.campaign.done()
        await first.store.leases.revoke(first.lease)
        await third.elected()


async def test_a_lease_revoked_by_somebody_else(connect: Connect) -> None:
    """A waiting candidate learns that somebody else revoked its lease from its key, long before it renews."""
    async with candidates(connect, 2, ttl_s=600) as (first, second):
        await first.elected()
        await first.store.leases.revoke_id(second.lease.id)
        with pytest.raises(LeaseLostError, match="removed"):
            await second.elected()


async def test_a_key_that_somebody_deletes(connect: Connect) -> None:
    """A waiting candidate whose key is deleted by hand gets LeaseLostError."""
    async with candidates(connect, 2) as (first, second):
        await first.elected()
        await write(first.store, Delete(second.key))
        with pytest.raises(LeaseLostError, match="removed"):
            await second.elected()


async def test_the_lease_runs_out_while_etcd_pauses(etcd: EmbeddedEtcd, connect: Connect) -> None:
    """A waiting candidate whose lease cannot be renewed gets LeaseLostError while etcd still says nothing."""
    async with candidates(connect, 1) as (first,), candidates(connect, 1, ttl_s=2) as (second,):
        await first.elected()
        with paused(etcd), pytest.raises(LeaseLostError, match="not renewed"):
            await second.elected()


async def test_campaigning_with_a_lease_that_is_gone(store: Store) -> None:
    """A campaign with a lease that etcd no longer knows raises LeaseLostError: the keeper may not have heard of it yet."""
    lease = await store.leases.grant(600)
    await store.leases.revoke_id(lease.id)
    with pytest.raises(LeaseLostError):
        async with asyncio.timeout(BOUND_S):
            await Election(store, ROLE, Leader("a", 1)).campaign(lease)


async def test_a_deposed_leader_writes_nothing(connect: Connect) -> None:
    """What a leader may write it may no longer write once its key is gone, even when it is elected again."""
    async with candidates(connect, 2) as (first, second):
        old = await first.elected()
        assert (await first.store.commit(Txn(when=(old.condition,), then=(Put(A, host(1)),)))).succeeded
        await second.store.leases.revoke_id(first.lease.id)
        new = await second.elected()
        assert not (await first.store.commit(Txn(when=(old.condition,), then=(Put(A, host(2)), Delete(second.key))))).succeeded
        assert (await second.store.commit(Txn(when=(new.condition,), then=(Put(A, host(3)),)))).succeeded
        entry = await first.store.get(A)
        assert entry is not None
        assert entry.value == host(3)


async def test_a_key_written_again_is_no_leadership(store: Store) -> None:
    """The condition of a leader whose key was deleted does not hold for a new key of the same name."""
    lease = await store.leases.grant(10)
    election = Election(store, ROLE, Leader("a", 1))
    async with asyncio.timeout(BOUND_S):
        old = await election.campaign(lease)
        await write(store, Delete(old.key))
        new = await election.campaign(lease)
    assert new.key == old.key
    assert not (await store.commit(Txn(when=(old.condition,), then=(Put(A, host(1)),)))).succeeded
    assert (await store.commit(Txn(when=(new.condition,), then=(Put(A, host(1)),)))).succeeded


async def test_campaigning_again_keeps_the_place(connect: Connect) -> None:
    """A candidate that was cancelled and campaigns again with the same lease has the place it had."""
    async with candidates(connect, 3) as (first, second, third):
        await first.elected()
        entry = await second.store.get(second.key)
        assert entry is not None
        second.campaign.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second.campaign
        again = asyncio.create_task(Election(second.store, ROLE, Leader("host-1", 1)).campaign(second.lease))
        await first.store.leases.revoke(first.lease)
        async with asyncio.timeout(BOUND_S):
            assert (await again).create_revision == entry.create_revision
        assert not third.campaign.done()


async def test_roles_are_independent(store: Store) -> None:
    """One lease can lead two roles, also when one role's name begins with the other's."""
    lease = await store.leases.grant(10)
    async with asyncio.timeout(BOUND_S):
        one = await Election(store, ROLE, Leader("a", 1)).campaign(lease)
        two = await Election(store, f"{ROLE}2", Leader("a", 1)).campaign(lease)
    assert one.key != two.key
    await store.leases.revoke(lease)
    assert (await store.list(Kind.LEADERS)).entries == ()


async def test_etcd_is_killed_and_started_again(etcd: EmbeddedEtcd, connect: Connect) -> None:
    """A restart of etcd within the TTL changes no leader, and the waiting candidate is still the next."""
    async with candidates(connect, 2) as (first, second):
        leadership = await first.elected()
        etcd.kill()
        etcd.start()
        await renewed(first.lease, 1)
        assert not second.campaign.done()

        async def fenced() -> bool:
            txn = Txn(when=(leadership.condition,), then=(Put(A, host(1)),))
            return (await first.store.commit(txn)).succeeded

        assert await eventually(fenced, "the leader writes again")
        await first.store.leases.revoke(first.lease)
        await second.elected()


async def test_a_corrupt_candidate_still_counts(connect: Connect) -> None:
    """A candidate key that cannot be read keeps its place: a younger candidate does not pass it."""
    async with candidates(connect, 1) as (first,):
        await first.elected()
        path = first.store.keys.path(first.key)
        await first.store.channel.call("KV.Put", rpc.PutRequest(key=path, value=b"?", lease=first.lease.id))
        async with candidates(connect, 1) as (second,):
            assert not second.campaign.done()
            await first.store.leases.revoke(first.lease)
            await second.elected()
