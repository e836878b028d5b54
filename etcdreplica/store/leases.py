"""Leases of a process, renewed on a few streams.

A lease counts from when its renewal was *sent*: etcd may have received it at any moment after that, so what etcd grants
ends no earlier than `deadline`. Whoever holds something under a lease must have let go of it by then; `Lease.lost` says
when that is, without asking etcd. A lost lease never comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from operator import attrgetter
from typing import Any

from aetcd.rpc import rpc_pb2 as rpc

from etcdreplica.clock import Clock, boottime
from etcdreplica.core.timing import Timing
from etcdreplica.errors import StoreError, StoreUnavailableError
from etcdreplica.store.channel import EtcdChannel

log = logging.getLogger(__name__)

GRID = 1 / 6  # of a TTL: renewals are sent at its multiples, so that those of many leases are sent together
RECONNECT_S = 0.1  # after it was begun, a stream that ended is begun again: at once, if it has lasted
STREAMS = 8  # one message at a time is under way on each: with hundreds of leases this halves what they cost


class Lease:
    """One lease. `deadline` is on the keeper's clock; `lost` is done once the lease cannot be relied on.

    Until `kept_until` it is not given up, although it may have ended: who relies on `deadline` must look at that.
    """

    def __init__(self, lease_id: int, ttl_s: float, sent_at: float) -> None:
        self.id = lease_id
        self.ttl_s = ttl_s
        self.deadline = sent_at + ttl_s
        self.kept_until = 0.0
        self.is_confirmed = True  # by etcd, to this process
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.sent: deque[float] = deque()
        self.renew_after(sent_at)

    def renew_after(self, sent_at: float) -> None:
        """Be renewed an interval after that, or a little sooner."""
        grid_s = GRID * self.ttl_s
        self.renew_at = math.floor((sent_at + self.ttl_s / Timing.renewals_per_ttl) / grid_s) * grid_s

    def lose(self, reason: str) -> None:
        """Mark the lease as lost."""
        if not self.lost.done():
            self.lost.set_result(reason)

    def keep(self, until: float) -> None:
        """Go on renewing it at least until then."""
        self.kept_until = max(self.kept_until, until)

    def confirm(self, ttl_s: float) -> None:
        """Take the answer to the oldest renewal under way."""
        self.is_confirmed = True
        if self.sent:
            self.deadline = max(self.deadline, self.sent.popleft() + ttl_s)


class _Alarm:
    """Waits until a moment, or until an earlier one is named; so a thousand new leases wake nobody a thousand times."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._at: float | None = None
        self._hurry = asyncio.Event()

    def by(self, at: float) -> None:
        """Have whoever waits go on at that time at the latest."""
        if self._at is None or at < self._at:
            self._hurry.set()

    async def wait(self, at: float | None) -> None:
        """Wait; without a moment, until one is named."""
        self._at = at
        self._hurry.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if at is None else max(0.0, at - self._clock()) + 0.001):
                await self._hurry.wait()


