"""For how long a replica may run: its own lease and that of its host, whichever could end first.

With `failsafe` also without them, for as long as others vouch for it.
"""

from __future__ import annotations

import asyncio

from etcdreplica.clock import Clock
from etcdreplica.core.timing import Timing
from etcdreplica.store import Lease


class Hold:
    """The two leases. `own` is None until one was granted."""

    def __init__(self, host: Lease, timing: Timing, clock: Clock) -> None:
        self.own: Lease | None = None
        self._vouched_until = 0.0
        self._host = host
        self._timing = timing
        self._clock = clock

    @property
    def until(self) -> float | None:
        """When the kernel must have ended the process, unless a lease is renewed before. None while there is no lease."""
        return None if self.own is None else self._end - self._timing.kernel_margin_s

    @property
    def left(self) -> float:
        """Seconds until the WatchDog must have begun to end the process."""
        if any(lease.lost.done() for lease in self._leases):
            return 0.0
        return self._end - self._timing.fence_margin_s - self._clock()

    @property
    def confirmed_left(self) -> float:
        """The same, by what etcd has confirmed to this process alone."""
        if any(lease.lost.done() or not lease.is_confirmed for lease in self._leases):
            return 0.0
        return min(lease.deadline for lease in self._leases) - self._timing.fence_margin_s - self._clock()

    def vouched(self, until: float) -> None:
        """Let it run until then, whatever becomes of the leases."""
        self._vouched_until = max(self._vouched_until, until)
        for lease in self._leases:
            lease.keep(until)

    async def ended(self) -> None:
        """Return when nothing is left."""
        while (left := self.left) > 0:
            lost = [lease.lost for lease in self._leases]
            await asyncio.wait(lost, timeout=left, return_when=asyncio.FIRST_COMPLETED)

    @property
    def _end(self) -> float:
        return max(self._vouched_until, min(lease.deadline for lease in self._leases))

    @property
    def _leases(self) -> tuple[Lease, ...]:
        return (self._host, self.own) if self.own else (self._host,)
