"""The life of a replica: its table, what it refuses, and the diagram made from it."""

from __future__ import annotations

from itertools import product

import pytest

from etcdreplica.core.lifecycle import PROMOTABLE, TRANSITIONS, IllegalTransitionError, advance, diagram
from etcdreplica.model import ReplicaState

PAIRS = list(product(ReplicaState, ReplicaState))


@pytest.mark.parametrize(("current", "new"), [(a, b) for a, b in PAIRS if b in TRANSITIONS[a]])
def test_legal_transition(current: ReplicaState, new: ReplicaState) -> None:
    """What the table allows happens."""
    assert advance(current, new) is new


@pytest.mark.parametrize("state", ReplicaState)
def test_staying_is_legal(state: ReplicaState) -> None:
    """To publish a state again is no transition."""
    assert advance(state, state) is state


@pytest.mark.parametrize(("current", "new"), [(a, b) for a, b in PAIRS if a is not b and b not in TRANSITIONS[a]])
def test_illegal_transition_raises(current: ReplicaState, new: ReplicaState) -> None:
    """What the table does not allow is a bug, and the message names both states."""
    with pytest.raises(IllegalTransitionError, match=f"from {current} to {new}"):
        advance(current, new)


def test_table_is_complete() -> None:
    """Every state has a row, and every state can be reached from the first."""
    assert set(TRANSITIONS) == set(ReplicaState)
    reached = {ReplicaState.STARTING}
    for _ in ReplicaState:
        reached |= {b for a in reached for b in TRANSITIONS[a]}
    assert reached == set(ReplicaState)


def test_stopping_is_final() -> None:
    """Nothing but the end follows, and what starts or ends cannot take over."""
    assert not TRANSITIONS[ReplicaState.STOPPING]
    assert PROMOTABLE.isdisjoint({ReplicaState.STARTING, ReplicaState.STOPPING})


def test_body_never_begins_twice() -> None:
    """From running there is no way back to waiting: a body cannot be called back."""
    assert TRANSITIONS[ReplicaState.RUNNING] <= {ReplicaState.STOPPING}


def test_diagram_lists_every_state_and_transition() -> None:
    """The diagram is the table, with a beginning and an end."""
    lines = [line.strip() for line in diagram().splitlines()]
    assert lines[0] == "stateDiagram-v2"
    assert f"[*] --> {ReplicaState.STARTING}" in lines
    assert {f"{state} --> [*]" for state in ReplicaState} <= set(lines)
    arrows = {line for line in lines if "-->" in line and "[*]" not in line}
    assert arrows == {f"{a} --> {b}" for a, row in TRANSITIONS.items() for b in row}
