"""Which hosts have room, and which applications are where: kept up to date, so that nobody has to look at all of them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Set

from attrs import Factory, define


@define
class Room:
    """The hosts that are up by how full they are; equally full ones by name."""

    _order: list[tuple[bool, float, str]] = Factory(list)  # full, load, name
    _keys: dict[str, tuple[bool, float, str]] = Factory(dict)

    def put(self, host: str, seats: int, capacity: int) -> bool:
        """Take how full a host is; return whether it has room now and had none before."""
        before = self._keys.get(host)
        after = (seats >= capacity, seats / max(1, capacity), host)
        if after != before:
            self.drop(host)
            self._keys[host] = after
            insort(self._order, after)
        return not after[0] and (before is None or before[0])

    def drop(self, host: str) -> None:
        """Forget a host that is gone."""
        key = self._keys.pop(host, None)
        if key is not None:
            del self._order[bisect_left(self._order, key)]

    def clear(self) -> None:
        """Forget all."""
        self._order.clear()
        self._keys.clear()

    def __bool__(self) -> bool:
        """Whether any host has room."""
        return bool(self._order) and not self._order[0][0]

    def __iter__(self) -> Iterator[str]:
        """Yield the hosts that have room, the emptiest first."""
        for full, _, host in self._order:
            if full:
                return
            yield host


@define
class Occupants:
    """The applications of each host."""

    _by_host: dict[str, set[str]] = Factory(dict)
    _hosts: dict[str, Set[str]] = Factory(dict)  # by application

    def put(self, app: str, hosts: Set[str]) -> None:
        """Take where an application is now."""
        before = self._hosts.get(app, frozenset())
        if hosts == before:
            return
        for host in before - hosts:
            there = self._by_host[host]
            there.discard(app)
            if not there:
                del self._by_host[host]
        for host in hosts - before:
            self._by_host.setdefault(host, set()).add(app)
        if hosts:
            self._hosts[app] = hosts
        else:
            del self._hosts[app]

    def on(self, host: str) -> Set[str]:
        """Return the applications of a host."""
        return self._by_host.get(host, frozenset())

    @property
    def hosts(self) -> Set[str]:
        """The hosts that have any."""
        return self._by_host.keys()

    def clear(self) -> None:
        """Forget all."""
        self._by_host.clear()
        self._hosts.clear()
