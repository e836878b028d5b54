"""What a WatchDog writes when a replica has ended: one transaction, which also calls the successor.

The replica's key is only deleted while it is held by the lease it was written under: a write that etcd answers late must
not take away what a later incarnation shows.
"""

from __future__ import annotations

from etcdreplica.model import Failure, InSync, Placement, Succession
from etcdreplica.store import Delete, Exists, Held, Key, Kind, Put, Txn, Unchanged
from etcdreplica.words import Role


def withdrawal(app: str, host: str, lease: int) -> Txn:
    """Take the replica back, and say nothing: it was not wanted any more, or all has been said."""
    key = Key(Kind.REPLICAS, (app, host))
    return Txn((Held(key, lease),), (Delete(key),))


def report(
    app: str, failure: Failure, placement: Placement, revision: int, lease: int, in_sync: tuple[InSync, int] | None = None
) -> Txn:
    """Take the replica back, say how it ended, and call the successor.

    The successor is called only if it is there, `revision` is the newest assignment, and the in-sync set, given with its mod
    revision, has not changed; else a manager decides.
    """
    key = Key(Kind.REPLICAS, (app, failure.host))
    put = Put(Key(Kind.FAILURES, (app, str(failure.incarnation))), failure)
    if placement.successor is None or placement.role is not Role.PRIMARY:
        return Txn((Held(key, lease),), (Delete(key), put), (put,))
    record, at = in_sync or (None, 0)
    succession = Succession(placement.epoch + 1, placement.incarnation, record, at)
    newest = Unchanged(Key(Kind.ASSIGNMENTS, (app,)), revision)
    there = Exists(Key(Kind.REPLICAS, (app, placement.successor)))
    same = (Unchanged(Key(Kind.IN_SYNC, (app,)), at),) if record is not None else ()
    call = Put(Key(Kind.SUCCESSIONS, (placement.successor, app)), succession)
    return Txn((newest, there, *same, Held(key, lease)), (call, Delete(key), put), (put,))
