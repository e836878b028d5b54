"""The simulation finds out every version of the daemons that is broken on purpose."""

from __future__ import annotations

import pytest

from tests.simulation.mutations import MUTATIONS, Mutation
from tests.simulation.run import run
from tests.simulation.scenario import scenario

SEEDS = 150


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_is_caught(mutation: Mutation) -> None:
    """Some seed fails while the mutation is in force, and holds without it."""
    numbers = range(mutation.first_seed, mutation.first_seed + SEEDS)
    seeds = (scenario(seed, calm=mutation.calm, only=mutation.only) for seed in numbers)
    with mutation.break_():
        caught = next((played for played in seeds if run(played).violations), None)
    assert caught is not None, f"{SEEDS} seeds from {mutation.first_seed} do not notice: {mutation.what}"
    assert not run(caught).violations, "it is not the mutation that is to blame"
