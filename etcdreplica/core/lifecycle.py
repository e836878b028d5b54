"""The life of a replica on its host as one table; docs/state-machines.md is generated from it."""

from __future__ import annotations

from collections.abc import Mapping

from etcdreplica.model import ReplicaState as S

TRANSITIONS: Mapping[S, frozenset[S]] = {
    S.STARTING: frozenset({S.STANDBY, S.READY, S.RUNNING, S.STOPPING}),
    S.STANDBY: frozenset({S.STARTING}),
    S.READY: frozenset({S.STARTING, S.RUNNING, S.STOPPING}),  # back, where the standby command of a plain program ends first
    S.RUNNING: frozenset({S.STOPPING}),
    S.STOPPING: frozenset(),
}
"""Besides these, a replica may end from every state; then nothing of it is published any more."""

PROMOTABLE = frozenset({S.STANDBY, S.READY, S.RUNNING})
"""States in which a backup can take over without waiting for anything."""


class IllegalTransitionError(AssertionError):
    """A replica was moved where its life cannot go: a bug of ours."""


def advance(current: S, new: S) -> S:
    """Return `new` if a replica may go there from `current`; staying is always allowed."""
    if new is not current and new not in TRANSITIONS[current]:
        raise IllegalTransitionError(f"a replica cannot go from {current} to {new}")
    return new


def diagram() -> str:
    """Return the table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {S.STARTING}"]
    lines += [f"    {a} --> {b}" for a in S for b in S if b in TRANSITIONS[a]]
    lines += [f"    {state} --> [*]" for state in S]
    return "\n".join(lines) + "\n"
