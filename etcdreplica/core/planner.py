"""The ReplicaManager's mind: from what is desired and observed of one application to its next assignment.

Level-triggered: it looks at the whole picture each time and never at how it came about, so it may be interrupted anywhere
and asked again. What it remembers between calls (`Memory`) is only how long things have been so; losing it costs time,
never safety. Waiting is expressed as `Decision.wake_at`.
"""

from __future__ import annotations

from collections.abc import Iterator

from attrs import Factory, define, evolve, field, frozen

from etcdreplica.core.lifecycle import PROMOTABLE
from etcdreplica.core.restarts import RestartPolicy, restart_delay_s, strikes_after
from etcdreplica.core.view import AppView, ClusterView
from etcdreplica.model import Assignment, AssignmentState, Event, Failure, FailureKind, Registration, ReplicaState, Seat
from etcdreplica.words import MAX_DEGREE, Role

ZONE = "zone"  # the host label by which replicas are spread
HISTORY_KEPT = 20
EVENTS_AT_ONCE = 10  # etcd takes 128 operations in one transaction
DERIVED = "placements/"  # corrupt values there are written anew from the assignment


@frozen
class PlannerSettings:
    """Seconds throughout."""

    restart: RestartPolicy = Factory(RestartPolicy)
    start_grace_s: float = 15.0  # a host that is up shows a replica it was given within this
    refusal_retry_s: float = 30.0  # a host that refused the program is asked again after this
    failed_host_s: float = 60.0  # a host where the application just failed is chosen last


@define
class Memory:
    """What one manager remembers of one application."""

    missing_since: dict[int, float] = Factory(dict)
    refused_at: dict[str, float] = Factory(dict)
    failed_at: dict[str, float] = Factory(dict)
    running_since: tuple[int, float] | None = None
    primary_hold_until: float | None = None
    backup_hold_until: float | None = None

    def clear(self) -> None:
        """Begin anew, as for an application that was registered once more."""
        self.__init__()  # type: ignore[misc]


@frozen
class Plan:
    """What to write, in one transaction. `assignment` None means to delete what is left of the application."""

    assignment: Assignment | None
    consumed: tuple[int, ...] = ()  # incarnations whose failure records are dealt with
    events: tuple[Event, ...] = ()


@frozen
class Decision:
    """`plan` None: nothing to write now. `wake_at`: ask again then, even if nothing has changed."""

    plan: Plan | None = None
    wake_at: float | None = None


def decide(app: AppView, cluster: ClusterView, memory: Memory, now: float, settings: PlannerSettings) -> Decision:
    """Decide the next step for one application."""
    old, registration = app.assignment, app.registration
    if any(not key.startswith(DERIVED) for key in app.corrupt):
        return Decision()  # nobody can tell what is right until somebody mends the value
    if registration is None or (old and old.state is AssignmentState.REMOVING):
        return _remove(app)
    unchanged = old is not None and old.registration_revision == app.registration_revision
    if old and old.state is AssignmentState.COMPLETED and (unchanged or app.replicas):  # first let its last copies end
        return Decision(Plan(old, tuple(app.failures)) if app.failures else None)
    return _Step(app, registration, cluster, memory, now, settings).decide()


def _remove(app: AppView) -> Decision:
    old = app.assignment
    if old is None:
        return Decision(Plan(None) if app.failures else None)
    if old.state is not AssignmentState.REMOVING:
        return Decision(Plan(_vacated(old, AssignmentState.REMOVING, "being removed"), tuple(app.failures)))
    return Decision(Plan(None) if not app.replicas else None)


