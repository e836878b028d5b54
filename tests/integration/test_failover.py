"""The main job: a protected program survives the death of its process and of its host, under each style."""

from __future__ import annotations

import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from etcdreplica.core.view import ClusterView
from etcdreplica.model import AssignmentState, FailureKind, ReplicaState
from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from etcdreplica.testing.processes import descendants
from tests.integration.apps_cli.cli_harness import delete_raw, eventually, put_raw, raw_keys
from tests.integration.conftest import Worker, kill, repair, wait_dead
from tests.integration.stage import NO_CHECKPOINTS

pytestmark = pytest.mark.integration
STYLES = ["cold", "warm", "hot"]
MakeWorker = Callable[..., Worker]
_numbers = itertools.count()


@pytest.fixture(scope="module")
def lasting_hosts(etcd_server: EmbeddedEtcd) -> Iterator[LocalCluster]:
    """Three hosts whose leases outlast what a busy machine takes for a WatchDog to be replaced."""
    name = f"lasting-{next(_numbers)}"
    with LocalCluster(3, etcd=etcd_server, cluster=name, lease_ttl_s=10, node_arguments=NO_CHECKPOINTS) as cluster:
        yield cluster


@pytest.fixture
def lasting_cluster(lasting_hosts: LocalCluster) -> Iterator[LocalCluster]:
    """The same, all up and without an application."""
    yield lasting_hosts
    repair(lasting_hosts)


def test_each_etcd(any_etcd: EmbeddedEtcd, make_worker: MakeWorker) -> None:
    """Crash, loss of the host and completion work on every etcd of this machine."""
    with LocalCluster(3, etcd=any_etcd, cluster="each", node_arguments=NO_CHECKPOINTS) as cluster:
        worker = make_worker(cluster, "--style", "warm")
        worker.start()
        first = cluster.wait_ready(worker.name)
        cluster.kill_replica(worker.name)
        second = cluster.wait_ready(worker.name, after_epoch=first)
        host, _ = cluster.primary(worker.name)
        cluster.hosts[host].kill()
        cluster.wait_ready(worker.name, after_epoch=second)
        assert host not in worker.hosts()


@pytest.mark.parametrize("style", STYLES)
def test_crash(shared_cluster: LocalCluster, make_worker: MakeWorker, style: str) -> None:
    """After SIGKILL of the primary the named successor runs with a larger epoch, and the degree is restored."""
    worker = make_worker(shared_cluster, "--style", style, "--degree", "2")
    worker.start()
    epoch = shared_cluster.wait_ready(worker.name)
    assignment = shared_cluster.view.apps[worker.name].assignment
    assert assignment is not None
    host, pid = shared_cluster.kill_replica(worker.name)
    after = shared_cluster.wait_ready(worker.name, after_epoch=epoch)
    hosts = worker.hosts()
    assert after == epoch + 1
    assert hosts[0] == assignment.successor != host
    assert len(hosts) == len(set(hosts)) == 2
    kinds = "begin" if style != "hot" else "role"
    lines = worker.wait_lines(lambda ls: any(x["what"] == kinds and x["epoch"] == after for x in ls), "the new primary")
    assert {x["host"] for x in lines if x["epoch"] == after and x["role"] == "primary"} == {hosts[0]}
    events = [e for (app, _), e in shared_cluster.events.items() if app == worker.name]
    assert [(e.failure.kind, e.failure.host, e.primary) for e in events] == [(FailureKind.EXIT, host, hosts[0])]
    wait_dead(pid)


@pytest.mark.parametrize("style", STYLES)
def test_lost_host(hosts: LocalCluster, make_worker: MakeWorker, style: str) -> None:
    """After everything on the primary's host is killed, another host serves; when the host is back the degree is whole."""
    worker = make_worker(hosts, "--style", style, "--degree", "3")
    worker.start("host-b")
    epoch = hosts.wait_ready(worker.name)
    assert worker.hosts()[0] == "host-b"
    hosts.hosts["host-b"].kill()
    hosts.wait_until(
        lambda view: (a := view.apps[worker.name].assignment) is not None and a.degraded and a.epoch == epoch + 1,
        "a new primary, degraded",
    )
    assert "2 of 3 copies" in (hosts.view.apps[worker.name].assignment or pytest.fail("none")).reason
    hosts.restart("host-b")
    hosts.wait_ready(worker.name)
    assert sorted(worker.hosts()) == ["host-a", "host-b", "host-c"]
    assert worker.hosts()[0] != "host-b"


@pytest.mark.parametrize("style", STYLES)
def test_three_crashes_in_a_row(shared_cluster: LocalCluster, make_worker: MakeWorker, style: str) -> None:
    """Each new primary may die in its turn, at once; the application comes back every time, with growing epochs."""
    worker = make_worker(shared_cluster, "--style", style)
    worker.start()
    epochs = [shared_cluster.wait_ready(worker.name)]
    for _ in range(3):
        shared_cluster.kill_replica(worker.name)
        epochs.append(shared_cluster.wait_ready(worker.name, after_epoch=epochs[-1]))
    assert epochs == sorted(set(epochs))


