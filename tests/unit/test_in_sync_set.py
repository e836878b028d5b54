"""The in-sync set as one run keeps it: what is written under which conditions, what is remembered, and what is answered."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from attrs import evolve

from etcdreplica.daemon.objects import InSyncSet
from etcdreplica.errors import ProtocolError, StoreDeniedError, StoreUnavailableError, UsageError
from etcdreplica.model import InSync, Member, Placement, Succession
from etcdreplica.store import Entry, Key, Kind, Put, Txn, TxnResult, Unchanged
from etcdreplica.words import Role

APP, HERE = "shop", "a"
RECORD = Key(Kind.IN_SYNC, (APP,))
PLACED = Key(Kind.PLACEMENTS, (HERE, APP))
CALLED = Key(Kind.SUCCESSIONS, ("b", APP))
PRIMARY = Placement(Role.PRIMARY, epoch=50, incarnation=9, session=3, successor="b", born=40)
BOTH = [["a", 9], ["b", 8]]
LIMIT_S = 5.0


class Etcd:
    """Records by key, and transactions with one kind of condition. `gate` holds them up."""

    def __init__(self) -> None:
        self.revision = 100
        self.values: dict[Key, tuple[Any, int]] = {}
        self.sent: list[Txn] = []
        self.lost: Exception | None = None  # raised after a transaction, in the place of its answer
        self.away: Exception | None = None  # raised in the place of a read
        self.gate = asyncio.Event()
        self.gate.set()

    def put(self, key: Key, value: Any) -> int:
        """Write."""
        self.revision += 1
        self.values[key] = value, self.revision
        return self.revision

    async def get(self, key: Key) -> Entry | None:
        """Read."""
        if self.away:
            raise self.away
        return Entry(key, *self.values[key]) if key in self.values else None

    async def commit(self, txn: Txn) -> TxnResult:
        """Write if all is as it should be."""
        self.sent.append(txn)
        await self.gate.wait()
        conditions = [condition for condition in txn.when if isinstance(condition, Unchanged)]
        holds = all(self.values.get(c.key, (None, 0))[1] == c.mod_revision for c in conditions)
        for operation in txn.then if holds else ():
            assert isinstance(operation, Put)
            self.put(operation.key, operation.value)
        if self.lost:
            raise self.lost
        return TxnResult(holds, self.revision)


class Side:
    """The WatchDog's side of one run, and what its process is told."""

    def __init__(self) -> None:
        self.etcd = Etcd()
        self.told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.placement = PRIMARY
        self.revision = self.etcd.put(PLACED, PRIMARY)
        store: Any = self.etcd
        self.set = InSyncSet(store, APP, HERE, lambda: (self.placement, self.revision))

    def send(self, kind: str, **fields: Any) -> None:
        """Be told, as the process's connection."""
        self.told.put_nowait({"type": kind, **fields})

    def say(self, kind: str, **fields: Any) -> bool:
        """Have the process say something."""
        connection: Any = self
        return self.set.take({"type": kind, **fields}, connection)

    async def answer(self) -> dict[str, Any]:
        """Return the next answer."""
        async with asyncio.timeout(LIMIT_S):
            return await self.told.get()

    async def change(self, revision: int, members: list[list[Any]] = BOTH) -> dict[str, Any]:
        """Have the set changed, and return the answer."""
        self.say("change", question=2, revision=revision, members=members)
        return await self.answer()

    async def ask(self) -> dict[str, Any]:
        """Ask for the set, and return the answer."""
        self.say("members", question=1)
        return await self.answer()

    @property
    def callable(self) -> int:
        """At which revision of the set the successor would be called; 0 for not at all."""
        placement, record = self.set.succession(self.placement)
        assert bool(record) is (placement.successor is not None)
        return record[1] if record else 0


@pytest.fixture
async def side() -> Side:
    """A primary, of whose set nothing is known."""
    return Side()


# --- asking ----------------------------------------------------------------------------------------------------------


