"""One primary, always: every fault with real processes and signals, and an outside witness of who acted when."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from etcdreplica.clock import boottime
from etcdreplica.core.view import ClusterView
from etcdreplica.model import Event, FailureKind
from etcdreplica.testing import LocalCluster
from etcdreplica.testing.processes import descendants
from etcdreplica.testing.witness import Witness

pytestmark = pytest.mark.integration
CLAIMANT = Path(__file__).parent / "apps" / "claimant.py"
PATIENCE_S = 60.0
DAY_S = 86400.0
_numbers = itertools.count()


class Stage:
    """A cluster, the application under a name of its own on two of its hosts, and the witness."""

    def __init__(self, cluster: LocalCluster, directory: Path) -> None:
        self.cluster = cluster
        self.app = f"claimant-{next(_numbers)}"
        self.witness = Witness(directory / "claims")
        self.gil = directory / "hold-gil"
        self.stopped: list[int] = []
        self._hit: set[str] = set()

    def start(self, *arguments: str, spawned: bool = True) -> None:
        """Start it; with `spawned`, make its primary one that a guardian has started."""
        words = ("--name", self.app, "--claims", str(self.witness.path), "--hold-gil", str(self.gil))
        self.cluster.start(CLAIMANT, *words, *arguments)
        epoch = self.cluster.wait_ready(self.app)
        if spawned:
            self.cluster.kill_replica(self.app)
            self.cluster.wait_ready(self.app, after_epoch=epoch)

    def leave(self) -> None:
        """Leave the cluster as it was: without the application, and with nodes that nothing has happened to."""
        self.go_on()
        for host in self._hit:
            self.cluster.hosts[host].kill()
            self.cluster.restart(host)
        if self.app in self.cluster.view.apps:
            self.cluster.remove(self.app)

    def hit(self) -> str:
        """Return the host of the primary, of which nothing can be expected after what follows."""
        host = self.host
        self._hit.add(host)
        return host

    @property
    def host(self) -> str:
        """The host of the primary."""
        return self.cluster.primary(self.app)[0]

    @property
    def epoch(self) -> int:
        """The epoch of the assignment."""
        assignment = self.cluster.view.apps[self.app].assignment
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
        deadline = time.monotonic() + PATIENCE_S
        while not any(reign.epoch > after_epoch for reign in self.witness.reigns(self.app)):
            assert time.monotonic() < deadline, f"no later primary acts\n{self.cluster.describe()}"
            time.sleep(0.02)  # a file raises no event

    def still_acting(self, seconds: float) -> None:
        """Wait until the primary has acted for so long from now on."""
        reigning = self.witness.reigns(self.app)[-1]
        until = boottime() + seconds
        deadline = time.monotonic() + seconds + 30
        while self.witness.reigns(self.app)[-1].end < until:
            assert time.monotonic() < deadline, self.cluster.describe()
            time.sleep(0.05)  # a file raises no event
        assert self.witness.reigns(self.app)[-1].epoch == reigning.epoch, self.events()

    def events(self) -> list[Event]:
        """Return its history so far."""
        return [event for (app, _), event in list(self.cluster.events.items()) if app == self.app]

    def verdict(self) -> None:
        """No two at a time, and epochs only grew."""
        assert self.witness.violations() == []


@pytest.fixture(scope="module")
def hosts() -> Iterator[LocalCluster]:
    """Three hosts with a TTL of 2 s, on an etcd of their own: some tests stop it."""
    with LocalCluster(3) as cluster:
        yield cluster


@pytest.fixture
def stage(hosts: LocalCluster, tmp_path: Path) -> Iterator[Stage]:
    """The application of one test on them."""
    stage = Stage(hosts, tmp_path)
    yield stage
    stage.leave()


@pytest.fixture
def own_stage(tmp_path: Path) -> Iterator[Stage]:
    """The application on three hosts, and an etcd, that only one test uses."""
    with LocalCluster(3) as cluster:
        stage = Stage(cluster, tmp_path)
        yield stage
        stage.go_on()


def _kill_replica(stage: Stage) -> None:
    stage.cluster.kill_replica(stage.app)


def _stop_replica(stage: Stage) -> None:
    stage.stop(stage.cluster.primary(stage.app)[1])


def _hold_gil(stage: Stage) -> None:
    stage.gil.touch()


def _stop_watchdog(stage: Stage) -> None:
    stage.hit()
    stage.stop(stage.watchdog())


def _stop_guardian(stage: Stage) -> None:
    stage.hit()
    stage.stop(stage.guardian())
    os.kill(stage.watchdog(), signal.SIGSTOP)  # so that nobody renews either


def _stop_host(stage: Stage) -> None:
    stage.hit()
    for pid in (stage.watchdog(), stage.cluster.primary(stage.app)[1], stage.guardian()):
        stage.stop(pid)


def _kill_guardian(stage: Stage) -> None:
    stage.hit()
    os.kill(stage.guardian(), signal.SIGKILL)


def _kill_host(stage: Stage) -> None:
    stage.cluster.hosts[stage.hit()].kill()


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
    stage.cluster.wait_ready(stage.app, after_epoch=before, timeout=60)
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
    stage.cluster.wait_ready(stage.app, after_epoch=before, timeout=60)
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
    stage.still_acting(2 * stage.cluster.lease_ttl_s)
    stage.verdict()


@pytest.mark.parametrize("style", ["cold", "warm", "hot"])
def test_etcd_stopped_for_longer_than_the_ttl(own_stage: Stage, style: str) -> None:
    """The primary ends itself; with etcd another one begins."""
    stage = own_stage
    stage.start("--style", style)
    before, etcd = stage.epoch, _etcd(stage)
    primary = Path(f"/proc/{stage.cluster.primary(stage.app)[1]}")
    stage.stop(etcd)
    deadline = time.monotonic() + 30
    while primary.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)  # the observer of the cluster is as blind as the hosts
    stage.go_on()
    stage.wait_acting(before)
    stage.verdict()


def test_a_stall_of_everything_is_no_hang(tmp_path: Path) -> None:
    """WatchDog and application stopped together for longer than the hang timeout, and less than the TTL: nobody is blamed."""
    with LocalCluster(2, lease_ttl_s=10) as cluster:
        stage = Stage(cluster, tmp_path)
        stage.start("--style", "warm", "--hang-timeout", "1")
        pids = (stage.watchdog(), cluster.primary(stage.app)[1])
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(3)  # the fault itself
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        stage.still_acting(3)
        stage.verdict()
        assert not any(event.failure.kind is FailureKind.HANG for event in stage.events())


JUMPY = """
import pathlib, sys, time
real, by = time.time, pathlib.Path({by!r})
def jumpy():
    grpc = sys._getframe(1).f_globals["__name__"].startswith("grpc")  # it adds a timeout, and its C code takes it off again
    return real() + (0 if grpc else float(by.read_text()))
