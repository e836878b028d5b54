"""The checker finds what no single register could have done."""

from __future__ import annotations

from math import inf

import pytest

from tests.unit.linearizability import ADD, READ, Operation, is_linearizable


def add(answer: int | None, start: float, end: float = inf, *, key: str = "k") -> Operation:
    """Add one."""
    return Operation(key, ADD, 1, answer, start, end)


def read(answer: int | None, start: float, end: float = inf, *, key: str = "k") -> Operation:
    """Look."""
    return Operation(key, READ, 0, answer, start, end)


GOOD = {
    "nothing": [],
    "one after the other": [add(1, 0, 1), read(1, 2, 3), add(2, 4, 5), read(2, 6, 7)],
    "at once in any order": [add(2, 0, 9), add(1, 0, 9), add(3, 1, 9)],
    "a read beside an add sees either": [add(1, 0, 5), read(0, 1, 2), read(1, 3, 4)],
    "unknown, and has happened": [add(None, 0), read(1, 2, 3)],
    "unknown, and has not": [add(None, 0), read(0, 2, 3)],
    "unknown, and happens late": [add(None, 0), read(0, 2, 3), read(1, 4, 5)],
    "keys are their own": [add(1, 0, 1), add(1, 2, 3, key="l"), read(0, 4, 5, key="m")],
    "a read without an answer": [read(None, 0), add(1, 1, 2)],
}
BAD = {
    "lost": [add(1, 0, 1), read(0, 2, 3)],
    "lost by an add": [add(1, 0, 1), add(1, 2, 3)],
    "twice": [add(1, 0, 1), read(2, 2, 3)],
    "unknown and twice": [add(None, 0), read(2, 2, 3)],
    "seen and gone": [add(None, 0), read(1, 1, 2), read(0, 3, 4)],
    "seen before it began": [read(1, 0, 1), add(1, 2, 3)],
    "stale": [add(1, 0, 1), add(2, 2, 3), read(1, 4, 5)],
    "two see another order": [add(2, 0, 1), add(1, 2, 3)],
    "another key": [add(1, 0, 1), read(1, 2, 3, key="l")],
}


@pytest.mark.parametrize("history", GOOD.values(), ids=GOOD)
def test_histories_that_can_be(history: list[Operation]) -> None:
    """They are accepted."""
    assert is_linearizable(history)


@pytest.mark.parametrize("history", BAD.values(), ids=BAD)
def test_histories_that_cannot_be(history: list[Operation]) -> None:
    """They are rejected."""
    assert not is_linearizable(history)


def test_long_histories() -> None:
    """States that were seen are not looked at again: many operations at once, and some that are unknown, are no problem."""
    history = [add(number, number - 1, number + 6) for number in range(1, 200)] + [add(None, 500 + n) for n in range(8)]
    assert is_linearizable([*history, read(205, 600, 601)])
    assert not is_linearizable([*history, read(208, 600, 601)])
    assert not is_linearizable([*history, read(198, 600, 601)])
