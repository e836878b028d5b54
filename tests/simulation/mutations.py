"""Versions of the daemons that are broken on purpose. Each must be found out by the simulation, or it proves nothing.

A mutation replaces one method or function of the product while it is in force. `UNDECIDED` lists those that were not found out
within a few hundred seeds: something else holds as well, or it takes a coincidence of milliseconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from attrs import evolve, frozen

from etcdreplica.core.brake import Brake
from etcdreplica.core.planner import _Step
from etcdreplica.daemon import run as run_module
from etcdreplica.daemon.guard import Guard
from etcdreplica.daemon.hold import Hold
from etcdreplica.daemon.process import ReplicaProcess
from etcdreplica.daemon.publisher import Publisher
from etcdreplica.daemon.replica_manager import ReplicaManager
from etcdreplica.daemon.report import report
from etcdreplica.daemon.run import Run
from etcdreplica.daemon.super_watchdog import SuperWatchDog
from etcdreplica.daemon.vitals import Vitals
from etcdreplica.daemon.watchdog import WatchDog
from etcdreplica.model import Placement
from etcdreplica.store import Held, Key, Kind, Lease, Put, Snapshot, Store, Txn, Unchanged
from etcdreplica.store.election import Election, Leadership
from etcdreplica.words import Role

Break = Callable[[], AbstractContextManager[Any]]


@frozen
class Mutation:
    """One of them. `calm`: only runs without a fault that anybody may notice are of use; `only`: only these faults are.

    `first_seed`: where the test begins to look, shortly before the first seed that was found to notice.
    """

    name: str
    what: str
    break_: Break
    calm: bool | None = None
    only: tuple[str, ...] = ()
    first_seed: int = 1


def _never_left() -> AbstractContextManager[Any]:
    async def ended(self: Hold) -> None:
        await asyncio.wait([lease.lost for lease in self._leases], return_when=asyncio.FIRST_COMPLETED)

    return patch.multiple(Hold, left=property(lambda self: 1.0), ended=ended)


def _guardian_is_told_nothing() -> AbstractContextManager[Any]:
    keep = Guard.keep
    return patch.multiple(
        Guard, until=lambda self, deadlines: None, keep=lambda self, ward, memo, until=None: keep(self, ward, memo)
    )


def _no_backstop() -> AbstractContextManager[Any]:
    backstop = Guard.backstop
    return patch.object(Guard, "backstop", lambda self, after_s: backstop(self, 1e6))


def _deadlines_stand_still() -> AbstractContextManager[Any]:
    return patch.object(Guard, "until", lambda self, deadlines: None)


def _counted_from_the_answer() -> AbstractContextManager[Any]:
    def confirm(self: Lease, ttl_s: float) -> None:
        if self.sent:
            self.sent.popleft()
            self.deadline = max(self.deadline, asyncio.get_running_loop().time() + ttl_s)

    return patch.object(Lease, "confirm", confirm)


def _released_before_death() -> AbstractContextManager[Any]:
    async def kill(self: ReplicaProcess) -> None:
        await self._kill_once()

    return patch.object(ReplicaProcess, "kill", kill)


def _not_killed() -> AbstractContextManager[Any]:
    async def kill(self: ReplicaProcess) -> None:
        return

    return patch.object(ReplicaProcess, "kill", kill)


def _no_brake() -> AbstractContextManager[Any]:
    return patch.object(Brake, "held", property(lambda self: []))


def _without(drop: Callable[[Any], bool]) -> AbstractContextManager[Any]:
    """Leave out conditions of a manager's writes."""
    transaction = ReplicaManager._transaction

    def weaker(self: ReplicaManager, app: Any, plan: Any) -> Txn:
        txn = transaction(self, app, plan)
        return evolve(txn, when=tuple(condition for condition in txn.when if not drop(condition)))

    return patch.object(ReplicaManager, "_transaction", weaker)


def _succession_not_exclusive() -> AbstractContextManager[Any]:
    """Either of the two conditions would do: a succession is written together with a failure."""
    kinds = (Kind.SUCCESSIONS, Kind.FAILURES)
    return _without(lambda condition: isinstance(condition, Unchanged) and condition.key.kind in kinds)


def _assignment_not_compared() -> AbstractContextManager[Any]:
    return _without(lambda condition: isinstance(condition, Unchanged) and condition.key.kind is Kind.ASSIGNMENTS)


def _pause_not_compared() -> AbstractContextManager[Any]:
    return _without(lambda condition: isinstance(condition, Unchanged) and condition.key.kind is Kind.PAUSES)


def _succession_of_an_old_assignment() -> AbstractContextManager[Any]:
    def careless(*what: Any) -> Txn:
        txn = report(*what)
        kept = tuple(c for c in txn.when if isinstance(c, Held) or c.key.kind is not Kind.ASSIGNMENTS)
        return evolve(txn, when=kept)

    return patch.object(run_module, "report", careless)


def _same_epoch() -> AbstractContextManager[Any]:
    return patch.object(Placement, "promoted", lambda self: evolve(self, role=Role.PRIMARY, successor=None))


