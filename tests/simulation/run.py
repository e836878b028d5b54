"""One run of a scenario, from the first boot to the removal of everything, and what it proves."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from attrs import frozen

from etcdreplica.model import AssignmentState, Origin, Replica, ReplicaState
from etcdreplica.store import Kind
from etcdreplica.testing.simulated_loop import World, simulated_world
from etcdreplica.words import Failover, Role, Style
from tests.simulation.cluster import Cluster
from tests.simulation.faults import enrol, heal, inject, introduce, remove
from tests.simulation.scenario import STORM_S, WARM_UP_S, Scenario

REGISTER_S = 2.0
LOOK_S = 0.5
PATIENCE_TTLS, PATIENCE_S = 3, 60.0  # within which everything must be well after the last fault
REMOVAL_S = 30.0
TICK_S = 0.5  # how often a simulated WatchDog looks at signs of life: ten times less than a real one, to save time


@frozen
class Result:
    """What came of one run."""

    scenario: Scenario
    violations: tuple[str, ...]
    events: tuple[tuple[float, str], ...]
    simulated_s: float
    promotions: int
    healed_s: float | None  # how long it took after the last fault until all was well
    calls: int  # of etcd

    @property
    def digest(self) -> str:
        """Return what is the same only if everything happened in the same way at the same time."""
        return hashlib.sha256(repr((self.events, self.violations)).encode()).hexdigest()

    def timeline(self) -> str:
        """Return what happened, for people."""
        return "\n".join(f"{at:10.4f}  {what}" for at, what in self.events)


def run(scenario: Scenario) -> Result:
    """Play it."""
    with seeded(scenario.seed), simulated_world() as world:
        return _play(world, scenario)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Jitter of the daemons comes from the seed, and they say nothing."""
    state, disabled = random.getstate(), logging.root.manager.disable
    random.seed(seed)
    logging.disable(logging.CRITICAL)
    try:
        origin = patch("etcdreplica.store.origin.first_origin", lambda: Origin("the first"))
        with patch("etcdreplica.daemon.watchdog.TICK_S", TICK_S), origin:
            yield
    finally:
        logging.disable(disabled)
        random.setstate(state)


def _play(world: World, scenario: Scenario) -> Result:
    cluster = Cluster(world, scenario.seed, scenario.hosts, scenario.timing)
    violations = cluster.complaints
    for app in scenario.apps:
        cluster.register(app.registration)
        if app.registration.failover is Failover.FAST:
            cluster.witness.fast.add(app.registration.name)
        world.at(REGISTER_S, introduce, cluster, app)
        if app.registration.failsafe:
            cluster.witness.failsafe.add(app.registration.name)
    for fault in scenario.faults:
        world.at(fault.at, inject, cluster, fault)
    last = max((fault.at + fault.lasts for fault in scenario.faults if scenario.calm), default=0.0)
    end = max(WARM_UP_S + STORM_S, last) if scenario.faults else 2 * WARM_UP_S
    healed_s: float | None = None
    try:
        if scenario.calm:
            _stays_calm(cluster, scenario, end)
        else:
            world.run_until(end)
        heal(cluster)
        for app in scenario.apps:
            enrol(cluster, cluster.registrations[app.registration.name])
        healed_s = _wait(cluster, PATIENCE_S + PATIENCE_TTLS * scenario.timing.lease_ttl_s, _troubles)
        if healed_s is None:
            violations += [f"never healed: {trouble}" for trouble in _troubles(cluster)]
        for app in scenario.apps:
            remove(cluster, app.registration.name)
        if _wait(cluster, REMOVAL_S, _leftovers) is None:
            violations += [f"left behind: {left}" for left in _leftovers(cluster)]
    except Exception as error:
        violations.append(f"bug: {error!r}")
    violations += world.errors + world.unseen()
    return Result(
        scenario, tuple(violations), tuple(cluster.events), world.now, cluster.witness.promotions, healed_s, cluster.etcd.calls
    )


