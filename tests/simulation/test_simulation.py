"""A bounded part of the simulation, and that it can be relied on: the same seed is the same run, failures shrink."""

from __future__ import annotations

import pytest
from attrs import evolve

from etcdreplica.model import Registration
from etcdreplica.words import Style
from tests.simulation.mutations import MUTATIONS
from tests.simulation.run import run
from tests.simulation.scenario import Fault, scenario
from tests.simulation.shrink import report, shrink

SEEDS = 100
PART = 20


@pytest.mark.parametrize("first", range(1, SEEDS + 1, PART))
def test_seeds(first: int) -> None:
    """Whatever goes wrong, what is guaranteed holds."""
    for seed in range(first, first + PART):
        result = run(scenario(seed))
        assert not result.violations, report(shrink(result))


@pytest.mark.parametrize("seed", [3, 7, 11, 25])
def test_the_same_seed_is_the_same_run(seed: int) -> None:
    """Two runs of a seed are equal to the last event and the last digit."""
    one, other = run(scenario(seed)), run(scenario(seed))
    assert one.events == other.events
    assert one.digest == other.digest
    assert len(one.events) > 50


def test_different_seeds_are_different_runs() -> None:
    """A seed decides something."""
    assert len({run(scenario(seed)).digest for seed in range(1, 11)}) == 10


def _has_successor(registration: Registration) -> bool:
    return registration.degree > 1 and registration.style is Style.WARM and not registration.restarts_here


def test_a_failing_schedule_shrinks() -> None:
    """Of many faults only what it takes is left, and the timeline says what happened."""
    broken = next(mutation for mutation in MUTATIONS if mutation.name == "same epoch")
    needed = Fault(20.0, "kill primary", "app-0", how=0.1)
    seed = next(seed for seed in range(1, 100) if _has_successor(scenario(seed).apps[0].registration))
    more = tuple(Fault(10.0 + n, "etcd compacts") for n in range(8))
    with broken.break_():
        result = run(evolve(scenario(seed, calm=False), faults=tuple(sorted((*more, needed), key=lambda fault: fault.at))))
        assert result.violations
        small = shrink(result)
    assert small.scenario.faults == (needed,)
    assert "kill primary app-0" in report(small)
    assert "is not above" in report(small)
