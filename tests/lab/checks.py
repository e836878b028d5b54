"""What must hold after any faults. Each check returns what it found wrong, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from attrs import define, frozen

from etcdreplica.model import Event, FailureKind
from etcdreplica.testing.journal import written_lines

PLANNED = (FailureKind.DONE, FailureKind.HANDOVER)
AFTERMATH_S = 20.0  # a fault may show so long after its end: a TTL, a hang timeout, and a machine that others use as well


@frozen
class Journal:
    """What a client of the object did: `try N`, `done N`, `unknown N`."""

    path: Path

    def numbers(self, what: str) -> list[int]:
        """Return the numbers of all lines of one kind."""
        return [int(number) for kind, number in map(str.split, written_lines(self.path)) if kind == what]


@define
class Hit:
    """A fault that was done: copies on `hosts` may end by it. None: nobody should notice it."""

    kind: str
    hosts: frozenset[str]
    begin: float
    end: float = float("inf")

    def excuses(self, event: Event) -> bool:
        """Whether the end of a copy may come from it."""
        failure = event.failure
        return failure.host in self.hosts and self.begin <= failure.detected_at <= self.end + AFTERMATH_S


def lost_tokens(client: str, journal: Journal, held: Sequence[int]) -> list[str]:
    """Return what is wrong with what the object holds of a client: acknowledged once is there once; tried, at most once."""
    counts, tried, found = Counter(held), set(journal.numbers("try")), []
    done = journal.numbers("done")
    if missing := [number for number in done if not counts[number]]:
        found.append(f"{client}: acknowledged updates are lost: {missing[:20]} ({len(missing)} in all)")
    if twice := [number for number, count in counts.items() if count > 1]:
        found.append(f"{client}: updates were applied more than once: {twice[:20]}")
    places = {number: place for place, number in enumerate(held)}
    if late := [b for a, b in pairwise(done) if a in places and b in places and places[a] > places[b]]:
        found.append(f"{client}: not in the order in which they were acknowledged: {late[:20]}")
    if strange := [number for number in counts if number not in tried]:
        found.append(f"{client}: updates that nobody made: {strange[:20]}")
    return found


def lost_checkpoints(app: str, journal: Path) -> list[str]:
    """Return what is wrong with a writer's journal: something acknowledged was lost, or acknowledged twice."""
    found: list[str] = []
    best = epoch = 0
    for line in written_lines(journal):
        kind, by, number = line.split()
        count = int(number)
        if int(by) < epoch:
            found.append(f"{app}: epoch {by} wrote after epoch {epoch}: {line}")
        epoch = max(epoch, int(by))
        if kind == "restored" and count < best:
            found.append(f"{app}: epoch {by} restored {count}, but {best} was acknowledged")
        if kind == "acknowledged" and count <= best:
            found.append(f"{app}: {count} was acknowledged in epoch {by}, after {best}")
        best = max(best, count) if kind == "acknowledged" else best
    return found


def needless(events: Mapping[tuple[str, int], Event], hits: Iterable[Hit], since: float) -> list[str]:
    """Return every end of a copy that no fault explains."""
    hits = list(hits)
    return [
        f"{app}: the {event.failure.role} on {event.failure.host} ended for no reason "
        f"({event.failure.kind}: {event.failure.reason})"
        for (app, _), event in events.items()
        if event.failure.kind not in PLANNED
        and event.failure.detected_at > since
        and not any(hit.excuses(event) for hit in hits)
    ]
