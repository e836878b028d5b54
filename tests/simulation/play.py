"""Three hosts with one application of two copies, and what is done to them, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attrs import evolve

from etcdreplica.core.timing import Timing
from etcdreplica.model import Program, Registration
from etcdreplica.testing.simulated_loop import simulated_world
from etcdreplica.words import Style
from tests.simulation.cluster import Cluster
from tests.simulation.faults import enrol, inject
from tests.simulation.run import seeded
from tests.simulation.scenario import Fault

Step = tuple[float, Callable[[Cluster], object]]
APP = "shop"


def play(
    steps: Sequence[Step], until: float, look: Callable[[Cluster], Any], timing: Timing | None = None, **registration: Any
) -> Any:
    """Run it, warm unless `registration` says otherwise, and return what is seen in the end."""
    with seeded(1), simulated_world() as world:
        cluster = Cluster(world, 1, 3, timing or Timing())
        made = cluster.register(evolve(Registration(APP, Style.WARM, 2, Program((), "/"), max_restarts=0), **registration))
        if made.failsafe:
            cluster.witness.failsafe.add(APP)
        world.at(2.0, enrol, cluster, made)
        for at, step in steps:
            world.at(at, step, cluster)
        world.run_until(until)
        seen = look(cluster)
        assert cluster.complaints + world.errors + world.unseen() == []
        return seen


def fault(kind: str, target: str = "", lasts: float = 0.0, how: float = 0.0) -> Callable[[Cluster], object]:
    """Return what has a fault happen."""
    return lambda cluster: inject(cluster, Fault(cluster.world.now, kind, target, lasts, how))
