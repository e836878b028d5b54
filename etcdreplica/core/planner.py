"""The ReplicaManager's mind: from what is desired and observed of one application to its next assignment.

Level-triggered: it looks at the whole picture each time and never at how it came about, so it may be interrupted anywhere
and asked again. What it remembers between calls (`Memory`) is only how long things have been so; losing it costs time,
never safety. Waiting is expressed as `Decision.wake_at`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attrs import Factory, define, evolve

from etcdreplica.core.draft import Draft
from etcdreplica.core.failsafe import in_doubt
from etcdreplica.core.moves import heirs, is_up, unready, unsettled
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
from etcdreplica.model import (
    Ask,
    Assignment,
    AssignmentState,
    Event,
    Failure,
    FailureKind,
    Leaving,
    ReplicaState,
    Request,
    Seat,
)
from etcdreplica.words import MAX_DEGREE, Role

LOOK_S = 0.25  # how often a primary that is to leave a drained host looks whether copies are starting
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
    if old is not None and _rests(old, app):
        answered = app.request is not None and old.state in ENDED
        left = app.failures or old.paused or answered
        return Decision(Plan(evolve(old, paused=False), tuple(app.failures), answered=answered) if left else None)
    return step.decide()


def foresee(app: AppView, cluster: ClusterView, settings: PlannerSettings) -> tuple[str, str | None]:
    """Say why nobody would take over at once if the primary failed now, and which host would get one more copy.

    As `decide` would have it, but for what only the manager remembers: the primary is taken to have run for long.
    """
    assert app.registration is not None
    step = _Step(app, app.registration, cluster, Memory(), 0.0, settings)
    step.draft = step._begin()
    if step.draft.primary is not None:
        step.memory.running_since = (step.draft.primary.incarnation, -settings.restart.settle_s)
    why, seat = step._not_at_once(), step._new_seat()
    return why, seat.host if seat is not None else None


def _rests(old: Assignment, app: AppView) -> bool:
    """Whether nothing of it is to run; what is to run again must first have let its last copies end."""
    if old.state is AssignmentState.STOPPED:
        return bool(app.replicas) or (app.request is not None and app.request.ask is Ask.STOP)
    return old.state in ENDED and (bool(app.replicas) or old.registration_revision == app.registration_revision)


def _remove(app: AppView, cluster: ClusterView) -> Decision:
    old = app.assignment
    if old is None:
        return Decision(Plan(None) if app.failures or app.pause or app.request or app.vouchers else None)
    if old.state is not AssignmentState.REMOVING:
        return Decision(Plan(_vacated(old, AssignmentState.REMOVING, "being removed"), tuple(app.failures)))
    return Decision(Plan(None) if not app.replicas and in_doubt(app, cluster) is None else None)


def _vacated(assignment: Assignment, state: AssignmentState, reason: str) -> Assignment:
    nobody: dict[str, Any] = {"primary": None, "backups": (), "successor": None, "again": None, "leaving": None}
    return evolve(assignment, state=state, reason=reason, degraded=False, **nobody)


@define
class _Step(Draft):
    """One decision under way: `draft` goes through the steps in order and is compared with the old assignment."""

    failures: list[Failure] = Factory(list)
    done: bool = False
    answered: bool = False  # the request of a person

    def decide(self) -> Decision:
        self.draft = self._begin()
        self._forget_old_failures()
        self._take_succession()
        self._take_done()
        if not self.done:
            self._take_failures()
        if not self.done and self._asked(Ask.STOP):
            self._stop()
        elif not self.done:
            self._promote()
            self._restyle()
            self._fill()
            self._hand_over()
            self._choose_successor()
            self._describe()
        mended = not any(key.startswith(DERIVED) for key in self.app.corrupt)
        if self.draft == self.app.assignment and not self.app.failures and not self.answered and mended:
            return Decision(wake_at=self.wake_at)
        return Decision(Plan(self.draft, tuple(self.app.failures), self._events(), self.answered), self.wake_at)

    def _asked(self, *asks: Ask) -> Request | None:
        request = self.app.request
        return request if request is not None and request.ask in asks else None

    def _stop(self) -> None:
        """First the primary ends, in order and with nobody to follow, so that other hosts can hold its last checkpoint."""
        draft, request = self.draft, self.app.request
        assert request is not None
        reason = f"stopped by {request.by}"
        if draft.primary is None:
            self.draft = _vacated(draft, AssignmentState.STOPPED, reason)
        else:
            self.draft = evolve(draft, successor=None, leaving=draft.leaving or Leaving(reason))

    def _hand_over(self) -> None:
        """Have the primary end if a person wants it, or its host is drained, and another copy can follow at once."""
        draft, request = self.draft, self._asked(Ask.SWITCHOVER, Ask.FAILOVER)
        if request is not None and (draft.primary is None or draft.primary.incarnation != request.primary):
            self.answered, request = True, None  # another one is primary since
        if request is not None and (draft.leaving is None or request.ask is Ask.FAILOVER):
            able = heirs(self.app, self.cluster, (seat for seat in draft.backups if request.to in (None, seat.host)))
            if able:
                reason = f"{request.ask} to {able[0].host}, asked for by {request.by}"
                self.draft = evolve(draft, leaving=Leaving(reason, able[0].host, at_once=request.ask is Ask.FAILOVER))
                self.answered = True
        elif request is not None:
            self.answered = True  # it is ending already
        elif draft.primary is not None and draft.leaving is None and (heir := self._heir_of_drained(draft.primary)):
            reason = f"switchover to {heir.host}: {draft.primary.host} is drained"
            self.draft = evolve(draft, leaving=Leaving(reason, heir.host))

    def _heir_of_drained(self, primary: Seat) -> Seat | None:
        """Who follows a primary on a drained host: nobody before all copies that are to stay are as good as the old ones."""
        if self._lasts(primary):
            self.memory.heir_since = None
            return None
        lasting = [seat for seat in self.draft.backups if self._lasts(seat)]
        waits = len(lasting) < self.registration.degree and self._held(primary=False)
        if waits or any(unsettled(self.app, self.cluster, seat) for seat in lasting):
            return None
        heir = next(iter(heirs(self.app, self.cluster, lasting)), None)
        return heir if heir is not None and self._is_quiet() else None

    def _is_quiet(self) -> bool:
        """Whether bodies can end and begin quickly: first all copies are made, everywhere, and then the primaries go."""
        memory, settings = self.memory, self.settings
        memory.heir_since = self.now if memory.heir_since is None else memory.heir_since
        until = memory.heir_since + settings.quiet_s
        if not self.cluster.starting or self.now >= until:
            memory.heir_since = None
            return True
        self._wake(min(until, self.now + LOOK_S))
        return False

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
        degree = self.registration.degree
        if old is None:
            self.memory.clear()
            first = floor + self.cluster.revision  # above any number an earlier application of this name has used
            return Assignment(first, first * MAX_DEGREE, revision, AssignmentState.PENDING, born=first, degree=degree)
        if old.epoch < floor:  # another etcd may have gone on from here
            old = evolve(old, epoch=floor, incarnation=floor * MAX_DEGREE, successor=None)
        if old.state in (*ENDED, AssignmentState.STOPPED):  # registered once more, or started again
            self.memory.clear()
            return Assignment(old.epoch, old.incarnation, revision, AssignmentState.PENDING, born=old.born, degree=degree)
        return evolve(old, registration_revision=revision, paused=False, degree=degree)

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
            following: dict[str, Any] = {"epoch": draft.epoch + 1, "primary": seat, "backups": backups}
            self.draft = evolve(draft, **following, successor=None, here=0, leaving=None, in_doubt=False)

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
            if was_primary and old.leaving is not None:
                self.home = failure.host
            self._empty(failure)
            self._count(failure, primary=was_primary or failure.role is Role.PRIMARY)
        self._park()

    def _empty(self, failure: Failure) -> None:
        draft = self.draft
        if draft.primary and draft.primary.incarnation == failure.incarnation:
            here = failure.kind in RESTARTED_HERE and draft.here < self.registration.restarts_here
            here = here and not self._standing()  # nor is a copy that has the state of an object passed over
            self.draft = evolve(draft, primary=None, again=draft.primary if here else None, leaving=None)
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
            grace_s = self.settings.start_grace_s + self.registration.end_timeout_s  # an earlier copy there may be ending
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
        here = again is not None and is_up(self.cluster, again) and self._lasts(again)
        here = here and again is not None and self._allowed(again.host) and self._may_lead(again.host)
        seat = self._seat_on(again.host) if again and here else self._next_primary()
        draft = evolve(self.draft, again=None, here=self.draft.here + 1 if here else 0)
        if seat is not None:
            backups = tuple(backup for backup in draft.backups if backup != seat)
            doubt = in_doubt(self.app, self.cluster) is not None
            draft = evolve(draft, epoch=draft.epoch + 1, primary=seat, backups=backups, in_doubt=doubt)
        self.draft = draft

    def _standing(self) -> tuple[Seat, ...]:
        """The backups that are in the in-sync set of a replicated object: while there are any, nobody else may lead."""
        members, failed = {member.incarnation for member in self.app.members}, self.app.failures
        return tuple(s for s in self.draft.backups if s.incarnation in members and s.incarnation not in failed)

    def _next_primary(self) -> Seat | None:
        standing = self._standing()
        able = standing or tuple(seat for seat in self.draft.backups if self._may_lead(seat.host))
        able = tuple(seat for seat in able if self._may_follow(seat.host))
        alive = [seat for seat in able if is_up(self.cluster, seat)]
        alive = [seat for seat in alive if not self.cluster.is_silent(seat.host)] or alive
        ready = [seat for seat in alive if self._promotable(seat)]
        chosen = sorted(ready or alive, key=self._rank_of_heir)
        if chosen or standing:
            return chosen[0] if chosen else None
        new = self._new_seat(primary=True) or self._new_seat(primary=True, drained=True)
        return new or self._new_seat(primary=True, silent=True)

    def _rank_of_heir(self, seat: Seat) -> tuple[bool, bool]:
        return not self._lasts(seat), not self.app.holds_checkpoint(seat.host)

    def _restyle(self) -> None:
        """Have a backup that was begun under another style begin anew on its host, one at a time."""
        shown = [(seat, self.app.replica(seat)) for seat in self.draft.backups]
        stale = [seat for seat, replica in shown if replica and replica.style not in (None, self.registration.style)]
        fresh = (seat for seat, _ in shown if seat not in stale)
        if stale and not self._held(primary=False) and not any(unready(self.app, self.cluster, seat) for seat in fresh):
            self.home = stale[-1].host
            self.draft = evolve(self.draft, backups=tuple(seat for seat in self.draft.backups if seat != stale[-1]))

    def _fill(self) -> None:
        """Restore the degree on hosts that are not drained, and give back what is above it."""
        standing = self._standing()
        if standing:
            others = (seat for seat in self.draft.backups if seat not in standing)
            self.draft = evolve(self.draft, backups=(*standing, *others))
        if self.draft.primary is not None:
            self._give_back(self.draft.primary)
        while not self._held(primary=False):
            again = (self.draft.again,) if self.draft.again else ()
            lasting = [seat for seat in (*self.draft.seats, *again) if self._lasts(seat)]
            seat = self._new_seat() if len(lasting) < self.registration.degree else None
            if seat is None and len((*self.draft.seats, *again)) < self.registration.degree:
                seat = self._new_seat(drained=True)
            if seat is None:
                return
            self.draft = evolve(self.draft, backups=(*self.draft.backups, seat))

    def _give_back(self, primary: Seat) -> None:
        """End the backups above the degree. One on a drained host is not above it before another one has replaced it."""
        backups, degree = self.draft.backups, self.registration.degree
        lasting = [seat for seat in backups if self._lasts(seat)][: degree - self._lasts(primary)]
        settled = sum(not unsettled(self.app, self.cluster, seat) for seat in lasting)
        passing = [seat for seat in backups if not self._lasts(seat)][: max(0, degree - 1 - settled)]
        self.draft = evolve(self.draft, backups=tuple(seat for seat in backups if seat in lasting or seat in passing))

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

    def _not_at_once(self) -> str:
        """Say why nobody is to take over at once when the primary fails."""
        draft, policy, registration, recent = self.draft, self.settings.restart, self.registration, self._recent()
        why = ""
        if restart_delay_s(draft.strikes + 1, self.app.name, policy) > 0 and not self._is_settled():
            why = f"it has failed {draft.strikes} times in quick succession, so its next start has to wait"
        elif draft.here < registration.restarts_here and not self._standing():
            why = f"it is first started again on its own host, {draft.here} of {registration.restarts_here} times so far"
        if registration.max_restarts and len(recent) >= registration.max_restarts:
            self._wake(min(recent.values()) + registration.restart_window_s)
            why = f"it has failed {len(recent)} times within {registration.restart_window_s:g} s: one more time parks it"
        return why

    def _choose_successor(self) -> None:
        """The first backup that can take over at once, unless the next failure has to wait, stay on its host or be the last.

        For a primary that was asked to end there is no next failure.
        """
        draft, waits = self.draft, bool(self._not_at_once())
        able = sorted((s for s in draft.backups if not unready(self.app, self.cluster, s)), key=self._rank_of_heir)
        if (leaving := draft.leaving) is not None:
            able.sort(key=lambda seat: seat.host != leaving.to)
            waits = False
        self.draft = evolve(draft, successor=able[0].host if able and draft.primary and not waits else None)

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
        hosts = sorted({each.host for each in standing or self.app.members})
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