def _vacated(assignment: Assignment, state: AssignmentState, reason: str) -> Assignment:
    return evolve(assignment, state=state, reason=reason, primary=None, backups=(), successor=None, degraded=False)


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
        self._take_succession()
        self._take_done()
        if not self.done:
            self._take_failures()
            self._promote()
            self._fill()
            self._choose_successor()
            self._describe()
        if self.draft == self.app.assignment and not self.app.failures and not self.app.corrupt:
            return Decision(wake_at=self.wake_at)
        return Decision(Plan(self.draft, tuple(self.app.failures), self._events()), self.wake_at)

    def _begin(self) -> Assignment:
        old, revision = self.app.assignment, self.app.registration_revision
        if old is None:
            first = self.cluster.revision  # above any number an earlier application of this name has used
            return Assignment(first, first * MAX_DEGREE, revision, AssignmentState.PENDING)
        if old.state is AssignmentState.COMPLETED:  # registered once more
            self.memory.clear()
            return Assignment(old.epoch, old.incarnation, revision, AssignmentState.PENDING)
        return evolve(old, registration_revision=revision)

    def _take_succession(self) -> None:
        """A successor that its primary's WatchDog has called is the primary already."""
        draft = self.draft
        if draft.successor is None or draft.primary is None or draft.successor not in self.app.successions:
            return
        died, _ = self.app.successions[draft.successor]
        seat = next((s for s in draft.backups if s.host == draft.successor), None)
        if seat and died == draft.primary.incarnation:
            backups = tuple(s for s in draft.backups if s != seat)
            self.draft = evolve(draft, epoch=draft.epoch + 1, primary=seat, backups=backups, successor=None)

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

    def _empty(self, failure: Failure) -> None:
        draft = self.draft
        primary = None if draft.primary and draft.primary.incarnation == failure.incarnation else draft.primary
        backups = tuple(seat for seat in draft.backups if seat.incarnation != failure.incarnation)
        self.draft = evolve(draft, primary=primary, backups=backups)

    def _count(self, failure: Failure, *, primary: bool) -> None:
        memory, policy = self.memory, self.settings.restart
        if failure.kind is FailureKind.REFUSED:
            memory.refused_at[failure.host] = self.now
            self.draft = evolve(self.draft, refusals={**self.draft.refusals, failure.host: failure.reason})
            return
        if failure.kind not in (FailureKind.EXIT, FailureKind.RETURNED, FailureKind.LOST):
            return
        memory.failed_at[failure.host] = self.now
        strikes = strikes_after(self.draft.strikes, failure.uptime_s, policy)
        self.draft = evolve(self.draft, strikes=strikes)
        hold = self.now + restart_delay_s(strikes, self.app.name, policy)
        if primary:
            memory.primary_hold_until = hold
        memory.backup_hold_until = hold

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
        if self.draft.primary is not None:
            return
        if self._held(primary=True):
            return
        draft = self.draft
        alive = [seat for seat in draft.backups if self._is_up(seat)]
        alive = [seat for seat in alive if not self.cluster.is_silent(seat.host)] or alive
        ready = [seat for seat in alive if self._promotable(seat)]
        if chosen := (ready or alive):
            backups = tuple(seat for seat in draft.backups if seat != chosen[0])
            self.draft = evolve(draft, epoch=draft.epoch + 1, primary=chosen[0], backups=backups)
        elif seat := self._new_seat() or self._new_seat(silent=True):
            self.draft = evolve(self.draft, epoch=draft.epoch + 1, primary=seat)

    def _fill(self) -> None:
        """Restore the degree, and give back what is above it."""
        if self.draft.primary is not None:
            self.draft = evolve(self.draft, backups=self.draft.backups[: self.registration.degree - 1])
        while len(self.draft.seats) < self.registration.degree and not self._held(primary=False):
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

    def _new_seat(self, *, silent: bool = False) -> Seat | None:
        """The least loaded host that may run it, other zones first, hosts where it just failed last.

        `silent`: among those that are up although their peers cannot reach them, which is better than no primary at all.
        """
        taken = {seat.host for seat in self.draft.seats}
        hosts = self.cluster.hosts
        zones = {hosts[h].host.labels.get(ZONE) for h in taken if h in hosts} - {None}

        def rank(name: str) -> tuple[bool, bool, bool, float, str]:
            host = hosts[name].host
            failed_at = self.memory.failed_at.get(name)
            failed = failed_at is not None and self.now - failed_at < self.settings.failed_host_s
            origin = self.draft.state is AssignmentState.PENDING and name == self.registration.origin
            load = self.cluster.seats[name] / max(1, host.capacity)
            return (not origin, failed, host.labels.get(ZONE) in zones, load, name)

        free = [h for h in hosts if h not in taken and self.cluster.is_silent(h) is silent and self._allowed(h)]
        if not free:
            return None
        name = min(free, key=rank)
        self.draft = evolve(
            self.draft,
            incarnation=self.draft.incarnation + 1,
            refusals={h: e for h, e in self.draft.refusals.items() if h != name},
        )
        return Seat(name, hosts[name].session, self.draft.incarnation)

    def _allowed(self, name: str) -> bool:
        host = self.cluster.hosts[name].host
        if self.registration.hosts and name not in self.registration.hosts:
            return False
        if any(host.labels.get(k) != v for k, v in self.registration.labels.items()):
            return False
        if self.cluster.seats[name] >= host.capacity:
            return False
        if name not in self.draft.refusals:
            return True
        retry_at = self.memory.refused_at.setdefault(name, self.now) + self.settings.refusal_retry_s
        if self.now < retry_at:
            self._wake(retry_at)
            return False
        return True

    def _choose_successor(self) -> None:
        """The first backup that can take over at once, unless the next failure has to wait anyway."""
        draft, policy = self.draft, self.settings.restart
        waits = restart_delay_s(draft.strikes + 1, self.app.name, policy) > 0 and not self._is_settled()
        able = [seat.host for seat in draft.backups if self._is_up(seat) and self._promotable(seat)]
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
        elif missing > 0:
            why = "; ".join(f"{host}: {error}" for host, error in sorted(draft.refusals.items()))
            reason = f"{len(draft.seats)} of {degree} copies: no further host is up, allowed and able" + (
                f" ({why})" if why else ""
            )
        self.draft = evolve(draft, state=state, degraded=missing > 0, reason=reason)

    def _events(self) -> tuple[Event, ...]:
        primary = self.draft.primary.host if self.draft.primary else None
        old = self.app.assignment
        before = old.primary.host if old and old.primary else None
        action = f"{primary} promoted" if primary and primary != before else self.draft.reason or "replaced"
        return tuple(Event(f, self.draft.epoch, primary, action, f.wall) for f in self.failures[:EVENTS_AT_ONCE])

    def _is_up(self, seat: Seat) -> bool:
        host = self.cluster.hosts.get(seat.host)
        return host is not None and host.session == seat.session

    def _promotable(self, seat: Seat) -> bool:
        replica = self.app.replica(seat)
        return replica is not None and replica.state in PROMOTABLE

    def _wake(self, at: float) -> None:
        self.wake_at = at if self.wake_at is None else min(self.wake_at, at)


def lost_seats(app: AppView, cluster: ClusterView) -> Iterator[tuple[Seat, Role]]:
    """The SuperWatchDog's mind: every seat, with its role, whose host is down, began a new session or is given up by peers."""
    for seat in app.assignment.seats if app.assignment else ():
        host = cluster.hosts.get(seat.host)
        is_lost = host is None or host.session != seat.session or cluster.loss_of(app.name, seat) is not None
        if is_lost and seat.incarnation not in app.failures:
            yield seat, Role.PRIMARY if app.assignment and seat == app.assignment.primary else Role.BACKUP