async def test_no_set(side: Side) -> None:
    """All is 0 and empty, and nobody may be called."""
    assert await side.ask() == {"type": "members", "question": 1, "revision": 0, "epoch": 0, "primary": 0, "members": []}
    assert side.callable == 0


async def test_what_is_read_is_remembered(side: Side) -> None:
    """So that a successor in the set can be called without reading anything."""
    revision = side.etcd.put(RECORD, InSync(49, 7, (Member("a", 9), Member("b", 8))))
    told = {"revision": revision, "epoch": 49, "primary": 7, "members": BOTH}
    assert side.callable == 0
    assert await side.ask() == {"type": "members", "question": 1, **told}
    assert side.callable == revision


async def test_who_is_not_in_the_set_is_not_called(side: Side) -> None:
    """Nor is anybody if there is no successor."""
    side.etcd.put(RECORD, InSync(50, 9, (Member("a", 9), Member("c", 7))))
    await side.ask()
    assert side.callable == 0
    side.placement = evolve(PRIMARY, successor=None)
    assert side.callable == 0


async def test_set_of_an_earlier_application_is_none_and_is_replaced(side: Side) -> None:
    """Whether or not the primary has asked before."""
    side.etcd.put(RECORD, InSync(39, 2, (Member("b", 1),)))
    done = await side.change(0)
    assert done["revision"] == side.etcd.revision
    side.etcd.put(RECORD, InSync(39, 2, (Member("b", 1),)))
    assert (await side.ask())["revision"] == 0
    assert (await side.change(0))["revision"] == side.etcd.revision == side.callable


async def test_called_with_the_set(side: Side) -> None:
    """It is told and remembered without a read."""
    record = InSync(49, 7, (Member("a", 9), Member("b", 8)))
    connection: Any = side
    side.etcd.away = StoreUnavailableError("no answer")
    side.set.called(Succession(50, 7, record, 99), connection)
    told = {"revision": 99, "epoch": 49, "primary": 7, "members": BOTH}
    assert await side.answer() == {"type": "members", "question": 0, **told}
    assert side.callable == 99
    side.set.called(Succession(50, 7, record, 99), None)  # its process is not there just now, and will ask
    assert side.told.empty()


async def test_called_without_a_set(side: Side) -> None:
    """By a WatchDog of an earlier version, which does not send it: it is read."""
    revision = side.etcd.put(RECORD, InSync(49, 7, (Member("a", 9),)))
    connection: Any = side
    side.set.called(Succession(50, 7), connection)
    assert side.told.empty()
    assert (await side.ask())["revision"] == revision


async def test_etcd_that_does_not_answer(side: Side) -> None:
    """The process is told, and may ask again."""
    side.etcd.away = StoreUnavailableError("no answer")
    assert await side.ask() == {"type": "members", "question": 1, "error": "no answer"}


# --- changing --------------------------------------------------------------------------------------------------------


async def test_first_set(side: Side) -> None:
    """It is written if there is none, if the placement is the same, and if no successor was called; then it is remembered."""
    done = await side.change(0)
    assert done == {"type": "changed", "question": 2, "revision": side.etcd.revision}
    (txn,) = side.etcd.sent
    assert set(txn.when) == {Unchanged(RECORD, 0), Unchanged(PLACED, side.revision), Unchanged(CALLED, 0)}
    assert txn.then == (Put(RECORD, InSync(50, 9, (Member("a", 9), Member("b", 8)))),)
    assert side.callable == done["revision"]
    assert (await side.change(done["revision"], [["a", 9]]))["revision"] > done["revision"]
    assert side.callable == 0


async def test_set_that_has_changed_is_not_replaced(side: Side) -> None:
    """It is remembered as it stands."""
    revision = side.etcd.put(RECORD, InSync(50, 9, (Member("b", 8),)))
    answer = await side.change(revision - 1)
    assert (answer["unknown"], "has changed meanwhile" in answer["error"]) == (False, True)
    assert side.callable == revision


