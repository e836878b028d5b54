"""One process that stands in for the WatchDogs of hundreds of hosts, at the level of etcd: leases, host keys, replicas.

`python -m etcdreplica.testing.fleet ENDPOINT CLUSTER HOSTS CAPACITY TTL`. It follows all placements and shows each as a
replica under a lease of its own, as the WatchDogs would. Commands on standard input, answers as lines of JSON on standard
output; moments are CLOCK_BOOTTIME seconds:

    join          bring all hosts up at once                          {"at"}
    await APPS    until so many applications have both their copies   {"at"}, of the last placement
    settle        until every primary has a successor and all that is to be shown is shown      {"at"}
    lose          revoke the leases of the fullest host               {"at", "apps", "again", "restored"}

`again`: when each application that lost its primary had another one; `restored`: when all had both copies again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

from attrs import define, field

from etcdreplica.clock import boottime
from etcdreplica.daemon.waiting import insist
from etcdreplica.model import Host, Placement, Replica, ReplicaState
from etcdreplica.store import Corrupt, EtcdOptions, Key, Kind, Lease, Put, Store, Txn
from etcdreplica.words import Role

AT_ONCE = 32  # writes under way
DEGREE = 2


@define
class Copy:
    """A replica of one placement, and its lease."""

    placement: Placement
    lease: Lease | None = None
    is_queued: bool = False  # to be shown
    is_being_shown: bool = False


@define
class App:
    """The placements of one application, by host."""

    copies: dict[str, Copy] = field(factory=dict)

    @property
    def primary(self) -> str | None:
        """The host of its primary."""
        return next((host for host, copy in self.copies.items() if copy.placement.role is Role.PRIMARY), None)

    @property
    def is_settled(self) -> bool:
        """Whether it has both copies, and its primary a successor."""
        host = self.primary
        return host is not None and len(self.copies) == DEGREE and self.copies[host].placement.successor is not None


class Fleet:
    """The hosts and what is placed on them."""

    def __init__(self, store: Store, count: int, capacity: int, ttl_s: float) -> None:
        self._store = store
        self._names = [f"host-{number:04}" for number in range(count)]
        self._capacity = capacity
        self._ttl_s = ttl_s
        self._hosts: dict[str, tuple[int, Lease]] = {}  # session and lease
        self._apps: dict[str, App] = {}
        self._full: set[str] = set()  # applications with both copies
        self._settled: set[str] = set()
        self._lost: dict[str, float] = {}  # primaries: when each had another one, 0 while it has none
        self._to_show: asyncio.Queue[tuple[str, str, Copy]] = asyncio.Queue()
        self._unshown = 0
        self._changed = asyncio.Event()
        self._placed_at = 0.0

    async def run(self, commands: asyncio.StreamReader) -> None:
        """Obey until the end of the commands."""
        async with asyncio.TaskGroup() as tasks:
            work = [tasks.create_task(self._follow()), *(tasks.create_task(self._show()) for _ in range(AT_ONCE))]
            while line := await commands.readline():
                print(json.dumps(await self._obey(*line.decode().split())), flush=True)
            for each in work:
                each.cancel()

    async def _obey(self, command: str, *arguments: str) -> dict[str, Any]:
        at = boottime()
        if command == "join":
            await asyncio.gather(*map(self._join, self._names))
        elif command == "await":
            await self._until(lambda: len(self._full) >= int(arguments[0]))
            at = self._placed_at
        elif command == "settle":
            await self._until(lambda: len(self._settled) == len(self._apps) and not self._unshown)
            at = boottime()
        else:
            return await self._lose()
        return {"at": at}

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def _join(self, name: str) -> None:
        lease = await insist("granting", lambda: self._store.leases.grant(self._ttl_s))
        put = Put(Key(Kind.HOSTS, (name,)), Host(address=name, pid=1, capacity=self._capacity), lease.id)
        result = await insist("joining", lambda: self._store.commit(Txn((), (put,))))
        self._hosts[name] = (result.revision, lease)

    async def _lose(self) -> dict[str, Any]:
        """End a host and what was shown there."""
        count = dict.fromkeys(self._hosts, 0)
        for app in self._apps.values():
            for host in app.copies:
                count[host] += 1
        lost = max(count, key=lambda host: count[host])
        there = {name: app for name, app in self._apps.items() if lost in app.copies}
        self._lost = {name: 0.0 for name, app in there.items() if app.primary == lost}
        self._full -= there.keys()
        leases = [copy.lease for app in there.values() if (copy := app.copies[lost]).lease is not None]
        _, session = self._hosts.pop(lost)
        at = boottime()
        await self._store.leases.revoke(session)
        await asyncio.gather(*map(self._store.leases.revoke, leases))
        await self._until(lambda: len(self._full) == len(self._apps) and all(self._lost.values()))
        return {"at": at, "apps": len(there), "again": list(self._lost.values()), "restored": self._placed_at}

    async def _follow(self) -> None:
        async with contextlib.aclosing(self._store.follow(Kind.PLACEMENTS)) as batches:
            async for batch in batches:
                for entry in batch.entries:
                    if not isinstance(entry.value, Corrupt):
                        self._take(entry.key.names[0], entry.key.names[1], entry.value)
                self._changed.set()

    def _take(self, host: str, name: str, placement: Placement | None) -> None:
        app = self._apps.setdefault(name, App())
        if placement is None:
            gone = app.copies.pop(host, None)
            if gone is not None and gone.lease is not None:
                self._store.leases.drop(gone.lease)
        elif host in app.copies and app.copies[host].placement.incarnation == placement.incarnation:
            app.copies[host].placement = placement
        else:
            app.copies[host] = Copy(placement)
        if placement is not None:
            self._queue(host, name, app.copies[host])
        self._count(name, app)

    def _queue(self, host: str, name: str, copy: Copy) -> None:
        if not copy.is_queued:
            self._unshown += 1
            copy.is_queued = True
            if not copy.is_being_shown:
                self._to_show.put_nowait((host, name, copy))

    def _count(self, name: str, app: App) -> None:
        now, live = boottime(), app.copies.keys() & self._hosts.keys()
        if len(live) < DEGREE:
            self._full.discard(name)
        elif name not in self._full:
            self._full.add(name)
            self._placed_at = now
        (self._settled.add if app.is_settled else self._settled.discard)(name)
        if self._lost.get(name) == 0.0 and app.primary in live:
            self._lost[name] = now

    async def _show(self) -> None:
        while True:
            host, name, copy = await self._to_show.get()
            copy.is_queued, copy.is_being_shown = False, True
            if host in self._hosts and self._apps[name].copies.get(host) is copy:
                await self._write(host, name, copy)
            copy.is_being_shown = False
            self._unshown -= 1
            if copy.is_queued:
                self._to_show.put_nowait((host, name, copy))
            self._changed.set()

    async def _write(self, host: str, name: str, copy: Copy) -> None:
        placement = copy.placement
        if copy.lease is None:
            copy.lease = await insist("granting", lambda: self._store.leases.grant(self._ttl_s))
        state = ReplicaState.RUNNING if placement.role is Role.PRIMARY else ReplicaState.READY
        shown = Replica(placement.incarnation, placement.epoch, placement.role, state, successor=placement.successor)
        put = Put(Key(Kind.REPLICAS, (name, host)), shown, copy.lease.id)
        await insist("showing", lambda: self._store.commit(Txn((), (put,))))


async def main() -> None:
    """Stand in until the end of standard input."""
    endpoint, cluster, hosts, capacity, ttl_s = sys.argv[1:]
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    async with Store(EtcdOptions((endpoint,), timeout_s=10.0), cluster) as store:
        await Fleet(store, int(hosts), int(capacity), float(ttl_s)).run(commands)


if __name__ == "__main__":
    asyncio.run(main())
