"""An etcd that comes back with an empty disk or an old one: refused by everybody, until it is right again or accepted."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from tests.integration.conftest import wait_dead
from tests.integration.stage import Stage

pytestmark = pytest.mark.integration
PATIENCE_S = 60.0
REFUSED = "refused: this is not the etcd"


class Etcd:
    """An etcd whose disk can be another one when it comes back."""

    def __init__(self, directory: Path) -> None:
        self.server = EmbeddedEtcd(data_dir=directory / "etcd")
        self._data = directory / "etcd" / "data"
        self._kept = directory / "kept"

    def keep(self) -> None:
        """Make a backup: what the disk has at one moment, which etcd can begin with as after a crash."""
        assert self.server.process is not None
        self.server.process.send_signal(signal.SIGSTOP)
        try:
            shutil.copytree(self._data, self._kept)
        finally:
            self.server.process.send_signal(signal.SIGCONT)

    def empty(self) -> None:
        """Lose everything."""
        self.server.kill()
        shutil.rmtree(self._data)
        self.server.start()

    def restore(self) -> None:
        """Come back as it was when the backup was made."""
        self.server.kill()
        shutil.rmtree(self._data)
        shutil.copytree(self._kept, self._data)
        self.server.start()


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    """One of its own."""
    made = Etcd(tmp_path)
    with made.server:
        yield made


@pytest.fixture
def stage(etcd: Etcd, tmp_path: Path) -> Iterator[Stage]:
    """Two hosts, and an application that claims to be primary."""
    with LocalCluster(2, etcd=etcd.server, lease_ttl_s=4.0) as cluster:
        stage = Stage(cluster, tmp_path)
        stage.start("--style", "warm")
        yield stage


def fail_over(stage: Stage) -> int:
    """Have another primary, and return its epoch."""
    before = stage.epoch
    stage.cluster.kill_replica(stage.app)
    return stage.cluster.wait_ready(stage.app, after_epoch=before)


def log(stage: Stage, host: str) -> str:
    """Return what the daemons of a host have said."""
    return stage.cluster.hosts[host].log_path.read_text()


def wait_refused(stage: Stage) -> str:
    """Wait until every host, and its manager, has refused; return the origin that they know."""
    deadline = time.monotonic() + PATIENCE_S
    while not all(log(stage, host).count(REFUSED) >= 3 for host in stage.cluster.hosts):
        assert time.monotonic() < deadline, stage.cluster.describe()
        time.sleep(0.05)  # a file raises no event
    found = re.findall(r"accept-etcd ([0-9a-f]+)", log(stage, "host-a"))
    return str(found[-1])


def accept(stage: Stage, origin: str) -> None:
    """Accept what is there, as a person would, as soon as the hosts of the backup are gone."""
    command = [sys.executable, "-m", "etcdreplica", "accept-etcd", origin, *stage.cluster.connection]
    deadline = time.monotonic() + PATIENCE_S
    while (done := subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)).returncode:
        assert "hosts work with this etcd" in done.stderr
        assert time.monotonic() < deadline
    stage.cluster.observe_anew()


REPLACEMENTS: dict[str, Callable[[Etcd], None]] = {"empty": Etcd.empty, "old": Etcd.restore}


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_replaced_etcd_is_refused(stage: Stage, etcd: Etcd, replacement: str) -> None:
    """The primary ends by its deadline, and nobody follows it; with the right etcd all goes on."""
    etcd.keep()
    epoch = fail_over(stage)
    stage.wait_acting(epoch - 1)
    _, pid = stage.cluster.primary(stage.app)
    newest = etcd.server.data_dir / "newest"
    etcd.server.kill()
    shutil.copytree(etcd.server.data_dir / "data", newest)
    REPLACEMENTS[replacement](etcd)
    wait_refused(stage)
    wait_dead(pid)
    assert max(reign.epoch for reign in stage.witness.reigns()) == epoch
    etcd.server.kill()
    shutil.rmtree(etcd.server.data_dir / "data")
    newest.rename(etcd.server.data_dir / "data")
    etcd.server.start()
    stage.wait_acting(epoch)
    assert "is the one of before again" in log(stage, "host-a") + log(stage, "host-b")
    stage.verdict()


def test_accepted_backup_is_used(stage: Stage, etcd: Etcd) -> None:
    """Its applications run again, in epochs above all that the lost one can have used, and no two at a time."""
    etcd.keep()
    fail_over(stage)
    epoch = fail_over(stage)
    stage.wait_acting(epoch - 1)
    etcd.restore()
    accept(stage, wait_refused(stage))
    stage.wait_acting(epoch)
    stage.cluster.wait_ready(stage.app, after_epoch=epoch)
    stage.verdict()


def test_accepted_empty_etcd_is_used(stage: Stage, etcd: Etcd) -> None:
    """Hosts come up in it; what is registered anew under an old name begins above all epochs of before."""
    epoch = fail_over(stage)
    stage.wait_acting(epoch - 1)
    etcd.empty()
    accept(stage, wait_refused(stage))
    stage.cluster.wait_until(lambda view: len(view.hosts) == 2, "both hosts to be up")
    stage.start("--style", "warm", spawned=False)
    stage.wait_acting(epoch)
    stage.verdict()


def test_etcd_that_works_is_not_accepted_by_mistake(stage: Stage) -> None:
    """Every host would give up its leases."""
    command = [sys.executable, "-m", "etcdreplica", "accept-etcd", "0123456789abcdef", *stage.cluster.connection]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "hosts work with this etcd: host-a, host-b" in done.stderr
    stage.still_acting(1)


def test_restarted_daemons_remember(stage: Stage, etcd: Etcd) -> None:
    """A host whose every process was killed still knows the etcd of before; the other host need not tell it."""
    etcd.empty()
    origin = wait_refused(stage)
    stage.cluster.hosts["host-b"].kill()
    before = log(stage, "host-b").count(REFUSED)
    stage.cluster.hosts["host-b"].start()
    deadline = time.monotonic() + PATIENCE_S
    while log(stage, "host-b").count(REFUSED) == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)  # a file raises no event
    accept(stage, origin)
    stage.cluster.wait_until(lambda view: len(view.hosts) == 2, "both hosts to be up")