class LeaseKeeper:
    """Grants, renews and revokes the leases of this process."""

    def __init__(self, channel: EtcdChannel, clock: Clock = boottime) -> None:
        self._channel = channel
        self._clock = clock
        self._leases: dict[int, Lease] = {}
        self.on_confirm: Callable[[Lease], None] = lambda _: None  # called when a deadline has moved
        self._by_stream: dict[int, dict[int, Lease]] = {stream: {} for stream in range(STREAMS)}
        self._alarms = [_Alarm(clock) for _ in range(STREAMS)]
        self._expiry = _Alarm(clock)
        self._expiring: asyncio.Task[None] | None = None
        self._renewing: dict[int, asyncio.Task[None]] = {}  # by stream, from the first lease that falls to it

    async def grant(self, ttl_s: float) -> Lease:
        """Ask etcd for a lease; etcd may grant a longer one than asked for.

        Raises StoreError; a grant whose answer was lost expires by itself.
        """
        sent_at = self._clock()
        answer = await self._channel.call("Lease.LeaseGrant", rpc.LeaseGrantRequest(TTL=max(1, math.ceil(ttl_s))))
        lease = Lease(answer.ID, float(answer.TTL), sent_at)
        self._hold(lease)
        return lease

    def _hold(self, lease: Lease) -> None:
        stream = lease.id % STREAMS
        self._leases[lease.id] = self._by_stream[stream][lease.id] = lease
        self._alarms[stream].by(lease.renew_at)
        self._expiry.by(lease.deadline)
        self._expiring = self._expiring or asyncio.create_task(self._expire())
        if stream not in self._renewing:
            self._renewing[stream] = asyncio.create_task(self._renew(stream))

    def _forget(self, lease: Lease, reason: str) -> None:
        self._leases.pop(lease.id, None)
        self._by_stream[lease.id % STREAMS].pop(lease.id, None)
        lease.lose(reason)

    def _of(self, stream: int) -> list[Lease]:
        """Return the leases of a stream, first those that end first: a slow stream that is given up gets on all the same."""
        return sorted(self._by_stream[stream].values(), key=attrgetter("deadline"))

    def resume(self, lease_id: int, ttl_s: float, deadline: float) -> Lease:
        """Go on renewing a lease that an earlier process of this host held, confirmed until `deadline`."""
        lease = Lease(lease_id, ttl_s, deadline - ttl_s)
        lease.renew_at = self._clock()
        lease.is_confirmed = False
        self._hold(lease)
        return lease

    async def revoke(self, lease: Lease) -> None:
        """Give a lease up: its keys vanish at once. An already expired one is no error."""
        self._forget(lease, "revoked")
        await self.revoke_id(lease.id)

    def drop(self, lease: Lease) -> None:
        """Renew it no longer: it expires by itself."""
        self._forget(lease, "given up")

    async def revoke_id(self, lease_id: int) -> None:
        """Give up a lease of another process of this host that is known to be dead."""
        try:
            await self._channel.call("Lease.LeaseRevoke", rpc.LeaseRevokeRequest(ID=lease_id))
        except StoreError as error:
            if "not found" not in str(error):
                raise

    async def close(self) -> None:
        """Stop renewing. The leases then expire by themselves unless they were revoked."""
        tasks = [*self._renewing.values(), *([self._expiring] if self._expiring else [])]
        self._renewing, self._expiring = {}, None
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _renew(self, stream: int) -> None:
        task = asyncio.current_task()
        while task is None or not task.cancelling():  # gRPC may swallow a cancellation
            began = self._clock()
            for lease in self._of(stream):
                lease.sent.clear()
            try:
                async for answer in self._channel.stream("Lease.LeaseKeepAlive", self._requests(stream)):
                    self._take(answer)
            except StoreError as error:
                log.debug("lease stream lost: %s", error)
            await asyncio.sleep(max(0.0, began + RECONNECT_S * (0.5 + random.random()) - self._clock()))

    async def _requests(self, stream: int) -> AsyncIterator[Any]:
        first = True
        while True:
            now = self._clock()
            for lease in self._of(stream):
                if not first and lease.renew_at > now:
                    continue
                if lease.sent:
                    raise StoreUnavailableError("a renewal was not answered in time: try another endpoint while there is time")
                sent_at = self._clock()
                lease.sent.append(sent_at)
                lease.renew_after(sent_at)
                yield rpc.LeaseKeepAliveRequest(ID=lease.id)
            first = False
            await self._alarms[stream].wait(min((lease.renew_at for lease in self._by_stream[stream].values()), default=None))

    async def _expire(self) -> None:
        while True:
            for lease in list(self._leases.values()):
                if max(lease.deadline, lease.kept_until) <= self._clock():
                    self._forget(lease, f"not renewed for {lease.ttl_s:g} s")
            ends = (max(lease.deadline, lease.kept_until) for lease in self._leases.values())
            await self._expiry.wait(min(ends, default=None))

    def _take(self, answer: Any) -> None:
        lease = self._leases.get(answer.ID)
        if lease is None:
            return
        if answer.TTL <= 0:
            self._forget(lease, "etcd says it has expired")
        else:
            lease.confirm(float(answer.TTL))
            self.on_confirm(lease)
