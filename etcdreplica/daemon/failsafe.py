"""failsafe on the side of the primaries of a host: names in etcd who must vouch for them, and asks them when etcd is silent.

The rules stand in `core.failsafe`; the side that promises is `WatchDog.vouch`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import Protocol

from attrs import Factory, define

from etcdreplica.clock import Clock
from etcdreplica.core.failsafe import ANSWER_S, ASK_S, VOUCH_S
from etcdreplica.daemon.peers import PeerClient
from etcdreplica.errors import StoreError
from etcdreplica.model import Placement, Vouchers
from etcdreplica.store import Delete, Key, Kind, Put, Store, Txn, Unchanged
from etcdreplica.words import Role

log = logging.getLogger(__name__)

LOOK_S = 0.1  # how often somebody looks whether a lease is late
RETRY_S = 0.2


@define
class Backing:
    """Who must vouch for one primary. `sets`: what may stand in etcd; the last one was sent last.

    It may run on without its lease only if each of them names somebody, and all whom any of them names vouch for it.
    """

    sets: list[frozenset[str]] = Factory(lambda: [frozenset()])
    addresses: dict[str, str] = Factory(dict)  # by host, where its WatchDog answers

    @property
    def hosts(self) -> frozenset[str]:
        """Whom to ask; nobody: there is no use in asking."""
        return frozenset().union(*self.sets) if all(self.sets) else frozenset()

    @property
    def settled(self) -> Mapping[str, str]:
        """What the next WatchDog of this host may rely on: the addresses of those who must vouch."""
        return self.addresses if len(self.sets) == 1 else {}


async def release(store: Store, app: str, placement: Placement) -> None:
    """Let anybody follow a primary that is dead, and was not wanted any more. Raises StoreError."""
    entry = await store.get(Key(Kind.VOUCHERS, (app,)))
    while entry is not None and entry.value.incarnation == placement.incarnation:
        if (await store.commit(Txn((Unchanged(entry.key, entry.mod_revision),), (Delete(entry.key),)))).succeeded:
            return
        entry = await store.get(entry.key)


class Primary(Protocol):
    """What is asked of a run."""

    app: str
    backing: Backing

    @property
    def standing(self) -> tuple[Placement, int]:
        """Return its placement, and the mod revision of that."""

    @property
    def is_late(self) -> bool:
        """Whether it is a primary that runs, and its leases have not been confirmed for long."""

    def vouched(self, until: float) -> None:
        """It may run until then."""

    def backed(self) -> None:
        """What is known of who must vouch for it has changed."""


class Failsafe:
    """One for each stay of a host. `note` a primary whenever its placement is new; `drop` it before its end is reported."""

    def __init__(self, store: Store, host: str, session: int, clock: Clock, client: PeerClient) -> None:
        self._store = store
        self._host = host
        self._session = session
        self._clock = clock
        self._client = client
        self._primaries: dict[str, Primary] = {}
        self._writing: dict[str, asyncio.Task[None]] = {}
        self._asking: asyncio.Task[None] | None = None
        self._silent: set[str] = set()  # applications for which somebody did not vouch when asked last

    def note(self, run: Primary) -> None:
        """See that the right hosts vouch for it."""
        self._primaries[run.app] = run
        if run.app not in self._writing:
            task = self._writing[run.app] = asyncio.create_task(self._write(run))
            task.add_done_callback(lambda _: self._writing.pop(run.app, None))
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())

    def drop(self, run: Primary) -> None:
        """It runs no longer."""
        if self._primaries.get(run.app) is run:
            del self._primaries[run.app]
            if run.app in self._writing:
                self._writing[run.app].cancel()

    def stop(self) -> None:
        """The stay is over."""
        for task in (*self._writing.values(), *([self._asking] if self._asking else [])):
            task.cancel()

    async def _write(self, run: Primary) -> None:
        """Write who must vouch, until that is what its placement says."""
        written = None
        while written != run.standing:
            placement, revision = run.standing
            record = Vouchers(placement.epoch, placement.incarnation, self._host, self._session, placement.peers)
            if placement.role is not Role.PRIMARY:
                return
            try:
                hosts = (await self._store.list(Kind.HOSTS)).entries
                run.backing.sets.append(frozenset(placement.peers))
                run.backed()
                where = Unchanged(Key(Kind.PLACEMENTS, (self._host, run.app)), revision)
                result = await self._store.commit(Txn((where,), (Put(Key(Kind.VOUCHERS, (run.app,)), record),)))
            except StoreError as error:
                log.debug("%s: cannot write who vouches for it: %s", run.app, error)
                await asyncio.sleep(RETRY_S)
                continue
            if not result.succeeded:  # a newer placement is on its way
                await asyncio.sleep(RETRY_S)
                continue
            known = {entry.key.names[0]: entry.value for entry in hosts}
            addresses = {host: getattr(known.get(host), "peer", "") for host in placement.peers}
            run.backing.sets, run.backing.addresses = [frozenset(placement.peers)], addresses
            run.backed()
            written = placement, revision

    async def _ask(self) -> None:
        while True:
            late = [run for run in self._primaries.values() if run.is_late and run.backing.hosts]
            if late:
                await self._ask_for(late)
            await asyncio.sleep(ASK_S if late else LOOK_S)

    async def _ask_for(self, runs: Iterable[Primary]) -> None:
        """Have every voucher asked, once for all applications, and let those run on for which all have promised."""
        sent_at = self._clock()
        wanted: dict[tuple[str, str], dict[str, int]] = {}
        for run in runs:
            for host in run.backing.hosts:
                wanted.setdefault((host, run.backing.addresses.get(host, "")), {})[run.app] = run.standing[0].epoch
        answers = await asyncio.gather(*(self._client.vouch(*who, claims, ANSWER_S) for who, claims in wanted.items()))
        given = {(host, app) for (host, _), apps in zip(wanted, answers, strict=True) for app in apps}
        for run in runs:
            silent = sorted(host for host in run.backing.hosts if (host, run.app) not in given)
            if not silent:
                run.vouched(sent_at + VOUCH_S)
            self._tell(run.app, silent)

    def _tell(self, app: str, silent: list[str]) -> None:
        if silent and app not in self._silent:
            log.warning("%s: etcd is silent, and %s did not vouch for its primary here", app, ", ".join(silent))
        elif app in self._silent and not silent:
            log.warning("%s: all vouch for its primary here again", app)
        (self._silent.add if silent else self._silent.discard)(app)
