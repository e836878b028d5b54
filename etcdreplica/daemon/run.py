"""One incarnation of one application on this host, from its placement to its end.

`Run.main` is its life, top to bottom. What must be quick happens outside of it, in plain calls: a promotion goes to the
process the moment the WatchDog learns of it, and a death is reported in one transaction that also calls the successor.
A lease is given up only after the process is known dead. The guardian is told of every step, so that the next WatchDog of
this host goes on where this one was killed (`Run.resume`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from typing import Any

from attrs import evolve

from etcdreplica.app.protocol import INCARNATION_ENV, SOCKET_ENV, Message
from etcdreplica.core.failsafe import ASK_AFTER
from etcdreplica.core.hang import look_interval_s, pulse_interval_s
from etcdreplica.daemon.app_server import AppConnection
from etcdreplica.daemon.context import HostContext
from etcdreplica.daemon.failsafe import Backing, release
from etcdreplica.daemon.guard import WardView
from etcdreplica.daemon.hold import Hold
from etcdreplica.daemon.memo import Memo
from etcdreplica.daemon.objects import InSyncSet, welcome_fields
from etcdreplica.daemon.plain import NOTES_KEPT, PlainCopy
from etcdreplica.daemon.process import ReplicaProcess
from etcdreplica.daemon.publisher import Publisher
from etcdreplica.daemon.registry import read_registration
from etcdreplica.daemon.report import report, withdrawal
from etcdreplica.daemon.vitals import Vitals
from etcdreplica.daemon.waiting import first, insist
from etcdreplica.errors import ProtocolError, RefusedError, StoreError
from etcdreplica.model import Failure, FailureKind, Placement, Registration, Replica, ReplicaState, Succession
from etcdreplica.store import Key, Kind, Lease, Txn, Unchanged
from etcdreplica.words import Keep, Role, Style

log = logging.getLogger(__name__)

PROGRESS_SHOWN_S = 10.0  # heartbeats are published this often
LAST_WORDS_S = 1.0  # a process whose body is over gets so long, even if it is to end at once when it is asked to


class Run:
    """One replica. `promote`, `stop` and `leave` may be called at any time; `main` returns when all is given up."""

    def __init__(
        self, context: HostContext, app: str, placement: Placement, revision: int, candidate: AppConnection | None
    ) -> None:
        self.app = app
        self.placement = placement
        self.process: ReplicaProcess | None = None
        self._context = context
        self._hold = Hold(context.lease, context.settings.timing, context.clock)
        self._revision = revision  # of the placement, and so of the assignment
        self._candidate = candidate
        self._connection: AppConnection | None = None
        self._early: list[AppConnection] = []
        self._registration: Registration | None = None
        self._in_sync: InSyncSet | None = None  # of a replicated object
        self._plain: PlainCopy | None = None  # of a plain program
        self._leftovers: list[WardView] = []  # of an earlier WatchDog: hooks that were running
        self.backing = Backing()  # with failsafe
        self._awaited: tuple[Placement, float] | None = None  # a promotion that has to wait until its leases are confirmed
        self._started_at = context.clock()
        self._leaving = False
        self._at_once = asyncio.Event()  # it is killed and not asked
        self._given_up = False
        self._released = False  # by the guardian
        self._completed = False
        self._ending: asyncio.Task[None] | None = None
        self.look_at = 0.0  # when `check` is to be called next, in its own time
        self._progress_due = 0.0
        self._error = ""
        self._evidence = ""
        self._spawning: asyncio.Task[ReplicaProcess] | None = None
        self._is_hung = asyncio.Event()
        self._vitals = Vitals(self._is_hung.set, context.machine.status_page)
        self._stop = asyncio.Event()
        self._promoted = asyncio.Event()
        self._done = asyncio.Event()
        self._attached = asyncio.Event()
        self._publisher = Publisher(
            context.store,
            self.key,
            Replica(
                placement.incarnation, placement.epoch, placement.role, ReplicaState.STARTING, successor=placement.successor
            ),
            self._remember,
            lambda: Unchanged(Key(Kind.PLACEMENTS, (context.host, app)), self._revision),
        )
        if placement.role is Role.PRIMARY:
            self._promoted.set()
        self._heed()

    @classmethod
    def resume(cls, context: HostContext, ward: WardView, memo: Memo, beside: list[WardView]) -> Run:
        """Take over what an earlier WatchDog of this host began, its process and its lease; what ran beside it is ended."""
        run = cls(context, ward.ward, memo.placement, memo.revision, None)
        run._leftovers = beside
        run._replicate(memo.object)
        if memo.vouchers:
            run.backing = Backing([frozenset(memo.vouchers)], dict(memo.vouchers))
        if memo.replica is not None:
            run._publisher.replica = memo.replica
            run._publisher.revision = None
            run._started_at = memo.replica.body_at or run._started_at
            run._vitals.arrived = memo.replica.state not in (ReplicaState.STARTING, ReplicaState.STANDBY)
            run._vitals.awaited = run._vitals.arrived
        if memo.lease is not None:
            deadline = context.lease.deadline if ward.until is None else ward.until + context.settings.timing.kernel_margin_s
            run._hold.own = context.store.leases.resume(memo.lease, memo.ttl_s, deadline)
        if ward.pid is not None:
            run._publisher.claimed.set()
            run.process = context.machine.process(context.guard, ward)
            run.process.on_exit = run._on_exit
        return run

    @property
    def key(self) -> Key:
        """The replica's key in etcd."""
        return Key(Kind.REPLICAS, (self.app, self._context.host))

    @property
    def lease(self) -> Lease | None:
        """Its own lease, once it has one."""
        return self._hold.own

    @property
    def until(self) -> float | None:
        """When the kernel must have ended its process, unless a lease is renewed before. None while it has no lease."""
        return self._hold.until

    @property
    def wards(self) -> tuple[str, ...]:
        """The guardian's names for all that must be dead by then."""
        return (self.app, *(self._plain.wards if self._plain is not None else ()))

    @property
    def stop_timeout_s(self) -> float:
        """How long it may take to end when asked to."""
        return self._registration.end_timeout_s if self._registration else 0.0

    # --- what the WatchDog is told by etcd -------------------------------------------------------------------------

    def place(self, placement: Placement, revision: int) -> None:
        """Take a newer placement of the same incarnation."""
        if placement.epoch < self.placement.epoch or revision <= self._revision:
            return  # written before a succession that has already happened here
        self._revision = revision
        self._awaited = None
        self._publisher.placed()
        if self._in_sync is not None:
            self._in_sync.placed()
        if placement.role is Role.PRIMARY and self.placement.role is Role.BACKUP:
            self.promote(placement, self._context.clock())
        elif placement.role is not self.placement.role:
            self.leave()  # a body cannot be called back: another one starts as backup
        else:
            if placement.degree != self.placement.degree and self._connection is not None:
                self._connection.send("degree", degree=placement.degree)
            self.placement = placement
            self._remember()
            if self._plain is not None:
                self._plain.placed()
            self._seek_vouchers()
            if self._publisher.replica.epoch != placement.epoch:
                self._tell_role()
            if (self._publisher.replica.epoch, self._publisher.replica.successor) != (placement.epoch, placement.successor):
                self._publisher.show(epoch=placement.epoch, successor=placement.successor)
        self._heed()

    def _heed(self) -> None:
        """Hand over if the placement says so: the successor that it names is called once this replica is dead."""
        if self.placement.leaving is not None:
            if self.placement.leaving.at_once:
                self._at_once.set()
            self.leave()

    def succeed(self, succession: Succession) -> None:
        """The primary of the epoch before is dead, and this replica was named to follow it."""
        if self.placement.role is Role.BACKUP and succession.epoch == self.placement.epoch + 1:
            if self._in_sync is not None:
                self._in_sync.called(succession, self._connection)
            self.promote(self.placement.promoted(), self._context.clock())

    def promote(self, placement: Placement, decided_at: float) -> None:
        """Become primary, once etcd has confirmed that this replica holds its leases."""
        if self._hold.confirmed_left <= 0:
            self._awaited = placement, decided_at
            return
        self._awaited = None
        self.placement = placement
        self._promoted.set()
        self._seek_vouchers()
        promoted_at = self._context.clock()
        self._tell_role()
        self._publisher.show(
            role=Role.PRIMARY,
            epoch=placement.epoch,
            successor=placement.successor,
            decided_at=decided_at,
            promoted_at=promoted_at,
        )

    def stop(self) -> None:
        """End this replica: it is wanted here no longer."""
        self._given_up = True
        self._stop.set()

    def leave(self) -> None:
        """End this replica and hand its role over: this host, or somebody at it, wants it to end."""
        self._leaving = True
        self._stop.set()

    # --- failsafe --------------------------------------------------------------------------------------------------

    @property
    def standing(self) -> tuple[Placement, int]:
        """Its placement, and the mod revision of that."""
        return self.placement, self._revision

    @property
    def is_late(self) -> bool:
        """Whether it is a primary that runs, and its leases have not been confirmed for long."""
        margin_s, ttl_s = self._context.settings.timing.fence_margin_s, self._context.settings.lease_ttl_s
        is_running = self.placement.role is Role.PRIMARY and self._ending is None and not self._stop.is_set()
        return is_running and self._hold.confirmed_left + margin_s < (1 - ASK_AFTER) * ttl_s and self._hold.left > 0

    def vouched(self, until: float) -> None:
        """Run on until then, also without a lease; but what is about to end does."""
        if self._ending is not None or self._hold.left <= 0:
            return
        self._hold.vouched(until)
        self._context.extended()

    def backed(self) -> None:
        """Keep who must vouch for it for the next WatchDog."""
        self._remember()

    def _seek_vouchers(self) -> None:
        if self._registration is not None and self._registration.failsafe and self.placement.role is Role.PRIMARY:
            self._context.failsafe.note(self)

    # --- what the process tells ------------------------------------------------------------------------------------

    def attach(self, connection: AppConnection) -> None:
        """The process has reached the decorated call."""
        registration = self._registration
        if self.process is None or registration is None:  # it is quicker than the guardian, or etcd, told us of it
            self._early.append(connection)
            return
        if registration.plain:
            connection.refuse(f"{self.app} is registered as a plain program, which no library speaks for: see docs/programs.md")
            return
        if not self.process.has(connection.pid):
            connection.refuse(f"process {connection.pid} was not started as a replica of {self.app}")
            return
        before = self._connection
        if before is not None and before.is_open:
            if before.pid != connection.pid:
                connection.refuse(f"another process is {self.app}'s replica here already")
                return
            before.drop()  # it has lost patience with that one
        self.process.include(connection.pid)
        self._connection = connection
        self._attached.set()
        self._vitals.arrived, self._vitals.awaited = True, False
        connection.on_message = self._on_message
        placement = self.placement
        connection.send(
            "welcome",
            host=self._context.host,
            role=placement.role,
            epoch=placement.epoch,
            incarnation=placement.incarnation,
            pulse=pulse_interval_s(registration.hang_timeout_s),
            style=registration.style,
            degree=placement.degree or registration.degree,
            **self._own_deadline(),
            **(welcome_fields(self._context.settings, registration, placement) if registration.object else {}),
        )
        if registration.object:
            self._context.copies.tell(self.app, connection)
        if self._stop.is_set():
            connection.send("stop")
        elif registration.style is Style.WARM and placement.role is Role.BACKUP:
            self._publisher.show(state=ReplicaState.READY)

    def renewed(self) -> None:
        """Its deadline has moved: tell a process that has no guardian."""
        if self._awaited is not None:
            self.promote(*self._awaited)
        if self._connection is not None and (deadline := self._own_deadline()):
            self._connection.send("renew", **deadline)

    def _own_deadline(self) -> dict[str, Any]:
        """What a process that was started by hand must do for itself: die in time, and mark what it starts."""
        if self.process is None or self.process.is_child or self.until is None:
            return {}
        return {"until": self.until, "mark": self.process.mark}

    def check(self, at: float) -> None:
        """Look for signs of life; `at` is time as far as the WatchDog was awake."""
        self.look_at = at + look_interval_s(self._registration.hang_timeout_s if self._registration else 0)
        self._vitals.check(at)
        if at >= self._progress_due:
            self._progress_due = at + PROGRESS_SHOWN_S
            self._show_progress()

    def _on_message(self, message: Message) -> None:
        kind = message["type"]
        if kind == "running":
            now = self._context.clock()
            body_at = min(now, float(message["at"]))
            self._started_at = body_at
            if self._publisher.replica.state in (ReplicaState.STARTING, ReplicaState.READY):
                pid, wall = self._connection and self._connection.pid, time.time() - (now - body_at)
                self._publisher.show(state=ReplicaState.RUNNING, body_at=body_at, body_wall=wall, pid=pid)
                self._ask_probes()
        elif kind == "page":
            assert self._connection is not None
            self._vitals.attach(self._connection.pid, message)
        elif kind == "notice":
            self._expect_notice()
        elif kind == "health":
            self._vitals.health = int(message["bad"]), str(message["reason"])[:1000]
        elif kind == "advertise":
            self._publisher.show(endpoint=str(message["endpoint"])[:1024])
        elif kind == "serves" and self._in_sync is not None:
            self._publisher.show(serves=str(message["endpoint"])[:1024])
        elif kind == "leaving":
            self.leave()
        elif kind == "failed":
            self._on_failed(str(message["reason"])[:2000])
        elif kind == "done":
            self._done.set()
        elif self._in_sync is None or self._connection is None or not self._in_sync.take(message, self._connection):
            raise ProtocolError(f"unknown message {kind!r}")

    def _expect_notice(self) -> None:
        if self.process is not None and self._connection is not None and self._vitals.page is not None:
            self.process.expect_notice(self._connection.pid, self._vitals.page)

    def _on_failed(self, reason: str) -> None:
        self._error = f"the body raised {reason}"
        self._vitals.end()  # nothing of it runs any more but what the interpreter does at its end
        self._reply_ok()
        asyncio.get_running_loop().call_later(max(LAST_WORDS_S, self.stop_timeout_s), self._kill_group)

    def _replicate(self, is_object: bool) -> None:
        if is_object and self._in_sync is None:
            self._in_sync = InSyncSet(
                self._context.store, self.app, self._context.host, lambda: (self.placement, self._revision)
            )

    def _begin_plain(self, registration: Registration) -> None:
        def note(text: str) -> None:
            self._publisher.show(hooks=(*self._publisher.replica.hooks, text)[-NOTES_KEPT:])

        self._vitals.arrived, self._vitals.awaited = True, False  # nothing in it could give signs of life
        self._plain = PlainCopy(
            self._context, self.app, registration, lambda: self.placement, lambda: self.until, self._show_plain, note
        )

    def _show_plain(self, state: ReplicaState) -> None:
        if state is ReplicaState.RUNNING:
            self._started_at = self._context.clock()
            self._publisher.show(state=state, body_at=self._started_at)
        else:
            self._publisher.show(state=state)
        if self.process is not None:
            self._attached.set()
            self._ask_probes()

    def _show_progress(self) -> None:
        progress_at = self._vitals.progress_at
        if progress_at not in (0.0, self._publisher.replica.progress_at):
            self._publisher.show(progress_at=min(progress_at, self._context.clock()))

    def _tell_role(self) -> None:
        if self._connection is not None:
            self._connection.send("role", role=self.placement.role, epoch=self.placement.epoch)

    def _reply_ok(self) -> None:
        if self._connection is not None:
            self._connection.send("ok")

    def _kill_group(self) -> None:
        if self.process is not None and not self.process.exited.done():
            self.process.signal(signal.SIGKILL)

    # --- its life --------------------------------------------------------------------------------------------------

    async def main(self) -> None:
        """Live, and end. Cancelled, at whatever point, it returns when all is dead and the lease is renewed no longer."""
        try:
            await self._end(*await self._life())
        except asyncio.CancelledError:
            await self._abandon()
            raise

    async def _life(self) -> tuple[FailureKind, str]:
        kind, reason = FailureKind.EXIT, "its WatchDog failed"
        try:
            registration = self._registration = await read_registration(self._context.store, self.app)
            self._replicate(registration.object)
            if registration.plain:
                self._begin_plain(registration)
            store, ttl_s = self._context.store, self._context.settings.lease_ttl_s
            if self._ending is not None:  # taken over, and dead already
                return kind, reason
            self._remember()
            if self._hold.own is None:
                self._hold.own = await insist(f"a lease for {self.app}", lambda: store.leases.grant(ttl_s))
                self._remember()
            if self._publisher.replica.style is None:
                self._publisher.show(style=registration.style)
            await self._end_leftovers()
            self._publisher.start(self._hold.own)
            await first(self._publisher.claimed.wait(), self._stop.wait(), self._hold.ended())
            if self.process is None and not self._promoted.is_set():
                await self._wait_without_program(registration)
            self._seek_vouchers()
            if self.process is not None or self._may_begin:
                await self._start(registration)
            kind, reason = await self._live(registration) if self.process is not None else self._why()
        except RefusedError as error:
            kind, reason = FailureKind.REFUSED, str(error)
        except Exception as error:  # out of memory, descriptors, disk: this host cannot run it now
            log.exception("%s: could not be run here", self.app)
            kind, reason = FailureKind.REFUSED, f"this host could not run it: {error}"
        finally:
            for connection in (*self._early, *([self._candidate] if self._candidate else [])):
                connection.refuse(f"{self.app} did not get a place here: {reason}")
        return kind, reason

    async def _wait_without_program(self, registration: Registration) -> None:
        """Be a backup on which the program does not run, if that is its style. Raises RefusedError when it could not."""
        ends = (self._promoted.wait, self._stop.wait, self._hold.ended)
        if registration.style is not Style.COLD and not (registration.standby and self._may_begin):
            return
        self._context.machine.process.check(registration.program_on(self._context.host))  # what starts at once is checked there
        if self._plain is not None and registration.standby:
            await self._plain.stand_by(*(end() for end in ends))
            return
        self._publisher.show(state=ReplicaState.STANDBY)
        if self._plain is not None:
            self._plain.tell()
        await first(*(end() for end in ends))

    async def _abandon(self) -> None:
        """The session is over, and etcd is to learn of the end from the lease."""
        self._publisher.stop()
        self._vitals.end()
        if self._ending is not None:
            self._ending.cancel()
        await self._end_leftovers()
        if self._plain is not None:
            await self._plain.kill()
            self._plain.tell_end()
        if self._spawning is not None:
            with contextlib.suppress(RefusedError):
                self.process = await self._spawning
        if self.process is not None and (self.process.is_child or not self._completed):
            await self.process.kill()
        if self.lease is not None:
            self._context.store.leases.drop(self.lease)

    async def _end_leftovers(self) -> None:
        if self._leftovers:
            await asyncio.gather(*(self._context.machine.process.end(ward) for ward in self._leftovers))
            for ward in self._leftovers:
                self._context.guard.release(ward.ward)
            self._leftovers = []

    async def _start(self, registration: Registration) -> None:
        if self.process is not None:  # taken over
            self._attach_early()
            return
        if self._publisher.replica.state in (ReplicaState.STANDBY, ReplicaState.READY):
            self._publisher.show(state=ReplicaState.STARTING)
        candidate, self._candidate = self._candidate, None
        if candidate is not None and candidate.is_open:
            try:
                adopt, number = self._context.machine.process.adopt, self.placement.incarnation
                self.process = adopt(self._context.guard, self.app, number, candidate.pid)
                self._context.state.record_process(self.app, self.process.pid, self.process.started)
            except ProcessLookupError:
                candidate = None
        if self._plain is not None:
            preparing = asyncio.create_task(self._plain.prepare())
            await first(preparing, self._stop.wait(), self._hold.ended())
            if preparing.cancelled() or not preparing.done():
                return
            preparing.result()
        if self.process is None:
            self.process = await self._start_program(registration)
            if self.process is None:
                return
        self.process.on_exit = self._on_exit
        self._started_at = self._context.clock()
        self._publisher.show(pid=self.process.pid)
        self._early += [candidate] if candidate is not None else []
        self._attach_early()

    def _attach_early(self) -> None:
        early, self._early = self._early, []
        for connection in early:
            if connection.is_open:
                self.attach(connection)

    def _ask_probes(self) -> None:
        begun = (ReplicaState.RUNNING, ReplicaState.READY) if self._plain is not None else (ReplicaState.RUNNING,)
        if self._registration is not None and self._publisher.replica.state in begun:
            self._vitals.probe(self._registration.program_on(self._context.host))

    async def _start_program(self, registration: Registration) -> ReplicaProcess | None:
        """Start it when it is its turn; None if it is not wanted any more by then."""
        starts = self._context.starts
        if not await starts.take(self._stop.wait(), self._hold.ended()):
            return None
        if self._stop.is_set() or self._hold.left <= 0:
            starts.over()
            return None
        self._spawning = asyncio.create_task(self._spawn(registration))
        try:
            process = await asyncio.shield(self._spawning)
        except BaseException:
            starts.over()
            raise
        self._spawning = None
        starts.over_with(first(process.exited, self._attached.wait()))
        return process

    async def _spawn(self, registration: Registration) -> ReplicaProcess:
        context, number = self._context, self.placement.incarnation
        environment = {SOCKET_ENV: str(context.settings.socket_path), INCARNATION_ENV: str(number)}
        if self._plain is not None:
            environment = self._plain.environment
        return await context.machine.process.spawn(
            context.guard,
            self.app,
            number,
            registration.program_on(self._context.host),
            environment,
            context.log_path(self.app),
        )

    async def _live(self, registration: Registration) -> tuple[FailureKind, str]:
        """Wait for the end, and return what it was."""
        process = self.process
        assert process is not None
        self._vitals.begin(registration)
        self._ask_probes()
        ends = [process.exited, self._stop.wait(), self._done.wait(), self._is_hung.wait(), self._hold.ended()]
        if self._plain is not None:
            self._plain.begin(process.pid, self._publisher.replica.state, self._promoted)
            ends.append(self._plain.failed.wait())
        await first(*ends)
        self._vitals.end()
        if self._done.is_set() or (process.exited.done() and self._returned_zero(process)):
            return await self._complete(registration, process)
        if process.exited.done():
            return self._why(self._exit_reason(process))
        if self._is_hung.is_set():
            self._evidence = await self._vitals.evidence(process.pid)
            return FailureKind.HANG, self._vitals.hung
        if self._stop.is_set():
            if self.placement.leaving is not None:
                await self._take_turn(process)
            await self._end_gently(registration, process)
        return self._why()

    @property
    def _is_over(self) -> bool:
        """Whether it is to end, or cannot go on."""
        return self._stop.is_set() or (self._plain is not None and self._plain.failed.is_set())

    @property
    def _may_begin(self) -> bool:
        """Whether a process may be started for it."""
        return self.process is None and self._publisher.claimed.is_set() and not self._is_over and self._hold.left > 0

    async def _take_turn(self, process: ReplicaProcess) -> None:
        """Wait to hand over until it is its turn. Until then it goes on."""
        turns = self._context.handovers
        if await turns.take(process.exited, self._hold.ended(), self._at_once.wait()):
            turns.over_with(process.exited)

    def _why(self, reason: str = "") -> tuple[FailureKind, str]:
        if self._given_up:
            return FailureKind.HANDOVER, "no longer wanted here"
        if self._leaving:
            return FailureKind.HANDOVER, self.placement.leaving.reason if self.placement.leaving else "asked to end"
        if reason and self._hold.left > 0:
            return FailureKind.EXIT, reason
        if self._plain is not None and self._plain.failure is not None:
            return self._plain.failure
        return FailureKind.FENCED, "a lease ran out: etcd could not be reached, or the WatchDog could not run"

    def _on_exit(self) -> None:
        """The process is dead: report it without waiting for `main`'s next turn, unless there is more to it."""
        process = self.process
        assert process is not None
        over = self._is_over or self._done.is_set() or self._is_hung.is_set()
        if not over and not self._returned_zero(process):
            self._end(*self._why(self._exit_reason(process)))

    def _exit_reason(self, process: ReplicaProcess) -> str:
        if self._connection or self._publisher.replica.state in (ReplicaState.READY, ReplicaState.RUNNING):
            return self._error or process.exited.result()
        stay = "; it must stay in the foreground" if self._plain is not None and process.returncode == 0 else ""
        return f"{self._error or process.exited.result()} before it was {'ready' if self._plain else 'a replica'}{stay}"

    def _returned_zero(self, process: ReplicaProcess) -> bool:
        return process.returncode == 0 and self._publisher.replica.state is ReplicaState.RUNNING

    async def _end_gently(self, registration: Registration, process: ReplicaProcess) -> None:
        self._publisher.show(state=ReplicaState.STOPPING)
        if self._at_once.is_set():
            return
        if self._plain is not None:
            await first(self._plain.demote(), process.exited, self._hold.ended(), self._at_once.wait())
        if self._connection is not None:
            self._connection.send("stop")
        else:
            process.signal(signal.SIGTERM)
        await self._wait_exit(process, registration.stop_timeout_s)

    async def _complete(self, registration: Registration, process: ReplicaProcess) -> tuple[FailureKind, str]:
        """The body returned: the application is complete, or, with keep="always", it is run again."""
        what = "the body returned" if self._plain is None else "the program exited with code 0"
        if registration.keep is Keep.ALWAYS:
            self._reply_ok()
            await self._wait_exit(process, max(LAST_WORDS_S, registration.stop_timeout_s))
            return FailureKind.RETURNED, f'{what}, and keep is "always"'
        self._completed = True
        await self._commit(self._report(FailureKind.DONE, what))
        self._reply_ok()
        if process.is_child:
            await self._wait_exit(process, registration.stop_timeout_s)
            await process.kill()
        return FailureKind.DONE, what

    async def _wait_exit(self, process: ReplicaProcess, limit_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await first(process.exited, self._hold.ended(), self._at_once.wait())

    # --- what it writes --------------------------------------------------------------------------------------------

    def _end(self, kind: FailureKind, reason: str) -> asyncio.Task[None]:
        """Begin to finish, once."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._finish(kind, reason))
        return self._ending

    async def _finish(self, kind: FailureKind, reason: str) -> None:
        """See that it is dead, report the end and call the successor in one transaction, then give the lease up."""
        self._context.failsafe.drop(self)
        self._publisher.stop()  # nothing may show the replica again
        self._vitals.end()
        await self._end_leftovers()
        if self._plain is not None:
            await self._plain.kill()
        if self.process is not None and not self._completed:
            await self.process.kill()
        quiet = self._completed or self._given_up
        if self.lease is not None and quiet:
            if self._registration is None or self._registration.failsafe:  # no failure tells that it is dead
                await insist(f"releasing {self.app}", lambda: release(self._context.store, self.app, self.placement))
            await self._commit(withdrawal(self.app, self._context.host, self.lease.id))
        elif not quiet:
            await self._commit(self._report(kind, reason))
            placement = self.placement
            log.warning("%s: %s of epoch %d ended (%s): %s", self.app, placement.role, placement.epoch, kind, reason)
        self._context.state.forget_process(self.app)
        if self.lease is not None:
            with contextlib.suppress(StoreError):  # then it expires
                await self._context.store.leases.revoke(self.lease)
        self._released = True
        self._context.guard.release(self.app, Memo(self.placement, self._revision, ended=True))
        if self._plain is not None:
            self._plain.tell_end()
        if self.process is not None:
            await self.process.gone()  # the next copy here may need its ports

    def _report(self, kind: FailureKind, reason: str) -> Txn:
        placement, now = self.placement, self._context.clock()
        began = self._publisher.replica.state in (ReplicaState.RUNNING, ReplicaState.READY)
        failure = Failure(
            host=self._context.host,
            incarnation=placement.incarnation,
            epoch=placement.epoch,
            role=placement.role,
            kind=kind,
            reason=reason,
            by=self._context.host,
            uptime_s=round(now - self._started_at, 3) if began else None,
            detected_at=now,
            wall=time.time(),
            evidence=self._evidence or "\n".join(self._publisher.replica.hooks),
            phases=self._publisher.replica.phases,
        )
        if kind is FailureKind.DONE:
            placement = evolve(placement, successor=None)
        placement, in_sync = self._in_sync.succession(placement) if self._in_sync is not None else (placement, None)
        return report(self.app, failure, placement, self._revision, self.lease.id if self.lease else 0, in_sync)

    def _remember(self) -> None:
        """Have the guardian know what the next WatchDog would have to know."""
        if self._released:
            return
        lease = self.lease
        lease_id, ttl_s = (lease.id, lease.ttl_s) if lease else (None, 0.0)
        is_object = self._in_sync is not None
        memo = Memo(
            self.placement,
            self._revision,
            self._publisher.replica,
            lease_id,
            ttl_s,
            object=is_object,
            vouchers=self.backing.settled,
        )
        self._context.guard.keep(self.app, memo, self.until)

    async def _commit(self, txn: Txn) -> None:
        """Write, however long etcd is away: the process is dead or done, so nothing is at risk meanwhile."""
        await insist(f"reporting {self.app}", lambda: self._context.store.commit(txn))
