"""Following a prefix of a real etcd: a snapshot, then every change once and in order, whatever happens to etcd meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from aetcd.rpc import rpc_pb2 as rpc

from etcdreplica.model import Replica, ReplicaState
from etcdreplica.store import Delete, Entry, Key, Kind, Put, Store
from etcdreplica.testing.etcd import EmbeddedEtcd
from etcdreplica.words import Role
from tests.integration.store.store_harness import (
    Connect,
    Relay,
    changes,
    eventually,
    host,
    host_key,
    metric,
    paused,
    snapshot,
    until,
    write,
    write_hosts,
)

pytestmark = pytest.mark.integration

A, B = host_key("a"), host_key("b")
REPLICA = Replica(1, 1, Role.PRIMARY, ReplicaState.RUNNING)


def revisions(entries: list[Entry]) -> list[int]:
    """Return the mod revision of each change."""
    return [entry.mod_revision for entry in entries]


async def compact(store: Store, revision: int) -> None:
    """Have etcd forget everything before a revision."""
    await store.channel.call("KV.Compact", rpc.CompactionRequest(revision=revision, physical=True))


async def test_snapshot_then_changes(store: Store) -> None:
    """First comes what is there, then puts, updates and deletions with their records and revisions."""
    first = await write(store, Put(A, host(1)))
    async with aclosing(store.follow(Kind.HOSTS)) as batches:
        start = await snapshot(batches)
        assert [(entry.key, entry.value, entry.mod_revision) for entry in start.entries] == [(A, host(1), first)]
        assert start.revision == first
        created = await write(store, Put(B, host(2)))
        updated = await write(store, Put(A, host(3)))
        deleted = await write(store, Delete(B))
        found = await changes(batches, 3)
    assert [(entry.key, entry.value, entry.mod_revision) for entry in found] == [
        (B, host(2), created),
        (A, host(3), updated),
        (B, None, deleted),
    ]
    assert [entry.create_revision for entry in found[:2]] == [created, first]


async def test_nothing_there_yet(store: Store) -> None:
    """Following an empty prefix begins with an empty snapshot."""
    async with aclosing(store.follow()) as batches:
        assert (await snapshot(batches)).entries == ()
        revision = await write(store, Put(A, host(1)))
        assert revisions(await changes(batches, 1)) == [revision]


async def test_one_transaction_is_one_batch(store: Store) -> None:
    """The changes of a transaction arrive together, in the transaction's order of keys."""
    await write(store, Put(A, host(1)))
    async with aclosing(store.follow()) as batches:
        await snapshot(batches)
        revision = await write(store, Delete(A), *(Put(host_key(f"h{number}"), host(number)) for number in range(50)))
        async with asyncio.timeout(20):
            batch = await anext(batches)
    assert batch.revision == revision
    assert {entry.key for entry in batch.entries} == {A, *(host_key(f"h{number}") for number in range(50))}


async def test_the_prefix_and_no_more(store: Store) -> None:
    """Following one application's replicas shows neither another application's nor another kind's keys."""
    mine = Key(Kind.REPLICAS, ("app", "a"))
    async with aclosing(store.follow(Kind.REPLICAS, "app")) as batches:
        await snapshot(batches)
        await write(store, Put(Key(Kind.REPLICAS, ("app2", "a")), REPLICA), Put(A, host(1)))
        revision = await write(store, Put(mine, REPLICA))
        found = await changes(batches, 1)
    assert [(entry.key, entry.mod_revision) for entry in found] == [(mine, revision)]


async def test_keys_of_a_lease_vanish(store: Store) -> None:
    """The end of a lease arrives as the deletion of its keys."""
    lease = await store.leases.grant(5)
    await write(store, Put(A, host(1), lease.id), Put(B, host(2), lease.id))
    async with aclosing(store.follow()) as batches:
        assert [entry.lease for entry in (await snapshot(batches)).entries] == [lease.id, lease.id]
        await store.leases.revoke(lease)
        assert {(entry.key, entry.value) for entry in await changes(batches, 2)} == {(A, None), (B, None)}


async def test_several_followers_see_the_same(connect: Connect) -> None:
    """Ten followers over three connections see three hundred concurrent writes, each once and in order."""
    stores = [connect() for _ in range(3)]
    async with aclosing(stores[0].follow()) as batches:
        await snapshot(batches)
        others = [stores[number % 3].follow(Kind.HOSTS) for number in range(9)]
        for other in others:
            await snapshot(other)
        written = await asyncio.gather(*(write_hosts(stores[n], range(n * 100, n * 100 + 100)) for n in range(3)))
        due = sorted(revision for each in written for revision in each)
        for each in (batches, *others):
            assert revisions(await changes(each, 300)) == due
        for other in others:
            await other.aclose()


async def test_etcd_is_killed_and_started_again(etcd: EmbeddedEtcd, store: Store) -> None:
    """A follow goes on where it was when etcd comes back on its data: nothing missed, nothing doubled, no snapshot."""
    async with aclosing(store.follow()) as batches:
        await snapshot(batches)
        before = await write_hosts(store, range(20))
        assert revisions(await changes(batches, 20)) == before
        unread = await write_hosts(store, range(20, 30))
        etcd.kill()
        waiting = asyncio.create_task(changes(batches, 20))
        etcd.start()
        after = [await eventually(lambda: write(store, Put(A, host(99))), "etcd is back")]
        after += await write_hosts(store, range(30, 39))
        assert revisions(await waiting) == [*unread, *after]


