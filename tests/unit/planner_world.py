"""A cluster small enough to read: what etcd would show, changed by the hands of a WatchDog, a SuperWatchDog and a manager.

`World` writes what the daemons write, one revision for each transaction, into the very `ClusterView` that they use. Time is
a number that a test sets. Nothing is decided here but by `core.planner.decide`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from etcdreplica.core.brake import lost_seats
from etcdreplica.core.plan import HISTORY_KEPT, Decision, Memory, Plan, PlannerSettings
from etcdreplica.core.planner import decide
from etcdreplica.core.restarts import RestartPolicy, restart_delay_s
from etcdreplica.core.view import AppView, ClusterView
from etcdreplica.model import (
    Ask,
    Assignment,
    Drain,
    Event,
    Failure,
    FailureKind,
    Host,
    Pause,
    Placement,
    Program,
    Registration,
    Replica,
    ReplicaState,
    Request,
    Seat,
    Succession,
)
from etcdreplica.words import Role, Style

APP = "shop"
SETTINGS = PlannerSettings(
    restart=RestartPolicy(settle_s=1.0, free_strikes=2, base_s=0.5, cap_s=4.0),
    start_grace_s=15.0,
    refusal_retry_s=30.0,
    failed_host_s=60.0,
)
QUIET_AFTER = 8  # writes in a row after which a manager must be content

Operation = tuple[str, tuple[str, ...], Any]


class World:
    """Hosts, applications and one manager. Methods named after what happens; `step` lets the manager act once."""

    def __init__(self, *hosts: str) -> None:
        self.now = 500.0
        self.view = ClusterView(revision=1000)
        self.memories: defaultdict[str, Memory] = defaultdict(Memory)
        self.placements: dict[tuple[str, str], tuple[Placement, int]] = {}  # by host and application
        self.successions: dict[tuple[str, str], Succession] = {}
        self.events: dict[int, Event] = {}  # by incarnation
        self.touched: set[str] = set()  # applications that a change has concerned, for whoever clears it
        self.join(*hosts)

    # --- what is there ---------------------------------------------------------------------------------------------

    def app(self, name: str = APP) -> AppView:
        """Return what is known of an application."""
        return self.view.apps[name]

    def assignment(self) -> Assignment:
        """The assignment of the application under test."""
        found = self.app().assignment
        assert found is not None
        return found

    def primary(self) -> str | None:
        """The host of the primary."""
        seat = self.assignment().primary
        return seat.host if seat else None

    def backups(self) -> list[str]:
        """The hosts of the backups, in order."""
        return [seat.host for seat in self.assignment().backups]

    def seat(self, host: str) -> Seat:
        """Return the seat that the application under test has on a host."""
        return next(seat for seat in self.assignment().seats if seat.host == host)

    # --- what people and hosts do ----------------------------------------------------------------------------------

    def commit(self, *operations: Operation) -> int:
        """Write one transaction; return its revision."""
        self.view.revision += 1
        revision = self.view.revision
        for kind, names, value in operations:
            if kind == "placements":
                self.placements.pop((names[0], names[1]), None)
                if value is not None:
                    self.placements[names[0], names[1]] = (value, revision)
            elif kind == "successions":
                self.successions.pop((names[0], names[1]), None)
                if value is not None:
                    self.successions[names[0], names[1]] = value
            self.touched |= self.view.apply(kind, names, value, revision, revision)
        return revision

    def register(
        self,
        name: str = APP,
        *,
        degree: int = 2,
        style: Style = Style.WARM,
        hosts: Iterable[str] = (),
        labels: Mapping[str, str] | None = None,
        origin: str | None = None,
        **more: Any,
    ) -> None:
        """Write a registration. By default the application is never parked."""
        program = Program(("python", "app.py"), "/srv")
        more = {"max_restarts": 0, **more}
        registration = Registration(
            name, style, degree, program, hosts=tuple(hosts), labels=labels or {}, origin=origin, **more
        )
        self.commit(("registrations", (name,), registration))

    def resume(self, name: str = APP) -> None:
        """End a pause and write the registration again, as `etcdreplica resume` does for what is parked."""
        self.commit(("pauses", ("app", name), None), ("registrations", (name,), self.app(name).registration))

    def pause(self, *, cluster: bool = False) -> None:
        """Pause the application under test, or the whole cluster."""
        names = ("cluster", "test") if cluster else ("app", APP)
        self.commit(("pauses", names, Pause("ann@desk", "work on the roof")))

    def unpause(self, *, cluster: bool = False) -> None:
        """End it."""
        self.commit(("pauses", ("cluster", "test") if cluster else ("app", APP), None))

    def ask(self, ask: Ask, to: str | None = None) -> None:
        """Ask for something with the application under test, as the command line does."""
        primary = self.assignment().primary
        request = Request(ask, "ann@desk", primary.incarnation if primary else 0, to)
        self.commit(("requests", (APP,), request))

    def drain(self, *hosts: str) -> None:
        """Drain hosts."""
        self.commit(*(("drains", (host,), Drain("ann@desk")) for host in hosts))

    def undrain(self, *hosts: str) -> None:
        """End that."""
        self.commit(*(("drains", (host,), None) for host in hosts))

    def recent(self) -> int:
        """How many failures the manager counts in the window."""
        return len(self.memories[APP].recent or {})

    def unregister(self, name: str = APP) -> None:
        """Delete a registration, and with it a pause."""
        self.commit(("registrations", (name,), None), ("pauses", ("app", name), None))

    def join(self, *hosts: str, capacity: int = 100, **labels: str) -> None:
        """Begin a session on each host."""
        for host in hosts:
            self.commit(("hosts", (host,), Host("10.0.0.1", 1, labels, capacity)))

    def lose(self, host: str) -> None:
        """End the leases of a host: its key and those of its replicas vanish."""
        replicas = [("replicas", (name, host), None) for name, app in self.view.apps.items() if host in app.replicas]
        self.commit(("hosts", (host,), None), *replicas)

    def report_losses(self) -> None:
        """Do what the SuperWatchDog does."""
        for app in list(self.view.apps.values()):
            for seat, role in list(lost_seats(app, self.view)):
                assert app.assignment is not None
                reason = f"host {seat.host} is down"
                failure = Failure(seat.host, seat.incarnation, app.assignment.epoch, role, FailureKind.HOST, reason, "super")
                self.commit(("failures", (app.name, str(seat.incarnation)), failure))

    def show(self, *hosts: str, state: ReplicaState | None = None, app: str = APP) -> None:
        """Have the WatchDogs of these hosts publish the replicas they were given; by default primaries run, others wait."""
        for host in hosts:
            placement, _ = self.placements[host, app]
            usual = ReplicaState.RUNNING if placement.role is Role.PRIMARY else ReplicaState.READY
            replica = Replica(placement.incarnation, placement.epoch, placement.role, state or usual)
            self.commit(("replicas", (app, host), replica))

    def show_all(self) -> None:
        """Have every replica of the application under test shown as it should be."""
        self.show(*(seat.host for seat in self.assignment().seats))

    def fail(
        self, host: str, kind: FailureKind = FailureKind.EXIT, *, uptime_s: float | None = 0.1, succession: bool = True
    ) -> Failure:
        """Have the WatchDog of a host report the end of its replica and call the successor, if there is one."""
        seat, old = self.seat(host), self.assignment()
        role = Role.PRIMARY if seat == old.primary else Role.BACKUP
        failure = Failure(host, seat.incarnation, old.epoch, role, kind, f"{kind} on {host}", host, uptime_s)
        operations: list[Operation] = [
            ("replicas", (APP, host), None),
            ("failures", (APP, str(seat.incarnation)), failure),
        ]
        successor = old.successor if role is Role.PRIMARY else None
        if succession and kind is not FailureKind.DONE and successor in self.app().replicas:
            operations.append(("successions", (successor, APP), Succession(old.epoch + 1, seat.incarnation)))
        self.commit(*operations)
        return failure

    # --- what the manager does -------------------------------------------------------------------------------------

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    def restart_manager(self) -> None:
        """Elect another manager, which remembers nothing."""
        self.memories.clear()

    def decide(self, name: str = APP) -> Decision:
        """Ask the planner."""
        return decide(self.app(name), self.view, self.memories[name], self.now, SETTINGS)

    def step(self, name: str = APP) -> Decision:
        """Ask the planner and write what it says."""
        decision = self.decide(name)
        if decision.plan is not None:
            self.write(name, decision.plan)
        return decision

    def run(self, name: str = APP) -> Decision:
        """Step until the manager has nothing to write; return the last decision."""
        for _ in range(QUIET_AFTER):
            if name not in self.view.apps:
                return Decision()
            decision = self.step(name)
            if decision.plan is None:
                return decision
        raise AssertionError(f"the planner does not come to rest: {self.decide(name)}")

    def write(self, name: str, plan: Plan) -> None:
        """Write a plan as the ReplicaManager does, in one transaction."""
        app, old, new = self.app(name), self.app(name).assignment, plan.assignment
        operations: list[Operation] = [("assignments", (name,), new)]
        hosts = {seat.host for seat in new.seats} if new else set()
        operations += [("placements", (seat.host, name), None) for seat in (old.seats if old else ()) if seat.host not in hosts]
        kept = [seat for seat in (new.seats if new else ()) if seat.incarnation not in app.failures]
        operations += [("placements", (seat.host, name), new.placement(seat)) for seat in kept if new]
        operations += [("successions", (host, name), None) for host in list(app.successions)]
        operations += [("failures", (name, str(i)), None) for i in (plan.consumed if new else list(app.failures))]
        for event in plan.events:
            self.events[event.failure.incarnation] = event
            operations.append(("history", (name, str(event.failure.incarnation)), event))
        most = HISTORY_KEPT - len(plan.events) if new else 0
        operations += [("history", (name, str(i)), None) for i in sorted(app.history, reverse=True)[most:]]
        operations += [("pauses", ("app", name), None)] if new is None else []
        operations += [("requests", (name,), None)] if new is None or plan.answered else []
        self.commit(*operations)


def delay_s(strikes: int, name: str = APP) -> float:
    """Return how long an application waits after this many strikes."""
    return restart_delay_s(strikes, name, SETTINGS.restart)


def placed(*hosts: str, degree: int = 2, style: Style = Style.WARM, **more: Any) -> World:
    """Return a world in which the application runs with its degree, its primary on the first host."""
    world = World(*hosts)
    world.register(degree=degree, style=style, origin=hosts[0], **more)
    world.run()
    world.show_all()
    world.run()
    return world


def crash(world: World, times: int) -> Decision:
    """Have the primary crash soon after each start, without waiting; return the last decision."""
    decision = Decision()
    for _ in range(times):
        world.show_all()
        world.run()
        world.fail(world.primary() or "", uptime_s=0.1)
        decision = world.step()
    return decision
