"""Many hosts lost at once: believed only after a wait, and everything comes back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from etcdreplica.store import Kind, Store
from etcdreplica.testing import LocalCluster
from tests.integration.apps_cli.cli_harness import eventually, in_store
from tests.integration.conftest import Worker

pytestmark = pytest.mark.integration
MakeWorker = Callable[..., Worker]
BRAKE = "brake: most hosts vanished at once"


def logs(cluster: LocalCluster) -> str:
    """Return what all nodes have logged."""
    return "\n".join(host.log_path.read_text(errors="replace") for host in cluster.hosts.values())


def test_all_leases_dropped(etcd_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """As when a stalled etcd ends the leases of healthy hosts: they come back by themselves and everything is whole again."""
    cluster = etcd_cluster
    worker = make_worker(cluster, "--degree", "3")
    worker.start()
    epoch = cluster.wait_ready(worker.name)
    sessions = {name: host.session for name, host in cluster.view.hosts.items()}

    async def drop(store: Store) -> None:
        for entry in (await store.list(Kind.HOSTS)).entries:
            await store.leases.revoke_id(entry.lease)

    in_store(cluster.etcd, cluster.cluster, drop)
    eventually(lambda: BRAKE in logs(cluster), "the brake")
    cluster.wait_until(
        lambda view: set(view.hosts) == set(sessions) and all(view.hosts[h].session != s for h, s in sessions.items()),
        "the hosts to come back",
    )
    cluster.wait_ready(worker.name, after_epoch=epoch)
    epochs = [line["epoch"] for line in worker.lines("begin")]
    assert epochs == sorted(set(epochs))


def test_most_hosts_lost(etcd_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """Two of three die for good: after the brake the third serves, and with the others back the degree is whole."""
    cluster = etcd_cluster
    worker = make_worker(cluster, "--degree", "3")
    worker.start("host-a")
    epoch = cluster.wait_ready(worker.name)
    for host in ("host-a", "host-b"):
        cluster.hosts[host].freeze()  # at once: to kill a host takes its time
    for host in ("host-a", "host-b"):
        cluster.hosts[host].kill()
    cluster.wait_until(
        lambda view: (
            (a := view.apps[worker.name].assignment) is not None
            and a.epoch > epoch
            and [seat.host for seat in a.seats] == ["host-c"]
            and (r := view.apps[worker.name].replicas.get("host-c")) is not None
            and r.epoch == a.epoch
        ),
        "host-c to serve alone",
    )
    assert BRAKE in logs(cluster)
    assert "brake: still gone after the wait: " in logs(cluster)
    for host in ("host-a", "host-b"):
        cluster.restart(host)
    cluster.wait_ready(worker.name)


def test_single_host_lost(etcd_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """The loss of one of three is believed at once."""
    cluster = etcd_cluster
    worker = make_worker(cluster, "--degree", "3")
    worker.start("host-a")
    epoch = cluster.wait_ready(worker.name)
    cluster.hosts["host-a"].kill()
    cluster.wait_until(
        lambda view: (a := view.apps[worker.name].assignment) is not None and a.epoch > epoch and "host-a" not in view.hosts,
        "a new primary",
    )
    cluster.restart("host-a")
    cluster.wait_ready(worker.name, after_epoch=epoch)
    assert "brake" not in logs(cluster)


def test_host_that_left_in_order_does_not_count(etcd_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """One stopped in order and one killed are not most of three, to a SuperWatchDog that saw both."""
    cluster = etcd_cluster
    worker = make_worker(cluster, "--degree", "3")
    worker.start("host-a")
    epoch = cluster.wait_ready(worker.name)
    leader = cluster.leaders["superwatchdog"]
    stopped, killed = sorted(set(cluster.hosts) - {leader})
    cluster.hosts[stopped].stop()
    cluster.wait_until(
        lambda view: (
            stopped not in view.hosts
            and (a := view.apps[worker.name].assignment) is not None
            and stopped not in {seat.host for seat in a.seats}
        ),
        f"{stopped} to leave",
    )
    cluster.hosts[killed].kill()
    cluster.wait_until(
        lambda view: (a := view.apps[worker.name].assignment) is not None and [s.host for s in a.seats] == [leader],
        f"{leader} to serve alone",
    )
    for host in (stopped, killed):
        cluster.restart(host)
    cluster.wait_ready(worker.name, after_epoch=epoch - 1)
    assert "brake" not in logs(cluster)
