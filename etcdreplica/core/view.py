"""What the elected roles know of the cluster: a plain picture, kept up to date change by change."""

from __future__ import annotations

from collections import Counter
from typing import Any

from attrs import Factory, define, frozen

from etcdreplica.model import Assignment, Checkpoint, Failure, Host, InSync, Member, Pause, Registration, Replica, Seat, Server
from etcdreplica.words import Failover


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
    """All that is known of one application."""

    name: str
    registration: Registration | None = None
    registration_revision: int = 0
    assignment: Assignment | None = None
    assignment_revision: int = 0
    successions: dict[str, tuple[int, int]] = Factory(dict)  # by host: (incarnation that died, mod revision)
    replicas: dict[str, Replica] = Factory(dict)  # by host
    failures: dict[int, Failure] = Factory(dict)  # by incarnation
    history: set[int] = Factory(set)
    corrupt: dict[str, str] = Factory(dict)
    pause: Pause | None = None
    pause_revision: int = 0
    checkpoint: Checkpoint | None = None
    checkpoint_revision: int = 0
    in_sync: InSync | None = None
    in_sync_revision: int = 0

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

    def holds_checkpoint(self, host: str) -> bool:
        """Whether what is durable of its state is on this host."""
        return self.checkpoint is not None and host in self.checkpoint.holders

    def replica(self, seat: Seat) -> Replica | None:
        """Return what its host reports of this very seat."""
        replica = self.replicas.get(seat.host)
        return replica if replica and replica.incarnation == seat.incarnation else None

    def is_empty(self) -> bool:
        """Whether nothing of the application is left in etcd."""
        return not (self.registration or self.assignment or self.replicas or self.failures or self.corrupt or self.pause)


@define
class ClusterView:
    """All applications and hosts at one revision."""

    revision: int = 0
    hosts: dict[str, HostView] = Factory(dict)
    apps: dict[str, AppView] = Factory(dict)
    servers: dict[str, Server] = Factory(dict)  # CheckpointServers, by host
    seats: Counter[str] = Factory(Counter)  # how many seats each host has
    pause: Pause | None = None  # of the whole cluster
    pause_revision: int = 0
    floor: int = 0  # below it are the epochs that an etcd before this one has used
    losses: dict[str, Loss] = Factory(dict)  # by host; what we found ourselves, so that no snapshot clears it

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

    def fast_seats(self) -> dict[str, frozenset[tuple[str, int]]]:
        """Return the seats of failover="fast", application and incarnation, by the host that is up and holds them.

        Not those that hold the state of an object alone: what they may still acknowledge would be lost with them.
        """
        found: dict[str, set[tuple[str, int]]] = {}
        for app in self.apps.values():
            if app.registration is None or app.assignment is None or app.registration.failover is not Failover.FAST:
                continue
            for seat in app.assignment.seats:
                alone = app.own_in_sync is not None and app.own_in_sync.members == (Member(seat.host, seat.incarnation),)
                if not alone and seat.host in self.hosts and self.hosts[seat.host].session == seat.session:
                    found.setdefault(seat.host, set()).add((app.name, seat.incarnation))
        return {host: frozenset(seats) for host, seats in found.items()}

    def clear(self) -> None:
        """Forget everything, before a snapshot."""
        self.hosts.clear()
        self.servers.clear()
        self.apps.clear()
        self.seats.clear()
        self.pause, self.pause_revision, self.floor = None, 0, 0

    def apply(self, kind: str, names: tuple[str, ...], value: Any, revision: int, created: int, error: str = "") -> set[str]:
        """Take one change; `value` None deletes, `error` says that the value cannot be read. Return the apps touched."""
        if kind == "hosts":
            if error:  # its key, and so its lease, is there: what runs on it is not lost
                self.hosts.setdefault(names[0], HostView(Host(address="", pid=0, capacity=0), created))
            elif value is None:
                self.hosts.pop(names[0], None)
            else:
                self.hosts[names[0]] = HostView(value, created)
            return set(self.apps)
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

    def expect(self, app: AppView, assignment: Assignment | None) -> None:
        """Count the seats of an assignment already while it is being written, so that many plans spread over the hosts."""
        self.seats.subtract(seat.host for seat in (app.assignment.seats if app.assignment else ()))
        app.assignment = assignment
        self.seats.update(seat.host for seat in (app.assignment.seats if app.assignment else ()))

    def _apply_to(self, app: AppView, kind: str, names: tuple[str, ...], value: Any, revision: int) -> None:
        if kind == "registrations":
            app.registration, app.registration_revision = value, revision if value else 0
        elif kind == "assignments":
            self.expect(app, value)
            app.assignment_revision = revision if value else 0
        elif kind == "pauses":
            app.pause, app.pause_revision = value, revision if value else 0
        elif kind == "checkpoints":
            app.checkpoint, app.checkpoint_revision = value, revision if value else 0
        elif kind == "insync":
            app.in_sync, app.in_sync_revision = value, revision if value else 0
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
            if value is None:
                held.pop(key, None)
            else:
                held[key] = (value.incarnation, revision) if kind == "successions" else value
