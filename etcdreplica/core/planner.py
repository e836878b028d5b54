"""The ReplicaManager's mind: from what is desired and observed of one application to its next assignment.

Level-triggered: it looks at the whole picture each time and never at how it came about, so it may be interrupted anywhere
and asked again. What it remembers between calls (`Memory`) is only how long things have been so; losing it costs time,
never safety. Waiting is expressed as `Decision.wake_at`.
"""

from __future__ import annotations

from collections.abc import Iterator

from attrs import Factory, define, evolve, field

from etcdreplica.core.failsafe import in_doubt
from etcdreplica.core.lifecycle import PROMOTABLE
from etcdreplica.core.plan import Decision, Memory, Plan, PlannerSettings
from etcdreplica.core.restarts import (
    FAULTS,
    RESTARTED_HERE,
    carried_over,
    restart_delay_s,
    strikes_after,
    with_failure,
    within_window,
)
from etcdreplica.core.view import AppView, ClusterView
from etcdreplica.model import Assignment, AssignmentState, Event, Failure, FailureKind, Member, Registration, ReplicaState, Seat
from etcdreplica.words import MAX_DEGREE, Role

ZONE = "zone"  # the host label by which replicas are spread
EVENTS_AT_ONCE = 10  # etcd takes 128 operations in one transaction
DERIVED = "placements/"  # corrupt values there are written anew from the assignment
STATE = "checkpoints/"  # of these the CheckpointServers make what they can; who is primary does not depend on them
ENDED = (AssignmentState.COMPLETED, AssignmentState.FAILED)  # until the application is registered once more


def decide(app: AppView, cluster: ClusterView, memory: Memory, now: float, settings: PlannerSettings) -> Decision:
    """Decide the next step for one application."""
    old, registration = app.assignment, app.registration
    if any(not key.startswith((DERIVED, STATE)) for key in app.corrupt):
        return Decision()  # nobody can tell what is right until somebody mends the value
    if registration is None or (old and old.state is AssignmentState.REMOVING):
        return _remove(app, cluster)
    step = _Step(app, registration, cluster, memory, now, settings)
    if app.pause or cluster.pause:
        return step.hold_still()
    unchanged = old is not None and old.registration_revision == app.registration_revision
    if old and old.state in ENDED and (unchanged or app.replicas):  # first let its last copies end
        return Decision(Plan(evolve(old, paused=False), tuple(app.failures)) if app.failures or old.paused else None)
    return step.decide()


def _remove(app: AppView, cluster: ClusterView) -> Decision:
    old = app.assignment
    if old is None:
        return Decision(Plan(None) if app.failures or app.pause or app.vouchers else None)
    if old.state is not AssignmentState.REMOVING:
        return Decision(Plan(_vacated(old, AssignmentState.REMOVING, "being removed"), tuple(app.failures)))
    return Decision(Plan(None) if not app.replicas and in_doubt(app, cluster) is None else None)


def _vacated(assignment: Assignment, state: AssignmentState, reason: str) -> Assignment:
    return evolve(assignment, state=state, reason=reason, primary=None, backups=(), successor=None, degraded=False, again=None)


