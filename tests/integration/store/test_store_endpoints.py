"""Several endpoints: the store goes on through another one when the one in use dies, stops, or was never any good."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager

import pytest

from etcdreplica.clock import boottime
from etcdreplica.core.timing import Timing
from etcdreplica.errors import StoreUnavailableError
from etcdreplica.store import EtcdOptions, Lineage, Put, Store
from etcdreplica.testing.etcd import EmbeddedEtcd
from tests.integration.store.store_harness import (
    BOUND_S,
    Connect,
    Member,
    Members,
    Relay,
    changes,
    eventually,
    host,
    host_key,
    new_cluster,
    paused,
    renewed,
    revive,
    snapshot,
    until,
    write,
    write_hosts,
)

pytestmark = pytest.mark.integration

A, B = host_key("a"), host_key("b")
Via = Callable[..., Store]


@pytest.fixture(scope="module")
def three(program: str) -> Iterator[Members]:
    """An etcd cluster of three members for the module."""
    with Members(program, 3) as running:
        yield running


@pytest.fixture
def members(three: Members) -> Iterator[Members]:
    """The module's cluster, whose members all run again after the test."""
    yield three
    for member in three.all:
        revive(member)
    for member in three.all:
        member.wait_until_healthy()


@pytest.fixture
async def via(members: Members) -> AsyncIterator[Via]:
    """Make stores of one fresh cluster name that try this member first."""
    cluster = new_cluster()
    async with AsyncExitStack() as stack:

        def make(first: Member, timeout_s: float = 2.0) -> Store:
            others = tuple(member.endpoint for member in members.all if member is not first)
            store = Store(EtcdOptions((first.endpoint, *others), timeout_s=timeout_s), cluster)
            stack.push_async_exit(store)
            return store

        yield make


