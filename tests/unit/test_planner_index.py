"""What the manager need not look at: after any change, planning all applications must say what planning a few of them did."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from etcdreplica.core.draft import ZONE
from etcdreplica.core.planner import _Step, decide
from etcdreplica.core.room import Occupants, Room
from etcdreplica.core.view import Loss
from etcdreplica.model import AssignmentState, Checkpoint, Drain, Failure, FailureKind, Pause
from etcdreplica.words import Failover, Role
from tests.unit.planner_world import SETTINGS, World

HOSTS = ("a", "b", "c", "d", "e")
APPS = ("one", "two", "three", "four")
ZONES = ("", "east", "west")

hosts, apps = st.sampled_from(HOSTS), st.sampled_from(APPS)


def best_of_all(step: _Step, *, primary: bool, silent: bool, drained: bool) -> str | None:
    """Rank every host, as the planner did when it still looked at all of them."""
    view, app = step.cluster, step.app
    taken = {seat.host for seat in (*step.draft.seats, *((step.draft.again,) if step.draft.again else ()))}
    zones = {view.hosts[host].host.labels.get(ZONE) for host in taken if host in view.hosts} - {None}

    def rank(name: str) -> tuple[bool, bool, bool, bool, float, str]:
        host, failed_at = view.hosts[name].host, step.memory.failed_at.get(name)
        origin = step.draft.state is AssignmentState.PENDING and name == step.registration.origin
        failed = failed_at is not None and step.now - failed_at < SETTINGS.failed_host_s
        load = view.seats[name] / max(1, host.capacity)
        return (not origin, failed, not app.holds_checkpoint(name), host.labels.get(ZONE) in zones, load, name)

    free = [host for host in view.hosts if host not in taken and view.is_silent(host) is silent and step._allowed(host)]
    free = [host for host in free if not primary or step._may_lead(host)]
    free = [host for host in free if (host in view.drains) is drained and (not drained or host in app.seated_on)]
    return min(free, key=rank, default=None)


class IndexMachine(RuleBasedStateMachine):
    """Several applications on small hosts, and a manager that looks only at what `ClusterView` says may have changed."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.offers = 0
        self.wake_at: dict[str, float] = {}

    def manage(self) -> None:
        """Do what `daemon.replica_manager` does, until there is nothing more to look at."""
        world, view = self.world, self.world.view
        for _ in range(50):
            due = world.touched | {name for name, at in self.wake_at.items() if at <= world.now}
            world.touched = set()
            for name in sorted(due):
                self.plan(name)
            if not due and self.offers == view.offers:
                return
            if self.offers != view.offers:
                self.offers = view.offers
                for name in sorted(view.seatless):
                    if not view.room:
                        break
                    self.plan(name)
        raise AssertionError("the manager does not come to rest")

    def plan(self, name: str) -> None:
        """Plan one application and write that."""
        self.wake_at.pop(name, None)
        if name in self.world.view.apps:
            decision = self.world.step(name)
            if decision.wake_at is not None:
                self.wake_at[name] = decision.wake_at

    @invariant()
    def planning_everything_changes_nothing(self) -> None:
        """No application that was left out would have been planned differently, or would have to be looked at sooner."""
        self.manage()
        world = self.world
        for name, app in world.view.apps.items():
            decision = decide(app, world.view, copy.deepcopy(world.memories[name]), world.now, SETTINGS)
            assert decision.plan is None, name
            if decision.wake_at is not None:
                assert self.wake_at.get(name, float("inf")) <= decision.wake_at, name

    @invariant()
    def the_best_host_is_found(self) -> None:
        """The host for a new seat is the one that looking at all of them finds."""
        for name, app in self.world.view.apps.items():
            if app.registration is not None and app.assignment is not None:
                every = ((p, s, d) for p in (False, True) for s in (False, True) for d in (False, True))
                for primary, silent, drained in every:
                    memory = copy.deepcopy(self.world.memories[name])
                    step = _Step(app, app.registration, self.world.view, memory, self.world.now, SETTINGS)
                    step.draft = app.assignment
                    expected = best_of_all(step, primary=primary, silent=silent, drained=drained)
                    found = step._new_seat(primary=primary, silent=silent, drained=drained)
                    assert (found.host if found else None) == expected

    @invariant()
    def seats_are_counted(self) -> None:
        """The counts of seats are those of the assignments."""
        counts = dict.fromkeys(self.world.view.hosts, 0)
        for app in self.world.view.apps.values():
            for seat in app.assignment.seats if app.assignment else ():
                if seat.host in counts:
                    counts[seat.host] += 1
        assert all(self.world.view.seats[host] == count for host, count in counts.items())

    @initialize(
        up=st.lists(st.tuples(hosts, st.integers(1, 3), st.sampled_from(ZONES)), min_size=2, unique_by=lambda each: each[0]),
        degrees=st.dictionaries(apps, st.integers(1, 3), min_size=2),
    )
    def begin(self, up: list[tuple[str, int, str]], degrees: dict[str, int]) -> None:
        """Begin where there is something to go wrong already."""
        for host, capacity, zone in up:
            self.join(host, capacity, zone)
        for name, degree in degrees.items():
            self.world.register(name, degree=degree)
        self.manage()
        self.obey()

    @rule(host=hosts, capacity=st.integers(0, 3), zone=st.sampled_from(ZONES))
    def join(self, host: str, capacity: int, zone: str) -> None:
        """Begin a session, or change what a host says of itself."""
        self.world.join(host, capacity=capacity, **({"zone": zone} if zone else {}))
        self.world.report_losses()

    @rule(host=hosts, at_once=st.booleans())
    def lose(self, host: str, at_once: bool) -> None:
        """End a host, which is reported later. The leases of its replicas may end later, too."""
        if at_once:
            self.world.lose(host)
        else:
            self.world.commit(("hosts", (host,), None))

    @rule()
    def report_losses(self) -> None:
        """Report what is lost."""
        self.world.report_losses()

    @rule(
        name=apps,
        degree=st.integers(1, 3),
        only=st.none() | st.sets(hosts, min_size=3),
        zone=st.sampled_from(ZONES),
        origin=hosts,
        failover=st.sampled_from(Failover),
        replicated=st.booleans(),
    )
    def register(
        self, name: str, degree: int, only: set[str] | None, zone: str, origin: str, failover: Failover, replicated: bool
    ) -> None:
        """Register, or change a registration."""
        more: dict[str, Any] = {"labels": {"zone": zone} if zone else {}, "hosts": sorted(only or ()), "failover": failover}
        self.world.register(name, degree=degree, origin=origin, object=replicated, **more)

    @rule(name=apps)
    def unregister(self, name: str) -> None:
        """Remove."""
        if name in self.world.view.apps:
            self.world.unregister(name)

    @rule()
    def obey(self) -> None:
        """Have the WatchDogs show what is placed, and withdraw what is not."""
        world = self.world
        for name, app in list(world.view.apps.items()):
            placed = [host for host, of in world.placements if of == name]
            world.commit(*(("replicas", (name, host), None) for host in list(app.replicas) if host not in placed))
            if app.assignment and not app.assignment.paused:
                world.show(*(host for host in placed if host in world.view.hosts), app=name)

    @rule(name=apps, number=st.integers(0, 2), kind=st.sampled_from([FailureKind.EXIT, FailureKind.REFUSED, FailureKind.DONE]))
    def fail(self, name: str, number: int, kind: FailureKind) -> None:
        """Report the end of a replica."""
        app = self.world.view.apps.get(name)
        seats = app.assignment.seats if app and app.assignment else ()
        if app and app.assignment and number < len(seats):
            seat, role = seats[number], Role.BACKUP if number else Role.PRIMARY
            failure = Failure(seat.host, seat.incarnation, app.assignment.epoch, role, kind, "it broke", seat.host, 0.1)
            self.world.commit(("replicas", (name, seat.host), None), ("failures", (name, str(seat.incarnation)), failure))

    @precondition(lambda self: self.world.view.hosts)
    @rule(data=st.data(), back=st.booleans())
    def fall_silent(self, data: st.DataObject, back: bool) -> None:
        """Have the peers of a host confirm that it cannot be reached, or that it can be again."""
        view = self.world.view
        host = data.draw(st.sampled_from(sorted(view.hosts)))
        if back:
            view.losses.pop(host, None)
        else:
            view.losses[host] = Loss(view.hosts[host].session, "silent", view.fast_seats(host))
        view.offer()  # as `daemon.manager` does
        self.world.touched |= view.seated_on(host)
        self.world.report_losses()

    @rule(host=hosts, on=st.booleans())
    def drain(self, host: str, on: bool) -> None:
        """Drain a host, or end that."""
        self.world.commit(("drains", (host,), Drain("ann") if on else None))

    @rule(name=apps, holders=st.sets(hosts, min_size=1))
    def keep(self, name: str, holders: set[str]) -> None:
        """Have hosts hold a checkpoint."""
        app = self.world.view.apps.get(name)
        if app and app.assignment:
            self.world.commit(("checkpoints", (name,), Checkpoint(app.assignment.epoch, 1, "", 0, tuple(sorted(holders)))))

    @rule(name=apps, on=st.booleans())
    def pause(self, name: str, on: bool) -> None:
        """Pause an application, or end that."""
        if name in self.world.view.apps:
            self.world.commit(("pauses", ("app", name), Pause("ann") if on else None))

    @rule(seconds=st.sampled_from([0.3, 5.0, 40.0, 700.0]))
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.world.wait(seconds)


IndexMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=20, deadline=None)
test_index = IndexMachine.TestCase


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 4), st.integers(0, 3), st.booleans())))
def test_room_is_in_order(changes: list[tuple[str, int, int, bool]]) -> None:
    """Only hosts with room, the emptiest first, then by name; a host that gets room again says so once."""
    room, known = Room(), dict[str, tuple[int, int]]()
    for host, seats, capacity, stays in changes:
        if stays:
            had = host in known and known[host][0] < known[host][1]
            known[host] = seats, capacity
            assert room.put(host, seats, capacity) == (seats < capacity and not had)
        else:
            known.pop(host, None)
            room.drop(host)
        free = [name for name, (taken, most) in known.items() if taken < most]
        assert list(room) == sorted(free, key=lambda name: (known[name][0] / known[name][1], name))
        assert bool(room) == bool(free)


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.frozensets(st.sampled_from("abc")))))
def test_occupants(changes: list[tuple[str, frozenset[str]]]) -> None:
    """Each application is where it was put last."""
    occupants, known = Occupants(), dict[str, frozenset[str]]()
    for app, where in changes:
        occupants.put(app, where)
        known[app] = where
    for host in "abc":
        assert occupants.on(host) == {app for app, where in known.items() if host in where}
    assert occupants.hosts == frozenset().union(*known.values())


def test_seatless_ends_with_the_application() -> None:
    """What is completed or being removed takes no seat any more."""
    world = World()
    world.register("one")
    world.run("one")
    assert world.view.seatless == {"one"}
    world.join("a", "b")
    world.run("one")
    assert world.view.seatless == set()
    world.unregister("one")
    world.run("one")
    assert world.view.seatless == set()
    assert AssignmentState.REMOVING not in {app.assignment.state for app in world.view.apps.values() if app.assignment}
