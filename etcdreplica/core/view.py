"""What the elected roles know of the cluster: a plain picture, kept up to date change by change."""

from __future__ import annotations

from collections import Counter
from typing import Any

from attrs import Factory, define, field, frozen

from etcdreplica.core.room import Occupants, Room
from etcdreplica.model import (
    Assignment,
    AssignmentState,
    Checkpoint,
    Drain,
    Failure,
    Host,
    InSync,
    Member,
    Pause,
    Registration,
    Replica,
    ReplicaState,
    Request,
    Seat,
    Server,
    Vouchers,
)
from etcdreplica.words import Failover

UNDER_WAY = (AssignmentState.PENDING, AssignmentState.ACTIVE, AssignmentState.BACKING_OFF)


@frozen
class HostView:
    """A host that is up. `session` changes when the host's WatchDog starts anew."""

    host: Host
    session: int


@frozen
class Loss:
    """A stay of a host that its peers cannot reach although its lease lives (`core.suspicion`).

    `seats` are those of failover="fast" that were there when that was found, by application and incarnation: they are lost.
    """

    session: int
    reason: str
    seats: frozenset[tuple[str, int]] = frozenset()


@define
class AppView:
    """All that is known of one application.

    `assignment` may be one that is only being written (`ClusterView.expect`), `written` is what stands in etcd. A seat that was
    never written proves nothing of the incarnation it names: the next plan gives that number to another one.
    """

    name: str
    registration: Registration | None = None
    registration_revision: int = 0
    assignment: Assignment | None = None
    assignment_revision: int = 0
    written: Assignment | None = None
    successions: dict[str, tuple[int, int]] = Factory(dict)  # by host: (incarnation that died, mod revision)
    replicas: dict[str, Replica] = Factory(dict)  # by host
    failures: dict[int, Failure] = Factory(dict)  # by incarnation
    history: set[int] = Factory(set)
    corrupt: dict[str, str] = Factory(dict)
    pause: Pause | None = None
    pause_revision: int = 0
    request: Request | None = None
    request_revision: int = 0
    checkpoint: Checkpoint | None = None
    checkpoint_revision: int = 0
    in_sync: InSync | None = None
    in_sync_revision: int = 0
    vouchers: Vouchers | None = None
    vouchers_revision: int = 0

    @property
    def born(self) -> int:
        """Checkpoints and in-sync sets older than this epoch belong to an earlier application of this name."""
        return self.assignment.born if self.assignment else 0

    @property
    def own_checkpoint(self) -> Checkpoint | None:
        """The newest one that is known to be durable, unless it is an earlier application's."""
        return self.checkpoint if self.checkpoint is not None and self.checkpoint.epoch >= self.born else None

    @property
    def own_in_sync(self) -> InSync | None:
        """The in-sync set of a replicated object, unless it is an earlier application's."""
        return self.in_sync if self.in_sync is not None and self.in_sync.epoch >= self.born else None

    @property
    def members(self) -> tuple[Member, ...]:
        """Those of the in-sync set of a replicated object."""
        is_object = self.registration is not None and self.registration.object
        return self.own_in_sync.members if is_object and self.own_in_sync is not None else ()

    def holds_checkpoint(self, host: str) -> bool:
        """Whether what is durable of its state is on this host."""
        return self.checkpoint is not None and host in self.checkpoint.holders

    def replica(self, seat: Seat) -> Replica | None:
        """Return what its host reports of this very seat."""
        replica = self.replicas.get(seat.host)
        return replica if replica and replica.incarnation == seat.incarnation else None

    @property
    def seated_on(self) -> frozenset[str]:
        """The hosts on which it has a seat, or is to have one again."""
        if self.assignment is None:
            return frozenset()
        again = (self.assignment.again,) if self.assignment.again else ()
        return frozenset(seat.host for seat in (*self.assignment.seats, *again))

    @property
    def lacks_seat(self) -> bool:
        """Whether it would take a seat on a host that comes up, or has room again."""
        if self.registration is None or self.assignment is None:
            return self.registration is not None
        assignment = self.assignment
        missing = assignment.primary is None or len(assignment.seats) < self.registration.degree
        return missing and assignment.state in UNDER_WAY

    def is_empty(self) -> bool:
        """Whether nothing of the application is left in etcd."""
        there = self.registration or self.assignment or self.replicas or self.failures
        return not (there or self.corrupt or self.pause or self.request or self.vouchers)