def _stays_calm(cluster: Cluster, scenario: Scenario, end: float) -> None:
    cluster.world.run_until(WARM_UP_S - 0.1)
    before = cluster.witness.promotions
    cluster.complaints += [f"not up after {WARM_UP_S:g} s: {trouble}" for trouble in _troubles(cluster)]
    cluster.world.run_until(end + 2.0)
    if cluster.witness.promotions != before:
        cluster.complaints.append(f"{cluster.witness.promotions - before} fail-overs of healthy applications")
    for app in scenario.apps:
        if not any(copy.acts for copy in cluster.copies(app.registration.name)):
            cluster.complaints.append(f"the healthy primary of {app.registration.name} is gone")


def _wait(cluster: Cluster, patience_s: float, troubles: object) -> float | None:
    began = cluster.world.now
    while cluster.world.now < began + patience_s:
        cluster.world.run_until(cluster.world.now + LOOK_S)
        if not troubles(cluster):  # type: ignore[operator]
            return cluster.world.now - began
    return None


def _troubles(cluster: Cluster) -> list[str]:
    """Say what is not yet as it should be."""
    assignments, shown = cluster.records(Kind.ASSIGNMENTS), cluster.records(Kind.REPLICAS)
    troubles: list[str] = []
    registered = cluster.records(Kind.REGISTRATIONS)
    for name in cluster.registrations:
        registration = registered.get((name,))
        if registration is None:
            troubles.append(f"{name} is not registered")
            continue
        assignment = assignments.get((name,))
        if assignment is None:
            troubles.append(f"{name} has no assignment")
            continue
        if assignment.state is not AssignmentState.ACTIVE or assignment.degraded or assignment.paused:
            troubles.append(f"{name} is {assignment.state}, degraded {assignment.degraded}: {assignment.reason}")
        if len(assignment.seats) != registration.degree or len({seat.host for seat in assignment.seats}) != registration.degree:
            troubles.append(f"{name} has {len(assignment.seats)} of {registration.degree} seats")
        copies = cluster.copies(name)
        acting = [copy for copy in copies if copy.acts]
        troubles += [f"{copy.name} hangs" for copy in copies if copy.is_hung]
        if len(acting) != 1:
            troubles.append(f"{name} has {len(acting)} primaries")
        for seat in assignment.seats:
            is_primary = seat == assignment.primary
            replica: Replica | None = shown.get((name, seat.host))
            if replica is None or replica.incarnation != seat.incarnation:
                troubles.append(f"{name} on {seat.host} is not shown")
                continue
            role = Role.PRIMARY if is_primary else Role.BACKUP
            state = ReplicaState.RUNNING if is_primary else _BACKUP[registration.style]
            if (replica.role, replica.state) != (role, state):
                troubles.append(f"{name} on {seat.host} is {replica.role} {replica.state}")
            wanted = 0 if state is ReplicaState.STANDBY else 1
            if sum(copy.host.name == seat.host and copy.incarnation == seat.incarnation for copy in copies) != wanted:
                troubles.append(f"{name} on {seat.host} has not {wanted} processes")
        if len(copies) != (1 if registration.style is Style.COLD else registration.degree):
            troubles.append(f"{name} has {len(copies)} processes: {', '.join(copy.name for copy in copies)}")
    return troubles


_BACKUP = {Style.COLD: ReplicaState.STANDBY, Style.WARM: ReplicaState.READY, Style.HOT: ReplicaState.RUNNING}


def _leftovers(cluster: Cluster) -> list[str]:
    """Say what is there that belongs to no host and no manager."""
    left = [copy.name for name in cluster.registrations for copy in cluster.copies(name)]
    store = cluster.etcd.store
    keys = [key.decode().split("/", 3)[3] for key in store.keys(b"/")]
    left += [key for key in keys if not key.startswith(("hosts/", "leaders/", "origin/"))]
    used = {store.record(key).lease for key in store.keys(b"/")}
    left += [f"lease {lease:x}" for lease in store.leases if lease not in used]
    return left
