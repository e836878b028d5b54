"""The loop around the planner: many plans at once, and what is looked at again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from etcdreplica.core.plan import PlannerSettings
from etcdreplica.core.view import ClusterView
from etcdreplica.daemon.replica_manager import ReplicaManager
from etcdreplica.model import Host, Program, Registration
from etcdreplica.store import Key, Keyspace, Kind, Put, Txn, TxnResult
from etcdreplica.store.election import Leadership
from etcdreplica.words import Style

pytestmark = pytest.mark.asyncio


class FakeStore:
    """Takes every transaction, and shows it to the view as a watch would."""

    def __init__(self, view: ClusterView) -> None:
        self.keys = Keyspace("test")
        self.view = view
        self.manager: ReplicaManager | None = None
        self.written: list[Txn] = []

    async def commit(self, txn: Txn) -> TxnResult:
        """Write it."""
        self.written.append(txn)
        await asyncio.sleep(0)
        revision = self.view.revision + 1
        touched = set[str]()
        for operation in txn.then:
            value = operation.value if isinstance(operation, Put) else None
            touched |= self.view.apply(operation.key.kind, operation.key.names, value, revision, revision)
        self.view.revision = revision
        assert self.manager is not None
        self.manager.touch(touched)
        return TxnResult(True, revision)


@contextlib.asynccontextmanager
async def managing(view: ClusterView) -> AsyncIterator[tuple[FakeStore, ReplicaManager]]:
    """Run a manager on a view."""
    store: Any = FakeStore(view)
    leadership: Any = Leadership(Key(Kind.LEADERS, ("manager", "1")), 1, None)  # type: ignore[arg-type]
    manager = store.manager = ReplicaManager(store, leadership, view, lambda: 100.0, PlannerSettings())
    task = asyncio.create_task(manager.run())
    yield store, manager
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def host(capacity: int) -> Host:
    """Return a host with room for so many."""
    return Host("10.0.0.1", 1, {}, capacity)


def register(view: ClusterView, count: int) -> None:
    """Register applications of two copies."""
    for number in range(count):
        view.revision += 1
        registration = Registration(f"app-{number}", Style.WARM, 2, Program(("app",), "/"))
        view.apply("registrations", (f"app-{number}",), registration, view.revision, view.revision)


async def settle() -> None:
    """Let the manager do all that it has to do."""
    for _ in range(300):
        await asyncio.sleep(0)


async def test_plans_of_one_moment_spread_over_the_hosts() -> None:
    """Each plan counts with those before it, although none of them is written yet: no host gets more than its share."""
    view = ClusterView(revision=10)
    for name in "abc":
        view.apply("hosts", (name,), host(20), 10, 10)
    register(view, 30)
    async with managing(view) as (_, manager):
        manager.touch(view.apps)
        await settle()
        assert view.seats == {"a": 20, "b": 20, "c": 20}


async def test_room_is_given_to_those_who_lack_a_seat() -> None:
    """Hosts that come are filled, and what finds no place is not written again for each of them."""
    view = ClusterView(revision=10)
    register(view, 10)
    async with managing(view) as (store, manager):
        manager.touch(view.apps)
        await settle()
        assert len(store.written) == 10
        for number, name in enumerate("abcd"):
            manager.touch(view.apply("hosts", (name,), host(3), 20 + number, 20 + number))
            await settle()
        assert view.seats == {"a": 3, "b": 3, "c": 3, "d": 3}
        assert not view.room
