"""Leases of a real etcd: renewed in time, counted from the sending, and lost without etcd having to say so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from aetcd.rpc import rpc_pb2 as rpc

from etcdreplica.clock import boottime
from etcdreplica.errors import StoreUnavailableError
from etcdreplica.store import LeaseKeeper, Put, Store
from etcdreplica.store.channel import EtcdChannel
from etcdreplica.store.leases import STREAMS
from etcdreplica.testing.etcd import EmbeddedEtcd
from tests.integration.store.store_harness import (
    POLL_S,
    Connect,
    eventually,
    host,
    host_key,
    lost,
    metric,
    paused,
    renewed,
    time_to_live,
    until,
    write,
)

pytestmark = pytest.mark.integration

A, B = host_key("a"), host_key("b")
TTL_S = 2.0  # the least that etcd grants


class SteppedClock:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Return the time it was set to."""
        return self.now


async def test_many_leases_on_few_streams(etcd: EmbeddedEtcd, store: Store) -> None:
    """Two hundred leases live on past their TTL, renewed on a few streams."""
    name = 'grpc_server_started_total{grpc_method="LeaseKeepAlive",grpc_service="etcdserverpb.Lease",grpc_type="bidi_stream"}'
    streams, ttl_s = metric(etcd.endpoint, name), 2 * TTL_S
    leases = [lease for _ in range(20) for lease in await asyncio.gather(*(store.leases.grant(ttl_s) for _ in range(10)))]
    assert len({lease.id for lease in leases}) == 200
    granted = {lease.id: lease.deadline for lease in leases}
    await until(
        lambda: (
            any(lease.lost.done() for lease in leases) or all(lease.deadline > granted[lease.id] + ttl_s for lease in leases)
        ),
        "every lease is renewed past its first deadline",
    )
    assert [lease.lost.result() for lease in leases if lease.lost.done()] == []
    left = await asyncio.gather(*(time_to_live(store, lease.id) for lease in leases))
    assert min(left) >= 0
    assert all(lease.deadline <= boottime() + ttl_s for lease in leases)
    assert 0 < metric(etcd.endpoint, name) - streams <= STREAMS


