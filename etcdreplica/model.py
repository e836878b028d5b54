"""Records and enums shared by all parts; no I/O. `docs/glossary.md` explains the words.

Every record that stands in etcd is a frozen attrs class here; its JSON has the same field names. New fields need a
default, so that old values stay readable. Fields ending in `_at` are CLOCK_BOOTTIME seconds of the host that wrote them,
fields ending in `_wall` are Unix time for people; neither decides anything on another host.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

from attrs import Factory, evolve, field, fields_dict, frozen

from etcdreplica.words import (
    HOOK_TIMEOUT_S,
    PROBE_FAILURES,
    PROBE_GRACE_S,
    PROBE_INTERVAL_S,
    PROBE_TIMEOUT_S,
    Failover,
    Keep,
    Role,
    Style,
    check_count,
    check_degree,
    check_failsafe,
    check_hang_timeout,
    check_name,
    check_plain,
    check_probe,
    check_replication,
    check_seconds,
    check_stop_timeout,
)


class ReplicaState(enum.StrEnum):
    """What the WatchDog last saw of a replica; transitions stand in `core.lifecycle`."""

    STARTING = "starting"
    STANDBY = "standby"  # cold backup: the program was checked, nothing runs
    READY = "ready"  # warm backup: loaded, waiting inside the decorated call
    RUNNING = "running"  # the body runs
    STOPPING = "stopping"


class AssignmentState(enum.StrEnum):
    """What the ReplicaManager is doing with an application."""

    PENDING = "pending"  # no host can be primary yet
    ACTIVE = "active"
    BACKING_OFF = "backing-off"  # failed too often too soon; the next start waits
    FAILED = "failed"  # failed too often in its window: parked until `etcdreplica resume`
    STOPPED = "stopped"  # a person wants it so, until `etcdreplica resume`
    COMPLETED = "completed"
    REMOVING = "removing"


class FailureKind(enum.StrEnum):
    """Why a replica ended. "done" and "handover" are planned; everything else is a failure."""

    DONE = "done"  # the body returned: the application is complete

    EXIT = "exit"  # the process ended or the body raised
    HOOK = "hook"  # its on-promote hook failed
    HANG = "hang"  # it gave no sign of life, or did not answer its probes, for too long
    HOST = "host"  # the host lease ended, or its peers confirmed its loss
    LOST = "lost"  # the host is up but the replica is not there
    FENCED = "fenced"  # its lease ran out, so its own WatchDog killed it
    REFUSED = "refused"  # the host cannot run the program
    RETURNED = "returned"  # the body returned although keep="always"
    HANDOVER = "handover"


@frozen
class Program:
    """How to start one copy of an application. `needs` are paths that must exist on a host that runs it."""

    argv: tuple[str, ...]
    cwd: str
    env: Mapping[str, str] = Factory(dict)
    needs: tuple[str, ...] = ()


@frozen
class Override:
    """What differs on one host. `python` replaces the interpreter, `argv` the whole command, `env` adds to the rest."""

    argv: tuple[str, ...] | None = None
    python: str | None = None
    cwd: str | None = None
    env: Mapping[str, str] = Factory(dict)

    def apply(self, program: Program) -> Program:
        """Return the program as this host runs it."""
        argv = self.argv or program.argv
        if self.python:
            argv = (self.python, *argv[1:])
        return Program(
            argv=argv,
            cwd=self.cwd or program.cwd,
            env={**program.env, **self.env},
            needs=() if self.argv or self.cwd else program.needs,
        )


@frozen
class Probe:
    """A question put to a running copy again and again; after `failures` bad answers in a row the copy counts as hung.

    `target` is tcp:[HOST:]PORT (accepts a connection), http[s]://URL (answers 2xx or 3xx), exec:COMMAND (a shell command
    that exits with 0) or call (the application's `health` function returns without raising, and not False). For
    `grace_s` after its start, bad answers do not count until the first good one.
    """

    target: str = field()
    interval_s: float = field(default=PROBE_INTERVAL_S)
    timeout_s: float = field(default=PROBE_TIMEOUT_S)
    failures: int = field(default=PROBE_FAILURES)
    grace_s: float = field(default=PROBE_GRACE_S)

    def __attrs_post_init__(self) -> None:
        check_probe(self.target)
        check_seconds("probe interval", self.interval_s, 0.05)
        check_seconds("probe timeout", self.timeout_s, 0.05)
        check_seconds("probe grace", self.grace_s, 0)
        check_count("probe failures", self.failures, 1, 1000)


PLAIN_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # where plain programs are looked for


@frozen
class Hooks:
    """Shell commands that the host of a plain program runs when something happens to its copy; "" for nothing.

    A failed `pre_start` keeps the program from being started there, a failed `on_promote` is a failure of the copy. `on_demote`
    runs before a planned end, and `notify` after every change of role; what they return changes nothing. Each is killed after
    `timeout_s`.
    """

    pre_start: str = ""
    on_promote: str = ""
    on_demote: str = ""
    notify: str = ""
    timeout_s: float = HOOK_TIMEOUT_S

    def __attrs_post_init__(self) -> None:
        check_seconds("hook_timeout", self.timeout_s, 0.1, 3600)

    @property
    def commands(self) -> dict[str, str]:
        """All of them by name."""
        return {name: getattr(self, name) for name in ("pre_start", "on_promote", "on_demote", "notify")}


@frozen
class Registration:
    """How an application is to be protected.

    `hosts` empty means any host; `labels` must all be present on a host; `origin` is the host whose process registered
    it and becomes the first primary, if it is still there. A copy without a sign of life for `hang_timeout_s` is hung (0:
    never); one that has not reached the protected call within `start_timeout_s` has failed to start.

    A failed primary is started again on its own host `restarts_here` times in a row before another host takes over. With
    more than `max_restarts` failures of its primaries (0: never) within `restart_window_s` the application is parked.

    `object`: it is a replicated object, whose updates go to every copy in its in-sync set, and which takes none while they are
    fewer than `min_in_sync`. `durable`: each copy has them on its disk, and they outlive the end of all copies.

    `plain`: no library of ours runs in the program, so it counts as running from its start, or, with probes, once all of them
    were answered well. `hooks` are run around it. Under style warm `standby` runs on backups in its place; without one the
    program itself runs there.

    `failsafe`: its primary runs on without its lease while all hosts of its backups vouch for it (`core.failsafe`).
    """

    name: str = field()
    style: Style
    degree: int = field()
    program: Program
    hosts: tuple[str, ...] = ()
    labels: Mapping[str, str] = Factory(dict)
    keep: Keep = Keep.UNTIL_DONE
    stop_timeout_s: float = field(default=10.0)
    overrides: Mapping[str, Override] = Factory(dict)
    origin: str | None = None
    hang_timeout_s: float = field(default=10.0)
    start_timeout_s: float = field(default=60.0)
    probes: tuple[Probe, ...] = ()
    restarts_here: int = field(default=0)
    max_restarts: int = field(default=10)
    restart_window_s: float = field(default=600.0)
    failover: Failover = Failover.SAFE
    object: bool = False
    min_in_sync: int = 1
    durable: bool = False
    plain: bool = False
    standby: str = ""
    hooks: Hooks = Factory(Hooks)
    failsafe: bool = False

    @name.validator
    def _check_name(self, _: Any, value: Any) -> None:
        check_name("application name", value)

    @degree.validator
    def _check_degree(self, _: Any, value: Any) -> None:
        check_degree(value, self.hosts)

    @stop_timeout_s.validator
    def _check_stop_timeout(self, _: Any, value: float) -> None:
        check_stop_timeout(value)

    def __attrs_post_init__(self) -> None:
        for host in (*self.hosts, *self.overrides):
            check_name("host name", host)
        check_hang_timeout(self.hang_timeout_s)
        check_seconds("start_timeout", self.start_timeout_s, 0.1)
        check_count("restarts_here", self.restarts_here)
        check_count("max_restarts", self.max_restarts)
        check_seconds("restart_window", self.restart_window_s, 1)
        check_replication(self.object, self.degree, self.min_in_sync, self.durable)
        check_plain(self.plain, self.style, self.standby, self.hooks.commands, [probe.target for probe in self.probes])
        check_failsafe(self.failsafe, self.degree)

    @property
    def end_timeout_s(self) -> float:
        """How long a copy may take to end when it is asked to, with the hook that runs before."""
        return self.stop_timeout_s + (self.hooks.timeout_s if self.hooks.on_demote else 0.0)

    def program_on(self, host: str) -> Program:
        """Return the program as a host is to run it."""
        override = self.overrides.get(host)
        program = override.apply(self.program) if override else self.program
        return evolve(program, env={"PATH": PLAIN_PATH, **program.env}) if self.plain else program

    def differences(self, other: Registration) -> list[str]:
        """Name the settings that differ, as people read them; the environment and the origin do not count."""
        names = [name for name in fields_dict(Registration) if name not in ("name", "program", "origin")]
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in names)
        found = [f"{name} {ours!s} -> {others!s}" for name, ours, others in pairs if ours != others]
        if (self.program.argv, self.program.cwd) != (other.program.argv, other.program.cwd):
            mine, theirs = (f"{' '.join(r.program.argv)} (in {r.program.cwd})" for r in (self, other))
            found.append(f"program {mine} -> {theirs}")
        return found


@frozen
class Host:
    """One host that is up, written by its WatchDog under the host lease."""

    address: str
    pid: int
    labels: Mapping[str, str] = Factory(dict)
    capacity: int = 100
    version: str = ""
    started_wall: float = 0.0
    peer: str = ""  # HOST:PORT where its WatchDog answers other hosts


class Ask(enum.StrEnum):
    """What people ask for with one application."""

    SWITCHOVER = "switchover"  # that its primary ends in order and another one follows
    FAILOVER = "failover"  # the same, but that it is killed
    STOP = "stop"  # that none of its copies runs, for as long as the request stands


@frozen
class Request:
    """What a person asks for. A change of primary stands under a lease, and ends with it if nobody has begun it by then.

    `primary` is the incarnation that is to hand over: once another one is primary, there is nothing left to do.
    """

    ask: Ask
    by: str
    primary: int = 0
    to: str | None = None
    wall: float = 0.0


@frozen
class Drain:
    """While it stands, the host gets no new seat, and those that it has move elsewhere."""

    by: str
    reason: str = ""
    wall: float = 0.0


@frozen
class Leaving:
    """That the primary is to end, and why. It cannot be called back, so this stands until another one is primary.

    `to`: who is to follow, if that one still can. `at_once`: it is killed and not asked.
    """

    reason: str
    to: str | None = None
    at_once: bool = False


@frozen
class Seat:
    """A place for one replica. A host runs an incarnation at most once; `session` is the host's stay it was given to.

    `session` is the create revision of the host's key: after a restart the host has another one, and seats of the old
    stay are void.
    """

    host: str
    session: int
    incarnation: int


@frozen
class Assignment:
    """What should be: written by the ReplicaManager only. Both counters begin at an etcd revision, so no value returns.

    `successor` is the backup that takes over at `epoch + 1` when the primary's WatchDog reports the primary dead, without
    waiting for a manager (docs/decisions.md 1).
    """

    epoch: int
    incarnation: int
    registration_revision: int
    state: AssignmentState
    primary: Seat | None = None
    backups: tuple[Seat, ...] = ()
    successor: str | None = None
    degraded: bool = False
    paused: bool = False
    reason: str = ""
    strikes: int = 0
    refusals: Mapping[str, str] = Factory(dict)
    changed_wall: float = field(default=0.0, eq=False)
    recent: int = 0  # failures of its primaries within the window when the last one was counted; 0 after a quiet window
    here: int = 0  # how often in a row its primary was started again on its own host
    again: Seat | None = None  # a primary that failed, and is to be started again on its host after the wait
    born: int = 0  # below every epoch of this application since it was registered; what is older belongs to another one
    in_doubt: bool = False  # the primary before this one may still run, vouched for by the host of this one
    leaving: Leaving | None = None  # while its primary is to hand over
    degree: int = 0  # as in the registration

    @property
    def seats(self) -> tuple[Seat, ...]:
        """The primary first, then the backups in order of promotion."""
        return ((self.primary,) if self.primary else ()) + self.backups

    def placement(self, seat: Seat) -> Placement:
        """The part of this assignment that the seat's host must make true."""
        primary = seat == self.primary
        return Placement(
            role=Role.PRIMARY if primary else Role.BACKUP,
            epoch=self.epoch,
            incarnation=seat.incarnation,
            session=seat.session,
            successor=self.successor if primary else None,
            peers=tuple(other.host for other in self.seats if other != seat),
            born=self.born,
            primary=None if primary or self.primary is None else self.primary.host,
            in_doubt=primary and self.in_doubt,
            leaving=self.leaving if primary else None,
            degree=self.degree,
        )


@frozen
class Placement:
    """What one host must make true for one application. Its mod revision is that of the assignment."""

    role: Role
    epoch: int
    incarnation: int
    session: int
    successor: str | None = None
    peers: tuple[str, ...] = ()  # the hosts of the other seats, which hold the same checkpoints
    born: int = 0  # as in the assignment
    in_doubt: bool = False  # as in the assignment
    leaving: Leaving | None = None  # this primary is to hand over
    degree: int = 0  # as in the registration: on so many hosts checkpoints are to be
    primary: str | None = None  # of a backup: the host of its primary, if there is one

    def promoted(self) -> Placement:
        """Return what this becomes when its host succeeds a dead primary."""
        return evolve(self, role=Role.PRIMARY, epoch=self.epoch + 1, successor=None, primary=None)


@frozen
class Replica:
    """What is: one replica as its WatchDog sees it, under the application lease."""

    incarnation: int
    epoch: int
    role: Role
    state: ReplicaState
    pid: int | None = None
    endpoint: str | None = None
    successor: str | None = None  # whom its WatchDog will call when it dies
    decided_at: float | None = None  # when this WatchDog learned of the promotion
    promoted_at: float | None = None  # when it told the process
    body_at: float | None = None  # when the body began to run as primary
    progress_at: float | None = None  # last heartbeat of the body
    serves: str | None = None  # HOST:PORT where this copy of a replicated object answers clients and the other copies
    style: Style | None = None  # under which it was begun
    hooks: tuple[str, ...] = ()  # of a plain program: what its last hooks came to, with their output
    body_wall: float = 0.0  # as `body_at`

    @property
    def phases(self) -> dict[str, float]:
        """How it became primary, in seconds: `told_s` from being called, `body_s` from then; and when, `body_wall`."""
        called, told, body = self.decided_at, self.promoted_at, self.body_at
        if called is None or told is None:
            return {}
        found = {"told_s": round(told - called, 6)}
        if body is not None and body >= told:  # under style hot it ran before
            found |= {"body_s": round(body - told, 6), "body_wall": self.body_wall}
        return found


@frozen
class Failure:
    """How a replica ended, written by its WatchDog, or by the SuperWatchDog for a lost host."""

    host: str
    incarnation: int
    epoch: int
    role: Role
    kind: FailureKind
    reason: str
    by: str
    uptime_s: float | None = None  # how long the body had run
    detected_at: float = 0.0
    wall: float = 0.0
    evidence: str = ""  # of a hang: the stacks and what the kernel said of its threads
    phases: Mapping[str, float] = Factory(dict)  # how it had become primary, as in `Replica.phases`


@frozen(order=True)
class Stamp:
    """Which checkpoint of an application: the newest is the greatest."""

    epoch: int = 0
    sequence: int = 0

    def __str__(self) -> str:
        return f"{self.epoch}.{self.sequence}"


@frozen
class Checkpoint:
    """What is known to be durable of an application, and where.

    `holders` is the in-sync set: every one of them holds every checkpoint that was acknowledged, also those newer than this
    record, which only says that they hold nothing older than `epoch`.`sequence`.
    """

    epoch: int
    sequence: int
    digest: str
    size: int
    holders: tuple[str, ...]
    wall: float = 0.0

    @property
    def stamp(self) -> Stamp:
        """Which one."""
        return Stamp(self.epoch, self.sequence)


@frozen
class Member:
    """One copy in the in-sync set of a replicated object: an incarnation, because what it holds is gone with its process."""

    host: str
    incarnation: int


@frozen
class InSync:
    """The in-sync set of a replicated object: each member holds every update that was acknowledged.

    Written by the WatchDog of the primary, when the primary asks for it; `epoch` and `primary`, an incarnation, say whose.
    """

    epoch: int
    primary: int
    members: tuple[Member, ...]


@frozen
class Vouchers:
    """The hosts that must vouch for a primary that runs on without its lease (`core.failsafe`); none: it does not.

    Written by its WatchDog, in its stay `session`.
    """

    epoch: int
    incarnation: int
    host: str
    session: int
    hosts: tuple[str, ...]


@frozen
class Server:
    """The CheckpointServer of a host, written by itself under a lease of its own.

    `damaged`: by application, the last checkpoint that was found damaged on its disk, and how, until a newer one is there.
    """

    address: str  # HOST:PORT where it answers its peers
    pid: int
    version: str = ""
    damaged: Mapping[str, str] = Factory(dict)


@frozen
class Pause:
    """While it stands, nothing is promoted, placed or started; copies still end themselves when they must."""

    by: str
    reason: str = ""
    wall: float = 0.0


@frozen
class Origin:
    """Which etcd this is, so that another one is not taken for it.

    `replaces`: the origin in whose place it was accepted. All epochs from then on are above `floor`.
    """

    id: str
    replaces: str = ""
    floor: int = 0
    by: str = ""


@frozen
class Succession:
    """The promotion of a successor, written together with the failure of the primary it follows.

    `in_sync`: of a replicated object the in-sync set as it stood then, with its mod revision; it cannot have changed since.
    """

    epoch: int
    incarnation: int  # of the replica that died
    in_sync: InSync | None = None
    in_sync_revision: int = 0


@frozen
class Event:
    """One fail-over or replacement, kept for people in `history/`."""

    failure: Failure
    epoch: int
    primary: str | None
    action: str
    wall: float


@frozen
class Leader:
    """Who holds, or waits for, an elected role."""

    host: str
    pid: int
