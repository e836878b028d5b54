"""How many programs of a host start at one time.

A program that starts wants all the CPU it can get. A hundred of them at once, after a power cut or a mass fail-over, would
slow each other down and leave nothing for whoever renews their leases.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable

AT_ONCE_PER_CPU = 4
LONGEST_S = 3.0  # a program that takes longer to start does not keep the next one waiting


class Starts:
    """Turns to start a program; each `turn` must be followed by `over`."""

    def __init__(self, at_once: int | None = None) -> None:
        self._turns = asyncio.Semaphore(at_once or AT_ONCE_PER_CPU * (os.cpu_count() or 1))
        self._under_way: set[asyncio.Task[None]] = set()

    async def turn(self) -> None:
        """Return when one more program may start."""
        await self._turns.acquire()

    def over(self) -> None:
        """A program has started, or never will."""
        self._turns.release()

    def over_with(self, started: Awaitable[object]) -> None:
        """Give the turn to the next one when this is done, or has taken too long."""

        async def wait() -> None:
            await asyncio.wait([asyncio.ensure_future(started)], timeout=LONGEST_S)
            self.over()

        task = asyncio.create_task(wait())
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