@define
class ClusterView:
    """All applications and hosts at one revision.

    A change of a host concerns the applications that have a seat there, which `apply` returns. Those that lack a seat, or
    are to leave a drained host (`seatless`), need only look again when there is something new for them: `offers` counts such
    changes.
    """

    revision: int = 0
    hosts: dict[str, HostView] = Factory(dict)
    apps: dict[str, AppView] = Factory(dict)
    servers: dict[str, Server] = Factory(dict)  # CheckpointServers, by host
    seats: Counter[str] = Factory(Counter)  # how many seats each host has
    pause: Pause | None = None  # of the whole cluster
    pause_revision: int = 0
    drains: dict[str, Drain] = Factory(dict)  # by host
    floor: int = 0  # below it are the epochs that an etcd before this one has used
    starting: set[tuple[str, str]] = Factory(set)  # application and host of copies that are shown to start
    losses: dict[str, Loss] = Factory(dict)  # by host; what we found ourselves, so that no snapshot clears it
    room: Room = field(factory=Room, eq=False)
    seatless: set[str] = field(factory=set, eq=False)
    offers: int = field(default=0, eq=False)
    _seated: Occupants = field(factory=Occupants, eq=False)
    _fast: Occupants = field(factory=Occupants, eq=False)  # of them, those with failover="fast"

    def app(self, name: str) -> AppView:
        """Return the view of an application, new if need be."""
        return self.apps.get(name) or self.apps.setdefault(name, AppView(name))

    def is_silent(self, host: str) -> bool:
        """Whether its peers cannot reach a host that is up."""
        return host in self.losses and host in self.hosts and self.losses[host].session == self.hosts[host].session

    def loss_of(self, app: str, seat: Seat) -> Loss | None:
        """Return why a seat is given up although the lease of its host lives, if it is."""
        loss = self.losses.get(seat.host) if self.is_silent(seat.host) else None
        return loss if loss is not None and (app, seat.incarnation) in loss.seats else None

    def seated_on(self, host: str) -> set[str]:
        """Return the applications that have a seat on a host, or wait for it."""
        return set(self._seated.on(host))

    def offer(self) -> None:
        """Have all that lack a seat look again."""
        self.offers += 1

    @property
    def fast_hosts(self) -> list[str]:
        """The hosts that are up and hold a seat of failover="fast"."""
        return [host for host in self._fast.hosts if any(self._fast_seat(app, host) for app in self._fast.on(host))]

    def fast_seats(self, host: str) -> frozenset[tuple[str, int]]:
        """Return the seats of failover="fast" on a host that is up: application and incarnation."""
        found = (self._fast_seat(app, host) for app in self._fast.on(host))
        return frozenset(seat for seat in found if seat is not None)

    def _fast_seat(self, name: str, host: str) -> tuple[str, int] | None:
        """Not one that holds the state of an object alone: what it may still acknowledge would be lost with it."""
        app, up = self.apps[name], self.hosts.get(host)
        for seat in app.assignment.seats if app.assignment and up else ():
            alone = app.own_in_sync is not None and app.own_in_sync.members == (Member(seat.host, seat.incarnation),)
            if seat.host == host and up is not None and up.session == seat.session and not alone:
                return name, seat.incarnation
        return None

    def clear(self) -> None:
        """Forget everything, before a snapshot."""
        self.hosts.clear()
        self.servers.clear()
        self.drains.clear()
        self.starting.clear()
        self.apps.clear()
        self.seats.clear()
        self.room.clear()
        self.seatless.clear()
        self._seated.clear()
        self._fast.clear()
        self.pause, self.pause_revision, self.floor = None, 0, 0

    def apply(self, kind: str, names: tuple[str, ...], value: Any, revision: int, created: int, error: str = "") -> set[str]:
        """Take one change; `value` None deletes, `error` says that the value cannot be read. Return the apps touched."""
        if kind == "hosts":
            return self._apply_host(names[0], value, created, error)
        if kind == "drains":
            return self._apply_drain(names[0], Drain(by="somebody", reason=error) if error else value)
        if kind == "servers":
            if value is None:
                self.servers.pop(names[0], None)
            else:
                self.servers[names[0]] = value
        if kind == "origin":
            self.floor = value.floor if value is not None else 0
            return set(self.apps)
        if kind in ("leaders", "servers"):
            return set()
        if kind == "pauses" and names[0] == "cluster":
            self.pause = Pause(by="somebody", reason=error) if error else value  # whoever wrote it wanted calm
            self.pause_revision = revision if self.pause else 0
            return set(self.apps)
        name = names[1] if kind in ("successions", "placements", "pauses") else names[0]
        app = self.app(name)
        label = "/".join((kind, *names))
        if error:
            app.corrupt[label] = error
            return {name}
        app.corrupt.pop(label, None)
        if kind != "placements":
            self._apply_to(app, kind, names, value, revision)
        if app.is_empty():
            del self.apps[name]
        return {name}

    def _apply_host(self, host: str, value: Any, created: int, error: str) -> set[str]:
        if error:  # its key, and so its lease, is there: what runs on it is not lost
            self.hosts.setdefault(host, HostView(Host(address="", pid=0, capacity=0), created))
        elif value is None:
            self.hosts.pop(host, None)
        else:
            self.hosts[host] = HostView(value, created)
        if host in self.hosts:
            self.offer()
        self._weigh(host)
        return self.seated_on(host)

    def _apply_drain(self, host: str, value: Drain | None) -> set[str]:
        if value is None:
            self.drains.pop(host, None)
        else:
            self.drains[host] = value
        self._weigh(host)
        for name in self.seated_on(host):
            self._index(self.apps[name])
        return self.seated_on(host)

    def expect(self, app: AppView, assignment: Assignment | None) -> None:
        """Count the seats of an assignment already while it is being written, so that many plans spread over the hosts."""
        before = app.assignment.seats if app.assignment else ()
        after = assignment.seats if assignment else ()
        app.assignment = assignment
        if before != after:
            self.seats.subtract(seat.host for seat in before)
            self.seats.update(seat.host for seat in after)
            for host in {seat.host for seat in (*before, *after)}:
                self._weigh(host)
        self._index(app)

    def _weigh(self, host: str) -> None:
        if host not in self.hosts or host in self.drains:
            self.room.drop(host)
        elif self.room.put(host, self.seats[host], self.hosts[host].host.capacity):
            self.offer()

    def _index(self, app: AppView) -> None:
        is_fast = app.registration is not None and app.registration.failover is Failover.FAST
        awaited = {app.vouchers.host} if app.vouchers else set()  # if that is back, a primary is known to be dead
        self._seated.put(app.name, app.seated_on | awaited)
        self._fast.put(app.name, app.seated_on if is_fast else frozenset())
        moves = any(host in self.drains for host in app.seated_on)
        (self.seatless.add if moves or app.lacks_seat else self.seatless.discard)(app.name)

    def _apply_to(self, app: AppView, kind: str, names: tuple[str, ...], value: Any, revision: int) -> None:
        if kind == "registrations":
            app.registration, app.registration_revision = value, revision if value else 0
            self._index(app)
        elif kind == "assignments":
            self.expect(app, value)
            app.written, app.assignment_revision = value, revision if value else 0
        elif kind == "pauses":
            app.pause, app.pause_revision = value, revision if value else 0
        elif kind == "requests":
            app.request, app.request_revision = value, revision if value else 0
        elif kind == "checkpoints":
            app.checkpoint, app.checkpoint_revision = value, revision if value else 0
        elif kind == "insync":
            app.in_sync, app.in_sync_revision = value, revision if value else 0
        elif kind == "vouchers":
            app.vouchers, app.vouchers_revision = value, revision if value else 0
            self._index(app)
        elif kind == "history":
            (app.history.discard if value is None else app.history.add)(int(names[1]))
        else:
            places: dict[str, tuple[dict[Any, Any], Any]] = {
                "successions": (app.successions, names[0]),
                "replicas": (app.replicas, names[1]),
                "failures": (app.failures, names[1]),
            }
            held, key = places[kind]
            if kind == "failures":
                key = int(key)
            elif kind == "replicas":
                starts = value is not None and value.state is ReplicaState.STARTING
                (self.starting.add if starts else self.starting.discard)((app.name, key))
            if value is None:
                held.pop(key, None)
            else:
                held[key] = (value.incarnation, revision) if kind == "successions" else value