class HaltingChannel:
    """Grants leases of one stream, and answers two renewals on each connection before that is lost."""

    def __init__(self, clock: SteppedClock) -> None:
        self._clock = clock
        self._granted = 0

    async def call(self, name: str, request: Any) -> Any:
        """Grant."""
        self._granted += 1
        return rpc.LeaseGrantResponse(ID=self._granted * STREAMS, TTL=60)

    async def stream(self, name: str, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Answer."""
        for _ in range(2):
            request = await anext(requests)
            self._clock.now += 0.1
            yield rpc.LeaseKeepAliveResponse(ID=request.ID, TTL=60)
        raise StoreUnavailableError("lost")


async def test_a_stream_that_breaks_again_and_again_renews_all() -> None:
    """Each connection begins with the leases that end first, not with those that the one before has renewed."""
    clock = SteppedClock()
    keeper = LeaseKeeper(cast("EtcdChannel", HaltingChannel(clock)), clock)
    try:
        leases = [await keeper.grant(60) for _ in range(7)]
        await until(lambda: all(lease.deadline > 1060 for lease in leases), "every lease is renewed")
    finally:
        await keeper.close()


async def test_a_key_lives_as_long_as_its_lease(store: Store) -> None:
    """A key under a renewed lease is there after several renewals, and gone at once after the revocation."""
    lease = await store.leases.grant(TTL_S)
    await write(store, Put(A, host(1), lease.id), Put(B, host(2)))
    await renewed(lease, 2)
    entry = await store.get(A)
    assert entry is not None
    assert entry.lease == lease.id
    await store.leases.revoke(lease)
    assert await store.get(A) is None
    assert await store.get(B) is not None
    assert lease.lost.result() == "revoked"
    assert await time_to_live(store, lease.id) == -1


async def test_etcd_grants_more_than_asked(store: Store) -> None:
    """Etcd raises a TTL of one second; the lease has what etcd granted, and its deadline counts from that."""
    before = boottime()
    lease = await store.leases.grant(1)
    assert lease.ttl_s == TTL_S
    assert before + TTL_S <= lease.deadline <= boottime() + TTL_S
    await renewed(lease, 2)


@pytest.mark.parametrize("asked_s", [2.2, 2.5, 3.5, 4.4])
async def test_a_fraction_is_not_cut_off(store: Store, asked_s: float) -> None:
    """Etcd knows whole seconds only: a lease is granted for no less than was asked for."""
    lease = await store.leases.grant(asked_s)
    assert lease.ttl_s >= asked_s


async def test_a_grant_counts_from_its_sending(etcd: EmbeddedEtcd, store: Store) -> None:
    """However long the answer takes, the deadline is the time of sending plus the TTL."""
    clock = SteppedClock()
    keeper = LeaseKeeper(store.channel, clock)
    try:
        await store.get(A)  # the connection stands
        with paused(etcd):
            granting = asyncio.create_task(keeper.grant(60))
            await asyncio.sleep(0)  # it has begun
            clock.now += 17
        lease = await granting
        assert lease.deadline == 1000 + 60
    finally:
        await keeper.close()


async def test_a_renewal_counts_from_its_sending(etcd: EmbeddedEtcd, store: Store) -> None:
    """However long the answer takes, the new deadline is the time the renewal was sent plus the TTL."""
    clock = SteppedClock()
    keeper = LeaseKeeper(store.channel, clock)
    try:
        lease = await keeper.grant(60)
        clock.now += 1
        await until(lambda: lease.deadline == 1061, "the renewal that opens the stream is answered")
        earlier = lease.deadline
        for _ in range(3):
            with paused(etcd):
                clock.now += 20
                keeper._alarms[lease.id % STREAMS].by(0)  # a clock that is set wakes nobody
                sent_at = clock.now
                await until(lambda: bool(lease.sent), "the next renewal is sent")
                clock.now += 7
            await until(lambda: not lease.sent, "the renewal is answered")
            assert earlier < lease.deadline == sent_at + 60
            earlier = lease.deadline
    finally:
        await keeper.close()


async def test_etcd_pauses_longer_than_the_ttl(etcd: EmbeddedEtcd, store: Store) -> None:
    """A lease that cannot be renewed is lost here at its deadline, not before, and while etcd still says nothing."""
    lease = await store.leases.grant(TTL_S)
    await renewed(lease, 1)
    with paused(etcd):
        reason = await lost(lease)
        assert boottime() >= lease.deadline
    assert reason == "not renewed for 2 s"


async def test_etcd_pauses_shorter_than_the_ttl(etcd: EmbeddedEtcd, store: Store) -> None:
    """A pause in which a renewal waits unanswered, but which ends before the deadline, loses nothing."""
    lease = await store.leases.grant(4)
    await renewed(lease, 1)
    with paused(etcd):
        await until(lambda: bool(lease.sent), "a renewal waits")
    await renewed(lease, 1)
    assert await time_to_live(store, lease.id) >= 0


async def test_revoked_by_somebody_else(connect: Connect) -> None:
    """A lease that somebody else revokes is lost with its next renewal; the others live on."""
    mine, other = connect(), connect()
    victim, spared = await mine.leases.grant(TTL_S), await mine.leases.grant(TTL_S)
    await renewed(victim, 1)
    await other.leases.revoke_id(victim.id)
    assert await lost(victim) == "etcd says it has expired"
    await renewed(spared, 1)


async def test_revoking_what_is_gone(store: Store) -> None:
    """Revoking a lease twice, or one that never was, is no error."""
    lease = await store.leases.grant(5)
    await store.leases.revoke_id(lease.id)
    await store.leases.revoke(lease)
    await store.leases.revoke_id(12345)
    assert lease.lost.result() == "revoked"


async def test_a_revoked_lease_is_not_renewed(store: Store) -> None:
    """Among many leases that come and go, the one that stays is renewed, and revoked ones keep their reason."""
    stays = await store.leases.grant(TTL_S)
    gone = await asyncio.gather(*(store.leases.grant(TTL_S) for _ in range(30)))
    await asyncio.gather(*(store.leases.revoke(lease) for lease in gone))
    await renewed(stays, 2)
    assert {lease.lost.result() for lease in gone} == {"revoked"}
    assert {await time_to_live(store, lease.id) for lease in gone} == {-1}


async def test_a_lease_after_all_others_were_revoked(store: Store) -> None:
    """A keeper that had nothing to renew for a while renews the next lease."""
    first = await store.leases.grant(TTL_S)
    await renewed(first, 1)
    await store.leases.revoke(first)
    second = await store.leases.grant(TTL_S)
    await renewed(second, 2)


async def test_a_revocation_that_cannot_be_sent(etcd: EmbeddedEtcd, store: Store) -> None:
    """Without etcd a lease is lost here all the same; the error tells that etcd does not know."""
    lease = await store.leases.grant(5)
    etcd.kill()
    with pytest.raises(StoreUnavailableError):
        await store.leases.revoke(lease)
    assert lease.lost.result() == "revoked"


async def test_a_restart_shorter_than_the_ttl(etcd: EmbeddedEtcd, store: Store) -> None:
    """Leases outlive an etcd that is killed and comes back on its data, and new ones can be had."""
    leases = [await store.leases.grant(6) for _ in range(5)]
    await write(store, Put(A, host(1), leases[0].id))
    etcd.kill()
    etcd.start()
    await asyncio.gather(*(renewed(lease, 1) for lease in leases))
    another = await eventually(lambda: store.leases.grant(TTL_S), "etcd grants again")
    await renewed(another, 1)
    assert await store.get(A) is not None


async def test_a_lost_lease_never_comes_back(etcd: EmbeddedEtcd, store: Store) -> None:
    """A lease lost while etcd was down stays lost, and expires in etcd although that knows it again; new ones are renewed."""
    lease = await store.leases.grant(TTL_S)
    await write(store, Put(A, host(1), lease.id))
    etcd.kill()
    reason = await lost(lease)
    deadline = lease.deadline
    etcd.start()
    new = await eventually(lambda: store.leases.grant(TTL_S), "etcd grants again")
    async with asyncio.timeout(20):
        while await eventually(lambda: time_to_live(store, lease.id), "etcd answers") >= 0:
            await renewed(new, 1)
    assert (lease.lost.result(), lease.deadline) == (reason, deadline)
    assert await store.get(A) is None


async def test_closing_lets_leases_expire(connect: Connect) -> None:
    """A keeper that was closed renews no more: etcd lets its leases expire by themselves."""
    store, other = connect(), connect()
    lease = await store.leases.grant(TTL_S)
    await renewed(lease, 1)
    await store.leases.close()
    deadline = lease.deadline
    async with asyncio.timeout(20):
        while await time_to_live(other, lease.id) >= 0:  # noqa: ASYNC110 - etcd tells nobody
            await asyncio.sleep(POLL_S)
    assert lease.deadline == deadline