def test_one_body_at_a_time(shared_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """Under style warm no body begins before the process of the one before is dead."""
    worker = make_worker(shared_cluster, "--style", "warm", "--degree", "3")
    worker.start()
    epoch = worker.wait_acting()
    for _ in range(3):
        shared_cluster.kill_replica(worker.name)
        epoch = worker.wait_acting(after_epoch=epoch)
    begins = worker.lines("begin")
    assert [line["epoch"] for line in begins] == sorted({line["epoch"] for line in begins})
    assert len({line["pid"] for line in begins}) == 4


def test_without_any_manager(lasting_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """A crash is taken over even while no ReplicaManager is there at all; the degree is restored when one is back."""
    cluster = lasting_cluster
    worker = make_worker(cluster)
    worker.start()
    epoch = worker.wait_acting()
    managers = _managers(cluster)
    for pid in managers.values():
        kill(pid, signal.SIGSTOP)
    try:
        successor = worker.hosts()[1]
        cluster.kill_replica(worker.name)
        worker.wait_lines(lambda ls: any(x["what"] == "begin" and x["host"] == successor for x in ls), "the successor's body")
        assert worker.lines("begin")[-1]["epoch"] == epoch + 1
    finally:
        for pid in managers.values():
            kill(pid, signal.SIGCONT)
    cluster.wait_ready(worker.name, after_epoch=epoch)


def test_an_incarnation_runs_once(lasting_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """A placement of a replica that has ended, written once more by a manager that does not know it yet, starts nothing."""
    cluster = lasting_cluster
    worker = make_worker(cluster)
    worker.start()
    epoch = worker.wait_acting()
    host, successor = worker.hosts()
    managers = _managers(cluster)
    for pid in managers.values():
        kill(pid, signal.SIGSTOP)
    try:
        key = f"placements/{host}/{worker.name}"
        placement = raw_keys(cluster)[key]
        cluster.kill_replica(worker.name)
        worker.wait_lines(lambda ls: any(x["what"] == "begin" and x["host"] == successor for x in ls), "the successor's body")
        put_raw(cluster, key, placement)
        put_raw(cluster, f"placements/{host}/barrier", placement)  # of no registration: refused after the one before was read
        cluster.wait_until(lambda view: "barrier" in view.apps and bool(view.apps["barrier"].failures), "the barrier")
        assert [line["host"] for line in worker.lines("begin")] == [host, successor]
        assert host not in cluster.view.apps[worker.name].replicas
        delete_raw(cluster, f"placements/{host}/barrier")
    finally:
        for pid in managers.values():
            kill(pid, signal.SIGCONT)
    cluster.wait_ready(worker.name, after_epoch=epoch)


def test_leading_manager_killed(lasting_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """Kill -9 of the leading manager: another leads without waiting for a lease, nothing fails over, nothing is lost."""
    cluster = lasting_cluster
    worker = make_worker(cluster)
    worker.start()
    epoch = cluster.wait_ready(worker.name)
    leader = cluster.leaders["manager"]
    pid = _managers(cluster)[leader]
    kill(pid)
    cluster.wait_until(
        lambda _: {"manager", "superwatchdog"} <= set(cluster.leaders) and leader not in cluster.leaders.values(),
        "another leader",
    )
    assert cluster.wait_ready(worker.name) == epoch
    cluster.kill_replica(worker.name)
    cluster.wait_ready(worker.name, after_epoch=epoch)


@pytest.mark.parametrize("by_hand", [True, False], ids=["by-hand", "spawned"])
@pytest.mark.parametrize("style", STYLES)
def test_killed_watchdog_comes_back(
    lasting_cluster: LocalCluster, make_worker: MakeWorker, style: str, *, by_hand: bool
) -> None:
    """Kill -9 of every WatchDog fails nothing over: the next ones adopt what runs, and know what to do with it."""
    cluster = lasting_cluster
    worker = make_worker(cluster, "--style", style)
    worker.start("host-a")
    epoch = cluster.wait_ready(worker.name)
    if not by_hand:
        cluster.kill_replica(worker.name)
        epoch = cluster.wait_ready(worker.name, after_epoch=epoch)
    before = _standing(cluster, worker)
    events = _events(cluster, worker)
    for name in worker.hosts():
        old = cluster.view.hosts[name].host.pid
        kill(old)
        wait_dead(old)

        def is_back(view: ClusterView, name: str = name, old: int = old) -> bool:
            return name in view.hosts and view.hosts[name].host.pid != old

        cluster.wait_until(is_back, f"another WatchDog on {name}")
    assert cluster.wait_ready(worker.name) == epoch
    assert _standing(cluster, worker) == before
    assert _events(cluster, worker) == events
    successor = worker.hosts()[1]
    cluster.kill_replica(worker.name)
    assert cluster.wait_ready(worker.name, after_epoch=epoch) == epoch + 1
    assert worker.hosts()[0] == successor


def _events(cluster: LocalCluster, worker: Worker) -> int:
    """Return how much stands in its history."""
    return sum(app == worker.name for app, _ in list(cluster.events))


def _standing(cluster: LocalCluster, worker: Worker) -> dict[str, tuple[object, ...]]:
    """Return what must not change: of each copy its process, place, and the stay of its host."""
    return {
        host: (replica.incarnation, replica.epoch, replica.role, replica.state, replica.pid, cluster.view.hosts[host].session)
        for host, replica in cluster.view.apps[worker.name].replicas.items()
    }


def test_killed_guardian_comes_back(lasting_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """Kill -9 of a guardian: all that it started dies with it, and a new node there need not wait for the old leases."""
    cluster = lasting_cluster
    worker = make_worker(cluster)
    cluster.run(["sleep", "600"])  # not ours: must be left alone
    worker.start("host-a")
    epoch = cluster.wait_ready(worker.name)
    backup = worker.hosts()[1]
    node, pid = cluster.hosts[backup].process, cluster.view.apps[worker.name].replicas[backup].pid
    assert node is not None
    assert pid is not None
    session = cluster.view.hosts[backup].session
    node.kill()
    node.wait()
    wait_dead(pid)
    cluster.hosts[backup].start()
    cluster.wait_until(lambda view: backup in view.hosts and view.hosts[backup].session != session, f"{backup} anew")
    assert cluster.wait_ready(worker.name) == epoch


def test_node_stopped_in_order(lasting_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """SIGTERM to a node hands over what runs there: the body ends by itself, then another begins."""
    cluster = lasting_cluster
    worker = make_worker(cluster, "--slow-stop", "0.1")
    worker.start("host-a")
    epoch = worker.wait_acting()
    cluster.kill_replica(worker.name)  # now it runs where a WatchDog started it
    epoch = worker.wait_acting(after_epoch=epoch)
    host, _ = cluster.primary(worker.name)
    cluster.hosts[host].stop()
    cluster.wait_until(lambda view: host not in view.hosts, f"{host} to leave")
    worker.wait_acting(after_epoch=epoch)
    begin, end = worker.lines("begin")[-1], worker.lines("end")[-1]
    assert end["host"] == host != begin["host"]
    assert end["at"] < begin["at"]


def test_etcd_restarted(make_worker: MakeWorker) -> None:
    """Kill -9 and restart of etcd within the TTL: nothing fails over, and a crash afterwards is handled."""
    with EmbeddedEtcd() as etcd, LocalCluster(3, etcd=etcd, lease_ttl_s=10, node_arguments=NO_CHECKPOINTS) as cluster:
        worker = make_worker(cluster)
        worker.start()
        epoch = worker.wait_acting()
        pid = cluster.primary(worker.name)[1]
        etcd.kill()
        etcd.start()
        cluster.kill_replica(worker.name)
        worker.wait_acting(after_epoch=epoch)
        wait_dead(pid)
        assert len(worker.lines("begin")) == 2


def test_etcd_gone_for_long(hosts: LocalCluster, make_worker: MakeWorker) -> None:
    """Etcd stopped for longer than the TTL: every copy is ended before its lease, and all comes back with etcd."""
    worker, etcd = make_worker(hosts), hosts.etcd.process
    worker.start()
    epoch = hosts.wait_ready(worker.name)
    pids = [replica.pid for replica in hosts.view.apps[worker.name].replicas.values()]
    assert etcd is not None
    etcd.send_signal(signal.SIGSTOP)
    try:
        for pid in pids:
            assert pid is not None
            wait_dead(pid)
    finally:
        etcd.send_signal(signal.SIGCONT)
    hosts.wait_ready(worker.name, after_epoch=epoch)
    hosts.wait_until(lambda view: set(hosts.hosts) <= set(view.hosts), "every host to be back")


def test_host_appears(etcd_server: EmbeddedEtcd, make_worker: MakeWorker) -> None:
    """With one host an application runs degraded; a second host makes it whole without touching the primary."""
    with LocalCluster(["host-a", "host-b"], etcd=etcd_server, cluster="grows", node_arguments=NO_CHECKPOINTS) as cluster:
        cluster.hosts["host-b"].kill()
        cluster.wait_until(lambda view: set(view.hosts) == {"host-a"}, "host-b to be lost")
        worker = make_worker(cluster)
        worker.start("host-a")
        cluster.wait_until(
            lambda view: (
                worker.name in view.apps
                and (a := view.apps[worker.name].assignment) is not None
                and a.state is AssignmentState.ACTIVE
                and a.degraded
                and (r := view.apps[worker.name].replicas.get("host-a")) is not None
                and r.state is ReplicaState.RUNNING
            ),
            "a degraded application",
        )
        before = cluster.primary(worker.name)
        cluster.restart("host-b")
        cluster.wait_ready(worker.name)
        assert cluster.primary(worker.name) == before


def _managers(cluster: LocalCluster) -> dict[str, int]:
    """Return the manager process of each host; one that was killed is back before long."""
    found: dict[str, int] = {}

    def look() -> bool:
        found.clear()
        for host in cluster.hosts.values():
            assert host.process is not None
            for pid in descendants(host.process.pid):
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    if b"manager" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                        found[host.name] = pid
        return set(found) == set(cluster.hosts)

    eventually(look, "a manager on every host")
    return found
