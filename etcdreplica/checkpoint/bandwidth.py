"""A limit on how much is sent in a second, for all transfers of a host together."""

from __future__ import annotations

import asyncio

from etcdreplica.clock import Clock

BURST_S = 0.1  # so much time's worth may be sent at once


class Bandwidth:
    """`bytes_s` bytes a second; 0 for no limit."""

    def __init__(self, bytes_s: float, clock: Clock) -> None:
        self._bytes_s = bytes_s
        self._clock = clock
        self._free_at = 0.0

    async def take(self, count: int) -> None:
        """Wait until so many bytes may be sent."""
        if not self._bytes_s:
            return
        now = self._clock()
        self._free_at = max(self._free_at, now - BURST_S) + count / self._bytes_s
        if self._free_at > now:
            try:
                await asyncio.sleep(self._free_at - now)
            except asyncio.CancelledError:
                self._free_at -= count / self._bytes_s  # nothing was sent
                raise