time.time = jumpy
"""


def test_the_wall_clock_jumps(tmp_path: Path) -> None:
    """A day ahead, then a day behind, in every process of every host: nobody notices, and a crash is dealt with as ever."""
    by, modules = tmp_path / "by", tmp_path / "modules"
    by.write_text("0")
    modules.mkdir()
    (modules / "sitecustomize.py").write_text(JUMPY.format(by=str(by)))
    names = ("host-a", "host-b", "host-c")
    with LocalCluster(names, prefixes=dict.fromkeys(names, ("env", f"PYTHONPATH={modules}"))) as cluster:
        stage = Stage(cluster, tmp_path)
        stage.start("--style", "warm", "--hang-timeout", "1")
        before = stage.epoch
        for jump_s in (DAY_S, -DAY_S):
            (tmp_path / "next").write_text(str(jump_s))
            (tmp_path / "next").rename(by)
            stage.still_acting(2 * cluster.lease_ttl_s)
        assert stage.epoch == before
        cluster.kill_replica(stage.app)
        stage.wait_acting(before)
        cluster.wait_ready(stage.app, after_epoch=before)
        stage.verdict()
        last = max(stage.events(), key=lambda event: event.failure.epoch)
        assert last.failure.wall < time.time() - DAY_S / 2  # they did see another time


def test_shown_hang(stage: Stage) -> None:
    """The history says what it was doing."""
    stage.start("--hang-timeout", "1")
    stage.gil.touch()

    def is_known(_: ClusterView) -> bool:
        return any(event.failure.kind is FailureKind.HANG for event in stage.events())

    stage.cluster.wait_until(is_known, "the hang in the history")
    event = next(event for event in stage.events() if event.failure.kind is FailureKind.HANG)
    assert "in step" in event.failure.evidence, event
