"""Reading and writing records in a real etcd: get, list, transactions, and values that cannot be read."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from etcdreplica import model
from etcdreplica.errors import CorruptValueError, StoreError, StoreUnavailableError
from etcdreplica.store import Corrupt, Delete, EtcdOptions, Exists, Key, Kind, Put, Store, Txn, Unchanged
from etcdreplica.words import Keep, Role, Style
from tests.integration.store.store_harness import Connect, changes, host, host_key, new_cluster, snapshot, write, write_raw

pytestmark = pytest.mark.integration

A, B, C = host_key("a"), host_key("b"), host_key("c")
SEAT, OTHER = model.Seat("a", 7, 9), model.Seat("b", 8, 10)
FAILURE = model.Failure(
    "a", 9, 3, Role.PRIMARY, model.FailureKind.EXIT, 'said "ß\n"', "a", uptime_s=1.5, detected_at=2.25, wall=0.1
)
PROGRAM = model.Program(("python", "app.py", "--name=ä b"), "/srv", {"PATH": "/bin"}, ("/srv/app.py",))
RECORDS: tuple[tuple[Kind, tuple[str, ...], Any], ...] = (
    (Kind.HOSTS, ("a",), model.Host("10.0.0.1", 7, {"zone": "z1"}, 3, "1.2", 1e9)),
    (
        Kind.REGISTRATIONS,
        ("app",),
        model.Registration(
            "app",
            Style.WARM,
            2,
            PROGRAM,
            ("a", "b"),
            {"disk": "ssd"},
            Keep.ALWAYS,
            0.5,
            {"b": model.Override(python="/usr/bin/python3", env={"X": "1"})},
            "a",
        ),
    ),
    (
        Kind.ASSIGNMENTS,
        ("app",),
        model.Assignment(
            2**53 + 1,
            9,
            5,
            model.AssignmentState.ACTIVE,
            SEAT,
            (model.Seat("b", 8, 10),),
            "b",
            True,
            False,
            "why",
            1,
            {"c": "no"},
            1e9,
            3,
            2,
            model.Seat("c", 8, 11),
        ),
    ),
    (Kind.PLACEMENTS, ("a", "app"), model.Placement(Role.BACKUP, 3, 9, 7, "b")),
    (Kind.SUCCESSIONS, ("a", "app"), model.Succession(4, 9)),
    (
        Kind.REPLICAS,
        ("app", "a"),
        model.Replica(
            9, 3, Role.PRIMARY, model.ReplicaState.RUNNING, 99, "tcp://a:1", decided_at=1.0, body_at=1.75, progress_at=2.5
        ),
    ),
    (Kind.FAILURES, ("app", "9"), FAILURE),
    (Kind.HISTORY, ("app", "9"), model.Event(FAILURE, 4, None, "replaced", 1e9)),
    (Kind.LEADERS, ("manager", "1f"), model.Leader("a", 7)),
    (Kind.PAUSES, ("app", "app"), model.Pause("ann@desk", "work on the roof", 1e9)),
    (Kind.CHECKPOINTS, ("app",), model.Checkpoint(4, 9, "0a" * 16, 1 << 40, ("a", "b"), 1e9)),
    (Kind.IN_SYNC, ("app",), model.InSync(4, 9, (model.Member("a", 9), model.Member("b", 1 << 53)))),
    (Kind.VOUCHERS, ("app",), model.Vouchers(4, 9, "a", 3, ("b", "c"))),
    (Kind.REQUESTS, ("app",), model.Request(model.Ask.SWITCHOVER, "ann@desk", 9, "b", 1e9)),
    (Kind.DRAINS, ("a",), model.Drain("ann@desk", "work on the roof", 1e9)),
    (Kind.ORIGIN, ("cluster",), model.Origin("1f", "1e", 1 << 53, "ann@a")),
    (Kind.SERVERS, ("a",), model.Server("10.0.0.1:7410", 7, "1.0", {"app": "4.9: its header is damaged"})),
)


def test_every_kind_has_a_sample() -> None:
    """A new kind of record must be added to the samples here."""
    assert {kind for kind, _, _ in RECORDS} == set(Kind)


@pytest.mark.parametrize(("kind", "names", "record"), RECORDS, ids=[kind for kind, _, _ in RECORDS])
async def test_a_record_comes_back_as_written(store: Store, kind: Kind, names: tuple[str, ...], record: Any) -> None:
    """What was put under a key is what get and list return, with the revisions of the write."""
    key = Key(kind, names)
    revision = await write(store, Put(key, record))
    entry = await store.get(key)
    assert entry is not None
    assert (entry.key, entry.value) == (key, record)
    assert type(entry.value) is type(record)
    assert (entry.mod_revision, entry.create_revision, entry.lease) == (revision, revision, 0)
    assert (await store.list(kind)).entries == (entry,)


async def test_get_of_nothing(store: Store) -> None:
    """A key that does not exist reads as None, and a cluster without keys lists as nothing at a revision."""
    assert await store.get(A) is None
    listed = await store.list()
    assert listed.entries == ()
    assert listed.revision > 0


async def test_an_update_keeps_the_create_revision(store: Store) -> None:
    """Writing again moves the mod revision only; deleting and writing again begins anew."""
    first = await write(store, Put(A, host(1)))
    second = await write(store, Put(A, host(2)))
    entry = await store.get(A)
    assert entry is not None
    assert (entry.create_revision, entry.mod_revision) == (first, second)
    await write(store, Delete(A))
    assert await store.get(A) is None
    third = await write(store, Put(A, host(3)))
    entry = await store.get(A)
    assert entry is not None
    assert (entry.create_revision, entry.mod_revision) == (third, third)


async def test_list_takes_whole_names_only(store: Store) -> None:
    """Listing `replicas/app` does not return those of `app2`, nor another kind's."""
    replica = model.Replica(1, 1, Role.PRIMARY, model.ReplicaState.RUNNING)
    mine = [Key(Kind.REPLICAS, ("app", name)) for name in ("a", "b")]
    others = [Key(Kind.REPLICAS, ("app2", "a")), Key(Kind.REPLICAS, ("ap", "a"))]
    revision = await write(store, *(Put(key, replica) for key in (*mine, *others)), Put(host_key("app"), host(1)))
    listed = await store.list(Kind.REPLICAS, "app")
    assert [entry.key for entry in listed.entries] == mine
    assert listed.revision >= revision
    assert {entry.key for entry in (await store.list(Kind.REPLICAS)).entries} == {*mine, *others}
    assert {entry.key for entry in (await store.list()).entries} == {*mine, *others, host_key("app")}


