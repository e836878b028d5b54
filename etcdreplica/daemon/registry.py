"""Registering an application: checked against the cluster, then written if nobody was faster."""

from __future__ import annotations

import asyncio
import contextlib

from attrs import evolve

from etcdreplica.daemon.waiting import insist
from etcdreplica.errors import CorruptValueError, RefusedError, StoreError
from etcdreplica.model import Assignment, AssignmentState, Registration, Replica, ReplicaState
from etcdreplica.store import Corrupt, Delete, Key, Kind, Put, Store, Txn, Unchanged
from etcdreplica.words import Role


async def register(store: Store, registration: Registration, here: str | None) -> int:
    """Write a registration, and return its revision; `here`: the host whose process wants to be its first primary.

    Of a plain program the same registration may come again. Raises RefusedError, with nothing changed, or StoreError.
    """
    name = registration.name
    await _check_hosts(store, registration, here)
    key = Key(Kind.REGISTRATIONS, (name,))
    existing = await store.get(key)
    assigned = await store.get(Key(Kind.ASSIGNMENTS, (name,)))
    assignment: Assignment | None = assigned.value if assigned else None
    if assignment and (assignment.state is AssignmentState.REMOVING or not existing):
        raise RefusedError(f"{name} is just being removed: try again in a moment")
    if existing and assignment and assignment.state is AssignmentState.FAILED:
        raise RefusedError(
            f"{name} is parked ({assignment.reason}): 'etcdreplica resume {name}' has its hosts start it again, 'etcdreplica "
            f"remove {name}' makes room for another registration"
        )
    if existing and assignment and assignment.state is AssignmentState.STOPPED:
        raise RefusedError(
            f"{name} is registered and was {assignment.reason}: 'etcdreplica resume {name}' has its hosts start it again, "
            f"'etcdreplica remove {name}' makes room for another registration"
        )
    if existing and registration.plain and evolve(existing.value, origin=registration.origin) == registration:
        return existing.mod_revision
    if existing and (assignment is None or assignment.state is not AssignmentState.COMPLETED):
        raise RefusedError(_duplicate(registration, existing.value, assignment))
    result = await store.commit(Txn((Unchanged(key, existing.mod_revision if existing else 0),), (Put(key, registration),)))
    if not result.succeeded:
        raise RefusedError(f"another process has just registered {name}: see 'etcdreplica status {name}'")
    return result.revision


async def await_primary(store: Store, app: str, limit_s: float) -> tuple[str, int]:
    """Return host and epoch of an application's primary once it runs. Raises RefusedError when none does within this time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s), contextlib.aclosing(store.follow(Kind.REPLICAS, app)) as batches:
            async for batch in batches:
                for entry in batch.entries:
                    found = entry.value
                    if isinstance(found, Replica) and (found.role, found.state) == (Role.PRIMARY, ReplicaState.RUNNING):
                        return entry.key.names[1], found.epoch
    assigned = await store.get(Key(Kind.ASSIGNMENTS, (app,)))
    refusals = [f"{host}: {why}" for host, why in assigned.value.refusals.items()] if assigned else []
    reason = "; ".join(filter(None, [assigned.value.reason, *refusals])) if assigned else "no manager has looked at it yet"
    raise RefusedError(
        f"{app} is registered, but has no running primary after {limit_s:g} s ({reason or 'it starts'}): see "
        f"'etcdreplica describe {app}'"
    )


async def read_registration(store: Store, app: str) -> Registration:
    """Read one, however long etcd is away. Raises RefusedError when it is corrupt or gone."""
    key = Key(Kind.REGISTRATIONS, (app,))
    try:
        entry = await insist(f"reading {key}", lambda: store.get(key))
    except CorruptValueError as error:
        raise RefusedError(str(error)) from None
    if entry is None:
        raise RefusedError("its registration is gone")
    return entry.value  # type: ignore[no-any-return]


async def unregister(store: Store, name: str, revision: int) -> None:
    """Take back a registration that no manager has acted on yet."""
    key = Key(Kind.REGISTRATIONS, (name,))
    unseen = (Unchanged(Key(Kind.ASSIGNMENTS, (name,)), 0), Unchanged(key, revision))
    with contextlib.suppress(StoreError):
        await store.commit(Txn(unseen, (Delete(key),)))


def _duplicate(new: Registration, old: Registration, assignment: Assignment | None) -> str:
    differences = old.differences(new)
    if differences or new.plain:
        how = "; ".join(differences) or "its environment"
        changed = "change it with 'etcdreplica apply'" if new.plain else "give this application another name"
        remove = f"first run 'etcdreplica remove {new.name}'"
        return f"{new.name} is registered already, and differently ({how}): {changed}, or {remove}"
    where = f"its primary is on {assignment.primary.host}" if assignment and assignment.primary else "it has no primary yet"
    return (
        f"{new.name} is protected and running already ({where}): this copy was not started; see 'etcdreplica status {new.name}'"
    )


async def _check_hosts(store: Store, registration: Registration, here: str | None) -> None:
    if not registration.hosts:
        return
    snapshot = await store.list(Kind.HOSTS)
    up = sorted(entry.key.names[0] for entry in snapshot.entries if not isinstance(entry.value, Corrupt))
    unknown = [host for host in registration.hosts if host not in up]
    if unknown:
        raise RefusedError(
            f"no such host is up: {', '.join(unknown)} (up are: {', '.join(up)}): start 'etcdreplica node' there, or correct "
            f"hosts= of {registration.name}"
        )
    if here is not None and here not in registration.hosts:
        raise RefusedError(f"this host, {here}, is not among hosts={list(registration.hosts)} of {registration.name}")