async def test_only_a_primary_changes_the_set(side: Side) -> None:
    """A backup's word is not even sent."""
    side.placement = evolve(PRIMARY, role=Role.BACKUP)
    assert (await side.change(0))["error"] == "a is not the primary"
    assert side.etcd.sent == []


async def test_placement_that_was_written_anew_is_not_in_the_way(side: Side) -> None:
    """The manager does that after each promotion: the change is made under the newer one, once it is known."""
    newer = evolve(PRIMARY, successor=None)
    written = side.etcd.put(PLACED, newer)
    side.say("change", question=2, revision=0, members=BOTH)
    for _ in range(10):
        await asyncio.sleep(0)
    assert side.told.empty()
    side.placement, side.revision = newer, written
    side.set.placed()
    assert (await side.answer())["revision"] == side.etcd.revision


async def test_primary_that_was_deposed_changes_nothing(side: Side) -> None:
    """Its placement is gone for good."""
    side.etcd.put(PLACED, evolve(PRIMARY, epoch=51, role=Role.BACKUP))
    answer = await side.change(0)
    assert (answer["unknown"], "placement of this primary has changed" in answer["error"]) == (False, True)
    assert RECORD not in side.etcd.values


async def test_once_a_successor_was_called_nothing_is_changed(side: Side) -> None:
    """Else it could be taken out of the set after it has begun to lead."""
    revision = (await side.change(0))["revision"]
    side.etcd.put(CALLED, Succession(51, 9))
    assert "error" in await side.change(revision, [["a", 9]])
    assert side.etcd.values[RECORD][1] == revision


async def test_while_it_changes_nothing_is_remembered_and_nothing_else_changed(side: Side) -> None:
    """Also not by what the process asks meanwhile."""
    revision = (await side.change(0))["revision"]
    side.etcd.gate.clear()
    side.say("change", question=3, revision=revision, members=BOTH)
    assert side.callable == 0
    assert (await side.ask())["revision"] == revision
    assert side.callable == 0
    other = await side.change(revision)
    assert (other["error"], other["unknown"]) == ("another change is under way", True)
    side.etcd.gate.set()
    assert (await side.answer())["revision"] == side.callable


@pytest.mark.parametrize(("lost", "unknown"), [(StoreUnavailableError("lost"), True), (StoreDeniedError("denied"), False)])
async def test_lost_answer(side: Side, lost: Exception, unknown: bool) -> None:
    """It may have happened, so nobody is called until the process has asked."""
    side.etcd.lost = lost
    answer = await side.change(0)
    assert (answer["error"], answer["unknown"]) == (str(lost), unknown)
    if unknown:
        assert side.callable == 0
        assert (await side.ask())["revision"] == side.callable == side.etcd.revision


async def test_read_that_fails_after_a_refusal_makes_nothing_unknown(side: Side) -> None:
    """The condition did not hold: that is known."""
    side.etcd.put(RECORD, InSync(50, 9, ()))
    side.etcd.away = StoreUnavailableError("no answer")
    answer = await side.change(7)
    assert (answer["unknown"], "a condition of the write failed" in answer["error"]) == (False, True)
    assert side.callable == 0


# --- nonsense --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "members", [None, "ab", {}, [["a", 1]] * 31, [["a/b", 1]], [["a", -1]], [["a", True]], [["a"]], [[]], [7], [["a", 1, 2]]]
)
async def test_what_is_no_set_is_refused(side: Side, members: Any) -> None:
    """With errors that end the connection, and nothing is sent."""
    with pytest.raises((ProtocolError, UsageError, ValueError, TypeError)):
        side.say("change", question=1, revision=0, members=members)
    with pytest.raises((KeyError, UsageError)):
        side.say("change", question=1, members=[])
    with pytest.raises(UsageError):
        side.say("members", question="first")
    assert not side.say("nonsense")
    assert side.etcd.sent == []
    assert (await side.change(0))["revision"] > 0
