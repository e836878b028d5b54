"""Whether a history of operations on one register could have come from one register that does one thing at a time.

The search of Wing and Gong: take any operation that no other one had ended before, see whether its answer is right, and go on;
states that were seen before are not looked at again. An operation whose outcome is unknown has no end, and need not happen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import inf

from attrs import frozen

ADD, READ = "add", "read"


@frozen
class Operation:
    """What somebody did to a counter: `add` gives the new value back, `read` the value. `end` is infinite if it is unknown."""

    key: str
    kind: str
    amount: int
    answer: int | None
    start: float
    end: float = inf


def is_linearizable(history: Iterable[Operation]) -> bool:
    """Look at each key on its own. Operations of unknown outcome may have happened at any time after their start, or never."""
    keys: dict[str, list[Operation]] = defaultdict(list)
    for operation in history:
        if operation.kind == ADD or operation.end < inf:  # a read without an answer says nothing
            keys[operation.key].append(operation)
    return all(_is_linearizable(sorted(operations, key=lambda o: o.start)) for operations in keys.values())


def _is_linearizable(operations: list[Operation]) -> bool:
    must = sum(1 << place for place, operation in enumerate(operations) if operation.end < inf)
    everything = (1 << len(operations)) - 1
    seen = set()
    todo = [(everything, 0)]
    while todo:
        left, value = todo.pop()
        if not left & must:
            return True
        if (left, value) in seen:
            continue
        seen.add((left, value))
        first_end = inf
        rest = left
        while rest:
            place = (rest & -rest).bit_length() - 1
            rest &= rest - 1
            operation = operations[place]
            if operation.start > first_end:
                break  # and so are all that come after it
            first_end = min(first_end, operation.end)
            after = value + operation.amount
            if operation.answer is None or operation.answer == after:
                todo.append((left & ~(1 << place), after))
    return False
