"""One primary, always: every fault with real processes and signals, and an outside witness of who acted when."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from etcdreplica.core.view import ClusterView
from etcdreplica.model import FailureKind
from etcdreplica.testing import LocalCluster
from etcdreplica.testing.processes import descendants
from etcdreplica.testing.witness import Witness

pytestmark = pytest.mark.integration
CLAIMANT = Path(__file__).parent / "apps" / "claimant.py"
APP = "claimant"


class Stage:
    """A cluster of three hosts, the application on two of them, and the witness."""

    def __init__(self, cluster: LocalCluster, directory: Path) -> None:
        self.cluster = cluster
        self.witness = Witness(directory / "claims")
        self.gil = directory / "hold-gil"
        self.stopped: list[int] = []

    def start(self, *arguments: str, spawned: bool = True) -> None:
        """Start it; with `spawned`, make its primary one that a guardian has started."""
        self.cluster.start(CLAIMANT, "--claims", str(self.witness.path), "--hold-gil", str(self.gil), *arguments)
        epoch = self.cluster.wait_ready(APP)
        if spawned:
            self.cluster.kill_replica(APP)
            self.cluster.wait_ready(APP, after_epoch=epoch)

    @property
    def host(self) -> str:
        """The host of the primary."""
        return self.cluster.primary(APP)[0]

    @property
    def epoch(self) -> int:
        """The epoch of the assignment."""
        assignment = self.cluster.view.apps[APP].assignment
        assert assignment is not None
        return assignment.epoch

    def watchdog(self) -> int:
        """Return the process id of the WatchDog of the primary's host."""
        return self.cluster.view.hosts[self.host].host.pid

    def guardian(self) -> int:
        """Return that of its guardian."""
        process = self.cluster.hosts[self.host].process
        assert process is not None
        return process.pid

    def manager(self) -> int:
        """Return that of the leading manager."""
        leader = self.cluster.leaders["manager"]
        process = self.cluster.hosts[leader].process
        assert process is not None
        return next(
            pid for pid in descendants(process.pid) if b"manager" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        )

    def stop(self, pid: int) -> None:
        """SIGSTOP a process; it is continued at the end at the latest."""
        os.kill(pid, signal.SIGSTOP)
        self.stopped.append(pid)

    def go_on(self) -> None:
        """SIGCONT what was stopped, if it still is."""
        while self.stopped:
            pid = self.stopped.pop()
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGCONT)

    def wait_acting(self, after_epoch: int) -> None:
        """Wait until a primary of a later epoch has acted."""
        self.cluster.wait_until(
            lambda view: any(reign.epoch > after_epoch for reign in self.witness.reigns(APP)), "a later primary to act", 60
        )

    def still_acting(self, seconds: float) -> None:
        """Wait until the primary has acted for so long from now on."""
        reigning = self.witness.reigns(APP)[-1]
        until = time.clock_gettime(time.CLOCK_BOOTTIME) + seconds
        deadline = time.monotonic() + seconds + 30
        while self.witness.reigns(APP)[-1].end < until:
            assert time.monotonic() < deadline, self.cluster.describe()
            time.sleep(0.05)  # a file raises no event
        assert self.witness.reigns(APP)[-1].epoch == reigning.epoch, self.cluster.events

    def verdict(self) -> None:
        """No two at a time, and epochs only grew."""
        assert self.witness.violations() == []


@pytest.fixture
def stage(etcd_cluster_of_three: LocalCluster, tmp_path: Path) -> Iterator[Stage]:
    """Three hosts with a TTL of 2 s."""
    stage = Stage(etcd_cluster_of_three, tmp_path)
    yield stage
    stage.go_on()


@pytest.fixture
def etcd_cluster_of_three(etcd_server: object) -> Iterator[LocalCluster]:
    """Hosts of this test alone, on an etcd of its own: some tests stop it."""
    with LocalCluster(3) as cluster:
        yield cluster


def _kill_replica(stage: Stage) -> None:
    stage.cluster.kill_replica(APP)


def _stop_replica(stage: Stage) -> None:
    stage.stop(stage.cluster.primary(APP)[1])


def _hold_gil(stage: Stage) -> None:
    stage.gil.touch()


def _stop_watchdog(stage: Stage) -> None:
    stage.stop(stage.watchdog())


def _stop_guardian(stage: Stage) -> None:
    stage.stop(stage.guardian())
    os.kill(stage.watchdog(), signal.SIGSTOP)  # so that nobody renews either


def _stop_host(stage: Stage) -> None:
    for pid in (stage.watchdog(), stage.cluster.primary(APP)[1], stage.guardian()):
        stage.stop(pid)


def _kill_guardian(stage: Stage) -> None:
    os.kill(stage.guardian(), signal.SIGKILL)


def _kill_host(stage: Stage) -> None:
    stage.cluster.hosts[stage.host].kill()


TAKEN_OVER: dict[str, Callable[[Stage], None]] = {
    "replica killed": _kill_replica,
    "replica stopped": _stop_replica,
    "GIL held": _hold_gil,
    "WatchDog stopped for longer than the TTL": _stop_watchdog,
    "guardian and WatchDog stopped": _stop_guardian,
    "guardian killed": _kill_guardian,
    "host stopped": _stop_host,
    "host killed": _kill_host,
}


