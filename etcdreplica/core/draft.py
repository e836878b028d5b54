"""An assignment that is being made: the picture it is made of, and which host gets a seat in it."""

from __future__ import annotations

from attrs import define, evolve, field

from etcdreplica.core.failsafe import in_doubt
from etcdreplica.core.lifecycle import PROMOTABLE
from etcdreplica.core.moves import misfit
from etcdreplica.core.plan import Memory, PlannerSettings
from etcdreplica.core.view import AppView, ClusterView
from etcdreplica.model import Assignment, AssignmentState, Registration, Seat

ZONE = "zone"  # the host label by which replicas are spread


@define
class Draft:
    """`draft` is what the assignment has become so far. `home`: a host that is to have back the seat it gives up."""

    app: AppView
    registration: Registration
    cluster: ClusterView
    memory: Memory
    now: float
    settings: PlannerSettings
    draft: Assignment = field(init=False)
    wake_at: float | None = field(init=False, default=None)
    home: str | None = field(init=False, default=None)

    def _new_seat(self, *, primary: bool = False, silent: bool = False, drained: bool = False) -> Seat | None:
        """The least loaded host that may run it: holders of its checkpoint and other zones first, where it just failed last.

        `silent`: among those that are up although their peers cannot reach them, which is better than no primary at all.
        `drained`: among those that are drained, in place of the seat that it has there.
        """
        taken = {seat.host for seat in (*self.draft.seats, *((self.draft.again,) if self.draft.again else ()))}
        hosts = self.cluster.hosts
        zones = {hosts[h].host.labels.get(ZONE) for h in taken if h in hosts} - {None}

        def rank(name: str) -> tuple[bool, bool, bool, bool, bool, float, str]:
            host = hosts[name].host
            failed_at = self.memory.failed_at.get(name)
            failed = failed_at is not None and self.now - failed_at < self.settings.failed_host_s
            origin = self.draft.state is AssignmentState.PENDING and name == self.registration.origin
            load = self.cluster.seats[name] / max(1, host.capacity)
            holder = self.app.holds_checkpoint(name)
            return (name != self.home, not origin, failed, not holder, host.labels.get(ZONE) in zones, load, name)

        def is_able(name: str) -> bool:
            able = name in hosts and name not in taken and self.cluster.is_silent(name) is silent and self._allowed(name)
            able = able and (name in self.cluster.drains) is drained and (not drained or name in self.app.seated_on)
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
        if misfit(self.app, self.cluster, name):
            return False
        if name not in self.draft.refusals:
            return True
        retry_at = self.memory.refused_at.setdefault(name, self.now) + self.settings.refusal_retry_s
        if self.now < retry_at:
            self._wake(retry_at)
            return False
        return True

    def _may_lead(self, host: str) -> bool:
        """Whether a host may lead when no copy has the state: one that has the log, if the object has a durable one."""
        has_log = not (self.registration.durable and self.app.members) or host in {m.host for m in self.app.members}
        return has_log and self._may_follow(host)

    def _may_follow(self, host: str) -> bool:
        """Whether a host may lead after the last primary: if that may still run, one that had to vouch for it."""
        doubt = in_doubt(self.app, self.cluster)
        return doubt is None or host in (doubt.host, *doubt.hosts)

    def _lasts(self, seat: Seat) -> bool:
        return seat.host not in self.cluster.drains

    def _promotable(self, seat: Seat) -> bool:
        replica = self.app.replica(seat)
        return replica is not None and replica.state in PROMOTABLE

    def _wake(self, at: float) -> None:
        self.wake_at = at if self.wake_at is None else min(self.wake_at, at)
