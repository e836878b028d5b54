"""One primary, always: every fault with real processes and signals, and an outside witness of who acted when."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from etcdreplica.model import FailureKind
from tests.integration.stage import PATIENCE_S, Stage

pytestmark = pytest.mark.integration


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


def is_taken_over(stage: Stage, fault: str) -> None:
    """After the fault another copy acts, and none beside it, also when what was stopped goes on; then the degree is whole."""
    before = stage.epoch
    TAKEN_OVER[fault](stage)
    stage.wait_acting(before)
    stage.go_on()
    stage.cluster.wait_ready(stage.app, after_epoch=before, timeout=60)
    stage.still_acting(0.5)
    stage.verdict()


@pytest.mark.parametrize("fault", TAKEN_OVER)
@pytest.mark.parametrize("style", ["cold", "warm", "hot"])
def test_faults_that_are_taken_over(stage: Stage, style: str, fault: str) -> None:
    """Another copy is primary afterwards, and never before the first one has ended; also when what was stopped goes on.

    The warm one has children in sessions of their own, which act with the primary, and end with it.
    """
    stage.start("--style", style, "--hang-timeout", "1", "--children", "3" if style == "warm" else "0")
    is_taken_over(stage, fault)
    if fault == "GIL held":
        event = next(event for event in stage.events() if event.failure.kind is FailureKind.HANG)
        assert "in step" in event.failure.evidence, event


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


@pytest.mark.parametrize("style", ["cold", "warm", "hot"])
def test_etcd_stopped_for_longer_than_the_ttl(stage: Stage, style: str) -> None:
    """The primary ends itself; with etcd another one begins."""
    stage.start("--style", style)
    before, etcd = stage.epoch, stage.etcd()
    primary = Path(f"/proc/{stage.cluster.primary(stage.app)[1]}")
    stage.stop(etcd)
    deadline = time.monotonic() + PATIENCE_S
    while primary.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)  # the observer of the cluster is as blind as the hosts
    stage.go_on()
    stage.wait_acting(before)
    stage.cluster.wait_ready(stage.app, after_epoch=before, timeout=60)
    stage.verdict()
    stage.cluster.wait_until(lambda view: set(stage.cluster.hosts) <= set(view.hosts), "every host to be back")