async def test_list_in_pages_is_of_one_revision(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written between two pages does not show."""
    monkeypatch.setattr("etcdreplica.store.store.PAGE", 2)
    keys = [host_key(name) for name in "abcde"]
    revision = await write(store, *(Put(key, host(1)) for key in keys))
    call, pages = store.channel.call, 0

    async def meddle(name: str, request: Any, **options: Any) -> Any:
        nonlocal pages
        answer = await call(name, request, **options)
        if name == "KV.Range":
            pages += 1
            await write(store, Delete(keys[-1]), Put(keys[2], host(9)))
        return answer

    monkeypatch.setattr(store.channel, "call", meddle)
    listed = await store.list(Kind.HOSTS)
    assert pages == 3
    assert listed.revision == revision
    assert [(entry.key, entry.value) for entry in listed.entries] == [(key, host(1)) for key in keys]


async def test_clusters_do_not_see_each_other(store: Store) -> None:
    """A cluster whose name begins with another's name shares nothing with it."""
    async with Store(store.channel.options, f"{store.keys.cluster}2") as other:
        await write(store, Put(A, host(1)))
        await write(other, Put(B, host(2)))
        assert [entry.key for entry in (await store.list()).entries] == [A]
        assert [entry.key for entry in (await other.list()).entries] == [B]


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        (lambda mod, create: Unchanged(A, mod), True),
        (lambda mod, create: Unchanged(A, create), False),
        (lambda mod, create: Unchanged(A, mod + 1), False),
        (lambda mod, create: Unchanged(A, 0), False),
        (lambda mod, create: Unchanged(B, 0), True),
        (lambda mod, create: Unchanged(B, mod), False),
        (lambda mod, create: Exists(A), True),
        (lambda mod, create: Exists(A, create), True),
        (lambda mod, create: Exists(A, mod), False),
        (lambda mod, create: Exists(B), False),
        (lambda mod, create: Exists(B, create), False),
        (lambda mod, create: Exists(B, 0), True),
    ],
    ids=[
        "unchanged",
        "changed-since",
        "unchanged-later",
        "absent-but-there",
        "absent",
        "unchanged-but-gone",
        "exists",
        "exists-created-then",
        "exists-created-at-mod",
        "exists-not",
        "exists-not-created-then",
        "created-at-0-is-absent",
    ],
)
async def test_conditions(store: Store, condition: Any, holds: bool) -> None:
    """A transaction does `then` if its condition holds of an updated A and an absent B, and `otherwise` if not."""
    create = await write(store, Put(A, host(1)))
    mod = await write(store, Put(A, host(2)))
    result = await store.commit(
        Txn(when=(condition(mod, create),), then=(Put(C, host(3)),), otherwise=(Put(C, host(4)), Delete(A)))
    )
    assert result.succeeded is holds
    assert result.revision == mod + 1
    entry = await store.get(C)
    assert entry is not None
    assert entry.value == host(3 if holds else 4)
    assert entry.mod_revision == result.revision
    assert ((await store.get(A)) is not None) is holds


