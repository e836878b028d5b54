"""A host that is cut off from the network, but lives, under failover="fast": taken over before its lease ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from etcdreplica.model import Event, FailureKind
from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from tests.integration.conftest import Worker, wait_dead
from tests.lab.conftest import HOSTS, mended
from tests.lab.network import Network

pytestmark = pytest.mark.lab
LONG_TTL_S = 10.0


@pytest.fixture
def fast_lab(network: Network, fast_hosts: LocalCluster) -> Iterator[LocalCluster]:
    """The hosts of this module."""
    yield fast_hosts
    mended(network, fast_hosts)


@pytest.fixture(scope="module")
def fast_hosts(network: Network) -> Iterator[LocalCluster]:
    """Three nodes that answer each other at their own addresses; the one on host-b has no manager."""
    prefixes = {host: network.prefix(host) for host in HOSTS}
    arguments = {host: ["--peer-listen", f"{network.address_of(host)}:0", "--insecure"] for host in HOSTS}
    arguments["host-b"].append("--no-manager")
    with (
        EmbeddedEtcd(address=network.address) as etcd,
        LocalCluster(
            HOSTS, etcd=etcd, cluster="fast", lease_ttl_s=LONG_TTL_S, prefixes=prefixes, node_arguments=arguments
        ) as cluster,
    ):
        yield cluster


def events(cluster: LocalCluster, app: str) -> list[Event]:
    """Return the history of an application."""
    return [event for (name, _), event in list(cluster.events.items()) if name == app]


def test_cut_off_primary(network: Network, fast_lab: LocalCluster, tmp_path: Path) -> None:
    """A new primary runs while the lease of the old one lives; the old copy ends by its deadline, with the older epoch."""
    worker = Worker(fast_lab, tmp_path, "--failover", "fast", name="cut-off")
    worker.start("host-b")
    epoch = fast_lab.wait_ready(worker.name)
    host, pid = fast_lab.primary(worker.name)
    assert host == "host-b"
    session = fast_lab.view.hosts[host].session
    network.cut(host)
    fast_lab.wait_until(lambda _: bool(events(fast_lab, worker.name)), "the loss in the history")
    assert fast_lab.view.hosts[host].session == session
    (event,) = events(fast_lab, worker.name)
    assert (event.failure.kind, event.failure.host) == (FailureKind.HOST, host)
    assert "while its lease still lived" in event.failure.reason
    worker.wait_lines(lambda lines: any(line["epoch"] > epoch for line in lines), "a body elsewhere")
    assert Path(f"/proc/{pid}").exists()  # the overlap that the documentation tells of
    wait_dead(pid)
    fast_lab.wait_until(lambda view: host not in view.hosts, "its own lease to end")  # that of the copy may end earlier
    network.mend(host)
    fast_lab.wait_until(lambda view: host in view.hosts and view.hosts[host].session != session, "it to be back")
    fast_lab.wait_ready(worker.name, after_epoch=epoch)
    assert max(line["epoch"] for line in worker.lines() if line["host"] == host) == epoch


def test_cable_out_for_a_moment(network: Network, fast_lab: LocalCluster, tmp_path: Path) -> None:
    """A cable that is out for less than the patience loses nobody."""
    worker = Worker(fast_lab, tmp_path, "--failover", "fast", "--degree", "3", name="loose-cable")
    worker.start("host-b")
    epoch = fast_lab.wait_ready(worker.name)
    for _ in range(5):
        network.cut("host-b")
        network.mend("host-b")
    fast_lab.kill_replica(worker.name)  # what comes of this tells that nothing came of that
    assert fast_lab.wait_ready(worker.name, after_epoch=epoch) == epoch + 1
    assert [event.failure.kind for event in events(fast_lab, worker.name)] == [FailureKind.EXIT]