async def test_a_follow_begun_without_etcd(etcd: EmbeddedEtcd, store: Store) -> None:
    """A follow that begins while etcd is down waits for it."""
    revision = await write(store, Put(A, host(1)))
    assert etcd.process is not None
    etcd.process.terminate()  # not killed: etcd 3.5.0 to 3.5.2 may forget at SIGKILL what it has acknowledged
    etcd.process.wait()
    async with aclosing(store.follow()) as batches:
        waiting = asyncio.create_task(snapshot(batches))
        with pytest.raises(Exception, match="does not answer"):
            await store.get(A)
        assert not waiting.done()
        etcd.start()
        assert revisions(list((await waiting).entries)) == [revision]


async def test_etcd_pauses(etcd: EmbeddedEtcd, connect: Connect) -> None:
    """After SIGSTOP and SIGCONT of etcd a follow goes on: nothing missed, nothing doubled, no snapshot."""
    store = connect(timeout_s=0.5)
    async with aclosing(store.follow()) as batches:
        await snapshot(batches)
        before = await write_hosts(store, range(10))
        with paused(etcd), pytest.raises(Exception, match="does not answer"):
            await store.get(A)
        after = await write_hosts(store, range(10, 20))
        assert revisions(await changes(batches, 20)) == [*before, *after]


async def test_the_connection_is_cut(etcd: EmbeddedEtcd, connect: Connect) -> None:
    """What is written while a follower is cut off arrives afterwards, each change once, three times over."""
    direct = connect()
    async with Relay(etcd.port) as relay, aclosing(connect(endpoints=(relay.endpoint,)).follow()) as batches:
        await snapshot(batches)
        due: list[int] = []
        for cut in range(3):
            waiting = asyncio.create_task(changes(batches, 11))
            due = await write_hosts(direct, range(5))
            await relay.cut()
            due += await write_hosts(direct, range(5, 10))
            await relay.open()
            due += [await write(direct, Delete(host_key(f"h{cut}")))]
            assert revisions(await waiting) == due


async def test_compacted_while_cut_off(etcd: EmbeddedEtcd, connect: Connect) -> None:
    """When the changes a follower missed are gone it gets a snapshot, without what was deleted, and changes after that."""
    direct = connect()
    async with Relay(etcd.port) as relay, aclosing(connect(endpoints=(relay.endpoint,)).follow()) as batches:
        await write(direct, Put(A, host(1)))
        await snapshot(batches)
        await write(direct, Put(B, host(2)))
        await changes(batches, 1)
        await relay.cut()
        await write(direct, Delete(A))
        await write(direct, Put(B, host(3)))
        last = await write(direct, Put(host_key("c"), host(4)))
        await compact(direct, last)
        waiting = asyncio.create_task(snapshot(batches))
        await relay.open()
        again = await waiting
        assert [(entry.key, entry.value) for entry in again.entries] == [(B, host(3)), (host_key("c"), host(4))]
        assert again.revision >= last
        revision = await write(direct, Put(A, host(5)))
        assert revisions(await changes(batches, 1)) == [revision]


async def test_compacted_up_to_a_deletion_while_cut_off(etcd: EmbeddedEtcd, connect: Connect) -> None:
    """Etcd may say nothing of a deletion at the very revision it was compacted to; the follower learns of it all the same."""
    direct = connect()
    async with Relay(etcd.port) as relay, aclosing(connect(endpoints=(relay.endpoint,)).follow()) as batches:
        await write(direct, Put(A, host(1)), Put(B, host(2)))
        await snapshot(batches)
        await write(direct, Put(B, host(3)))
        await changes(batches, 1)
        await relay.cut()
        await compact(direct, await write(direct, Delete(A)))
        waiting = asyncio.create_task(snapshot(batches))
        await relay.open()
        assert [(entry.key, entry.value) for entry in (await waiting).entries] == [(B, host(3))]


async def test_a_compaction_up_to_what_was_seen(etcd: EmbeddedEtcd, connect: Connect) -> None:
    """A compaction of nothing that the follower still needs brings no snapshot."""
    direct = connect()
    async with Relay(etcd.port) as relay, aclosing(connect(endpoints=(relay.endpoint,)).follow()) as batches:
        await snapshot(batches)
        seen = await write_hosts(direct, range(5))
        assert revisions(await changes(batches, 5)) == seen
        await relay.cut()
        await compact(direct, seen[-1])
        due = await write_hosts(direct, range(5))
        waiting = asyncio.create_task(changes(batches, 5))
        await relay.open()
        assert revisions(await waiting) == due


async def test_leaving_ends_the_watch(etcd: EmbeddedEtcd, store: Store) -> None:
    """Closing a follow early, or cancelling the task that reads it, leaves no watch behind in etcd."""
    name = "etcd_debugging_mvcc_watcher_total"
    before = metric(etcd.endpoint, name)

    async def read() -> None:
        async with aclosing(store.follow()) as batches:
            async for _ in batches:
                pass

    for number in range(10):
        async with aclosing(store.follow()) as batches:
            await snapshot(batches)
            await write(store, Put(A, host(number)))
            await changes(batches, 1)
    readers = [asyncio.create_task(read()) for _ in range(5)]
    await until(lambda: metric(etcd.endpoint, name) >= before + 5, "five watches stand")
    for reader in readers:
        reader.cancel()
    await asyncio.wait(readers)
    assert all(reader.cancelled() for reader in readers)
    await until(lambda: metric(etcd.endpoint, name) <= before, "every watch has ended")