@contextmanager
def bad_endpoint(kind: str) -> Iterator[str]:
    """An endpoint at which nobody listens, or one that accepts connections and never says a word."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        if kind == "mute":
            reserved.listen(64)
        yield f"127.0.0.1:{reserved.getsockname()[1]}"


async def goes_on(store: Store) -> None:
    """Check that a store reads, writes, follows and holds leases, whatever its first endpoint does."""
    assert await store.get(A) is None
    await eventually(lambda: write(store, Put(A, host(1))), "a write")
    async with aclosing(store.follow()) as batches:
        assert [entry.key for entry in (await snapshot(batches)).entries] == [A]
        lease = await eventually(lambda: store.leases.grant(4), "a lease")
        revision = await write(store, Put(B, host(2), lease.id))
        assert [entry.mod_revision for entry in await changes(batches, 1)] == [revision]
        await renewed(lease, 2)


@pytest.mark.parametrize("kind", ["closed", "mute"])
async def test_the_first_endpoint_is_bad(etcd: EmbeddedEtcd, connect: Connect, kind: str) -> None:
    """A first endpoint that nobody serves costs a write at most; reads do not notice."""
    with bad_endpoint(kind) as bad:
        store = connect(endpoints=(bad, etcd.endpoint), timeout_s=2.0)
        await goes_on(store)
        assert store.channel.endpoint == etcd.endpoint


@pytest.mark.parametrize("kind", ["closed", "mute"])
async def test_a_write_to_a_bad_endpoint(etcd: EmbeddedEtcd, connect: Connect, kind: str) -> None:
    """A write is not repeated by itself: the first fails, naming the endpoint, and the next goes to the other one."""
    with bad_endpoint(kind) as bad:
        store = connect(endpoints=(bad, etcd.endpoint), timeout_s=2.0)
        with pytest.raises(StoreUnavailableError, match=bad):
            await write(store, Put(A, host(1)))
        await write(store, Put(A, host(2)))


@pytest.mark.parametrize("kind", ["closed", "mute"])
async def test_a_follow_begins_at_a_bad_endpoint(etcd: EmbeddedEtcd, connect: Connect, kind: str) -> None:
    """A follow that begins at a bad endpoint, with no call before it, finds the good one."""
    with bad_endpoint(kind) as bad:
        store = connect(endpoints=(bad, etcd.endpoint))
        async with aclosing(store.follow()) as batches:
            assert (await snapshot(batches)).entries == ()


@pytest.mark.parametrize("kind", ["closed", "mute"])
async def test_all_endpoints_are_bad(kind: str) -> None:
    """When no endpoint serves, a read tries each of them and then says so, naming one."""
    with bad_endpoint(kind) as one, bad_endpoint(kind) as two:
        async with Store(EtcdOptions((one, two), timeout_s=0.5), new_cluster()) as store:
            with pytest.raises(StoreUnavailableError, match=f"{one}|{two}"):
                await store.get(A)


async def test_a_slow_connection(etcd: EmbeddedEtcd, connect: Connect) -> None:
    """An etcd that takes half a second to answer a connection is well within the timeout of a call."""
    async with Relay(etcd.port, delay_s=0.5) as relay:
        assert await connect(endpoints=(relay.endpoint,)).get(A) is None


async def test_all_connections_are_slow(etcd: EmbeddedEtcd, connect: Connect) -> None:
    """The same with two endpoints: trying them in turn gets somewhere."""
    async with Relay(etcd.port, delay_s=0.5) as one, Relay(etcd.port, delay_s=0.5) as two:
        store = connect(endpoints=(one.endpoint, two.endpoint))
        await eventually(lambda: store.get(A), "a read over slow connections", bound_s=10)


async def test_the_connection_comes_back(etcd: EmbeddedEtcd, connect: Connect) -> None:
    """With a single endpoint the store reconnects when it is there again."""
    async with Relay(etcd.port) as relay:
        store = connect(endpoints=(relay.endpoint,))
        await write(store, Put(A, host(1)))
        await relay.cut()
        with pytest.raises(StoreUnavailableError, match=relay.endpoint):
            await store.get(A)
        await relay.open()
        assert await eventually(lambda: store.get(A), "the connection is back") is not None


@pytest.mark.parametrize("role", ["follower", "leader"])
async def test_the_member_in_use_is_killed(members: Members, via: Via, role: str) -> None:
    """Calls, a follow and leases go on through another member: nothing missed, nothing doubled, no lease lost."""
    leader = await members.leader()
    victim = leader if role == "leader" else next(member for member in members.all if member is not leader)
    store = via(victim)
    async with aclosing(store.follow()) as batches:
        await snapshot(batches)
        lease = await store.leases.grant(12)
        due = await write_hosts(store, range(5))
        victim.kill()
        entry = await eventually(lambda: store.get(host_key("h4")), "a read")
        assert entry is not None
        assert entry.mod_revision == due[-1]
        due.append(await eventually(lambda: write(store, Put(A, host(1), lease.id)), "a write"))
        found = await changes(batches, 6)
        assert [entry.mod_revision for entry in found] == due
        await renewed(lease, 1)
        assert store.channel.endpoint != victim.endpoint


async def test_the_member_in_use_stops(members: Members, via: Via) -> None:
    """A member that is stopped keeps its connections open; calls and leases go on through another one all the same."""
    leader = await members.leader()
    victim = next(member for member in members.all if member is not leader)
    store = via(victim, timeout_s=2.0)
    lease = await store.leases.grant(8)
    await write(store, Put(A, host(1), lease.id))
    with paused(victim):
        assert await store.get(A) is not None
        await renewed(lease, 2)
    assert await store.get(A) is not None


@pytest.mark.parametrize("role", ["follower", "leader"])
async def test_a_member_falls_silent_just_before_renewals(members: Members, role: str) -> None:
    """The worst moment: a lease is renewed elsewhere in time, also if the leader is silent and all others wait for a new one.

    A renewal that a follower has passed on to it is never answered, and a call at the leader itself takes a whole timeout.
    """
    leader = await members.leader()
    follower, other = (member for member in members.all if member is not leader)
    victim, endpoints = (leader, (follower, leader, other)) if role == "leader" else (follower, (follower, other, leader))
    timing = Timing(timeout_s=2.0)
    options = EtcdOptions(tuple(member.endpoint for member in endpoints), timeout_s=timing.timeout_s)
    async with Store(options, new_cluster(), lineage=Lineage(None, timing.lease_ttl_s)) as store:
        lease = await store.leases.grant(timing.lease_ttl_s)
        await renewed(lease, 2)
        end, fence = lease.deadline, lease.deadline - timing.fence_margin_s
        await asyncio.sleep(lease.renew_at - boottime() - 0.05)
        with paused(victim):
            await until(lambda: lease.deadline > end or boottime() > fence, "a renewal, or the fence")
            assert lease.deadline > end, "a copy would have ended"


async def test_a_short_lease_while_the_stream_hangs(members: Members, via: Via) -> None:
    """A lease granted while the stream hangs on a stopped member is renewed in its own time, not in that of older leases."""
    leader = await members.leader()
    victim = next(member for member in members.all if member is not leader)
    store = via(victim, timeout_s=2.0)
    longer = await store.leases.grant(60)
    await renewed(longer, 1)
    with paused(victim):
        await store.get(A)  # moves to another member
        short = await store.leases.grant(6)
        await renewed(short, 2)
    assert not longer.lost.done()


async def test_all_members_pause(members: Members, via: Via) -> None:
    """Follows and leases survive a pause of all members in which calls try one endpoint after the other in vain."""
    store = via(members.all[0], timeout_s=0.2)
    async with aclosing(store.follow()) as batches:
        await snapshot(batches)
        waiting = asyncio.create_task(changes(batches, 1))
        lease = await eventually(lambda: store.leases.grant(30), "a lease within so short a timeout")
        await renewed(lease, 1)
        with paused(*members.all):
            for _ in range(3):
                with pytest.raises(StoreUnavailableError):
                    await store.get(A)
        writer = via(members.all[1])
        revision = await eventually(lambda: write(writer, Put(A, host(1))), "a write after the pause")
        async with asyncio.timeout(BOUND_S):
            assert [entry.mod_revision for entry in await waiting] == [revision]
        await renewed(lease, 1)
