"""The WatchDog: makes the placements of its host true, watches what runs there, and reports.

It holds one lease for the host and one for each replica. A stay under one host lease is a *session*; placements name the
session they were made for, so nothing is ever started twice. When the session is lost, every replica is killed before
its lease can end, and a new session begins. When only this process is lost, the next one goes on with the same session:
the guardian, which started both, knows what there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from typing import Any

import msgspec

import etcdreplica
from etcdreplica.app.protocol import Message
from etcdreplica.clock import Clock, boottime
from etcdreplica.core.failsafe import Promises
from etcdreplica.core.hang import Awake
from etcdreplica.daemon.app_server import AppConnection
from etcdreplica.daemon.context import HostContext
from etcdreplica.daemon.failsafe import Failsafe
from etcdreplica.daemon.guard import Guard, WardView
from etcdreplica.daemon.hooks import Notifier, app_of, is_beside
from etcdreplica.daemon.machine import Machine
from etcdreplica.daemon.memo import OPENING, SESSION, Memo, SessionMemo
from etcdreplica.daemon.objects import Copies
from etcdreplica.daemon.registry import await_primary, register, unregister
from etcdreplica.daemon.run import Run
from etcdreplica.daemon.settings import NodeSettings
from etcdreplica.daemon.turns import HANDOVER_S, HANDOVERS, START_S, STARTS, Turns
from etcdreplica.daemon.waiting import insist
from etcdreplica.errors import (
    ConfigurationError,
    HostNameTakenError,
    ProtocolError,
    RefusedError,
    StoreDeniedError,
    StoreError,
    UsageError,
)
from etcdreplica.model import Host, Placement, Registration, Succession
from etcdreplica.store import Changes, Corrupt, Entry, Key, Kind, Lease, Put, Snapshot, Store, Txn, Unchanged
from etcdreplica.words import Role, check_seconds

log = logging.getLogger(__name__)

RETRY_S = 0.5
REPORT_S = 3.0  # how long a stopping WatchDog tries to report to etcd
TICK_S = 0.05  # how often the signs of life are looked at, at most


class WatchDog:
    """One host's daemon. `run` serves until cancelled; then it ends every replica and hands its role over."""

    def __init__(
        self, settings: NodeSettings, store: Store, guard: Guard, clock: Clock = boottime, machine: Machine | None = None
    ) -> None:
        self.settings = settings
        self.guard = guard
        self.ready = asyncio.Event()
        self._store = store
        self.clock = clock
        self._machine = machine or Machine()
        self._context: HostContext | None = None  # None also while a session ends: nothing new begins in it
        self._lease: Lease | None = None  # of the session, to its very end
        self._server = self._machine.app_server(settings.socket_path, self._on_hello)
        session = lambda: self._context.session if self._context else 0  # noqa: E731
        self._peers = self._machine.peer_server(settings, session, self.vouch)
        self._promises = Promises(clock())
        self._deferred: dict[str, tuple[Placement, asyncio.TimerHandle]] = {}  # promotions that wait until promises are over
        self._state = self._machine.state_file(settings.state_dir)
        self._copies = Copies(store)
        self._notifier = Notifier(guard, self._machine.process, clock)
        self._runs: dict[str, Run] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._next: dict[str, tuple[Placement, int]] = {}  # what comes after a run that is still ending
        self._begun: dict[str, int] = {}  # by application: the newest incarnation that was begun here
        self._successions: dict[str, Succession] = {}  # by application: the newest one that names this host
        self._registered: dict[str, int] = {}  # by candidate's application: the revision of its registration
        self._candidates: dict[str, AppConnection] = {}
        self._past: set[int] = set()  # leases of sessions that are over, ours or those of a WatchDog that died here
        self._background: set[asyncio.Task[None]] = set()
        self._extending: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Serve. Raises HostNameTakenError, ConfigurationError, StoreDeniedError."""
        self._state.lock()
        self._store.leases.on_confirm = self._on_confirm
        ticking = asyncio.create_task(self._tick())
        try:
            timing = self.settings.timing
            self.guard.backstop(timing.kernel_margin_s - timing.guardian_margin_s)
            await self._end_predecessor()
            await self._start_peers()
            lease = await self._resume_session()
            await self._server.start()
            while True:
                await self._serve(lease or await self._open_session())
                lease = None
        finally:
            ticking.cancel()
            await self._notifier.close(REPORT_S)
            self._copies.stop()
            await self._peers.stop()
            await self._server.close()
            self._state.unlock()

    async def _start_peers(self) -> None:
        try:
            await self._peers.start()
        except ConfigurationError as error:
            if SESSION not in self.guard.wards:
                raise
            log.error("%s; until that is put right, and this node sent SIGHUP, other hosts cannot ask this one", error)

    async def _tick(self) -> None:
        """Look for signs of life, in time that stands still while this process does."""
        awake = Awake(TICK_S)
        while True:
            at = awake.tick(self.clock())
            if awake.lateness_s > 1:
                log.warning("this WatchDog could not run for %.1f s; nobody is blamed for that", awake.lateness_s)
            for run in list(self._runs.values()):
                if at >= run.look_at:
                    run.check(at)
            await asyncio.sleep(TICK_S)

    def _on_confirm(self, _: Lease) -> None:
        """Gather confirmations, but not for so long that the guardian acts on what was known before the last possible one."""
        if self._extending is None:
            timing = self.settings.timing
            gather_s = (timing.fence_margin_s - timing.kernel_margin_s) / 2
            self._extending = asyncio.get_running_loop().call_later(gather_s, self._extend)

    def _extend(self) -> None:
        """Move the deadlines of everything that runs here to where its leases have been confirmed."""
        self._extending = None
        if self._lease is None:
            return
        deadlines = {ward: run.until for run in self._runs.values() if run.until is not None for ward in run.wards}
        session = max(self._lease.deadline, self._lease.kept_until)
        self.guard.until({**deadlines, SESSION: session - self.settings.timing.kernel_margin_s})
        for run in self._runs.values():
            run.renewed()

    async def _serve(self, lease: Lease) -> None:
        """Follow this host's placements for one session."""
        followers: list[asyncio.Future[Any]] = [
            asyncio.create_task(self._follow(kind)) for kind in (Kind.PLACEMENTS, Kind.SUCCESSIONS)
        ]
        self.ready.set()
        try:
            await asyncio.wait((*followers, lease.lost), return_when=asyncio.FIRST_COMPLETED)
            for follower in followers:
                if follower.done():
                    follower.result()
            log.error("the host lease was lost (%s): ending every replica and starting anew", lease.lost.result())
        finally:
            for follower in followers:
                follower.cancel()
            await self._end_session(lease)

    async def _follow(self, kind: Kind) -> None:
        async with contextlib.aclosing(self._store.follow(kind, self.settings.host)) as batches:
            async for batch in batches:
                self._apply(kind, batch)

    def _apply(self, kind: Kind, batch: Snapshot | Changes) -> None:
        for entry in batch.entries:
            if isinstance(entry.value, Corrupt):
                continue  # logged where it was read; what runs goes on
            if kind is Kind.SUCCESSIONS:
                self._succeed(entry)
            else:
                self._place(entry.key.names[1], entry.value, entry.mod_revision)
        if kind is Kind.PLACEMENTS and isinstance(batch, Snapshot):
            wanted = {entry.key.names[1] for entry in batch.entries}
            for app in {*self._runs, *self._next, *self._deferred} - wanted:
                self._place(app, None, batch.revision)

    def _place(self, app: str, placement: Placement | None, revision: int) -> None:
        run = self._runs.get(app)
        context = self._context
        if app in self._deferred:
            self._deferred.pop(app)[1].cancel()
        if placement is not None and self._must_wait(app, placement, revision):
            return
        if placement is None or context is None or placement.session != context.session:
            self._next.pop(app, None)
            if run is not None:
                run.stop()
            elif app in self._begun:
                self.guard.release(app)  # its end need not be remembered any longer
        elif run is None:
            self._begin(context, app, placement, revision)
        elif run.placement.incarnation == placement.incarnation:
            run.place(placement, revision)
            if app in self._successions:  # the two watches need not keep the order
                run.succeed(self._successions[app])
        else:
            self._next[app] = (placement, revision)
            run.stop()

    # --- failsafe: what is promised to primaries of other hosts ------------------------------------------------------

    def vouch(self, app: str, epoch: int) -> bool:
        """Promise a primary elsewhere that no copy here begins to lead for a while; it may rely on that without its lease."""
        run = self._runs.get(app)
        known = [run.placement] if run else []
        known += [waiting[app][0] for waiting in (self._next, self._deferred) if app in waiting]
        called = app in self._successions and self._successions[app].epoch > epoch
        if called or any(placement.role is Role.PRIMARY or placement.epoch > epoch for placement in known):
            return False
        until = self._promises.give(app, self.clock())
        if run is not None:
            run.vouched(until)  # it is needed as long as its primary
        return True

    def _must_wait(self, app: str, placement: Placement, revision: int) -> bool:
        """Put off a promotion while the primary before may rely on what this host has promised."""
        run = self._runs.get(app)
        leads = run is not None and run.placement.incarnation == placement.incarnation and run.placement.role is Role.PRIMARY
        wait_s = self._promises.free_at(app) - self.clock()
        if leads or placement.role is not Role.PRIMARY or not placement.in_doubt or wait_s <= 0:
            return False
        again = asyncio.get_running_loop().call_later(wait_s, self._place, app, placement, revision)
        self._deferred[app] = placement, again
        log.warning("%s: waits %.1f s with leading: the primary before may still run", app, wait_s)
        return True

    def _succeed(self, entry: Entry) -> None:
        app = entry.key.names[1]
        if not isinstance(entry.value, Succession):
            self._successions.pop(app, None)
            return
        self._successions[app] = entry.value
        if app in self._runs:
            self._runs[app].succeed(entry.value)

    def _begin(self, context: HostContext, app: str, placement: Placement, revision: int) -> None:
        if placement.incarnation <= self._begun.get(app, 0):
            return  # it has been here and has ended: the manager only does not know it yet
        self._begun[app] = placement.incarnation
        self._registered.pop(app, None)
        self._start(Run(context, app, placement, revision, self._candidates.pop(app, None)))

    def _start(self, run: Run) -> None:
        app = run.app
        self._runs[app] = run
        task = asyncio.create_task(run.main(), name=f"replica {app}")
        self._tasks[app] = task
        task.add_done_callback(lambda done: self._ended(app, done))

    def _ended(self, app: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(app) is task:
            del self._tasks[app], self._runs[app]
        if not task.cancelled() and task.exception() is not None:
            log.error("%s: a bug in the WatchDog ended its replica", app, exc_info=task.exception())
        following = self._next.pop(app, None)
        if following is not None and self._context is not None:
            self._begin(self._context, app, *following)

    # --- processes -------------------------------------------------------------------------------------------------

    def _on_hello(self, connection: AppConnection, message: Message) -> None:
        if "registration" in message:
            if not isinstance(message["registration"], dict):
                raise ProtocolError("a registration must be an object")
            self._spawn(self._register(connection, message))
            return
        if "client" in message:
            self._copies.admit(connection, message)
            return
        run = self._runs.get(message["app"])
        if run is None or run.placement.incarnation != message["incarnation"]:
            connection.refuse(f"this host has no replica {message['app']} number {message['incarnation']}")
        else:
            run.attach(connection)

    async def _register(self, connection: AppConnection, message: Message) -> None:
        """Register an application; with `adopt`, the process itself waits to become its first primary."""
        try:
            registration = msgspec.convert({**message["registration"], "origin": self.settings.host}, Registration)
        except msgspec.ValidationError as error:
            connection.refuse(f"the registration is not valid: {error}")
            return
        app, adopt = registration.name, bool(message.get("adopt")) and not registration.plain
        if adopt and app in self._candidates:
            connection.refuse(f"another process on this host is registering {app} already")
            return
        if adopt:
            self._candidates[app] = connection
            connection.on_closed = lambda: self._withdraw(app, connection)
            connection.on_message = lambda message: self._on_candidate(app, connection, message)
        try:
            revision = await register(self._store, registration, self.settings.host)
        except (RefusedError, StoreError) as error:
            self._candidates.pop(app, None) if adopt else None
            connection.refuse(str(error))
        else:
            if not adopt:
                await self._confirm(connection, app, message)
            elif self._candidates.get(app) is connection:
                self._registered[app] = revision
            else:  # it went away meanwhile, or has its place already: then this does nothing
                await unregister(self._store, app, revision)

    async def _confirm(self, connection: AppConnection, app: str, message: Message) -> None:
        """Say that it is registered; with `wait`, once its primary runs, or that none does after so many seconds."""
        if "wait" not in message:
            connection.send("ok")
            return
        try:
            limit_s = check_seconds("wait", message["wait"], 0)
            host, epoch = await await_primary(self._store, app, limit_s)
        except (RefusedError, StoreError, UsageError) as error:
            connection.refuse(str(error))
        else:
            connection.send("ok", primary=host, epoch=epoch)

    def _on_candidate(self, app: str, connection: AppConnection, message: Message) -> None:
        if message["type"] != "leaving":
            raise ProtocolError(f"unexpected {message['type']} before welcome")
        self._withdraw(app, connection)
        connection.send("stop")

    def _withdraw(self, app: str, connection: AppConnection) -> None:
        """A process went away before it got a place: take its registration back unless it has been acted on."""
        if self._candidates.get(app) is connection:
            del self._candidates[app]
            if app in self._registered:
                self._spawn(unregister(self._store, app, self._registered.pop(app)))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # --- the session -----------------------------------------------------------------------------------------------

    async def _open_session(self) -> Lease:
        while True:
            lease: Lease | None = None
            try:
                lease = await self._store.leases.grant(self.settings.lease_ttl_s)
                self.guard.keep(OPENING, lease.id)
                session = await self._announce(lease)
            except StoreDeniedError:
                raise
            except (HostNameTakenError, StoreError) as error:
                if lease is not None:
                    with contextlib.suppress(StoreError):
                        await self._store.leases.revoke(lease)
                if isinstance(error, HostNameTakenError):
                    raise
                log.warning("waiting for etcd: %s", error)
                await asyncio.sleep(RETRY_S)
            else:
                self._state.record_session(self.guard.name, lease.id)
                self._begin_session(session, lease)
                memo = SessionMemo(session, lease.id, lease.ttl_s)
                self.guard.keep(SESSION, memo, lease.deadline - self.settings.timing.kernel_margin_s)
                self.guard.release(OPENING)
                log.info("host %s is up; programs here reach it at %s", self.settings.host, self.settings.socket_path)
                return lease

    def _begin_session(self, session: int, lease: Lease) -> HostContext:
        self._lease = lease
        self._context = HostContext(
            self.settings,
            self._store,
            self.clock,
            self.guard,
            Turns(STARTS, START_S),
            Turns(HANDOVERS, HANDOVER_S),
            self._state,
            self._copies,
            self._machine,
            self._notifier,
            Failsafe(self._store, self.settings.host, session, self.clock, self._peers.client),
            lambda: self._on_confirm(lease),
            session=session,
            lease=lease,
        )
        return self._context

    async def _resume_session(self) -> Lease | None:
        """Go on where an earlier WatchDog of this guardian was killed; None if there is nothing, or it is too late."""
        wards = {name: ward for name, ward in self.guard.wards.items() if not name.startswith("@")}
        if OPENING in self.guard.wards:  # it was killed before it knew whether its host key was written
            self._past.add(int(self.guard.wards[OPENING].memo))
        kept = self.guard.wards.get(SESSION)
        if kept is None:
            return None
        memo = msgspec.convert(kept.memo, SessionMemo)
        if kept.until is None or kept.until <= self.clock():
            self._past.add(memo.lease)
            await asyncio.gather(*(self._end_ward(ward) for ward in wards.values()))
            self.guard.release(SESSION)
            return None
        lease = self._store.leases.resume(memo.lease, memo.ttl_s, kept.until + self.settings.timing.kernel_margin_s)
        context = self._begin_session(memo.session, lease)
        beside = [wards.pop(name) for name in list(wards) if is_beside(name)]
        for ward in wards.values():
            replica = msgspec.convert(ward.memo, Memo)
            self._begun[ward.ward] = replica.placement.incarnation
            if not replica.ended:
                self._start(Run.resume(context, ward, replica, [each for each in beside if app_of(each.ward) == ward.ward]))
        for ward in beside:
            if app_of(ward.ward) not in self._runs:
                self._spawn(self._end_ward(ward))
        self._spawn(self._announce_again(memo.session, lease))
        log.info("took over from an earlier WatchDog of this host, with %d replicas", len(self._runs))
        return lease

    async def _end_ward(self, ward: WardView) -> None:
        """See that what an earlier WatchDog left is dead."""
        await self._machine.process.end(ward)
        self.guard.release(ward.ward)

    def _record(self) -> Host:
        settings = self.settings
        return Host(
            address=settings.address,
            pid=self._machine.pid(),
            labels=settings.labels,
            capacity=settings.capacity,
            version=etcdreplica.__version__,
            started_wall=time.time(),
            peer=self._peers.address,
        )

    async def _announce_again(self, session: int, lease: Lease) -> None:
        """Show what this WatchDog is, in the place of the one before it in the same session."""
        key = Key(Kind.HOSTS, (self.settings.host,))
        record = self._record()

        async def write() -> None:
            hosts = (await self._store.list(Kind.HOSTS)).entries  # also if it is corrupt
            entry = next((entry for entry in hosts if entry.key == key), None)
            if entry is not None and entry.create_revision == session:
                unchanged = Unchanged(key, entry.mod_revision)  # else what an earlier one has sent could come after ours
                if not (await self._store.commit(Txn((unchanged,), (Put(key, record, lease.id),)))).succeeded:
                    raise StoreError(f"{key} has just changed")

        await insist(f"writing {key}", write)

    async def _announce(self, lease: Lease) -> int:
        settings = self.settings
        key = Key(Kind.HOSTS, (settings.host,))
        try:
            result = await self._store.commit(Txn((Unchanged(key, 0),), (Put(key, self._record(), lease.id),)))
            if result.succeeded:
                return result.revision
        except StoreError:
            pass  # it may have happened: the read tells
        entry = await self._store.get(key)
        if entry is not None and entry.lease == lease.id:
            return entry.create_revision
        if entry is not None and entry.lease in self._past:
            await self._store.leases.revoke_id(entry.lease)
            entry = None
        if entry is None:
            raise StoreError(f"could not write {key}")
        other: Host = entry.value
        raise HostNameTakenError(
            f"host name {settings.host} is taken by a WatchDog at {other.address} (process {other.pid}): choose another "
            f"name with --host; if that one died, its lease ends within {settings.lease_ttl_s:g} s"
        )

    async def _end_session(self, lease: Lease) -> None:
        """End every replica; the host lease goes last, when nothing runs under this session any more."""
        if self._context is not None:
            self._context.failsafe.stop()
        for _, again in self._deferred.values():
            again.cancel()
        self._deferred.clear()
        self._context = None
        self._past.add(lease.id)
        self._next.clear()
        for run in list(self._runs.values()):
            run.leave()
        if self._tasks:
            limit = REPORT_S + max(run.stop_timeout_s for run in self._runs.values())
            _, late = await asyncio.wait(list(self._tasks.values()), timeout=limit)
            for task in late:
                task.cancel()  # kills the process; etcd learns from the lease
            if late:
                await asyncio.wait(late)
        for app in self._begun:
            self.guard.release(app)
        with contextlib.suppress(StoreError):
            await self._store.leases.revoke(lease)
        self._lease = None
        self.guard.release(SESSION)
        self._state.forget()

    async def _end_predecessor(self) -> None:
        """A node that died here left processes and a lease: end the ones, then give up the other."""
        lease = await self._state.end_leftovers(self.guard.name)
        if lease is not None:
            self._past.add(lease)
            with contextlib.suppress(StoreError):  # then when the session is opened
                await self._store.leases.revoke_id(lease)
