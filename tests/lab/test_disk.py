"""A host that loses its power, or has no room left: its disk has what was flushed, or takes nothing more."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from etcdreplica.testing import LocalCluster
from tests.integration.conftest import Worker
from tests.lab.disk import Disk

pytestmark = pytest.mark.lab
LONG_TTL_S = 30.0


@pytest.fixture
def disk(tmp_path: Path, rooted: None) -> Iterator[Disk]:
    """The disk of host-b."""
    made = Disk(tmp_path / "host-b.img", tmp_path / "host-b")
    try:
        made.make()
    except OSError as error:
        pytest.skip(str(error))
    yield made
    made.remove()


def test_host_is_back_before_its_lease_ends(disk: Disk, tmp_path: Path) -> None:
    """It has not forgotten which lease is its own."""
    with LocalCluster(2, directory=tmp_path, lease_ttl_s=LONG_TTL_S) as cluster:
        worker = Worker(cluster, tmp_path, "--degree", "2")
        worker.start("host-a")
        cluster.wait_ready(worker.name)
        session = cluster.view.hosts["host-b"].session
        cluster.hosts["host-b"].kill()
        disk.lose_power()
        cluster.restart("host-b")
        assert cluster.view.hosts["host-b"].session != session
        cluster.wait_ready(worker.name)


def leases(cluster: LocalCluster) -> int:
    """Return how many there are."""
    with urllib.request.urlopen(f"http://{cluster.etcd.endpoint}/v3/lease/leases", b"{}", timeout=10) as answer:
        return len(json.load(answer).get("leases", ()))


def test_full_disk(disk: Disk, tmp_path: Path) -> None:
    """A copy that was started by hand ends there, and is taken over; the host goes on, and leaves nothing behind."""
    with LocalCluster(2, directory=tmp_path) as cluster:
        cluster.wait_until(lambda _: len(cluster.servers) == 2, "both CheckpointServers")
        before = leases(cluster)
        worker = Worker(cluster, tmp_path, "--degree", "2")
        worker.start("host-b")
        epoch = cluster.wait_ready(worker.name)
        disk.fill()
        host, pid = cluster.primary(worker.name)
        assert host == "host-b"
        os.kill(pid, signal.SIGKILL)
        worker.wait_lines(lambda lines: any(line["epoch"] > epoch for line in lines), "a body on host-a")
        cluster.remove(worker.name)
        deadline = time.monotonic() + 60
        while leases(cluster) > before:
            assert time.monotonic() < deadline, "a lease is left"
            time.sleep(0.1)  # etcd does not tell


def test_node_begins_on_a_full_disk(disk: Disk, tmp_path: Path) -> None:
    """It has no checkpoints to offer, and nothing to remember by; its WatchDog works."""
    with LocalCluster(2, directory=tmp_path) as cluster:
        cluster.hosts["host-b"].kill()
        cluster.wait_until(lambda view: "host-b" not in view.hosts, "its lease to end")
        disk.fill()
        cluster.restart("host-b")