@pytest.mark.parametrize("fault", TAKEN_OVER)
@pytest.mark.parametrize("style", ["cold", "warm", "hot"])
def test_faults_that_are_taken_over(stage: Stage, style: str, fault: str) -> None:
    """Another copy is primary afterwards, and never before the first one has ended; also when what was stopped goes on."""
    stage.start("--style", style, "--hang-timeout", "1")
    before = stage.epoch
    TAKEN_OVER[fault](stage)
    stage.wait_acting(before)
    stage.go_on()
    stage.cluster.wait_ready(APP, after_epoch=before, timeout=60)
    stage.still_acting(0.5)
    stage.verdict()


@pytest.mark.parametrize(
    "fault", ["replica stopped", "WatchDog stopped for longer than the TTL", "GIL held", "guardian killed"]
)
def test_a_copy_that_was_started_by_hand(stage: Stage, fault: str) -> None:
    """It has no guardian for a parent, and still ends in time."""
    stage.start("--style", "hot", "--hang-timeout", "1", spawned=False)
    before = stage.epoch
    TAKEN_OVER[fault](stage)
    stage.wait_acting(before)
    stage.go_on()
    stage.still_acting(0.5)
    stage.verdict()


@pytest.mark.parametrize(
    "fault", ["replica killed", "replica stopped", "WatchDog stopped for longer than the TTL", "host killed"]
)
def test_a_primary_with_children_in_sessions_of_their_own(stage: Stage, fault: str) -> None:
    """They act with the primary, and end with it."""
    stage.start("--style", "warm", "--hang-timeout", "1", "--children", "3")
    before = stage.epoch
    TAKEN_OVER[fault](stage)
    stage.wait_acting(before)
    stage.go_on()
    stage.cluster.wait_ready(APP, after_epoch=before, timeout=60)
    stage.still_acting(0.5)
    stage.verdict()


def _kill_watchdog(stage: Stage) -> None:
    os.kill(stage.watchdog(), signal.SIGKILL)


def _replace_watchdog(stage: Stage) -> None:
    os.kill(stage.guardian(), signal.SIGHUP)


def _kill_manager(stage: Stage) -> None:
    os.kill(stage.manager(), signal.SIGKILL)


def _stop_manager(stage: Stage) -> None:
    stage.stop(stage.manager())


def _pause_watchdog(stage: Stage) -> None:
    _briefly(stage.watchdog())


def _pause_etcd(stage: Stage) -> None:
    _briefly(_etcd(stage))


def _etcd(stage: Stage) -> int:
    process = stage.cluster.etcd.process
    assert process is not None
    return process.pid


def _briefly(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.6)  # the fault itself: shorter than what is left of any lease of 2 s
    os.kill(pid, signal.SIGCONT)


UNNOTICED: dict[str, Callable[[Stage], None]] = {
    "WatchDog killed": _kill_watchdog,
    "WatchDog replaced": _replace_watchdog,
    "manager killed": _kill_manager,
    "manager stopped": _stop_manager,
    "WatchDog stopped for less than the TTL": _pause_watchdog,
    "etcd stopped for less than the TTL": _pause_etcd,
}


@pytest.mark.parametrize("fault", UNNOTICED)
@pytest.mark.parametrize("spawned", [True, False], ids=["spawned", "by hand"])
def test_faults_that_nobody_notices(stage: Stage, fault: str, spawned: bool) -> None:
    """The same copy goes on as primary, past the end of every lease it had."""
    stage.start("--style", "warm", spawned=spawned)
    UNNOTICED[fault](stage)
    stage.still_acting(3 * stage.cluster.lease_ttl_s)
    stage.verdict()


@pytest.mark.parametrize("style", ["cold", "warm", "hot"])
def test_etcd_stopped_for_longer_than_the_ttl(stage: Stage, style: str) -> None:
    """The primary ends itself; with etcd another one begins."""
    stage.start("--style", style)
    before, etcd = stage.epoch, _etcd(stage)
    primary = Path(f"/proc/{stage.cluster.primary(APP)[1]}")
    stage.stop(etcd)
    deadline = time.monotonic() + 30
    while primary.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)  # the observer of the cluster is as blind as the hosts
    stage.go_on()
    stage.wait_acting(before)
    stage.verdict()


def test_a_stall_of_everything_is_no_hang(etcd_server: object, tmp_path: Path) -> None:
    """WatchDog and application stopped together for longer than the hang timeout, and less than the TTL: nobody is blamed."""
    with LocalCluster(2, lease_ttl_s=10) as cluster:
        stage = Stage(cluster, tmp_path)
        stage.start("--style", "warm", "--hang-timeout", "1")
        pids = (stage.watchdog(), cluster.primary(APP)[1])
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(3)  # the fault itself
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        stage.still_acting(3)
        stage.verdict()
        assert not any(event.failure.kind is FailureKind.HANG for event in cluster.events.values())


def test_shown_hang(stage: Stage) -> None:
    """The history says what it was doing."""
    stage.start("--hang-timeout", "1")
    stage.gil.touch()

    def is_known(_: ClusterView) -> bool:
        return any(event.failure.kind is FailureKind.HANG for event in stage.cluster.events.values())

    stage.cluster.wait_until(is_known, "the hang in the history")
    event = next(event for event in stage.cluster.events.values() if event.failure.kind is FailureKind.HANG)
    assert "in step" in event.failure.evidence, event