async def test_one_false_condition_stops_all(store: Store) -> None:
    """Of several conditions every one must hold; otherwise nothing is written."""
    revision = await write(store, Put(A, host(1)))
    result = await store.commit(Txn(when=(Unchanged(A, revision), Exists(B)), then=(Put(A, host(2)), Put(C, host(3)))))
    assert not result.succeeded
    assert result.revision == revision
    assert [entry.value for entry in (await store.list()).entries] == [host(1)]


async def test_a_transaction_happens_at_one_revision(store: Store) -> None:
    """All puts and deletes of a transaction have the revision it returned."""
    await write(store, Put(A, host(1)))
    result = await store.commit(Txn(when=(), then=(Put(B, host(2)), Put(C, host(3)), Delete(A), Delete(host_key("none")))))
    listed = await store.list()
    assert [(entry.key, entry.mod_revision) for entry in listed.entries] == [(B, result.revision), (C, result.revision)]
    assert listed.revision == result.revision


async def test_of_concurrent_writers_one_wins(connect: Connect) -> None:
    """Of twenty writers that saw the same revision exactly one writes, and what stands is its value."""
    stores = [connect() for _ in range(4)]
    revision = await write(stores[0], Put(A, host(0)))
    results = await asyncio.gather(
        *(
            stores[number % 4].commit(Txn(when=(Unchanged(A, revision),), then=(Put(A, host(number)),)))
            for number in range(1, 21)
        )
    )
    winners = [number for number, result in enumerate(results, start=1) if result.succeeded]
    assert len(winners) == 1
    entry = await stores[0].get(A)
    assert entry is not None
    assert entry.value == host(winners[0])


async def test_a_record_written_again_is_another_one(store: Store) -> None:
    """`Exists` with a create revision does not hold for a key that was deleted and written again."""
    create = await write(store, Put(A, host(1)))
    await write(store, Delete(A))
    again = await write(store, Put(A, host(1)))
    assert not (await store.commit(Txn(when=(Exists(A, create),), then=(Put(B, host(2)),)))).succeeded
    assert (await store.commit(Txn(when=(Exists(A, again),), then=(Put(B, host(2)),)))).succeeded


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("hosts/a", b"{not json"),
        ("hosts/a", b""),
        ("hosts/a", b"\xff\xfe"),
        ("hosts/a", b'{"address": "x", "pid": "seven"}'),
        ("hosts/a", b'{"address": "\xff", "pid": 7}'),
        ("hosts/a", b'{"pid": 7}'),
        ("hosts/a", b"null"),
        ("registrations/a", b'{"name":"a","style":"lukewarm","degree":1,"program":{"argv":[],"cwd":"/"}}'),
        ("registrations/a", b'{"name":"a","style":"cold","degree":0,"program":{"argv":[],"cwd":"/"}}'),
        ("registrations/a", b'{"name":"a b","style":"cold","degree":1,"program":{"argv":[],"cwd":"/"}}'),
        ("registrations/a", b'{"name":"a","style":"cold","degree":1,"program":{"argv":[],"cwd":"/"},"hosts":["-"]}'),
    ],
    ids=["no-json", "empty", "binary", "type", "utf8", "missing", "null", "style", "degree", "name", "host"],
)
async def test_a_corrupt_value(store: Store, path: str, value: bytes) -> None:
    """A value that is not its key's record arrives as `Corrupt` in list and follow, and raises in get, naming the key."""
    kind = Kind(path.partition("/")[0])
    key = Key(kind, ("a",))
    async with aclosing(store.follow()) as batches:
        await snapshot(batches)
        revision = await write_raw(store, path, value)
        await write(store, Put(host_key("good"), host(1)))
        followed = await changes(batches, 2)
    listed = {entry.key: entry for entry in (await store.list()).entries}
    for entry in (followed[0], listed[key]):
        assert (entry.key, entry.mod_revision) == (key, revision)
        assert isinstance(entry.value, Corrupt)
        assert path in entry.value.error
    for entry in (followed[1], listed[host_key("good")]):
        assert entry.value == host(1)
    with pytest.raises(CorruptValueError, match=path):
        await store.get(key)


