"""failsafe with a real etcd: its primary outlives etcd while the node of its backup can be asked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from tests.integration.conftest import wait_dead
from tests.integration.stage import Stage

REASON = "fails now and then on a busy machine, not understood yet: make integration has it"
pytestmark = [pytest.mark.integration, pytest.mark.skipif(os.environ.get("LAB") == "short", reason=REASON)]
TTL_S = 5.0  # with 2 s there are 0.6 s for being asked, on a machine that others keep busy


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """Two hosts, and an etcd of their own that can be killed."""
    with EmbeddedEtcd() as etcd, LocalCluster(2, etcd=etcd, lease_ttl_s=TTL_S) as cluster:
        stage = Stage(cluster, tmp_path)
        stage.start("--style", "warm", "--failsafe")
        stage.wait_backed()
        yield stage
        stage.verdict()


def test_outage(stage: Stage) -> None:
    """The same process is primary before, during and after; then a crash is taken over as ever."""
    cluster, epoch = stage.cluster, stage.epoch
    before = {host: replica.pid for host, replica in cluster.view.apps[stage.app].replicas.items()}
    assert isinstance(cluster.etcd, EmbeddedEtcd)
    cluster.etcd.kill()
    stage.still_acting(2.5 * TTL_S)
    cluster.etcd.start()
    stage.still_acting(1.5 * TTL_S)
    cluster.catch_up()
    assert {host: replica.pid for host, replica in cluster.view.apps[stage.app].replicas.items()} == before
    assert stage.epoch == epoch
    cluster.kill_replica(stage.app)
    cluster.wait_ready(stage.app, after_epoch=epoch)


def test_backup_lost_in_an_outage(stage: Stage) -> None:
    """A voucher that is gone may have been told to lead: the primary ends. With etcd, and that host, all comes back."""
    cluster, epoch = stage.cluster, stage.epoch
    host, pid = cluster.primary(stage.app)
    other = next(name for name in cluster.hosts if name != host)
    assert isinstance(cluster.etcd, EmbeddedEtcd)
    cluster.etcd.kill()
    stage.still_acting(1.5 * TTL_S)
    cluster.hosts[other].kill()
    wait_dead(pid)
    cluster.etcd.start()
    cluster.restart(other)
    cluster.wait_ready(stage.app, after_epoch=epoch)
