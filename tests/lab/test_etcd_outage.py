"""What each length and kind of outage of an etcd of three means: the rows of docs/etcd-outage.md."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from etcdreplica.model import FailureKind
from tests.integration.conftest import wait_dead
from tests.integration.stage import Stage, urgent
from tests.lab.world import MEMBERS, TTL_S, World

pytestmark = [pytest.mark.lab, pytest.mark.skipif(os.environ.get("LAB") == "short", reason="make lab has it")]
SHORT_S = TTL_S / 3  # what is surely left of a lease, with a margin for the machine
ALL_LEASES_S = TTL_S + 1
_numbers = itertools.count()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, rooted: None) -> Iterator[World]:
    """Five hosts and three members."""
    with World(tmp_path_factory.mktemp("outage")) as made:
        yield made


@pytest.fixture
def stage(world: World, tmp_path: Path) -> Iterator[Stage]:
    """An application that claims to be primary."""
    stage = Stage(world.cluster, tmp_path)
    stage.app = f"outage-{next(_numbers)}"
    stage.start("--style", "warm")
    yield stage
    world.calm_down()
    world.etcd.start()
    world.cluster.catch_up()
    world.cluster.remove(stage.app)
    stage.verdict()


def still_primary(stage: Stage, epoch: int) -> None:
    """The same copy is primary after every lease has ended, or was renewed."""
    stage.still_acting(ALL_LEASES_S)
    stage.cluster.catch_up()
    assert stage.epoch == epoch


def test_leader_lost(world: World, stage: Stage) -> None:
    """Another member leads; nobody notices."""
    epoch, leader = stage.epoch, world.etcd.leader()
    world.etcd.kill(leader)
    still_primary(stage, epoch)


def test_member_lost(world: World, stage: Stage) -> None:
    """Whoever used it uses another one."""
    epoch, leader = stage.epoch, world.etcd.leader()
    world.etcd.kill(next(member for member in MEMBERS if member != leader))
    still_primary(stage, epoch)


def test_silent_leader(world: World, stage: Stage) -> None:
    """Its cable is out: whoever used it finds out by its silence, and there is time left."""
    epoch, leader = stage.epoch, world.etcd.leader()
    world.network.cut(leader)
    still_primary(stage, epoch)


def test_member_cut_off_from_the_others(world: World, stage: Stage) -> None:
    """It can be reached, and cannot answer; whoever used it finds that out in time. When it is back it deposes nobody."""
    epoch, leader = stage.epoch, world.etcd.leader()
    world.network.split((leader,), [member for member in MEMBERS if member != leader])
    still_primary(stage, epoch)
    world.network.unblock()
    still_primary(stage, epoch)


def test_away_for_less_than_is_left_of_leases(world: World, stage: Stage) -> None:
    """Nobody notices."""
    epoch = stage.epoch
    with urgent():
        for member in MEMBERS:
            world.etcd.signal(member, signal.SIGSTOP)
        time.sleep(SHORT_S)  # the fault itself
        for member in MEMBERS:
            world.etcd.signal(member, signal.SIGCONT)
    still_primary(stage, epoch)


def test_primary_that_dies_meanwhile(world: World, stage: Stage) -> None:
    """Nobody can be called before etcd is back; then the successor is, by the report that was waiting."""
    epoch = stage.epoch
    _, pid = world.cluster.primary(stage.app)
    with urgent():
        for member in MEMBERS[1:]:
            world.etcd.signal(member, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        wait_dead(pid)
        for member in MEMBERS[1:]:
            world.etcd.signal(member, signal.SIGCONT)
    stage.wait_acting(epoch)
    world.cluster.wait_ready(stage.app, after_epoch=epoch)
    assert FailureKind.EXIT in {event.failure.kind for event in stage.events()}


def test_no_quorum_for_longer_than_leases(world: World, stage: Stage) -> None:
    """The primary ends by its deadline, and with etcd all comes back."""
    epoch = stage.epoch
    _, pid = world.cluster.primary(stage.app)
    world.etcd.kill(*MEMBERS[1:])
    wait_dead(pid)
    assert max(reign.epoch for reign in stage.witness.reigns()) == epoch
    world.etcd.start()
    stage.wait_acting(epoch)
    world.cluster.wait_ready(stage.app, after_epoch=epoch)


def test_failsafe(world: World, tmp_path: Path) -> None:
    """With failsafe the same copy is primary throughout an outage that all leases end in, and a fail-over works afterwards."""
    stage = Stage(world.cluster, tmp_path)
    stage.start("--style", "warm", "--failsafe")
    stage.wait_backed()
    epoch = stage.epoch
    try:
        world.etcd.kill(*MEMBERS[1:])
        stage.still_acting(3 * TTL_S)
    finally:
        world.etcd.start()
    still_primary(stage, epoch)
    stage.cluster.kill_replica(stage.app)
    stage.wait_acting(epoch)
    world.cluster.wait_ready(stage.app, after_epoch=epoch)
    world.cluster.remove(stage.app)
    stage.verdict()


def test_replaced_by_an_empty_one(world: World, stage: Stage) -> None:
    """Three new members with the same names and addresses: refused, and the primary ends; with the old disks all comes back."""
    epoch = stage.epoch
    _, pid = world.cluster.primary(stage.app)
    world.etcd.kill(*MEMBERS)
    kept = world.etcd.put_aside()
    world.etcd.start()
    wait_dead(pid)
    deadline = time.monotonic() + 60
    while not all("refused: this is not the etcd" in host.log_path.read_text() for host in world.cluster.hosts.values()):
        assert time.monotonic() < deadline, world.cluster.describe()
        time.sleep(0.05)  # a file raises no event
    assert max(reign.epoch for reign in stage.witness.reigns()) == epoch
    world.etcd.kill(*MEMBERS)
    world.etcd.bring_back(kept)
    world.etcd.start()
    stage.wait_acting(epoch)
    world.cluster.wait_ready(stage.app, after_epoch=epoch)
