"""A host that is cut off from the network, but lives."""

from __future__ import annotations

from pathlib import Path

import pytest

from etcdreplica.core.view import ClusterView
from etcdreplica.testing import LocalCluster
from tests.integration.conftest import Worker, wait_dead
from tests.lab.network import Network

pytestmark = pytest.mark.lab


@pytest.mark.parametrize("style", ["cold", "warm"])
def test_cut_off_primary(network: Network, lab: LocalCluster, tmp_path: Path, style: str) -> None:
    """The copy on it ends by itself before another body begins elsewhere; when the cable is back the host takes part again."""
    worker = Worker(lab, tmp_path, "--style", style, "--degree", "3")
    worker.start("host-b")
    epoch = lab.wait_ready(worker.name)
    host, pid = lab.primary(worker.name)
    assert host == "host-b"
    network.cut(host)
    worker.wait_lines(lambda lines: any(line["epoch"] > epoch for line in lines), "a body elsewhere")
    assert not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes()
    begin = worker.lines("begin")[-1]
    assert begin["host"] != host
    network.mend(host)
    lab.wait_ready(worker.name, after_epoch=epoch)
    assert set(worker.hosts()) == {"host-a", "host-b", "host-c"}


def test_cut_off_backup(network: Network, lab: LocalCluster, tmp_path: Path) -> None:
    """The primary does not notice; the cut-off backup ends, and its place is filled again when the cable is back."""
    worker = Worker(lab, tmp_path, "--degree", "3")
    worker.start("host-a")
    epoch = worker.wait_acting()
    backup = worker.hosts()[1]
    before = lab.view.apps[worker.name].replicas[backup]
    assert before.pid is not None
    network.cut(backup)
    wait_dead(before.pid)
    network.mend(backup)

    def is_lost(view: ClusterView) -> bool:
        now = view.apps[worker.name].replicas.get(backup)
        return now is None or now.incarnation != before.incarnation  # its place may be filled again in no time

    lab.wait_until(is_lost, "the cut-off backup to be lost")
    assert lab.wait_ready(worker.name) == epoch
    assert len(worker.lines("begin")) == 1
