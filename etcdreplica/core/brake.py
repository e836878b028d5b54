"""The SuperWatchDog's mind: which replicas are lost with their hosts, and when so many are lost that it is hard to believe.

A host is lost when its lease has ended. But a stalled etcd can end the leases of healthy hosts, all at about one time; they
come back by themselves, and until then everything would be moved to the few that are left. So when more than half of the
hosts vanish within one TTL, the rest of them is not reported before another TTL has passed and the hosts were read again.
Nothing moves until a loss is reported, and a WatchDog that lost its lease has ended its replicas without being told.

Hosts that nothing ran on do not count: those that left in order have handed their seats over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Set as AbstractSet

from attrs import Factory, define

from etcdreplica.core.view import AppView, ClusterView
from etcdreplica.model import FailureKind, Seat
from etcdreplica.words import Role

AGAIN_S = 0.2  # read the hosts again after this when etcd knows of one that we do not see yet
FEWEST = 2


def lost_seats(app: AppView, cluster: ClusterView) -> Iterator[tuple[Seat, Role]]:
    """Every seat in etcd, with its role, that went with its host, and whose end is not reported yet.

    Its host is down, has begun a new session, or, if the application wants that, is given up by its peers.
    """
    for seat in app.written.seats if app.written else ():
        host = cluster.hosts.get(seat.host)
        is_lost = host is None or host.session != seat.session or cluster.loss_of(app.name, seat) is not None
        if is_lost and seat.incarnation not in app.failures:
            yield seat, Role.PRIMARY if app.written and seat == app.written.primary else Role.BACKUP


@define
class Occupancy:
    """Which seats have been in use, as far as one SuperWatchDog has seen; at its first look it counts every seat as used.

    A host that leaves in order may be given a seat between its last handover and the end of its lease. Nothing ever ran
    there, so it is no sign of a loss. At first that cannot be told from a lost host of which a replica's lease has ended
    already, and its own has not.
    """

    _used: dict[str, dict[int, bool]] = Factory(dict)  # by application, then by incarnation
    _gone: dict[str, set[str]] = Factory(dict)  # by application, where there are any
    _absent: Counter[str] = Factory(Counter)  # by host: how many applications say so

    def look(self, name: str, cluster: ClusterView) -> None:
        """Take what is seen of an application now."""
        app, before = cluster.apps.get(name), self._used.pop(name, {})
        used: dict[int, bool] = {}
        gone: set[str] = set()
        for seat in app.written.seats if app and app.written else ():
            assert app is not None
            is_gone, failure = seat.host not in cluster.hosts, app.failures.get(seat.incarnation)
            used[seat.incarnation] = app.replica(seat) is not None or before.get(seat.incarnation, not before)
            if is_gone and used[seat.incarnation] and (failure is None or failure.kind is FailureKind.HOST):
                gone.add(seat.host)
        self._absent -= Counter(self._gone.pop(name, ()))
        self._absent.update(gone)
        if used:
            self._used[name] = used
        if gone:
            self._gone[name] = gone

    @property
    def absent(self) -> set[str]:
        """Hosts that are gone although something ran there that did not end before they went."""
        return set(self._absent)


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

    def look(self, present: AbstractSet[str], absent: AbstractSet[str], now: float) -> None:
        """Take what is seen now."""
        self._vanished = {host: at for host, at in self._vanished.items() if now - at < self.ttl_s}
        self._vanished.update(dict.fromkeys(absent - self._absent, now))
        self._absent, self._lost = frozenset(absent), self._lost & absent
        known = present | self._vanished.keys()
        if self.until is None and len(self._vanished) >= max(FEWEST, len(known) // 2 + 1) and self.held:
            self.until = now + self.ttl_s
        if self.until is None:
            self._lost = self._absent

    def release(self, present: AbstractSet[str], now: float) -> None:
        """End the wait: `present` was just read from etcd, so whatever is not in it is lost after all."""
        self._lost = self._lost | (self._absent - present)
        self._vanished = {}
        self.until = now + AGAIN_S if self.held else None
