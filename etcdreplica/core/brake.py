"""The SuperWatchDog's mind: which replicas are lost with their hosts, and when so many are lost that it is hard to believe.

A host is lost when its lease has ended. But a stalled etcd can end the leases of healthy hosts, all at about one time; they
come back by themselves, and until then everything would be moved to the few that are left. So when more than half of the
hosts vanish within one TTL, the rest of them is not reported before another TTL has passed and the hosts were read again.
Nothing moves until a loss is reported, and a WatchDog that lost its lease has ended its replicas without being told.

Hosts that nothing is placed on do not count: those that left in order have handed their seats over.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet

from attrs import Factory, define

from etcdreplica.core.view import AppView, ClusterView
from etcdreplica.model import FailureKind, Seat
from etcdreplica.words import Role

AGAIN_S = 0.2  # read the hosts again after this when etcd knows of one that we do not see yet
FEWEST = 2


def lost_seats(app: AppView, cluster: ClusterView) -> Iterator[tuple[Seat, Role]]:
    """Every seat, with its role, whose host is down or has begun a new session, and whose end is not reported yet."""
    for seat in app.assignment.seats if app.assignment else ():
        host = cluster.hosts.get(seat.host)
        if (host is None or host.session != seat.session) and seat.incarnation not in app.failures:
            yield seat, Role.PRIMARY if app.assignment and seat == app.assignment.primary else Role.BACKUP


def absent_hosts(cluster: ClusterView) -> set[str]:
    """Hosts that are not there although something is placed on them that did not end before they went."""
    found = set()
    for app in cluster.apps.values():
        for seat in app.assignment.seats if app.assignment else ():
            failure = app.failures.get(seat.incarnation)
            if seat.host not in cluster.hosts and (failure is None or failure.kind is FailureKind.HOST):
                found.add(seat.host)
    return found


@define
class Brake:
    """What one SuperWatchDog remembers of hosts that vanished. Hosts absent at its first look count as vanished then."""

    ttl_s: float
    until: float | None = None  # while set, absent hosts are held; at that time the hosts are to be read again
    _absent: AbstractSet[str] = frozenset()
    _lost: AbstractSet[str] = frozenset()  # absent hosts that may be reported
    _vanished: dict[str, float] = Factory(dict)  # by host, within the last TTL, whether it is back or not

    @property
    def held(self) -> list[str]:
        """Absent hosts that are not to be reported yet."""
        return sorted(self._absent - self._lost)

    def look(self, present: AbstractSet[str], absent: AbstractSet[str], now: float) -> AbstractSet[str]:
        """Take what is seen now, and return the absent hosts that may be reported as lost."""
        self._vanished = {host: at for host, at in self._vanished.items() if now - at < self.ttl_s}
        self._vanished.update(dict.fromkeys(absent - self._absent, now))
        self._absent, self._lost = frozenset(absent), self._lost & absent
        known = present | self._vanished.keys()
        if self.until is None and len(self._vanished) >= max(FEWEST, len(known) // 2 + 1) and self.held:
            self.until = now + self.ttl_s
        if self.until is None:
            self._lost = self._absent
        return self._lost

    def release(self, present: AbstractSet[str], now: float) -> AbstractSet[str]:
        """End the wait: `present` was just read from etcd. Return the hosts that are lost after all."""
        self._lost = self._lost | (self._absent - present)
        self._vanished = {}
        self.until = now + AGAIN_S if self.held else None
        return self._lost
