"""A WatchDog that dies at an awkward moment: the next one goes on, reports what it missed, and leaves no key behind."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from aetcd.rpc import rpc_pb2 as rpc

from etcdreplica.clock import boottime
from etcdreplica.model import AssignmentState, FailureKind, ReplicaState
from etcdreplica.store import EtcdOptions, Kind, Store
from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from etcdreplica.words import Role
from tests.integration.conftest import PATIENCE_S, Worker, wait_dead

pytestmark = pytest.mark.integration


class Stage:
    """A cluster of three hosts, and the worker on it."""

    def __init__(self, cluster: LocalCluster, worker: Worker) -> None:
        self.cluster = cluster
        self.worker = worker
        self.stopped: list[int] = []
        self.ended_at: dict[str, float] = {}  # by host: when the last WatchDog that was killed could renew nothing more

    @property
    def app(self) -> str:
        """Its name."""
        return self.worker.name

    def start(self) -> int:
        """Start it and make its primary one that a guardian has started; return the epoch."""
        self.worker.start()
        epoch = self.cluster.wait_ready(self.app)
        self.cluster.kill_replica(self.app)
        return self.worker.wait_acting(after_epoch=epoch)

    @property
    def host(self) -> str:
        """The host of the primary."""
        return self.cluster.primary(self.app)[0]

    def guardian(self, host: str) -> int:
        """Return the process id of a host's guardian."""
        process = self.cluster.hosts[host].process
        assert process is not None
        return process.pid

    def watchdog(self, host: str) -> int:
        """Return that of its WatchDog that lives now."""
        return self.cluster.view.hosts[host].host.pid

    def kill_watchdog(self, host: str) -> int:
        """SIGKILL it; return its process id."""
        pid = self.watchdog(host)
        os.kill(pid, signal.SIGKILL)
        self.ended_at[host] = boottime()
        return pid

    def wait_next(self, host: str, before: int) -> int:
        """Wait until the next WatchDog shows itself, and return its process id."""
        self.cluster.wait_until(
            lambda view: host in view.hosts and view.hosts[host].host.pid != before, f"the next WatchDog of {host}"
        )
        return self.watchdog(host)

    def replace_watchdog(self, host: str) -> None:
        """Kill it and wait for the next one."""
        self.wait_next(host, self.kill_watchdog(host))

    def while_away(self, host: str, act: Callable[[], None]) -> None:
        """Do something while this host has no WatchDog: its guardian is stopped for as long as that takes."""
        guardian, before = self.guardian(host), self.watchdog(host)
        os.kill(guardian, signal.SIGSTOP)
        self.stopped.append(guardian)
        os.kill(before, signal.SIGKILL)
        wait_dead(before)
        act()
        self.go_on()
        self.wait_next(host, before)

    def go_on(self) -> None:
        """Continue what was stopped."""
        while self.stopped:
            os.kill(self.stopped.pop(), signal.SIGCONT)

    def kinds(self) -> list[FailureKind]:
        """How its copies have ended so far, in order."""
        found = {number: event for (app, number), event in self.cluster.events.items() if app == self.app}
        return [found[number].failure.kind for number in sorted(found)]

    def wait_kind(self, kind: FailureKind) -> None:
        """Wait for such an end in the history."""
        self.cluster.wait_until(lambda _: kind in self.kinds(), f"{kind} in the history")

    def verdict(self, after_epoch: int, *, same: bool) -> None:
        """One primary, full degree, and no copy shown that nobody wants; `same`: nobody has died, so the epoch is this one."""
        epoch = self.cluster.wait_ready(self.app, after_epoch=0 if same else after_epoch, timeout=60)
        assert (epoch == after_epoch) if same else (epoch > after_epoch), self.cluster.describe()

        def is_clean(_: object) -> bool:
            known = self.cluster.view.apps[self.app]
            assignment = known.assignment
            roles = [replica.role for replica in known.replicas.values()]
            return (
                assignment is not None
                and {seat.host for seat in assignment.seats} == set(known.replicas)
                and roles.count(Role.PRIMARY) == 1
                and len(roles) == 2
            )

        self.cluster.wait_until(is_clean, "one primary and one backup")


@pytest.fixture(scope="module")
def lasting(etcd_server: EmbeddedEtcd) -> Iterator[LocalCluster]:
    """Hosts whose leases outlast several WatchDogs that are killed before they could renew them."""
    with LocalCluster(3, etcd=etcd_server, cluster=f"restart-{uuid.uuid4().hex}", lease_ttl_s=30) as cluster:
        yield cluster


