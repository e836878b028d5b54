"""Which conditions and operations the transaction of each end has."""

from __future__ import annotations

import pytest
from attrs import evolve

from etcdreplica.daemon.report import report, withdrawal
from etcdreplica.model import Failure, FailureKind, InSync, Member, Placement, Succession
from etcdreplica.store import Delete, Exists, Held, Key, Kind, Put, Unchanged
from etcdreplica.words import Role

APP, HOST, NEXT, LEASE, REVISION = "app", "host-a", "host-b", 77, 1234
KEY = Key(Kind.REPLICAS, (APP, HOST))
PRIMARY = Placement(Role.PRIMARY, epoch=5, incarnation=9, session=3, successor=NEXT)
FAILURE = Failure(HOST, incarnation=9, epoch=5, role=Role.PRIMARY, kind=FailureKind.EXIT, reason="exited", by=HOST)
SAID = Put(Key(Kind.FAILURES, (APP, "9")), FAILURE)


def test_withdrawal() -> None:
    """The replica's key goes, if it is still ours; nothing else happens, and nothing instead."""
    txn = withdrawal(APP, HOST, LEASE)
    assert txn.when == (Held(KEY, LEASE),)
    assert txn.then == (Delete(KEY),)
    assert txn.otherwise == ()


def test_primary_with_successor() -> None:
    """One transaction says how it ended, and calls the successor with the next epoch."""
    txn = report(APP, FAILURE, PRIMARY, REVISION, LEASE)
    assert set(txn.when) == {
        Unchanged(Key(Kind.ASSIGNMENTS, (APP,)), REVISION),
        Exists(Key(Kind.REPLICAS, (APP, NEXT))),
        Held(KEY, LEASE),
    }
    called = Put(Key(Kind.SUCCESSIONS, (NEXT, APP)), Succession(epoch=6, incarnation=9))
    assert txn.then == (called, Delete(KEY), SAID)
    assert txn.otherwise == (SAID,)


@pytest.mark.parametrize(
    "placement",
    [evolve(PRIMARY, successor=None), evolve(PRIMARY, role=Role.BACKUP), evolve(PRIMARY, role=Role.BACKUP, successor=None)],
)
def test_whoever_has_nobody_to_call(placement: Placement) -> None:
    """A primary without a successor and every backup only say how they ended."""
    txn = report(APP, FAILURE, placement, REVISION, LEASE)
    assert txn.when == (Held(KEY, LEASE),)
    assert txn.then == (Delete(KEY), SAID)
    assert txn.otherwise == (SAID,)


def test_every_end_is_said_and_none_takes_away_another_lease_s_key() -> None:
    """A write that comes late, when a later incarnation shows itself, deletes nothing and still says how it ended."""
    for placement in (PRIMARY, evolve(PRIMARY, successor=None)):
        txn = report(APP, FAILURE, placement, REVISION, LEASE)
        assert Held(KEY, LEASE) in txn.when
        assert SAID in txn.then
        assert not any(isinstance(operation, Delete) for operation in txn.otherwise)
        assert not any(isinstance(operation, Put) and operation.key.kind is Kind.SUCCESSIONS for operation in txn.otherwise)


def test_successor_of_an_object_is_called_for_one_in_sync_set() -> None:
    """It is told the set, which must not have changed; that is a condition of the call, and of nothing else."""
    record = InSync(5, 9, (Member(HOST, 9), Member(NEXT, 8)))
    txn = report(APP, FAILURE, PRIMARY, REVISION, LEASE, (record, 99))
    unchanged = Unchanged(Key(Kind.IN_SYNC, (APP,)), 99)
    assert set(txn.when) == {*report(APP, FAILURE, PRIMARY, REVISION, LEASE).when, unchanged}
    assert txn.then[0] == Put(Key(Kind.SUCCESSIONS, (NEXT, APP)), Succession(6, 9, record, 99))
    assert report(APP, FAILURE, evolve(PRIMARY, successor=None), REVISION, LEASE, (record, 99)).when == (Held(KEY, LEASE),)
