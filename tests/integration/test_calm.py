"""Calm: faults that nobody may notice, with real processes and signals, and the same outside witness of who acted when."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from etcdreplica.core.timing import preset
from etcdreplica.model import FailureKind
from etcdreplica.testing import LocalCluster
from tests.integration.stage import NO_CHECKPOINTS, Stage, WallClock, urgent

pytestmark = pytest.mark.integration
DAY_S = 86400.0
TTL_S = preset("safe").lease_ttl_s
ALL_LEASES_S = TTL_S + 1.5  # by then every lease has ended that nobody has renewed, and what follows has happened


@pytest.fixture(scope="module")
def hosts() -> Iterator[LocalCluster]:
    """Three hosts with the default TTL, on an etcd of their own: some tests stop it."""
    with LocalCluster(3, lease_ttl_s=TTL_S, node_arguments=NO_CHECKPOINTS) as cluster:
        yield cluster


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
    _briefly(stage.etcd())


def _briefly(pid: int) -> None:
    with urgent():  # else a busy machine would make it long
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.6)  # the fault itself: shorter than what is left of any lease
        os.kill(pid, signal.SIGCONT)


UNNOTICED: dict[str, Callable[[Stage], None]] = {
    "WatchDog killed": _kill_watchdog,
    "WatchDog replaced": _replace_watchdog,
    "manager killed": _kill_manager,
    "manager stopped": _stop_manager,
    "WatchDog stopped for less than the TTL": _pause_watchdog,
    "etcd stopped for less than the TTL": _pause_etcd,
}


@pytest.fixture
def other(hosts: LocalCluster, tmp_path: Path) -> Iterator[Stage]:
    """A second application on the same hosts."""
    directory = tmp_path / "other"
    directory.mkdir()
    stage = Stage(hosts, directory)
    yield stage
    stage.leave()


@pytest.mark.parametrize("fault", UNNOTICED)
def test_faults_that_nobody_notices(stage: Stage, other: Stage, fault: str) -> None:
    """The same copies go on as primaries, past the end of every lease they had: one a guardian started, one by hand."""
    stage.start("--style", "warm")
    other.start("--style", "warm", spawned=False, host=stage.host)
    assert other.host == stage.host
    UNNOTICED[fault](stage)
    stage.still_acting(ALL_LEASES_S)
    other.still_acting(0)
    stage.verdict()
    other.verdict()


def test_a_stall_of_everything_is_no_hang(tmp_path: Path) -> None:
    """WatchDog and application stopped together for longer than the hang timeout, and less than the TTL: nobody is blamed."""
    with LocalCluster(2, lease_ttl_s=10, node_arguments=NO_CHECKPOINTS) as cluster:
        stage = Stage(cluster, tmp_path)
        stage.start("--style", "warm", "--hang-timeout", "1")
        pids = (stage.watchdog(), cluster.primary(stage.app)[1])
        with urgent():
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(3)  # the fault itself
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        stage.still_acting(3)
        stage.verdict()
        assert not any(event.failure.kind is FailureKind.HANG for event in stage.events())


def test_the_wall_clock_jumps(tmp_path: Path) -> None:
    """A day ahead, then a day behind, in every process of every host: nobody notices, and a crash is dealt with as ever."""
    clock = WallClock(tmp_path)
    names = ("host-a", "host-b", "host-c")
    prefixes = dict.fromkeys(names, clock.prefix)
    with LocalCluster(names, prefixes=prefixes, lease_ttl_s=TTL_S) as cluster:
        stage = Stage(cluster, tmp_path)
        stage.start("--style", "warm", "--hang-timeout", "1")
        before = stage.epoch
        for jump_s in (DAY_S, -DAY_S):
            clock.jump(jump_s)
            stage.still_acting(ALL_LEASES_S)
        assert stage.epoch == before
        cluster.kill_replica(stage.app)
        stage.wait_acting(before)
        cluster.wait_ready(stage.app, after_epoch=before)
        stage.verdict()
        last = max(stage.events(), key=lambda event: event.failure.epoch)
        assert last.failure.wall < time.time() - DAY_S / 2  # they did see another time
