"""The primary's side of the log: who has what, and what is therefore acknowledged; no I/O.

A record is *committed*, and its updates acknowledged, when every in-sync copy holds it. While a change of the in-sync set is
being written, or its outcome is unknown, the copies of both sets must hold it: the change may have happened.
"""

from __future__ import annotations

from collections.abc import Iterable

from etcdreplica.objects.log import Log


class PrimaryLog:
    """The log in one epoch. `commit`: what was known to be committed before; with fewer than `min_in_sync`, nothing more is."""

    def __init__(self, me: int, members: Iterable[int], log: Log, commit: int, min_in_sync: int = 1) -> None:
        self.me = me
        self.min_in_sync = min_in_sync
        self.in_sync = frozenset(members) | {me}
        self.changing: frozenset[int] = frozenset()
        self.log = log
        self.commit = commit
        self.held = log.last  # by ourselves: less than all only while a disk is written
        self.acked: dict[int, int] = {}  # by copy that follows: the newest record that it holds, in this epoch

    def ack(self, copy: int, index: int) -> bool:
        """A copy holds everything up to there. Return whether more is committed now."""
        if copy == self.me:
            self.held = max(self.held, index)
        elif index <= self.log.last:
            self.acked[copy] = max(index, self.acked.get(copy, 0))
        return self.advance()

    def gone(self, copy: int) -> None:
        """A copy follows no longer. What it holds it holds, but in the next epoch it has to say so anew."""
        self.acked.pop(copy, None)

    def advance(self) -> bool:
        """See what is committed, and return whether that is more than before."""
        others = (self.in_sync | self.changing) - {self.me}
        least = min((self.acked.get(copy, 0) for copy in others), default=self.held)
        least = min(least, self.held)
        if least <= self.commit or len(self.in_sync) < self.min_in_sync:
            return False
        self.commit = least
        self.log.trim(self.commit)
        return True

    def may_join(self, copy: int) -> bool:
        """Whether a copy that is not in sync holds all that is committed."""
        return copy not in self.in_sync and self.acked.get(copy, -1) >= self.commit

    def change(self, members: Iterable[int]) -> None:
        """A change to these members is being written: from now on they count as well."""
        self.changing |= frozenset(members)

    def changed(self, members: Iterable[int]) -> bool:
        """These are the members, and nothing else is under way any more. Return whether more is committed now."""
        self.in_sync, self.changing = frozenset(members) | {self.me}, frozenset()
        return self.advance()
