"""A simulated cluster: etcd, hosts with the real daemons, applications, and all that can be done to them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from attrs import define, evolve, field

from etcdreplica.app.protocol import INCARNATION_ENV, Message
from etcdreplica.core.timing import Timing
from etcdreplica.daemon.machine import Machine
from etcdreplica.daemon.manager import Manager
from etcdreplica.daemon.node import Node
from etcdreplica.daemon.settings import NodeSettings
from etcdreplica.errors import EtcdReplicaError
from etcdreplica.model import Failure, FailureKind, Program, Registration
from etcdreplica.store import EtcdOptions, Key, Kind, Store
from etcdreplica.store.keys import decode
from etcdreplica.testing.simulated_etcd import Link, SimulatedEtcd
from etcdreplica.testing.simulated_loop import World
from tests.simulation.application import Application
from tests.simulation.guardian import FINAL, Guardian
from tests.simulation.machine import (
    Host,
    Network,
    Process,
    SimulatedAppServer,
    SimulatedGuard,
    SimulatedLineage,
    SimulatedPage,
    SimulatedPeerClient,
    SimulatedPeerServer,
    SimulatedStateFile,
    replica_process,
)

ENDPOINTS = ("etcd-a:2379", "etcd-b:2379", "etcd-c:2379")
RESTART_NODE_S = 1.0  # systemd starts an ended node again after this
AT_ONCE_S = 0.05
CLUSTER = "sim"
_ROOT = len(f"/etcdreplica/{CLUSTER}/")


@define
class Witness:
    """What really happened: the lives of primaries on the world's clock."""

    alive: dict[str, list[Application]] = field(factory=dict)  # by application: those that act as primary
    epochs: dict[str, set[int]] = field(factory=dict)  # by application: those that ever acted
    fast: set[str] = field(factory=set)  # applications that gave up half of G1
    failsafe: set[str] = field(factory=set)  # applications that may run on without their leases
    promotions: int = 0
    failovers: int = 0


class Daemon(Process):
    """A WatchDog or a manager."""

    def crashed(self, error: BaseException) -> int:
        """A refusal is final; anything else is a bug."""
        if isinstance(error, EtcdReplicaError):
            self.host.network.say(f"{self.name} gives up: {error}")
            return FINAL
        return super().crashed(error)


