"""A host that loses its power: its disk has what was flushed, and nothing else."""

from __future__ import annotations

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
