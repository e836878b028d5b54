"""The simulation finds out every version of the daemons that is broken on purpose."""

from __future__ import annotations

import pytest

from tests.simulation.mutations import MUTATIONS, Mutation
from tests.simulation.run import run
from tests.simulation.scenario import scenario

SEEDS = 60  # within so many after the first one that is of use


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_is_caught(mutation: Mutation) -> None:
    """Some seed fails while the mutation is in force."""
    for seed in range(mutation.first_seed, mutation.first_seed + SEEDS):
        with mutation.break_():
            result = run(scenario(seed, calm=mutation.calm))
        if result.violations:
            return
    raise AssertionError(f"{SEEDS} seeds from {mutation.first_seed} do not notice: {mutation.what}")