async def test_a_corrupt_value_is_repaired_or_removed(store: Store) -> None:
    """A good value over a corrupt one is read again, and deleting a corrupt one is an ordinary deletion."""
    async with aclosing(store.follow(Kind.HOSTS)) as batches:
        await write_raw(store, "hosts/a", b"?")
        await write_raw(store, "hosts/b", b"?")
        assert all(isinstance(entry.value, Corrupt) for entry in (await snapshot(batches)).entries)
        await write(store, Put(A, host(1)))
        await write(store, Delete(B))
        assert [(entry.key, entry.value) for entry in await changes(batches, 2)] == [(A, host(1)), (B, None)]
    entry = await store.get(A)
    assert entry is not None
    assert entry.value == host(1)


async def test_fields_of_a_later_version_are_ignored(store: Store) -> None:
    """A record with fields this version does not know is still read."""
    await write_raw(store, "hosts/a", b'{"address": "10.0.0.1", "pid": 1, "colour": ["red"]}')
    entry = await store.get(A)
    assert entry is not None
    assert entry.value == host(1)


@pytest.mark.parametrize("path", ["schema", "locks/a", "locks/a/b", b"\xff\xfe/a", "hosts2/a", "Hosts/a"])
async def test_an_unknown_key_is_ignored(store: Store, path: str | bytes) -> None:
    """Keys under the prefix that no version of this package wrote disturb neither list nor follow."""
    await write_raw(store, path, b"{}")
    assert (await store.list()).entries == ()
    async with aclosing(store.follow()) as batches:
        assert (await snapshot(batches)).entries == ()
        await write_raw(store, path, b"[]")
        await write(store, Put(A, host(1)))
        while not (found := (await anext(batches)).entries):
            pass
        assert [entry.key for entry in found] == [A]


@pytest.mark.parametrize("path", ["hosts/", "hosts/a/b", "replicas/app", "replicas/app/", "replicas/app/a/b", "leaders/x"])
async def test_a_known_kind_with_a_wrong_shape_is_ignored(store: Store, path: str) -> None:
    """A key of a known kind with too few, too many or empty names is one that no version of this package wrote."""
    await write_raw(store, path, b"{}")
    await write(store, Put(A, host(1)))
    assert [entry.key for entry in (await store.list()).entries] == [A]


async def test_a_put_under_an_unknown_lease(store: Store) -> None:
    """Etcd's refusal of a lease arrives in its own words, is not taken for an outage, and writes nothing."""
    with pytest.raises(StoreError, match="lease not found") as caught:
        await write(store, Put(A, host(1), lease=12345))
    assert not isinstance(caught.value, StoreUnavailableError)
    assert await store.get(A) is None


@pytest.mark.parametrize("size", [1_600_000, 4_000_000])
async def test_a_value_too_large(store: Store, size: int) -> None:
    """A value beyond etcd's limit is refused, is not taken for an outage, and writes nothing."""
    with pytest.raises(StoreError, match="larg") as caught:
        await write(store, Put(A, model.Host("x" * size, 1)))
    assert not isinstance(caught.value, StoreUnavailableError)
    assert await store.get(A) is None


async def test_many_calls_at_once(store: Store) -> None:
    """Two hundred writes and reads at once all arrive."""
    keys = [host_key(f"h{number}") for number in range(200)]
    revisions = await asyncio.gather(*(write(store, Put(key, host(number))) for number, key in enumerate(keys)))
    assert len(set(revisions)) == 200
    entries = await asyncio.gather(*(store.get(key) for key in keys))
    assert [entry and entry.value for entry in entries] == [host(number) for number in range(200)]


async def test_nobody_listening() -> None:
    """A read and a write without etcd raise StoreUnavailableError, which names the endpoint."""
    with_port = EtcdOptions(("127.0.0.1:1",))
    async with Store(with_port, new_cluster()) as store:
        with pytest.raises(StoreUnavailableError, match=r"127\.0\.0\.1:1 "):
            await store.get(A)
        with pytest.raises(StoreUnavailableError, match=r"127\.0\.0\.1:1 "):
            await write(store, Put(A, host(1)))
        with pytest.raises(StoreUnavailableError, match=r"127\.0\.0\.1:1 "):
            await store.leases.grant(5)