class Cluster(Network):
    """Everything. `events` is the timeline."""

    def __init__(self, world: World, seed: int, hosts: int, timing: Timing) -> None:
        super().__init__(world)
        self.random = Random(f"{seed}/network")
        self.etcd = SimulatedEtcd(world, self.random, ENDPOINTS)
        self.etcd.election_s = min(1.0, 0.2 * timing.lease_ttl_s)  # as docs/etcd-outage.md asks for with the shortest TTL
        self.timing = timing
        self.events: list[tuple[float, str]] = []
        self.witness = Witness()
        self.registrations: dict[str, Registration] = {}
        self.is_healed = False  # all faults have ended
        self.is_calm = False  # they are those that nobody may notice
        self.asked: set[tuple[str, int]] = set()  # application and incarnation of primaries that were to hand over
        self.on_exit = self._exited
        self.promoted = self._promoted
        self._people: list[Process] = []
        self._vanished: dict[str, float] = {}  # by host, when its lease ended
        self._used: set[tuple[str, int]] = set()  # application and incarnation of replicas that were ever shown
        self._braked: set[str] = set()  # those that vanished last, as most were lost
        self._braking_until = 0.0
        self._led_since = 0.0
        self._shown: dict[str, bytes] = {}  # what stands under replicas/
        self.etcd.store.on_commit = self._committed
        for number in range(hosts):
            self._add_host(f"host-{chr(97 + number)}")

    def _add_host(self, name: str) -> None:
        options = EtcdOptions(ENDPOINTS, timeout_s=self.timing.timeout_s)
        settings = NodeSettings(
            host=name,
            cluster=CLUSTER,
            etcd=options,
            socket_path=Path("/s"),
            state_dir=Path("/d"),
            address=name,
            timing=self.timing,
        )
        host = Host(self, name, settings, Link(self.world, self.random), Random(f"{name}/{self.random.random()}"))
        self.hosts[name] = host
        self.turn_on(host)

    def say(self, what: str) -> None:
        """Put something into the timeline."""
        self.events.append((self.world.now, what))

    # --- what runs on a host ---------------------------------------------------------------------------------------------

    def turn_on(self, host: Host) -> None:
        """Boot it."""
        if not host.is_on:
            host.is_on = True
            host.boot += 1
            self.start_node(host)

    def start_node(self, host: Host) -> None:
        """What systemd does."""
        if host.is_on and host.guardian is None:
            boot = host.boot
            Guardian(
                host,
                self._start_watchdog,
                self._start_program,
                lambda: self._again(host, boot),
            )

    def _again(self, host: Host, boot: int) -> None:
        if host.is_on and host.boot == boot and not host.disk.get("stopped"):
            self.world.after(RESTART_NODE_S, self.start_node, host)

    def store(self, process: Process) -> Store:
        """Return a process' store."""
        link = process.host.link
        options, clock = process.host.settings.etcd, process.loop.time
        lineage = SimulatedLineage(process)
        return Store(options, CLUSTER, clock, lambda endpoint: self.etcd.channel(endpoint, link), lineage)

    def _start_watchdog(self, guardian: Guardian) -> Process:
        host = guardian.host
        process = Daemon(host, "watchdog", guardian)
        machine = Machine(
            pid=lambda: process.pid,
            app_server=lambda path, on_hello: SimulatedAppServer(process, path, on_hello),
            peer_server=lambda settings, session, vouch: SimulatedPeerServer(process, settings, session, vouch),
            state_file=lambda path: SimulatedStateFile(host),
            process=replica_process(host),
            status_page=lambda pid, fd: SimulatedPage(host.processes[pid]),
        )

        async def main() -> None:
            guard = SimulatedGuard.over(process, guardian)
            await guard.ready
            async with self.store(process) as store:
                await Node(host.settings, store, guard, {}, None, process.loop.time, machine).run()

        process.run(main)
        return process

    def _start_program(self, guardian: Guardian, ward: str, message: Message) -> Process:
        host = guardian.host
        if message["argv"][0] == sys.executable:
            return self._start_manager(guardian)
        app = self.registrations[ward]
        return Application(host, ward, app.style, int(message["env"][INCARNATION_ENV]), guardian)

    def _start_manager(self, guardian: Guardian) -> Process:
        host = guardian.host
        process = Daemon(host, "manager", guardian)

        async def main() -> None:
            async with self.store(process) as store:
                peers = SimulatedPeerClient(process)
                await Manager(store, host.name, self.timing.lease_ttl_s, process.loop.time, peers=peers, pid=process.pid).run()

        process.run(main)
        return process

    # --- what people do --------------------------------------------------------------------------------------------------

    def do(self, work: Callable[[Store], Any]) -> None:
        """Run a command of a person, on a machine of their own; it is repeated until it has an answer."""
        person = Host(
            self, "desk", next(iter(self.hosts.values())).settings, Link(self.world, self.random), Random(self.random.random())
        )
        process = Process(person, "command")
        self._people.append(process)

        async def main() -> None:
            async with self.store(process) as store:
                await work(store)

        process.run(main)

    def send_home(self) -> None:
        """Interrupt whoever is at work."""
        for process in self._people:
            process.vanish()
        self._people.clear()

    def register(self, registration: Registration) -> Registration:
        """Return it with a program, and remember it."""
        registration = evolve(registration, program=Program(("app", registration.name), "/"))
        self.registrations[registration.name] = registration
        return registration

    # --- what is seen ----------------------------------------------------------------------------------------------------

    def records(self, kind: Kind) -> dict[tuple[str, ...], Any]:
        """Return what stands in etcd."""
        root = f"/etcdreplica/{CLUSTER}/".encode()
        found = {}
        for path in self.etcd.store.keys(root + kind.encode() + b"/"):
            names = tuple(path[len(root) :].decode().split("/")[1:])
            found[names] = decode(Key(kind, names), self.etcd.store.record(path).value)
        return found

    def copies(self, app: str) -> list[Application]:
        """Return the live copies of an application."""
        found = [process for host in self.hosts.values() for process in host.running("app")]
        return [process for process in found if isinstance(process, Application) and process.app == app]

    def _promoted(self, application: Application) -> None:
        witness, app = self.witness, application.app
        self.say(f"PRIMARY {application.name} epoch {application.epoch}")
        others = [other for other in witness.alive.setdefault(app, []) if other.acts]
        if others and app not in witness.fast:
            self.complain(f"two primaries of {app}: {others[0].name} still acts when {application.name} begins")
        used = witness.epochs.setdefault(app, set())
        late = app in witness.fast and application.epoch not in used and self._is_given_up(application)
        if application.epoch <= max(used, default=0) and not late:
            self.complain(f"{application.name}: epoch {application.epoch} is not above {max(used)}")
        used.add(application.epoch)
        witness.alive[app] = [*others, application]
        witness.promotions += 1

    def _is_given_up(self, application: Application) -> bool:
        """Whether it has no seat any more: its host was frozen when it was called, and has not yet heard of its successor."""
        assignment = self.records(Kind.ASSIGNMENTS).get((application.app,))
        return assignment is None or application.incarnation not in {seat.incarnation for seat in assignment.seats}

    def _exited(self, process: Process, code: int) -> None:
        self.say(f"end of {process.name}: {code}")
        if isinstance(process, Application) and process in self.witness.alive.get(process.app, []):
            self.witness.alive[process.app].remove(process)

    def _committed(self, events: list[Any]) -> None:
        names = []
        for event in events:
            name = event.kv.key[_ROOT:].decode()
            names.append(("-" if event.type else "+") + name)
            if name.startswith("replicas/"):
                if event.type:
                    self._withdrawn(name, self._shown.pop(name))
                else:
                    self._shown[name] = event.kv.value
                    if event.kv.create_revision == event.kv.mod_revision:
                        self._used.add((name.split("/")[1], _incarnation(name, event.kv.value)))
            elif name.startswith("hosts/"):
                host = name.partition("/")[2]
                if event.type:
                    self._host_gone(host)
                else:
                    self._host_back(host)
            elif name.startswith("assignments/") and not event.type:
                assignment = decode(Key(Kind.ASSIGNMENTS, (name.partition("/")[2],)), event.kv.value)
                if assignment.leaving is not None and assignment.primary is not None:
                    self.asked.add((name, assignment.primary.incarnation))
            elif name.startswith("failures/") and not event.type:
                self._failed(decode(Key(Kind.FAILURES, tuple(name.split("/")[1:])), event.kv.value))
            elif name.startswith("leaders/superwatchdog/"):
                self._led_since = self.world.now
        self.say(f"etcd {self.etcd.store.revision}: {' '.join(names)}")

    def _host_back(self, host: str) -> None:
        """If it was away for a moment only, a manager may have heard of both together."""
        if self.world.now - self._vanished.get(host, -1.0) < AT_ONCE_S:
            del self._vanished[host]
            if not self._most_vanished():
                self._braking_until = 0.0

    def _check_most(self, name: str) -> None:
        """Note since when most hosts that ran something are lost."""
        now, ttl_s = self.world.now, self.timing.lease_ttl_s
        if self._most_vanished() and now > self._braking_until:
            self._braking_until, self._braked = now + 0.9 * ttl_s, {name}
        elif now <= self._braking_until:
            self._braked.add(name)

    def _most_vanished(self) -> bool:
        now, ttl_s = self.world.now, self.timing.lease_ttl_s
        recent = {host for host, at in self._vanished.items() if now - at < 0.9 * ttl_s}
        up = {names[0] for names in self.records(Kind.HOSTS)}
        return len(recent) >= max(2, len(up | recent) // 2 + 1)

    def _failed(self, failure: Failure) -> None:
        """When most hosts have vanished at once, none of them may be taken for lost before another TTL."""
        braking = self._led_since < self._braking_until - 2 * self.timing.lease_ttl_s and self.world.now < self._braking_until
        if failure.kind is FailureKind.HOST and "is down" in failure.reason and braking and failure.host in self._braked:
            self.complain(f"{failure.host} was taken for lost at once although most hosts have vanished")

    def _withdrawn(self, name: str, value: bytes) -> None:
        """A replica is shown no longer, or its lease has ended: it must be dead."""
        _, app, host = name.split("/")
        incarnation = _incarnation(name, value)
        alive = [process for process in self.hosts[host].running("app") if isinstance(process, Application)]
        for process in alive:
            if (process.app, process.incarnation) == (app, incarnation) and app not in self.witness.failsafe:
                self.complain(f"{process.name} lives although etcd has given it up")

    def _host_gone(self, name: str) -> None:
        """The lease of a host has ended: nothing may run there."""
        assignments, failures = self.records(Kind.ASSIGNMENTS), self.records(Kind.FAILURES)
        seats = [(app, s.incarnation) for (app,), a in assignments.items() for s in a.seats if s.host == name]
        reported = {key for key in seats if (f := failures.get((key[0], str(key[1])))) and f.kind is not FailureKind.HOST}
        if self._used & (set(seats) - reported):
            self._vanished[name] = self.world.now
            self._check_most(name)
        for process in self.hosts[name].running("app"):
            if isinstance(process, Application) and process.app in self.witness.failsafe:
                continue  # that it leads alone is looked at elsewhere
            if not isinstance(process, Application) or process.incarnation is not None:
                self.complain(f"{process.name} lives although the lease of its host has ended")


def _incarnation(name: str, value: bytes) -> int:
    _, app, host = name.split("/")
    return decode(Key(Kind.REPLICAS, (app, host)), value).incarnation  # type: ignore[no-any-return]
