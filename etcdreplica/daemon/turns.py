"""How many programs of a host start, and how many primaries of it hand over, at one time.

A program that starts wants all the CPU it can get. A hundred of them at once, after a power cut or a mass fail-over, would
slow each other down and leave nothing for whoever renews their leases. A hundred primaries that end at once, when their host
is drained, would all be gone for as long as all of that takes; in turns each is gone for a moment.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable

from etcdreplica.daemon.waiting import first

CPUS = os.cpu_count() or 1
STARTS = 4 * CPUS
HANDOVERS = max(1, CPUS // 2)
START_S = 3.0  # a program that takes longer to start does not keep the next one waiting
HANDOVER_S = 0.1  # nor does a primary that takes longer to end


class Turns:
    """At most so many at a time; each turn that was taken must be followed by `over`, or `over_with`."""

    def __init__(self, at_once: int, longest_s: float) -> None:
        self._turns = asyncio.Semaphore(at_once)
        self._longest_s = longest_s
        self._under_way: set[asyncio.Task[None]] = set()

    async def take(self, *unless: object) -> bool:
        """Return True when it is one's turn, False if one of these comes first."""
        turn = asyncio.create_task(self._turns.acquire())
        await first(turn, *unless)
        if turn.done() and not turn.cancelled():
            return True
        turn.add_done_callback(lambda task: None if task.cancelled() else self.over())
        return False

    def over(self) -> None:
        """It is done, or never will be."""
        self._turns.release()

    def over_with(self, done: Awaitable[object]) -> None:
        """Give the turn to the next one when this is done, or has taken too long."""

        async def wait() -> None:
            await asyncio.wait([asyncio.ensure_future(done)], timeout=self._longest_s)
            self.over()

        task = asyncio.create_task(wait())
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
