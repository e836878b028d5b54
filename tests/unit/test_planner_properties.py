"""The planner under any order of faults: hypothesis plays hosts, WatchDogs, people and managers.

Each host runs what a WatchDog would run, as slowly as hypothesis likes; the manager may act at any moment between. After
every step the guarantees G1 and G2 must hold, and from wherever an example ends the application must converge (G4).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from attrs import define, evolve
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from etcdreplica.model import (
    Ask,
    Assignment,
    AssignmentState,
    Failure,
    FailureKind,
    InSync,
    Member,
    Placement,
    Replica,
    ReplicaState,
    Seat,
    Succession,
)
from etcdreplica.words import Role, Style
from tests.unit.planner_world import APP, World

HOSTS = ("a", "b", "c", "d", "e")
ROUNDS = 60  # within which an application must have converged

hosts = st.sampled_from(HOSTS)


@define
class Run:
    """What a WatchDog runs for the application; `stopping` is how it will be reported, None for not at all."""

    placement: Placement
    revision: int
    state: ReplicaState
    is_stopping: bool = False
    stopping: FailureKind | None = None

    @property
    def is_primary(self) -> bool:
        """Whether its body runs, or may soon run, as primary."""
        return self.placement.role is Role.PRIMARY


class ClusterMachine(RuleBasedStateMachine):
    """One application on up to five hosts."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.runs: dict[str, Run] = {}
        self.broken: set[str] = set()  # hosts that cannot run the program
        self.incarnations: dict[int, Seat] = {}
        self.retired: set[int] = set()
        self.primaries: dict[int, int] = {}  # by epoch: the incarnation that was primary
        self.last: Assignment | None = None
        self.before: Assignment | None = None  # when `no_state_is_passed_over` was checked last
        self.assigned_epoch = 0
        self.planned = self.acted = (0, 0)  # epoch and incarnation of the primary, as assigned and as a process
        self.degree, self.style, self.allowed = 1, Style.WARM, frozenset(HOSTS)
        self.begun: dict[str, int] = {}  # by host: the newest incarnation that its WatchDog has begun
        self.ladder: dict[str, Any] = {}

    # --- people ----------------------------------------------------------------------------------------------------

    @initialize(
        degree=st.integers(1, 4),
        style=st.sampled_from(Style),
        allowed=st.none() | st.sets(hosts, min_size=4),
        up=st.sets(hosts, min_size=1),
        restarts_here=st.sampled_from([0, 0, 1, 2]),
        max_restarts=st.sampled_from([0, 0, 1, 3]),
        replicated=st.booleans(),
    )
    def begin(
        self,
        degree: int,
        style: Style,
        allowed: set[str] | None,
        up: set[str],
        restarts_here: int,
        max_restarts: int,
        replicated: bool,
    ) -> None:
        """Start some hosts and register."""
        self.world.join(*sorted(up))
        self.ladder = {"restarts_here": restarts_here, "max_restarts": max_restarts, "object": replicated}
        self.degree, self.style, self.allowed = degree, style, frozenset(allowed or HOSTS)
        self.register()

    def register(self) -> None:
        """Write the registration."""
        limit = sorted(self.allowed) if self.allowed != frozenset(HOSTS) else ()
        self.world.register(degree=self.degree, style=self.style, hosts=limit, origin="a", **self.ladder)

    def assigned(self) -> Assignment | None:
        """Return the assignment, if there is one."""
        app = self.world.view.apps.get(APP)
        return app.assignment if app else None

    def may_register(self) -> bool:
        """Whether `daemon.registry` takes a registration: of a new name, or of one whose application is complete."""
        app, assignment = self.world.view.apps.get(APP), self.assigned()
        if assignment is None:
            return app is None or app.registration is None
        return assignment.state is AssignmentState.COMPLETED

    @precondition(lambda self: self.may_register())
    @rule(degree=st.integers(1, 4))
    def register_again(self, degree: int) -> None:
        """Register after a removal or a completion."""
        self.degree = degree
        self.register()

    @precondition(lambda self: APP in self.world.view.apps)
    @rule()
    def unregister(self) -> None:
        """Remove the application."""
        self.world.unregister()

    @precondition(lambda self: APP in self.world.view.apps)
    @rule(finisher=st.none() | hosts, degree=st.integers(1, 4), first=hosts)
    def begin_anew(self, finisher: str | None, degree: int, first: str) -> None:
        """Remove or complete the application and register it again before most WatchDogs have noticed."""
        if finisher is None:
            self.unregister()
        else:
            self.return_from_body(finisher)
        self.manage_until_quiet()
        if self.may_register():
            self.register_again(degree)
            self.manage_until_quiet()
            self.take_placement(first)

    @precondition(lambda self: (a := self.assigned()) is not None and a.state is AssignmentState.FAILED)
    @rule()
    def resume(self) -> None:
        """Start a parked application again."""
        if self.world.app().registration is not None:
            self.world.resume()

    @precondition(lambda self: APP in self.world.view.apps)
    @rule(cluster=st.booleans())
    def pause(self, cluster: bool) -> None:
        """Pause the application or all."""
        if cluster or self.world.app().registration is not None:
            self.world.pause(cluster=cluster)

    @rule(cluster=st.booleans())
    def unpause(self, cluster: bool) -> None:
        """End a pause."""
        self.world.unpause(cluster=cluster)

    @precondition(lambda self: APP in self.world.view.apps)
    @rule(ask=st.sampled_from(Ask), to=st.none() | hosts)
    def ask(self, ask: Ask, to: str | None) -> None:
        """Ask for a change of primary, or to stop."""
        if self.world.app().registration is not None and self.world.app().request is None and self.assigned() is not None:
            self.world.ask(ask, to)

    @precondition(lambda self: APP in self.world.view.apps)
    @rule()
    def take_back(self) -> None:
        """Start it again; or what was asked for has waited for too long."""
        self.world.commit(("requests", (APP,), None))

    @rule(host=hosts, on=st.booleans())
    def drain(self, host: str, on: bool) -> None:
        """Drain a host, or end that."""
        self.world.drain(host) if on else self.world.undrain(host)

    # --- hosts -----------------------------------------------------------------------------------------------------

    @rule(host=hosts)
    def join(self, host: str) -> None:
        """Start a host."""
        if host not in self.world.view.hosts:
            self.world.join(host)

    @rule(host=hosts)
    def lose(self, host: str) -> None:
        """Lose a host: everything on it is dead before its leases end."""
        if host in self.world.view.hosts:
            self.world.lose(host)
            self.runs.pop(host, None)

    @rule(host=hosts)
    def restart(self, host: str) -> None:
        """Lose a host and start it before anybody has reported it."""
        self.lose(host)
        self.world.join(host)

    @rule(host=hosts)
    def break_host(self, host: str) -> None:
        """Take the program away from a host, or put it back."""
        self.broken ^= {host}

    # --- WatchDogs -------------------------------------------------------------------------------------------------

    def show(self, host: str) -> None:
        """Publish the replica of a host."""
        run = self.runs[host]
        replica = Replica(run.placement.incarnation, run.placement.epoch, run.placement.role, run.state)
        self.world.commit(("replicas", (APP, host), replica))

    @rule(host=hosts)
    def take_placement(self, host: str) -> None:
        """Have a WatchDog make true what its placement says."""
        up, found = self.world.view.hosts.get(host), self.world.placements.get((host, APP))
        if up is None:
            return
        run = self.runs.get(host)
        placement, revision = found or (None, 0)
        if placement is None or placement.session != up.session:
            self.give_up(run)
        elif run is None:
            if placement.incarnation > self.begun.get(host, 0):
                self.start(host, placement, revision)
        elif run.placement.incarnation != placement.incarnation:
            self.give_up(run)
        elif placement.epoch >= run.placement.epoch and revision > run.revision:
            run.revision = revision
            if run.is_primary and placement.role is Role.BACKUP:
                run.is_stopping, run.stopping = True, FailureKind.HANDOVER
            elif (placement.role, placement.epoch) != (run.placement.role, run.placement.epoch):
                run.placement = placement
                self.promoted(host)
            else:
                run.placement = placement
            self.heed(run)

    def heed(self, run: Run) -> None:
        """Have a primary end that is to hand over."""
        if run.placement.leaving is not None and not run.is_stopping:
            run.is_stopping, run.stopping = True, FailureKind.HANDOVER

    def give_up(self, run: Run | None) -> None:
        """Begin to end a replica that is wanted no longer."""
        if run is not None:
            run.is_stopping, run.stopping = True, None

    def start(self, host: str, placement: Placement, revision: int) -> None:
        """Begin a replica."""
        self.begun[host] = placement.incarnation
        waits = self.style is Style.COLD and placement.role is Role.BACKUP
        self.runs[host] = Run(placement, revision, ReplicaState.STANDBY if waits else ReplicaState.STARTING)
        if host in self.broken:
            self.end(host, FailureKind.REFUSED)
        else:
            self.show(host)
            self.heed(self.runs[host])

    @rule(host=hosts)
    def take_succession(self, host: str) -> None:
        """Have a WatchDog see that its replica was called."""
        run, succession = self.runs.get(host), self.world.successions.get((host, APP))
        if run and succession and not run.is_primary and succession.epoch == run.placement.epoch + 1:
            run.placement = run.placement.promoted()
            self.promoted(host)

    def promoted(self, host: str) -> None:
        """Publish a new epoch or role."""
        run = self.runs[host]
        if run.is_primary and run.state is ReplicaState.STANDBY:
            run.state = ReplicaState.STARTING
        self.show(host)

    @rule(host=hosts)
    def progress(self, host: str) -> None:
        """Have a replica get as far as its role and style allow."""
        run = self.runs.get(host)
        if run is None or run.is_stopping or run.state is ReplicaState.STANDBY:
            return
        state = ReplicaState.RUNNING if run.is_primary or self.style is Style.HOT else ReplicaState.READY
        if state is not run.state:
            run.state = state
            self.show(host)

    @precondition(lambda self: self.ladder["object"] and APP in self.world.view.apps)
    @rule(others=st.sets(hosts))
    def change_members(self, others: set[str]) -> None:
        """Have the primary of an object write the in-sync set, as `daemon.objects` does: if nothing has moved meanwhile."""
        for host, run in self.runs.items():
            placement, revision = self.world.placements.get((host, APP), (None, 0))
            called = (run.placement.successor, APP) in self.world.successions
            if not run.is_primary or run.state is not ReplicaState.RUNNING or placement is None or called:
                continue
            if revision == run.revision and placement.incarnation == run.placement.incarnation:
                able = {host} | {other for other in others if other in self.runs and not self.runs[other].is_stopping}
                members = tuple(Member(h, self.runs[h].placement.incarnation) for h in sorted(able))
                self.world.commit(("insync", (APP,), InSync(run.placement.epoch, run.placement.incarnation, members)))

    @precondition(lambda self: self.ladder["object"] and APP in self.world.view.apps)
    @rule(others=st.sets(hosts), lost=st.booleans())
    def fail_over(self, others: set[str], lost: bool) -> None:
        """Let an object come to rest, change its set, and end its primary or that one's host."""
        for _ in range(3):
            self._settle()
        self.change_members(others)
        for host in [host for host, run in self.runs.items() if run.is_primary]:
            self.lose(host) if lost else self.end(host, FailureKind.EXIT, 60.0)
        self.world.report_losses()
        self.manage_until_quiet()

    @rule(host=hosts, uptime_s=st.sampled_from([None, 0.1, 60.0]), kind=st.sampled_from([FailureKind.EXIT, FailureKind.HANG]))
    def crash(self, host: str, uptime_s: float | None, kind: FailureKind) -> None:
        """Kill a replica."""
        if host in self.runs:
            run = self.runs[host]
            self.end(host, run.stopping if run.is_stopping else kind, uptime_s)

    @rule(times=st.integers(1, 5), uptime_s=st.sampled_from([0.1, 60.0]))
    def crash_loop(self, times: int, uptime_s: float) -> None:
        """Kill primaries one after the other."""
        for _ in range(times):
            for host in [host for host, run in self.runs.items() if run.is_primary]:
                self.crash(host, uptime_s, FailureKind.EXIT)
            self._settle()

    @rule(host=hosts)
    def ask_to_leave(self, host: str) -> None:
        """Ask a replica to hand over."""
        run = self.runs.get(host)
        if run and not run.is_stopping:
            run.is_stopping, run.stopping = True, FailureKind.HANDOVER

    @rule(host=hosts)
    def return_from_body(self, host: str) -> None:
        """Complete the application."""
        run = self.runs.get(host)
        if run and run.state is ReplicaState.RUNNING and not run.is_stopping:
            self.end(host, FailureKind.DONE)

    @rule(host=hosts)
    def finish_stopping(self, host: str) -> None:
        """Let a replica that ends be gone."""
        run = self.runs.get(host)
        if run and run.is_stopping:
            self.end(host, run.stopping)

    def end(self, host: str, kind: FailureKind | None, uptime_s: float | None = None) -> None:
        """Report the end of a replica, and call the successor, as `Run._finish` does; None reports nothing."""
        run = self.runs.pop(host)
        placement = run.placement
        gone = ("replicas", (APP, host), None)
        if kind is None:
            self.world.commit(gone)
            return
        number = str(placement.incarnation)
        reason = f"{kind} on {host}"
        failure = Failure(host, placement.incarnation, placement.epoch, placement.role, kind, reason, host, uptime_s)
        report = (gone, ("failures", (APP, number), failure))
        app, successor = self.world.view.apps.get(APP), placement.successor
        unchanged = app is not None and app.assignment_revision == run.revision
        if app is not None and self.ladder["object"]:
            record = app.own_in_sync
            unchanged = unchanged and record is not None and successor in {member.host for member in record.members}
        if kind is not FailureKind.DONE and run.is_primary and unchanged and app and successor in app.replicas:
            succession = Succession(placement.epoch + 1, placement.incarnation)
            self.world.commit(*report, ("successions", (successor, APP), succession))
        else:
            self.world.commit(*report)

    @precondition(lambda self: self.retired and APP in self.world.view.apps)
    @rule(data=st.data())
    def report_late(self, data: st.DataObject) -> None:
        """Report the end of a replica that was given up long ago."""
        incarnation = data.draw(st.sampled_from(sorted(self.retired)))
        kind = data.draw(st.sampled_from([FailureKind.EXIT, FailureKind.FENCED, FailureKind.DONE]))
        host = self.incarnations[incarnation].host
        failure = Failure(host, incarnation, self.assigned_epoch, Role.PRIMARY, kind, "late", host)
        self.world.commit(("failures", (APP, str(incarnation)), failure))

    # --- the elected roles and time ----------------------------------------------------------------------------------

    @rule()
    def manage(self) -> None:
        """Let the manager act once."""
        if APP in self.world.view.apps:
            with self._still_under_a_pause():
                self.world.step()

    @rule()
    def manage_until_quiet(self) -> None:
        """Let the manager act until it has nothing to write."""
        if APP in self.world.view.apps:
            with self._still_under_a_pause():
                self.world.run()

    @contextlib.contextmanager
    def _still_under_a_pause(self) -> Iterator[None]:
        """Nothing may move but by a succession that has happened, a removal, or the end of what is ended."""
        app, before = self.world.app(), self.assigned()
        paused = (app.pause or self.world.view.pause) and app.registration and not app.successions
        failures = dict(app.failures)
        yield
        after = self.assigned()
        if paused and (before is None or before.state is not AssignmentState.REMOVING):
            assert after == (before and evolve(before, paused=True, successor=None))
            assert app.failures == failures

    @rule()
    def report_losses(self) -> None:
        """Let the SuperWatchDog act."""
        self.world.report_losses()

    @rule()
    def elect_another_manager(self) -> None:
        """Lose what the manager remembers."""
        self.world.restart_manager()

    @rule(seconds=st.sampled_from([0.3, 1.0, 5.0, 20.0, 100.0]))
    def pass_time(self, seconds: float) -> None:
        """Let time pass."""
        self.world.wait(seconds)

    @rule(rounds=st.integers(1, 3))
    def let_everybody_act(self, rounds: int) -> None:
        """Come nearer to rest, as real clusters mostly do."""
        for _ in range(rounds):
            self._settle()

    # --- what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def at_most_one_primary_process(self) -> None:
        """G1: no two processes are primary at once."""
        primaries = {host: run for host, run in self.runs.items() if run.is_primary}
        assert len(primaries) <= 1, primaries

    @invariant()
    def an_epoch_has_one_primary(self) -> None:
        """G2: whoever acts with an epoch is the only one that ever does."""
        current = self.assigned()
        acting = [(run.placement.epoch, run.placement.incarnation) for run in self.runs.values() if run.is_primary]
        if current is not None and current.primary is not None:
            acting.append((current.epoch, current.primary.incarnation))
        for epoch, incarnation in acting:
            assert self.primaries.setdefault(epoch, incarnation) == incarnation

    @invariant()
    def epochs_only_grow(self) -> None:
        """G2: an epoch is never smaller than one before, and strictly larger when the primary is another."""
        current = self.assigned()
        if current is not None:
            assert current.epoch >= self.assigned_epoch
            self.assigned_epoch = current.epoch
            if current.primary is not None:
                self.planned = self.grown(self.planned, current.epoch, current.primary.incarnation)
        for run in self.runs.values():
            if run.is_primary:
                self.acted = self.grown(self.acted, run.placement.epoch, run.placement.incarnation)

    def grown(self, before: tuple[int, int], epoch: int, incarnation: int) -> tuple[int, int]:
        """Return the epoch and incarnation of a primary, which must follow on those of the one before."""
        assert epoch > before[0] or (epoch, incarnation) == before
        return epoch, incarnation

    @invariant()
    def no_state_is_passed_over(self) -> None:
        """G3: a new primary of an object is in sync, unless no copy that was is left."""
        app, current = self.world.view.apps.get(APP), self.assigned()
        record = app.own_in_sync if app is not None and self.ladder["object"] else None
        before, self.before = self.before, current
        if record is None or before is None or current is None or current.primary in (None, before.primary):
            return
        members = {member.incarnation for member in record.members}
        if current.primary and current.primary.incarnation not in members:
            left = {run.placement.incarnation for run in self.runs.values()} & {seat.incarnation for seat in before.seats}
            assert not left & members

    @invariant()
    def seats_are_in_order(self) -> None:
        """Distinct allowed hosts, at most the degree and what drains replace, each incarnation in one seat and once only."""
        current = self.assigned()
        seats = current.seats if current else ()
        assert len({seat.host for seat in seats}) == len(seats)
        assert len(seats) <= 2 * self.degree
        assert {seat.host for seat in seats} <= self.allowed
        for seat in seats:
            assert self.incarnations.setdefault(seat.incarnation, seat) == seat
            assert seat.incarnation not in self.retired
        if current is not None and current.successor is not None:
            assert current.successor in {seat.host for seat in current.backups}
        self.retired |= {seat.incarnation for seat in self.last.seats if seat not in seats} if self.last else set()
        self.last = current

    @invariant()
    def seats_are_counted(self) -> None:
        """The load of the hosts is what the assignments say."""
        current = self.assigned()
        assert +self.world.view.seats == {seat.host: 1 for seat in (current.seats if current else ())}

    # --- what must come ----------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """G4: once faults stop, everything is as it should be within bounded time, and then nothing happens any more."""
        self.broken.clear()
        for cluster in (False, True):
            self.unpause(cluster)
        self._come_to_rest()
        self._check_what_people_want()
        self.world.undrain(*HOSTS)
        if APP in self.world.view.apps:
            self.take_back()
        self._come_to_rest()
        self._check_converged()

    def _come_to_rest(self) -> None:
        for _ in range(ROUNDS):
            before = self.world.view.revision
            wake_at = self._settle()
            for check in (self.at_most_one_primary_process, self.an_epoch_has_one_primary, self.epochs_only_grow):
                check()
            self.seats_are_in_order()
            if (current := self.assigned()) and current.state is AssignmentState.FAILED and self.world.app().registration:
                self.world.resume()
            if self.world.view.revision == before:
                if wake_at is None:
                    break
                self.world.now = max(self.world.now, wake_at)
        else:
            raise AssertionError(f"no rest after {ROUNDS} rounds: {self.assigned()} {self.runs}")

    def _check_what_people_want(self) -> None:
        """What is to be stopped does not run, and nothing is on a drained host that another one could take."""
        app, current = self.world.view.apps.get(APP), self.assigned()
        if app is None or current is None or app.registration is None:
            return
        if app.request is not None and app.request.ask is Ask.STOP:
            assert current.state in (AssignmentState.STOPPED, AssignmentState.COMPLETED, AssignmentState.FAILED)
            assert not self.runs
        if current.state is not AssignmentState.ACTIVE or self.ladder["object"]:  # nobody brings its new copies in sync here
            return
        able = self.allowed & set(self.world.view.hosts) - set(self.world.view.drains)
        lasting = {seat.host for seat in current.seats} & able
        assert len(lasting) == min(self.degree, len(able))
        assert len(lasting) < self.degree or len(current.seats) == self.degree
        assert not able or (current.primary is not None and current.primary.host in able)

    def _settle(self) -> float | None:
        """Let everybody act once; return when the manager wants to look again."""
        self.world.report_losses()
        decision = self.world.run()
        for host in HOSTS:
            self.take_succession(host)
            self.take_placement(host)
            self.finish_stopping(host)
            self.progress(host)
        return decision.wake_at

    def _check_converged(self) -> None:
        app, current = self.world.view.apps.get(APP), self.assigned()
        if app is None or app.registration is None:
            assert app is None
            assert not self.runs
            return
        assert current is not None
        if current.state is AssignmentState.COMPLETED:
            assert current.seats == ()
            assert not self.runs
            return
        able = self.allowed & set(self.world.view.hosts)
        assert len(current.seats) == min(self.degree, len(able))
        assert (current.primary is not None) == bool(able)
        assert current.degraded == (len(able) < self.degree)
        assert set(self.runs) == {seat.host for seat in current.seats}
        for seat in current.seats:
            replica, placement = app.replica(seat), current.placement(seat)
            assert replica is not None
            assert (replica.role, replica.epoch) == (placement.role, placement.epoch)
        if current.primary is not None:
            here = current.here < self.ladder["restarts_here"]
            followers = {seat.incarnation for seat in current.backups}
            record = app.own_in_sync if self.ladder["object"] else None
            if record is not None and record.members:  # a member is not started again, but followed
                followers &= {member.incarnation for member in record.members}
                here = here and not followers
            assert (current.successor is not None) == bool(followers and not here)


TestCluster = ClusterMachine.TestCase
TestCluster.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
