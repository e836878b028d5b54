"""The ReplicaManager: compares what is desired with what is observed, and writes the next assignment.

Each write is one transaction, conditional on still being the elected manager and on the assignment it was planned from
(and on no successor having been called meanwhile, on no pause having begun or ended, and for a replicated object on the
same in-sync set). So it never matters how stale the view was: a stale plan fails.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator
from heapq import heappop, heappush

from attrs import evolve

from etcdreplica.clock import Clock
from etcdreplica.core.failsafe import in_doubt
from etcdreplica.core.plan import HISTORY_KEPT, Memory, Plan, PlannerSettings
from etcdreplica.core.planner import decide
from etcdreplica.core.view import AppView, ClusterView
from etcdreplica.errors import StoreError
from etcdreplica.model import Assignment
from etcdreplica.store import Delete, Key, Kind, Put, Store, Txn, Unchanged
from etcdreplica.store.election import Leadership
from etcdreplica.store.txn import Condition, Operation

log = logging.getLogger(__name__)

RETRY_S = 0.1
WRITES_AT_ONCE = 64
PLANS_AT_ONCE = 50


class ReplicaManager:
    """Plans and writes for one term of office. `touch` says which applications may have changed."""

    def __init__(
        self, store: Store, leadership: Leadership, view: ClusterView, clock: Clock, settings: PlannerSettings
    ) -> None:
        self._store = store
        self._leadership = leadership
        self._view = view
        self._clock = clock
        self._settings = settings
        self._memory: dict[str, Memory] = {}
        self._dirty: set[str] = set()
        self._wake = asyncio.Event()
        self._wake_at: dict[str, float] = {}
        self._timers: list[tuple[float, str]] = []  # a heap of these, and of some that are no longer valid
        self._offers = 0
        self._writing: set[str] = set()
        self._written: dict[str, int] = {}  # the view must have caught up with our own write before the next plan
        self._slots = asyncio.Semaphore(WRITES_AT_ONCE)
        self._cluster_pause = Key(Kind.PAUSES, ("cluster", store.keys.cluster))

    def touch(self, apps: Iterable[str]) -> None:
        """Look at these applications soon."""
        self._dirty.update(apps)
        self._wake.set()

    async def run(self) -> None:
        """Plan until cancelled."""
        async with asyncio.TaskGroup() as writes:
            while True:
                await self._until_due()
                self._wake.clear()
                for number, name in enumerate(self._due()):
                    self._act(name, writes)
                    if number % PLANS_AT_ONCE == PLANS_AT_ONCE - 1:
                        await asyncio.sleep(0)  # renewals and changes do not wait for a thousand plans

    def _due(self) -> Iterator[str]:
        """Yield what is to be looked at: what was touched, what has waited for long enough, and what may find a seat now."""
        due, self._dirty, now = self._dirty, set(), self._clock()
        while self._timers and self._timers[0][0] <= now:
            at, name = heappop(self._timers)
            if self._wake_at.get(name) == at:
                due.add(name)
        yield from sorted(due)
        if self._offers != self._view.offers:
            self._offers = self._view.offers
            for name in sorted(self._view.seatless):
                if not self._view.room:
                    return
                yield name

    def _act(self, name: str, writes: asyncio.TaskGroup) -> None:
        plan = self._plan(name, self._clock())
        if plan is not None:
            app = self._view.app(name)
            txn, before = self._transaction(app, plan), app.assignment
            self._view.expect(app, plan.assignment or before)  # now, so that the next plan knows who has what
            self._writing.add(name)
            writes.create_task(self._write(app, before, txn))

    async def _until_due(self) -> None:
        next_at = self._timers[0][0] if self._timers else None
        if self._offers != self._view.offers:
            return
        try:
            async with asyncio.timeout(None if next_at is None else max(0.0, next_at - self._clock())):
                await self._wake.wait()
        except TimeoutError:
            return

    def _plan(self, name: str, now: float) -> Plan | None:
        known = self._wake_at.pop(name, None)
        app = self._view.apps.get(name)
        if app is None:
            self._memory.pop(name, None)
            self._written.pop(name, None)
            return None
        if name in self._writing or self._view.revision < self._written.get(name, 0):
            return None  # touched again when that is over
        decision = decide(app, self._view, self._memory.setdefault(name, Memory()), now, self._settings)
        if decision.wake_at is not None:
            self._wake_at[name] = decision.wake_at
            if decision.wake_at != known or known <= now:
                heappush(self._timers, (decision.wake_at, name))
        return decision.plan

    def _transaction(self, app: AppView, plan: Plan) -> Txn:
        old, new = app.assignment, plan.assignment
        key = Key(Kind.ASSIGNMENTS, (app.name,))
        conditions: list[Condition] = [self._leadership.condition, Unchanged(key, app.assignment_revision)]
        if old is not None and old.successor is not None:
            called = Key(Kind.SUCCESSIONS, (old.successor, app.name))
            conditions.append(Unchanged(called, app.successions.get(old.successor, (0, 0))[1]))
        conditions.append(Unchanged(Key(Kind.PAUSES, ("app", app.name)), app.pause_revision))
        conditions.append(Unchanged(self._cluster_pause, self._view.pause_revision))
        if app.registration is not None and app.registration.object:  # who may lead depends on it
            conditions.append(Unchanged(Key(Kind.IN_SYNC, (app.name,)), app.in_sync_revision))
        if app.vouchers_revision or (app.registration is not None and app.registration.failsafe):
            conditions.append(Unchanged(Key(Kind.VOUCHERS, (app.name,)), app.vouchers_revision))
        kept = [seat.incarnation for seat in new.seats if seat.incarnation not in app.failures] if new else []
        conditions += [Unchanged(Key(Kind.FAILURES, (app.name, str(number))), 0) for number in kept]  # none failed meanwhile
        left = [seat for seat in old.seats if new is None or seat not in new.seats] if old else []
        unseen = [seat.host for seat in left if seat.incarnation not in app.failures and seat.host not in app.replicas]
        conditions += [Unchanged(Key(Kind.REPLICAS, (app.name, host)), 0) for host in unseen]  # nor has it begun at last
        return Txn(tuple(conditions), tuple(self._operations(app, plan, old, new)))

    def _operations(self, app: AppView, plan: Plan, old: Assignment | None, new: Assignment | None) -> Iterable[Operation]:
        key = Key(Kind.ASSIGNMENTS, (app.name,))
        yield Delete(key) if new is None else Put(key, evolve(new, changed_wall=time.time()))
        seats = {seat.host: seat for seat in new.seats} if new else {}
        for seat in old.seats if old else ():
            if seat.host not in seats:
                yield Delete(Key(Kind.PLACEMENTS, (seat.host, app.name)))
        for seat in seats.values():
            assert new is not None
            if seat.incarnation in app.failures:
                continue  # it has ended, and a pause keeps its seat: nothing may start it again
            yield Put(Key(Kind.PLACEMENTS, (seat.host, app.name)), new.placement(seat))
        for host in app.successions:
            yield Delete(Key(Kind.SUCCESSIONS, (host, app.name)))
        for incarnation in plan.consumed if new else app.failures:
            yield Delete(Key(Kind.FAILURES, (app.name, str(incarnation))))
        if new is None:
            yield from (Delete(Key(kind, (app.name,))) for kind in (Kind.CHECKPOINTS, Kind.IN_SYNC))
        if app.vouchers is not None and (new is None or in_doubt(app, self._view) is None):
            yield Delete(Key(Kind.VOUCHERS, (app.name,)))  # that primary is dead
        if new is None and app.pause:
            yield Delete(Key(Kind.PAUSES, ("app", app.name)))
        for event in plan.events:
            yield Put(Key(Kind.HISTORY, (app.name, str(event.failure.incarnation))), event)
        kept = max(0, HISTORY_KEPT - len(plan.events)) if new else 0
        for incarnation in sorted(app.history, reverse=True)[kept:]:
            yield Delete(Key(Kind.HISTORY, (app.name, str(incarnation))))

    async def _write(self, app: AppView, before: Assignment | None, txn: Txn) -> None:
        """Write what the view expects already; `before` is what it takes back if that fails."""
        expected = app.assignment
        try:
            async with self._slots:
                result = await self._store.commit(txn)
            written = result.succeeded
            if written:
                self._written[app.name] = result.revision
        except StoreError as error:
            log.warning("%s: cannot write its assignment yet: %s", app.name, error)
            written = False
        if not written:
            if app.assignment is expected and self._view.apps.get(app.name) is app:
                self._view.expect(app, before)
            await asyncio.sleep(RETRY_S)  # by then the view has seen what was in the way, or the lease is lost
        self._writing.discard(app.name)
        self.touch((app.name,))