def _begun_again() -> AbstractContextManager[Any]:
    begin = WatchDog._begin

    def forgetful(self: WatchDog, context: Any, app: str, placement: Placement, revision: int) -> None:
        self._begun.pop(app, None)
        begin(self, context, app, placement, revision)

    return patch.object(WatchDog, "_begin", forgetful)


def _sessions_not_compared() -> AbstractContextManager[Any]:
    place = WatchDog._place

    def careless(self: WatchDog, app: str, placement: Placement | None, revision: int) -> None:
        if placement is not None and self._context is not None:
            placement = evolve(placement, session=self._context.session)
        place(self, app, placement, revision)

    return patch.object(WatchDog, "_place", careless)


def _snapshot_ends_nothing() -> AbstractContextManager[Any]:
    apply = WatchDog._apply

    def careless(self: WatchDog, kind: Kind, batch: Any) -> None:
        if isinstance(batch, Snapshot):
            for entry in batch.entries:
                self._place(entry.key.names[1], entry.value, entry.mod_revision) if kind is Kind.PLACEMENTS else None
        else:
            apply(self, kind, batch)

    return patch.object(WatchDog, "_apply", careless)


def _resumed_too_late() -> AbstractContextManager[Any]:
    def resume(self: Any, lease_id: int, ttl_s: float, deadline: float) -> Lease:
        lease = Lease(lease_id, ttl_s, self._clock())
        self._hold(lease)
        return lease

    from etcdreplica.store.leases import LeaseKeeper

    return patch.object(LeaseKeeper, "resume", resume)


def _watch_from_the_next_revision() -> AbstractContextManager[Any]:
    watch = Store._watch
    return patch.object(Store, "_watch", lambda self, prefix, revision: watch(self, prefix, revision + 1))


def _compaction_ignored() -> AbstractContextManager[Any]:
    """Go on with the newest instead of reading everything again."""
    from etcdreplica.store import store as store_module

    follow = Store.follow

    async def careless(self: Store, kind: Kind | None = None, *names: str) -> Any:
        seen = False
        async for batch in follow(self, kind, *names):
            if isinstance(batch, Snapshot) and seen:
                continue
            seen = True
            yield batch

    assert store_module
    return patch.object(Store, "follow", careless)


def _late_writes_count() -> AbstractContextManager[Any]:
    async def write(self: Publisher, lease: int) -> None:
        await self._store.commit(Txn((), (Put(self._key, self.replica, lease),)))

    return patch.object(Publisher, "_write", write)


def _hand_made_copies_without_deadline() -> AbstractContextManager[Any]:
    return patch.object(Run, "_own_deadline", lambda self: {})


def _hangs_unseen() -> AbstractContextManager[Any]:
    return patch.object(Vitals, "check", lambda self, at: None)


def _degree_not_restored() -> AbstractContextManager[Any]:
    fill = _Step._fill

    def lazy(self: _Step) -> None:
        if self.app.assignment is None:
            fill(self)

    return patch.object(_Step, "_fill", lazy)


def _hosts_not_reported() -> AbstractContextManager[Any]:
    return patch.object(SuperWatchDog, "_failures", lambda self, name: ())


def _everybody_is_elected() -> AbstractContextManager[Any]:
    async def wait_for_turn(self: Election, key: Key, created: int, on_line: Any) -> None:
        on_line(())

    return patch.object(Election, "_wait_for_turn", wait_for_turn)


def _leadership_not_compared() -> AbstractContextManager[Any]:
    never = Unchanged(Key(Kind.LEADERS, ("nobody", "0")), 0)
    return patch.object(Leadership, "condition", property(lambda self: never))


def _promoted_without_a_lease() -> AbstractContextManager[Any]:
    promote = Run.promote

    def careless(self: Run, placement: Placement, decided_at: float) -> None:
        with patch.object(Hold, "confirmed_left", 1.0):
            promote(self, placement, decided_at)

    return patch.object(Run, "promote", careless)


def _margins_forgotten() -> AbstractContextManager[Any]:
    def until(self: Hold) -> float | None:
        return None if self.own is None else min(self.own.deadline, self._host.deadline) + 0.7

    async def ended(self: Hold) -> None:
        while (left := self.left) > 0:  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(left)

    left = property(lambda self: min(lease.deadline for lease in self._leases) + 0.5 - self._clock())
    return patch.multiple(Hold, until=property(until), left=left, ended=ended)


def _host_lease_ignored() -> AbstractContextManager[Any]:
    """Only its own lease ends a copy."""
    return patch.object(Hold, "_leases", property(lambda self: (self.own,) if self.own else (self._host,)))


def _deadlines_end_with_the_session() -> AbstractContextManager[Any]:
    extend = WatchDog._extend

    def early(self: WatchDog) -> None:
        if self._context is None:
            self._extending = None
        else:
            extend(self)

    return patch.object(WatchDog, "_extend", early)


