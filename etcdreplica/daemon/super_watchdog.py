"""The SuperWatchDog: turns the loss of a host into one failure for each replica that was placed there.

It does not decide what follows: each application is handled by the ReplicaManager as its own style and degree say. When
most hosts vanish at once it waits before it believes it (`core.brake`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

from etcdreplica.clock import Clock
from etcdreplica.core.brake import Brake, Occupancy, lost_seats
from etcdreplica.core.view import ClusterView
from etcdreplica.errors import StoreError
from etcdreplica.model import Failure, FailureKind, Seat
from etcdreplica.store import Key, Kind, Put, Store, Txn
from etcdreplica.store.election import Leadership

log = logging.getLogger(__name__)

RETRY_S = 0.1
BATCH = 64  # failures in one transaction; etcd allows 128 operations


class SuperWatchDog:
    """Reports lost hosts for one term of office. `touch` says which applications, or whose hosts, may have changed."""

    def __init__(
        self, store: Store, leadership: Leadership, view: ClusterView, clock: Clock, me: str, lease_ttl_s: float
    ) -> None:
        self._store = store
        self._leadership = leadership
        self._view = view
        self._clock = clock
        self._me = me
        self._dirty: set[str] = set()
        self._wake = asyncio.Event()
        self._reported: dict[str, set[int]] = {}
        self._brake = Brake(lease_ttl_s)
        self._occupancy = Occupancy()

    def touch(self, apps: Iterable[str]) -> None:
        """Look at these applications soon."""
        self._dirty.update(apps)
        self._wake.set()

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            await self._until_due()
            self._wake.clear()
            if self._brake.until is not None and self._clock() >= self._brake.until:
                await self._read_hosts_again()
            dirty, self._dirty = self._dirty, set()
            self._look(dirty)
            puts = [put for name in sorted(dirty) for put in self._failures(name)]
            for start in range(0, len(puts), BATCH):
                await self._write(puts[start : start + BATCH])

    async def _until_due(self) -> None:
        until = self._brake.until
        try:
            async with asyncio.timeout(None if until is None else max(0.0, until - self._clock())):
                await self._wake.wait()
        except TimeoutError:
            return

    def _look(self, dirty: Iterable[str]) -> None:
        """Find out which hosts are not to be reported yet."""
        brake, was_held = self._brake, self._brake.until is not None
        for name in dirty:
            self._occupancy.look(name, self._view)
        brake.look(self._view.hosts.keys(), self._occupancy.absent, self._clock())
        if brake.until is not None and not was_held:
            log.warning("brake: most hosts vanished at once; waiting %g s for %s", brake.ttl_s, ", ".join(brake.held))

    async def _read_hosts_again(self) -> None:
        """After the wait: what is not in etcd now is lost."""
        try:
            hosts = await self._store.list(Kind.HOSTS)
        except StoreError as error:
            log.warning("brake: cannot read the hosts again yet: %s", error)
            await asyncio.sleep(RETRY_S)
            return
        before = self._brake.held
        self._brake.release({entry.key.names[0] for entry in hosts.entries}, self._clock())
        lost = [host for host in before if host not in self._brake.held]
        log.warning("brake: still gone after the wait: %s", ", ".join(lost) or "no host")
        self._dirty.update(self._view.apps)

    def _failures(self, name: str) -> Iterable[Put]:
        app = self._view.apps.get(name)
        if app is None or app.written is None:
            self._reported.pop(name, None)
            return
        reported = self._reported.setdefault(name, set())
        reported &= {seat.incarnation for seat in app.written.seats}
        held = self._brake.held
        for seat, role in lost_seats(app, self._view):
            back = seat.host in self._view.hosts
            if seat.incarnation in reported or (not back and seat.host in held):
                continue
            reported.add(seat.incarnation)
            failure = Failure(
                host=seat.host,
                incarnation=seat.incarnation,
                epoch=app.written.epoch,
                role=role,
                kind=FailureKind.HOST,
                reason=self._why(name, seat),
                by=self._me,
                detected_at=self._clock(),
                wall=time.time(),
            )
            log.warning("%s: %s on %s lost: %s", name, role, seat.host, failure.reason)
            yield Put(Key(Kind.FAILURES, (name, str(seat.incarnation))), failure)

    def _why(self, app: str, seat: Seat) -> str:
        if loss := self._view.loss_of(app, seat):
            return loss.reason
        back = seat.host in self._view.hosts
        return f"host {seat.host} began anew" if back else f"host {seat.host} is down: its lease ended"

    async def _write(self, puts: list[Put]) -> None:
        """Write them if this is still the elected SuperWatchDog. Writing one twice does no harm: it names an incarnation."""
        try:
            await self._store.commit(Txn((self._leadership.condition,), tuple(puts)))
        except StoreError as error:
            log.warning("cannot report lost hosts yet: %s", error)
            for put in puts:
                self._reported.get(put.key.names[0], set()).discard(int(put.key.names[1]))
            self.touch(put.key.names[0] for put in puts)
            await asyncio.sleep(RETRY_S)