@define
class _Step:
    """One decision under way: `draft` goes through the steps in order and is compared with the old assignment."""

    app: AppView
    registration: Registration
    cluster: ClusterView
    memory: Memory
    now: float
    settings: PlannerSettings
    draft: Assignment = field(init=False)
    failures: list[Failure] = Factory(list)
    wake_at: float | None = None
    done: bool = False

    def decide(self) -> Decision:
        self.draft = self._begin()
        self._forget_old_failures()
        self._take_succession()
        self._take_done()
        if not self.done:
            self._take_failures()
        if not self.done:
            self._promote()
            self._fill()
            self._choose_successor()
            self._describe()
        mended = not any(key.startswith(DERIVED) for key in self.app.corrupt)
        if self.draft == self.app.assignment and not self.app.failures and mended:
            return Decision(wake_at=self.wake_at)
        return Decision(Plan(self.draft, tuple(self.app.failures), self._events()), self.wake_at)

    def hold_still(self) -> Decision:
        """Under a pause, write down what has happened already and nothing else: who took over, and that nobody will."""
        old = self.app.assignment
        if old is None:
            return Decision()
        self.draft = old
        self._take_succession()
        if self.draft != old and old.primary and (failure := self.app.failures.get(old.primary.incarnation)):
            self._count(failure, primary=True)
            self.failures.append(failure)
        self.draft = evolve(self.draft, paused=True, successor=None)
        if self.draft == old:
            return Decision()
        return Decision(Plan(self.draft, tuple(failure.incarnation for failure in self.failures), self._events()))

    def _begin(self) -> Assignment:
        old, revision, floor = self.app.assignment, self.app.registration_revision, self.cluster.floor
        if old is None:
            self.memory.clear()
            first = floor + self.cluster.revision  # above any number an earlier application of this name has used
            return Assignment(first, first * MAX_DEGREE, revision, AssignmentState.PENDING, born=first)
        if old.epoch < floor:  # another etcd may have gone on from here
            old = evolve(old, epoch=floor, incarnation=floor * MAX_DEGREE, successor=None)
        if old.state in ENDED:  # registered once more
            self.memory.clear()
            return Assignment(old.epoch, old.incarnation, revision, AssignmentState.PENDING, born=old.born)
        return evolve(old, registration_revision=revision, paused=False)

    def _recent(self) -> dict[int, float]:
        """Failures of primaries within the window; what an earlier manager counted begins with the first look."""
        known = carried_over(self.draft.recent, self.now) if self.memory.recent is None else self.memory.recent
        self.memory.recent = within_window(known, self.now, self.registration.restart_window_s)
        return self.memory.recent

    def _forget_old_failures(self) -> None:
        """After a quiet window nothing counts any more; written, so that a later manager does not count it again."""
        if recent := self._recent():
            self._wake(max(recent.values()) + self.registration.restart_window_s)
        elif self.draft.recent:
            self.draft = evolve(self.draft, recent=0, here=0)

    def _take_succession(self) -> None:
        """A successor that its primary's WatchDog has called is the primary already."""
        draft = self.draft
        if draft.successor is None or draft.primary is None or draft.successor not in self.app.successions:
            return
        died, _ = self.app.successions[draft.successor]
        seat = next((s for s in draft.backups if s.host == draft.successor), None)
        if seat and died == draft.primary.incarnation:
            backups = tuple(s for s in draft.backups if s != seat)
            self.draft = evolve(
                draft, epoch=draft.epoch + 1, primary=seat, backups=backups, successor=None, here=0, in_doubt=False
            )

    def _take_done(self) -> None:
        """A body that returned on any seat completes the application everywhere."""
        incarnations = {seat.incarnation for seat in self.app.assignment.seats} if self.app.assignment else set()
        for failure in self.app.failures.values():
            if failure.kind is FailureKind.DONE and failure.incarnation in incarnations:
                self.done = True
                self.draft = _vacated(self.draft, AssignmentState.COMPLETED, f"the body returned on {failure.host}")
                return

    def _take_failures(self) -> None:
        """Empty the seats that failed, and count what it cost."""
        old = self.app.assignment
        for failure in (*self.app.failures.values(), *self._lost()):
            self.memory.missing_since.pop(failure.incarnation, None)
            if old is None or failure.incarnation not in {seat.incarnation for seat in old.seats}:
                continue  # dealt with before
            self.failures.append(failure)
            was_primary = old.primary is not None and old.primary.incarnation == failure.incarnation
            self._empty(failure)
            self._count(failure, primary=was_primary or failure.role is Role.PRIMARY)
        self._park()

    def _empty(self, failure: Failure) -> None:
        draft = self.draft
        if draft.primary and draft.primary.incarnation == failure.incarnation:
            here = failure.kind in RESTARTED_HERE and draft.here < self.registration.restarts_here
            here = here and not self._standing()  # nor is a copy that has the state of an object passed over
            self.draft = evolve(draft, primary=None, again=draft.primary if here else None)
        else:
            backups = tuple(seat for seat in draft.backups if seat.incarnation != failure.incarnation)
            self.draft = evolve(draft, backups=backups)

    def _count(self, failure: Failure, *, primary: bool) -> None:
        memory, policy = self.memory, self.settings.restart
        if failure.kind is FailureKind.REFUSED:
            memory.refused_at[failure.host] = self.now
            self.draft = evolve(self.draft, refusals={**self.draft.refusals, failure.host: failure.reason})
            return
        if failure.kind not in FAULTS:
            return
        memory.failed_at[failure.host] = self.now
        strikes = strikes_after(self.draft.strikes, failure.uptime_s, policy)
        self.draft = evolve(self.draft, strikes=strikes)
        hold = self.now + restart_delay_s(strikes, self.app.name, policy)
        if primary:
            memory.primary_hold_until = hold
            self._count_in_window(failure)
        memory.backup_hold_until = hold

    def _count_in_window(self, failure: Failure) -> None:
        """Only primaries count here: a host that cannot run a backup must not cost the primary that works."""
        most = self.registration.max_restarts + 1
        recent = self.memory.recent = with_failure(self._recent(), failure.incarnation, self.now, most)
        self.draft = evolve(self.draft, recent=len(recent))

    def _park(self) -> None:
        """Give up an application that has failed too often, until a person resumes it."""
        most, window_s = self.registration.max_restarts, self.registration.restart_window_s
        counted = [failure for failure in self.failures if failure.incarnation in self._recent()]
        if most and counted and len(self._recent()) > most:
            reason = f"failed {len(self._recent())} times within {window_s:g} s, at last: {counted[-1].reason}"
            self.draft = _vacated(self.draft, AssignmentState.FAILED, reason)
            self.done = True

    def _lost(self) -> Iterator[Failure]:
        """Seats that their host, although it is up, has not shown for too long."""
        for seat in self.draft.seats:
            host = self.cluster.hosts.get(seat.host)
            if self.app.replica(seat) or seat.incarnation in self.app.failures or not host or host.session != seat.session:
                self.memory.missing_since.pop(seat.incarnation, None)
                continue
            since = self.memory.missing_since.setdefault(seat.incarnation, self.now)
            grace_s = self.settings.start_grace_s + self.registration.stop_timeout_s  # an earlier copy there may be ending
            if self.now < since + grace_s:
                self._wake(since + grace_s)
                continue
            role = Role.PRIMARY if seat == self.draft.primary else Role.BACKUP
            reason = f"{seat.host} is up but has not shown this replica for {grace_s:g} s"
            yield Failure(seat.host, seat.incarnation, self.draft.epoch, role, FailureKind.LOST, reason, by="manager")

    def _is_settled(self) -> bool:
        """Whether the primary's body has run for long enough that its next failure would be a first one."""
        draft, memory = self.draft, self.memory
        replica = self.app.replica(draft.primary) if draft.primary else None
        if replica is None or replica.state is not ReplicaState.RUNNING:
            return False
        if memory.running_since is None or memory.running_since[0] != replica.incarnation:
            memory.running_since = (replica.incarnation, self.now)
        settled_at = memory.running_since[1] + self.settings.restart.settle_s
        if self.now < settled_at:
            self._wake(settled_at)
        return self.now >= settled_at

    def _promote(self) -> None:
        if self.draft.primary is not None or self._held(primary=True):
            return
        again = self.draft.again
        here = again is not None and self._is_up(again) and self._allowed(again.host) and self._may_lead(again.host)
        seat = self._seat_on(again.host) if again and here else self._next_primary()
        draft = evolve(self.draft, again=None, here=self.draft.here + 1 if here else 0)
        if seat is not None:
            backups = tuple(backup for backup in draft.backups if backup != seat)
            doubt = in_doubt(self.app, self.cluster) is not None
            draft = evolve(draft, epoch=draft.epoch + 1, primary=seat, backups=backups, in_doubt=doubt)
        self.draft = draft

    @property
    def _members(self) -> tuple[Member, ...]:
        record = self.app.own_in_sync if self.registration.object else None
        return record.members if record else ()

    def _standing(self) -> tuple[Seat, ...]:
        """The backups that are in the in-sync set of a replicated object: while there are any, nobody else may lead."""
        members, failed = {member.incarnation for member in self._members}, self.app.failures
        return tuple(s for s in self.draft.backups if s.incarnation in members and s.incarnation not in failed)

    def _may_lead(self, host: str) -> bool:
        """Whether a host may lead when no copy has the state: one that has the log, if the object has a durable one."""
        has_log = not (self.registration.durable and self._members) or host in {member.host for member in self._members}
        return has_log and self._may_follow(host)

    def _may_follow(self, host: str) -> bool:
        """Whether a host may lead after the last primary: if that may still run, one that had to vouch for it."""
        doubt = in_doubt(self.app, self.cluster)
        return doubt is None or host in (doubt.host, *doubt.hosts)

    def _next_primary(self) -> Seat | None:
        standing = self._standing()
        able = standing or tuple(seat for seat in self.draft.backups if self._may_lead(seat.host))
        able = tuple(seat for seat in able if self._may_follow(seat.host))
        alive = [seat for seat in able if self._is_up(seat)]
        alive = [seat for seat in alive if not self.cluster.is_silent(seat.host)] or alive
        ready = [seat for seat in alive if self._promotable(seat)]
        chosen = sorted(ready or alive, key=lambda seat: not self.app.holds_checkpoint(seat.host))
        if chosen or standing:
            return chosen[0] if chosen else None
        return self._new_seat(primary=True) or self._new_seat(primary=True, silent=True)

    def _fill(self) -> None:
        """Restore the degree, and give back what is above it."""
        standing = self._standing()
        if standing:
            others = (seat for seat in self.draft.backups if seat not in standing)
            self.draft = evolve(self.draft, backups=(*standing, *others))
        if self.draft.primary is not None:
            self.draft = evolve(self.draft, backups=self.draft.backups[: self.registration.degree - 1])
        wanted = self.registration.degree - (1 if self.draft.again else 0)
        while len(self.draft.seats) < wanted and not self._held(primary=False):
            seat = self._new_seat()
            if seat is None:
                return
            self.draft = evolve(self.draft, backups=(*self.draft.backups, seat))

    def _held(self, *, primary: bool) -> bool:
        memory, delay = self.memory, restart_delay_s(self.draft.strikes, self.app.name, self.settings.restart)
        until = memory.primary_hold_until if primary else memory.backup_hold_until
        if until is None and delay and self.draft.state is AssignmentState.BACKING_OFF:
            until = self.now + delay  # an earlier manager was waiting: wait once more, rather too long than not at all
            memory.primary_hold_until = memory.backup_hold_until = until
        if until is None or self.now >= until:
            return False
        self._wake(until)
        return True

    def _new_seat(self, *, primary: bool = False, silent: bool = False) -> Seat | None:
        """The least loaded host that may run it: holders of its checkpoint and other zones first, where it just failed last.

        `silent`: among those that are up although their peers cannot reach them, which is better than no primary at all.
        """
        taken = {seat.host for seat in (*self.draft.seats, *((self.draft.again,) if self.draft.again else ()))}
        hosts = self.cluster.hosts
        zones = {hosts[h].host.labels.get(ZONE) for h in taken if h in hosts} - {None}

        def rank(name: str) -> tuple[bool, bool, bool, bool, float, str]:
            host = hosts[name].host
            failed_at = self.memory.failed_at.get(name)
            failed = failed_at is not None and self.now - failed_at < self.settings.failed_host_s
            origin = self.draft.state is AssignmentState.PENDING and name == self.registration.origin
            load = self.cluster.seats[name] / max(1, host.capacity)
            holder = self.app.holds_checkpoint(name)
            return (not origin, failed, not holder, host.labels.get(ZONE) in zones, load, name)

        def is_able(name: str) -> bool:
            able = name in hosts and name not in taken and self.cluster.is_silent(name) is silent and self._allowed(name)
            return able and (not primary or self._may_lead(name))

        special = self._special_hosts()
        best = min(filter(is_able, special), key=rank, default=None)
        for name in () if self.registration.hosts else self.cluster.room:
            if name in special or not is_able(name):
                continue
            if best is None or rank(name) < rank(best):
                best = name
            if hosts[name].host.labels.get(ZONE) not in zones:
                break  # those that follow are only fuller
        return self._seat_on(best) if best is not None else None

    def _special_hosts(self) -> set[str]:
        """Those whose rank depends on more than their load and zone, or that have room for this application alone."""
        holders = self.app.checkpoint.holders if self.app.checkpoint else ()
        old = self.app.assignment.seats if self.app.assignment else ()
        named = (*self.registration.hosts, *holders, *self.memory.failed_at, *(seat.host for seat in old))
        return {*named, *([self.registration.origin] if self.registration.origin else [])}

    def _seat_on(self, name: str) -> Seat:
        self.draft = evolve(
            self.draft,
            incarnation=self.draft.incarnation + 1,
            refusals={h: e for h, e in self.draft.refusals.items() if h != name},
        )
        return Seat(name, self.cluster.hosts[name].session, self.draft.incarnation)

    def _allowed(self, name: str) -> bool:
        host = self.cluster.hosts[name].host
        if self.registration.hosts and name not in self.registration.hosts:
            return False
        if any(host.labels.get(k) != v for k, v in self.registration.labels.items()):
            return False
        own = sum(seat.host == name for seat in self.app.assignment.seats) if self.app.assignment else 0
        if self.cluster.seats[name] - own >= host.capacity:  # a seat of its own there is being given up
            return False
        if name not in self.draft.refusals:
            return True
        retry_at = self.memory.refused_at.setdefault(name, self.now) + self.settings.refusal_retry_s
        if self.now < retry_at:
            self._wake(retry_at)
            return False
        return True

    def _choose_successor(self) -> None:
        """The first backup that can take over at once, unless the next failure has to wait, stay on its host or be the last."""
        draft, policy, registration, recent = self.draft, self.settings.restart, self.registration, self._recent()
        waits = restart_delay_s(draft.strikes + 1, self.app.name, policy) > 0 and not self._is_settled()
        waits = waits or (draft.here < registration.restarts_here and not self._standing())
        if registration.max_restarts and len(recent) >= registration.max_restarts:
            self._wake(min(recent.values()) + registration.restart_window_s)
            waits = True
        backups = self._standing() if self._members else draft.backups
        able = [seat.host for seat in backups if self._is_up(seat) and self._promotable(seat)]
        able.sort(key=lambda host: not self.app.holds_checkpoint(host))
        self.draft = evolve(draft, successor=able[0] if able and draft.primary and not waits else None)

    def _describe(self) -> None:
        draft, degree = self.draft, self.registration.degree
        missing = degree - len(draft.seats)
        if draft.primary is not None:
            state = AssignmentState.ACTIVE
        elif self.memory.primary_hold_until is not None and self.now < self.memory.primary_hold_until:
            state = AssignmentState.BACKING_OFF
        else:
            state = AssignmentState.PENDING
        reason = ""
        if state is AssignmentState.BACKING_OFF:
            last = self.failures[-1].reason if self.failures else draft.reason.partition(": ")[2]
            reason = f"failed {draft.strikes} times in quick succession, waiting before the next start: {last}"
        elif state is AssignmentState.PENDING and (awaited := self._awaited()):
            reason = awaited
        elif missing > 0:
            why = "; ".join(f"{host}: {error}" for host, error in sorted(draft.refusals.items()))
            reason = f"{len(draft.seats)} of {degree} copies: no further host is up, allowed and able" + (
                f" ({why})" if why else ""
            )
        self.draft = evolve(draft, state=state, degraded=missing > 0, reason=reason)

    def _awaited(self) -> str:
        """Say which hosts alone may lead, if not every host may."""
        doubt = in_doubt(self.app, self.cluster)
        if doubt is not None:
            who = " or ".join(sorted({doubt.host, *doubt.hosts}))
            return f"waiting for {who}: its primary on {doubt.host} may still run (failsafe), and only they can tell"
        standing = self._standing()
        if not standing and not self.registration.durable:
            return ""
        hosts = sorted({each.host for each in standing or self._members})
        what = "its state is nowhere else" if standing else "its copies are gone, and its log is nowhere else"
        return f"waiting for {' or '.join(hosts)}: {what}" if hosts else ""

    def _events(self) -> tuple[Event, ...]:
        primary = self.draft.primary.host if self.draft.primary else None
        before = self.app.assignment.primary if self.app.assignment else None
        if primary is None or self.draft.primary == before:
            action = self.draft.reason or "replaced"
        else:
            action = f"started again on {primary}" if before and primary == before.host else f"{primary} promoted"
        return tuple(Event(f, self.draft.epoch, primary, action, f.wall) for f in self.failures[:EVENTS_AT_ONCE])

    def _is_up(self, seat: Seat) -> bool:
        host = self.cluster.hosts.get(seat.host)
        return host is not None and host.session == seat.session

    def _promotable(self, seat: Seat) -> bool:
        replica = self.app.replica(seat)
        return replica is not None and replica.state in PROMOTABLE

    def _wake(self, at: float) -> None:
        self.wake_at = at if self.wake_at is None else min(self.wake_at, at)