MUTATIONS = (
    Mutation(
        "no fence", "the WatchDog does not end its copies before their leases end", _never_left, only=("cut off", "etcd down")
    ),
    Mutation(
        "no guardian",
        "the guardian is told no deadline",
        _guardian_is_told_nothing,
        only=("stop WatchDog", "stop host", "stop guardian"),
    ),
    Mutation(
        "no backstop",
        "no timer of the kernel for a guardian that is stopped",
        _no_backstop,
        only=("stop guardian", "stop host"),
    ),
    Mutation("deadlines stand still", "renewals do not move the guardian's deadlines", _deadlines_stand_still, calm=True),
    Mutation(
        "counted from the answer",
        "a lease counts from when its renewal was answered",
        _counted_from_the_answer,
        only=("slow answers",),
    ),
    Mutation(
        "no margins", "copies are ended after their leases instead of before", _margins_forgotten, only=("cut off", "etcd down")
    ),
    Mutation(
        "host lease ignored",
        "only its own lease ends a copy, not its host's",
        _host_lease_ignored,
        only=("cut off", "etcd stalls", "slow answers"),
    ),
    Mutation(
        "released before death",
        "reported and released when the kill was sent",
        _released_before_death,
        only=("leave", "end node", "hang primary"),
    ),
    Mutation("not killed", "reported, released and replaced without a kill", _not_killed, only=("leave", "hang primary")),
    Mutation(
        "no brake",
        "the loss of most hosts is believed at once",
        _no_brake,
        only=("cut off",),
        first_seed=200,
    ),
    Mutation("same epoch", "a successor goes on with the epoch of the dead primary", _same_epoch, only=("kill primary",)),
    Mutation(
        "begun again",
        "a WatchDog starts an incarnation again that has ended",
        _begun_again,
        only=("stop manager", "kill primary", "kill backup", "etcd compacts", "streams break"),
        first_seed=33,
    ),
    Mutation(
        "sessions not compared",
        "a WatchDog makes placements true that an earlier stay was given",
        _sessions_not_compared,
        only=("end node", "lose power"),
    ),
    Mutation(
        "snapshot ends nothing",
        "what a snapshot does not show goes on",
        _snapshot_ends_nothing,
        only=("register again", "remove", "etcd compacts", "streams fall silent"),
    ),
    Mutation(
        "next revision",
        "a watch resumes after the revision it knows",
        _watch_from_the_next_revision,
        only=("register again", "etcd compacts", "streams fall silent"),
    ),
    Mutation(
        "compaction ignored",
        "after a compaction nothing is read again",
        _compaction_ignored,
        only=("register again", "etcd compacts", "streams fall silent"),
    ),
    Mutation(
        "late writes count",
        "what a replica shows may be overwritten by an older state",
        _late_writes_count,
        only=("etcd member stops", "kill primary", "leave"),
    ),
    Mutation(
        "by hand without deadline",
        "a copy that was started by hand is told no deadline",
        _hand_made_copies_without_deadline,
        only=("kill guardian", "stop host"),
        first_seed=12,
    ),
    Mutation("hangs unseen", "nobody looks at signs of life", _hangs_unseen, only=("hang primary",)),
    Mutation("degree not restored", "a lost backup is not replaced", _degree_not_restored, only=("kill backup", "lose power")),
    Mutation("lost hosts not reported", "the SuperWatchDog says nothing", _hosts_not_reported, only=("lose power",)),
    Mutation(
        "deadlines end with the session",
        "a node that ends in order moves no deadline",
        _deadlines_end_with_the_session,
        only=("end node",),
    ),
)
UNDECIDED = (
    Mutation(
        "succession not exclusive",
        "a manager's plan ignores that a successor was called",
        _succession_not_exclusive,
        only=("kill primary", "kill backup", "slow link", "leave"),
    ),
    Mutation(
        "old successor",
        "a successor is called by an assignment that is no longer the newest",
        _succession_of_an_old_assignment,
        only=("kill primary", "kill backup", "slow link", "end node"),
    ),
    Mutation(
        "resumed too late",
        "a restarted WatchDog takes its leases for freshly renewed",
        _resumed_too_late,
        only=("kill WatchDog", "cut off", "etcd stalls"),
    ),
    Mutation(
        "everybody is elected",
        "every candidate leads at once",
        _everybody_is_elected,
        only=("kill manager", "kill primary", "lose power"),
    ),
    Mutation(
        "leadership not compared",
        "a deposed manager can write",
        _leadership_not_compared,
        only=("stop manager", "lose power", "kill primary"),
    ),
    Mutation(
        "assignment not compared",
        "a plan is written over any assignment",
        _assignment_not_compared,
        only=("stop manager", "etcd member stops", "kill primary", "lose power"),
    ),
    Mutation(
        "pause not compared",
        "a plan made before a pause is written after it",
        _pause_not_compared,
        only=("pause", "kill primary"),
    ),
    Mutation(
        "promoted without a lease",
        "a replica is promoted that cannot hold its lease",
        _promoted_without_a_lease,
        only=("kill primary", "slow answers", "cut off"),
    ),
)