@pytest.fixture
def make_stage(lasting: LocalCluster, make_worker: Callable[..., Worker], tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    """Make it with the arguments of its worker, on hosts that other tests use, too, or on a cluster that is given."""
    made: list[Stage] = []

    def make(*arguments: str, cluster: LocalCluster = lasting) -> Stage:
        own = cluster is not lasting  # it may have nobody left who could remove anything
        made.append(Stage(cluster, Worker(cluster, tmp_path, *arguments) if own else make_worker(cluster, *arguments)))
        return made[-1]

    yield make
    for stage in made:
        stage.go_on()


STYLES = ["cold", "warm", "hot"]


@pytest.mark.parametrize("style", STYLES)
def test_killed_while_replicas_are_starting(make_stage: Callable[..., Stage], style: str) -> None:
    """Every WatchDog, at the moment at which the application gets its first assignment."""
    stage = make_stage("--style", style)
    stage.worker.start()
    stage.cluster.wait_until(
        lambda view: stage.app in view.apps and view.apps[stage.app].assignment is not None, "an assignment"
    )
    before = {host: stage.kill_watchdog(host) for host in stage.cluster.hosts}
    for host, pid in before.items():
        stage.wait_next(host, pid)
    stage.cluster.wait_ready(stage.app, timeout=60)
    epoch = stage.cluster.wait_ready(stage.app, timeout=60)
    stage.verdict(epoch, same=True)


def test_killed_right_after_the_primary(make_stage: Callable[..., Stage]) -> None:
    """Neither could report: the next WatchDog does, and another host takes over."""
    stage = make_stage()
    epoch = stage.start()
    host, pid = stage.cluster.primary(stage.app)
    before = stage.watchdog(host)
    os.kill(pid, signal.SIGKILL)
    os.kill(before, signal.SIGKILL)
    stage.wait_next(host, before)
    stage.verdict(epoch, same=False)
    assert set(stage.kinds()) == {FailureKind.EXIT}


def test_primary_ends_while_the_watchdog_is_away(make_stage: Callable[..., Stage]) -> None:
    """The same, when it certainly was not there."""
    stage = make_stage()
    epoch = stage.start()
    host, pid = stage.cluster.primary(stage.app)
    stage.while_away(host, lambda: os.kill(pid, signal.SIGKILL))
    stage.verdict(epoch, same=False)
    assert stage.kinds() == [FailureKind.EXIT, FailureKind.EXIT]
    last = max((number, event) for (app, number), event in stage.cluster.events.items() if app == stage.app)[1]
    assert last.failure.reason == "killed by SIGKILL"


def test_body_raises_while_the_watchdog_is_away(make_stage: Callable[..., Stage], tmp_path: Path) -> None:
    """The backup takes over; what the next WatchDog tells is no completion."""
    stage = make_stage("--raise-while", str(tmp_path / "never"))
    epoch = stage.start()
    host, pid = stage.cluster.primary(stage.app)
    stage.while_away(host, lambda: os.kill(pid, signal.SIGABRT))
    stage.verdict(epoch, same=False)
    assert stage.kinds() == [FailureKind.EXIT, FailureKind.EXIT]


@pytest.mark.parametrize("spawned", [True, False], ids=["spawned", "by hand"])
def test_body_returns_while_the_watchdog_is_away(make_stage: Callable[..., Stage], tmp_path: Path, spawned: bool) -> None:
    """The application is complete, and nobody starts it again."""
    over = tmp_path / "over"
    stage = make_stage("--return-when", str(over))
    if spawned:
        stage.start()
    else:
        stage.worker.start()
        stage.worker.wait_acting()
    begun = len(stage.worker.lines("begin"))

    def end() -> None:
        over.touch()
        stage.worker.wait_lines(lambda lines: any(line["what"] == "end" for line in lines), "the body to return")

    stage.while_away(stage.host, end)
    stage.cluster.wait_until(
        lambda view: (
            stage.app in view.apps
            and (found := view.apps[stage.app].assignment) is not None
            and found.state is AssignmentState.COMPLETED
            and not view.apps[stage.app].replicas
        ),
        "completion",
    )
    assert len(stage.worker.lines("begin")) == begun


def test_asked_to_end_while_the_watchdog_is_away(make_stage: Callable[..., Stage]) -> None:
    """SIGTERM to the copy hands over, and is no failure."""
    stage = make_stage()
    epoch = stage.start()
    host, pid = stage.cluster.primary(stage.app)

    def ask() -> None:
        os.kill(pid, signal.SIGTERM)
        stage.worker.wait_lines(lambda lines: any(line["what"] == "end" for line in lines), "the body to return")

    stage.while_away(host, ask)
    stage.verdict(epoch, same=False)
    assert stage.kinds()[-1] is FailureKind.HANDOVER


def test_cold_standby_survives(make_stage: Callable[..., Stage]) -> None:
    """It has no process; the same incarnation stands by after each WatchDog, and can still take over."""
    stage = make_stage("--style", "cold")
    epoch = stage.start()
    (standby,) = [host for host in stage.worker.hosts() if host != stage.host]
    before = stage.cluster.view.apps[stage.app].replicas[standby]
    assert before.state is ReplicaState.STANDBY
    for _ in range(3):
        stage.replace_watchdog(standby)
    _wait_renewed(stage, standby)
    after = stage.cluster.view.apps[stage.app].replicas[standby]
    assert (after.incarnation, after.state) == (before.incarnation, ReplicaState.STANDBY)
    stage.verdict(epoch, same=True)
    stage.cluster.kill_replica(stage.app)
    stage.verdict(epoch, same=False)


@pytest.mark.parametrize("style", STYLES)
def test_killed_several_times_in_a_row(make_stage: Callable[..., Stage], style: str) -> None:
    """Also before it could do anything: every copy lives, and the last one renews its leases."""
    stage = make_stage("--style", style)
    epoch = stage.start()
    host, pid = stage.cluster.primary(stage.app)
    for _ in range(3):
        stage.replace_watchdog(host)
    _wait_renewed(stage, host)
    assert stage.cluster.primary(stage.app) == (host, pid)
    stage.verdict(epoch, same=True)


def test_hangup_to_every_node(make_stage: Callable[..., Stage]) -> None:
    """As an upgrade of all hosts would do it, one after the other."""
    stage = make_stage("--style", "hot")
    epoch = stage.start()
    before = stage.cluster.primary(stage.app)
    for host in stage.cluster.hosts:
        pid = stage.watchdog(host)
        os.kill(stage.guardian(host), signal.SIGHUP)
        wait_dead(pid)
        stage.ended_at[host] = boottime()
        stage.wait_next(host, pid)
        _wait_renewed(stage, host)
    assert stage.cluster.primary(stage.app) == before
    stage.verdict(epoch, same=True)
    stage.cluster.kill_replica(stage.app)
    stage.verdict(epoch, same=False)


def test_no_key_is_left_of_hosts_that_stop(etcd_cluster: LocalCluster, make_stage: Callable[..., Stage]) -> None:
    """After WatchDogs were killed and replicas handed on, hosts that stop in order leave no key under a lease."""
    stage = make_stage(cluster=etcd_cluster)
    epoch = stage.start()
    for host in stage.cluster.hosts:
        stage.replace_watchdog(host)
    stage.cluster.kill_replica(stage.app)
    stage.verdict(epoch, same=False)
    for node in stage.cluster.hosts.values():
        node.stop()
    assert asyncio.run(_leased(stage.cluster)) == []


async def _leased(cluster: LocalCluster) -> list[str]:
    async with Store(EtcdOptions((cluster.etcd.endpoint,), timeout_s=PATIENCE_S), cluster.cluster) as store:
        found = await store.list()
    return [str(entry.key) for entry in found.entries if entry.lease or entry.key.kind is Kind.REPLICAS]


def _wait_renewed(stage: Stage, host: str) -> None:
    """Return when the WatchDog that this host has now has renewed every lease that the one before it held."""
    asyncio.run(_renewed(stage.cluster, host, stage.ended_at[host]))


async def _renewed(cluster: LocalCluster, host: str, since: float) -> None:
    """A lease of which more is left than would be if nobody had renewed it since then."""
    deadline = time.monotonic() + 2 * cluster.lease_ttl_s
    async with Store(EtcdOptions((cluster.etcd.endpoint,), timeout_s=PATIENCE_S), cluster.cluster) as store:
        entries = (await store.list()).entries
        leases = {entry.lease for entry in entries if entry.lease and host in entry.key.names}
        assert leases, cluster.describe()
        while leases:
            assert time.monotonic() < deadline, f"the leases {leases} of {host} are not renewed\n{cluster.describe()}"
            for lease in list(leases):
                unrenewed_s = cluster.lease_ttl_s - (boottime() - since)
                answer = await store.channel.call("Lease.LeaseTimeToLive", rpc.LeaseTimeToLiveRequest(ID=lease))
                assert answer.TTL > 0, cluster.describe()
                if unrenewed_s < answer.TTL:  # it is in whole seconds, rounded down
                    leases.remove(lease)
            await asyncio.sleep(0.1)  # etcd tells nobody of a renewal
