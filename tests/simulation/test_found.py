"""What the simulation has found, each with no more than it takes."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from aetcd.rpc import rpc_pb2 as rpc

from etcdreplica.core.timing import Timing
from etcdreplica.core.view import AppView
from etcdreplica.daemon.guard import Guard
from etcdreplica.daemon.publisher import Publisher
from etcdreplica.daemon.replica_manager import ReplicaManager
from etcdreplica.model import Assignment, Program, Registration, ReplicaState
from etcdreplica.store import Kind, Txn
from etcdreplica.store.channel import EtcdChannel, _refused
from etcdreplica.store.origin import OriginCheck
from etcdreplica.words import Failover, Style
from tests.simulation.application import Application
from tests.simulation.cluster import CLUSTER, ENDPOINTS, Cluster
from tests.simulation.faults import remove
from tests.simulation.machine import End
from tests.simulation.play import APP, Step, fault, play
from tests.simulation.run import run
from tests.simulation.scenario import App, Fault, Scenario

_HOSTS = f"/etcdreplica/{CLUSTER}/hosts/".encode()


def primary(cluster: Cluster) -> Application:
    """Return the only primary."""
    (found,) = [copy for copy in cluster.copies(APP) if copy.acts]
    return found


def processes(cluster: Cluster) -> int:
    """Count copies."""
    return len(cluster.copies(APP))


def test_a_removal_in_a_silent_watch_and_a_compaction() -> None:
    """A manager whose watch fell silent learns of a removal, also if etcd was compacted to that very revision."""
    steps: list[Step] = [
        (10.0, lambda cluster: cluster.etcd.silence_streams(1.0)),
        (10.5, lambda cluster: remove(cluster, APP)),
        (11.0, lambda cluster: cluster.etcd.compact()),
    ]
    assert play(steps, 40.0, processes) == 0


def test_a_late_write_of_what_a_replica_shows() -> None:
    """A member of etcd that was stopped carries out what it was sent before: the state that is shown stays the newest."""

    def states(cluster: Cluster) -> set[object]:
        assert any("etcd member stops" in what for _, what in cluster.events)
        return {replica.state for replica in cluster.records(Kind.REPLICAS).values()}

    for at in (2.0065, 2.0075, 2.01, 2.1, 2.2, 2.25, 2.3):
        for member in range(len(ENDPOINTS)):
            steps: list[Step] = [(at, fault("etcd member stops", lasts=2.5, how=member / len(ENDPOINTS)))]
            assert play(steps, 12.0, states) == {ReplicaState.RUNNING, ReplicaState.READY}


def test_a_body_that_takes_longer_than_a_ttl_to_end() -> None:
    """A node that ends in order gives each copy its whole stop timeout."""
    ends: list[str] = []

    def slow(cluster: Cluster) -> None:
        copy = primary(cluster)
        copy.end_s = 8.0
        copy.on_exit.append(lambda: ends.append(f"{copy.status} after {cluster.world.now - 20:.1f} s"))
        fault("end node", copy.host.name, 20.0)(cluster)

    play([(20.0, slow)], 32.0, processes, stop_timeout_s=10.0)
    assert ends == ["0 after 8.0 s"]


@pytest.mark.parametrize("away_s", [2.8, 3.2, 3.6, 4.0])
def test_etcd_is_away_for_a_little_less_than_the_ttl(away_s: float) -> None:
    """A renewal that is confirmed before the fence counts, however shortly before."""
    for begun in range(10):
        steps: list[Step] = [(20 + begun / 6, fault("etcd stalls", lasts=away_s))]
        play(steps, 40.0, lambda cluster: None)


def test_a_copy_that_hangs_while_its_watchdog_is_replaced() -> None:
    """A WatchDog that took over finds a hang that began before it, or that kept the copy from coming back."""

    def hang_and_replace(cluster: Cluster) -> None:
        copy = primary(cluster)
        copy.hang()
        cluster.world.after(1.0, fault("kill WatchDog", copy.host.name), cluster)

    def reason(cluster: Cluster) -> str:
        assert not primary(cluster).is_hung
        return "".join(event.failure.kind for event in cluster.records(Kind.HISTORY).values())

    assert play([(20.0, hang_and_replace)], 50.0, reason) == "hang"


def test_a_placement_that_a_host_learns_of_too_late() -> None:
    """A host that hears late of a seat it had before a removal does not begin there: the new primary is elsewhere."""
    registration = Registration(
        "app-0", Style.WARM, 1, Program((), "/"), stop_timeout_s=0.1, hang_timeout_s=3.0, max_restarts=0
    )  # the next one has degree 2
    faults = (
        Fault(22.910, "streams break", how=0.112),
        Fault(22.931, "stop host", "host-b", 6.182, 0.855),
        Fault(22.941, "stop copy", "app-0", 4.476, 0.428),
        Fault(27.159, "slow answers", "host-b", 9.9, 0.234),
        Fault(37.4711, "register again", "app-0", how=0.261),
        Fault(37.4777, "cut off", "host-b", 0.827, 0.508),
    )
    schedule = Scenario(1004007, 2, "calm", calm=False, apps=(App(registration),), faults=faults)
    assert not run(schedule).violations
    begin = Publisher.__init__

    def careless(self: Publisher, *what: Any) -> None:
        begin(self, *what)
        self.claimed.set()

    with patch.object(Publisher, "__init__", careless):
        assert any("two primaries" in violation for violation in run(schedule).violations)


def test_a_plan_that_was_not_written_and_a_host_that_is_lost_meanwhile() -> None:
    """An incarnation that was given to a lost host, but not in etcd, says nothing of the host that gets it next."""
    write, clusters = ReplicaManager._write, list[Cluster]()

    async def into_silence(self: ReplicaManager, app: AppView, before: Assignment | None, txn: Txn) -> None:
        if clusters:  # the member it writes to stops, and the host of the new seat is lost: both are written down much later
            cluster, assignment = clusters.pop(), app.assignment
            assert assignment is not None
            (host,) = (seat.host for seat in assignment.seats if before is None or seat not in before.seats)
            member, lease = self._store.channel.endpoint, cluster.etcd.store.record(_HOSTS + host.encode()).lease
            cluster.etcd.freeze(member)
            cluster.world.after(0.3, cluster.etcd.answer, "Lease.LeaseRevoke", rpc.LeaseRevokeRequest(ID=lease))
            cluster.world.after(4.0, cluster.etcd.thaw, member)
        await write(self, app, before, txn)

    def reasons(cluster: Cluster) -> list[str]:
        return [event.failure.kind for event in cluster.records(Kind.HISTORY).values()]

    steps: list[Step] = [(20.0, clusters.append), (20.0, fault("kill backup", APP))]
    with patch.object(ReplicaManager, "_write", into_silence):
        assert play(steps, 40.0, reasons) == ["exit"]


def test_a_report_that_is_given_up_with_its_session() -> None:
    """A dead replica whose end could not be reported in time is not held up in etcd for ever."""

    def kill_and_give_up(cluster: Cluster) -> None:
        copy = primary(cluster)
        copy.kill()
        (watchdog,) = copy.host.running("watchdog")
        (reporting,) = (task for task in watchdog.loop.tasks if task.get_name() == f"replica {APP}")
        cluster.world.after(1.0, reporting.cancel)  # as when the lease of the host is lost

    def only_shown(cluster: Cluster) -> set[int]:
        shown = {replica.incarnation for replica in cluster.records(Kind.REPLICAS).values()}
        assert len(shown) == 2
        return shown - {copy.incarnation for copy in cluster.copies(APP)}

    steps: list[Step] = [(20.0, fault("etcd down", lasts=3.0)), (20.1, kill_and_give_up)]
    assert play(steps, 60.0, only_shown) == set()


def test_a_watchdog_that_dies_as_it_has_a_copy_started() -> None:
    """The guardian hears what it said last before it tells the next one what there is: nothing is started twice."""
    send, dead = Guard._send, list[str]()

    def dying(self: Guard, kind: str, **fields: Any) -> None:
        send(self, kind, **fields)
        if (kind, fields.get("ward")) == ("spawn", APP) and not dead and isinstance(self._transport, End):
            dead.append(self._transport.owner.name)
            self._transport.owner.vanish()

    with patch.object(Guard, "_send", dying):
        assert play([], 20.0, processes) == 2
    assert len(dead) == 1


@pytest.mark.parametrize("late_s", [3.8, 4.0, 4.2])
def test_a_promotion_that_comes_too_late(late_s: float) -> None:
    """A copy that is called while its host has been stopped for almost a TTL becomes primary or is replaced."""

    def stop_the_third(cluster: Cluster) -> None:
        (third,) = cluster.hosts.keys() - {copy.host.name for copy in cluster.copies(APP)}
        fault("stop host", third, late_s)(cluster)

    steps: list[Step] = [
        (20.0, stop_the_third),
        (20.2, fault("kill backup", APP)),
        (20.4, fault("kill primary", APP)),
    ]
    assert play(steps, 40.0, lambda cluster: primary(cluster).is_alive)


def test_a_leader_of_etcd_falls_silent() -> None:
    """Who had a renewal passed on to it asks all members, not one after the other, and so finds a new leader in time."""
    timing = Timing(timeout_s=2.0)

    def failures(cluster: Cluster) -> int:
        return len(cluster.records(Kind.HISTORY))

    def failed(at: float) -> object:
        steps: list[Step] = [(at, fault("etcd member stops", lasts=10.0, how=0.34))]
        return play(steps, 35.0, failures, timing=timing)

    moments = [20 + begun / 3 for begun in range(5)]
    assert not any(failed(at) for at in moments)

    async def search(self: EtcdChannel, check: OriginCheck, metadata: object) -> None:
        used = self._connection()
        error = _refused(check, await self._ask(check, used, metadata, 0.0))
        if error is not None:
            self._retire(used)
            self._open, self._index = None, (self._index + 1) % len(self.options.endpoints)
            raise error

    with patch.object(EtcdChannel, "_search", search):
        assert any(failed(at) for at in moments)


def test_a_host_that_is_frozen_as_it_is_called() -> None:
    """With failover="fast" it may begin after its successor, but only with its own, older epoch; that is no failure."""
    registration = Registration(
        "app-0", Style.WARM, 3, Program((), "/"), stop_timeout_s=0.1, failover=Failover.FAST, max_restarts=0
    )
    late = 0
    for n in range(5):  # around the moment at which it is called
        faults = (
            Fault(43.1828, "kill primary", "app-0", how=0.347),
            Fault(43.183 + n / 5000, "stop host", "host-b", 1.427, 0.295),
        )
        result = run(Scenario(1009689, 5, "safe", calm=False, apps=(App(registration),), faults=faults))
        assert not result.violations
        epochs = [int(what.rpartition(" ")[2]) for _, what in result.events if what.startswith("PRIMARY")]
        late += epochs != sorted(epochs)
    assert late
