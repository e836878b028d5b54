"""The planner under a pause: nothing moves, and afterwards everything that happened is dealt with."""

from __future__ import annotations

import pytest

from etcdreplica.core.plan import Decision
from etcdreplica.model import Assignment, AssignmentState, FailureKind
from tests.unit.planner_world import APP, World, placed

pytestmark = pytest.mark.parametrize("cluster", [False, True], ids=["application", "cluster"])


def paused(*hosts: str, cluster: bool, degree: int = 2) -> World:
    """Return a world in which the application runs, and is paused."""
    world = placed(*hosts, degree=degree)
    world.pause(cluster=cluster)
    world.run()
    assert world.assignment().paused
    return world


def still(assignment: Assignment) -> tuple[object, ...]:
    """Return what a pause must not change."""
    return assignment.epoch, assignment.incarnation, assignment.seats, assignment.strikes, assignment.recent


def test_pause_takes_the_successor_back(cluster: bool) -> None:
    """One write: the WatchDogs must not call anybody; nothing else changes."""
    world = placed("a", "b")
    before = world.assignment()
    assert before.successor == "b"
    world.pause(cluster=cluster)
    plan = world.step().plan
    assert plan is not None
    assert (world.assignment().paused, world.assignment().successor) == (True, None)
    assert still(world.assignment()) == still(before)
    assert world.run() == Decision()
    world.unpause(cluster=cluster)
    world.run()
    assert world.assignment() == before


@pytest.mark.parametrize("kind", [FailureKind.EXIT, FailureKind.HANG, FailureKind.HANDOVER, FailureKind.DONE])
def test_a_failure_waits(cluster: bool, kind: FailureKind) -> None:
    """Neither promoted nor counted nor consumed, for however long."""
    world = paused("a", "b", "c", cluster=cluster)
    before = world.assignment()
    world.fail("a", kind)
    world.wait(1000.0)
    assert world.run() == Decision()
    assert world.assignment() == before
    assert world.app().failures


def test_afterwards_what_failed_is_dealt_with(cluster: bool) -> None:
    """The fail-over happens, with its event."""
    world = paused("a", "b", "c", cluster=cluster)
    failure = world.fail("a")
    world.run()
    world.unpause(cluster=cluster)
    world.run()
    assert (world.primary(), world.backups(), world.assignment().paused) == ("b", ["c"], False)
    assert world.assignment().strikes == 1
    assert world.events[failure.incarnation].action == "b promoted"


def test_lost_hosts_wait(cluster: bool) -> None:
    """Reported they are, but nothing moves."""
    world = paused("a", "b", "c", cluster=cluster)
    world.lose("a")
    world.report_losses()
    assert world.run() == Decision()
    assert world.primary() == "a"
    world.unpause(cluster=cluster)
    world.run()
    assert world.primary() == "b"


def test_seats_that_failed_are_not_written_again(cluster: bool) -> None:
    """When the pause is taken after a failure, the placement of what failed stays as old as it is."""
    world = placed("a", "b")
    world.fail("b")
    world.pause(cluster=cluster)
    _, revision = world.placements["b", APP]
    world.run()
    assert world.assignment().paused
    assert world.placements["b", APP][1] == revision
    assert world.placements["a", APP][1] > revision


def test_succession_that_has_happened_is_taken(cluster: bool) -> None:
    """The successor serves already: that is written down, with its event and strike, and no more."""
    world = placed("a", "b", "c")
    epoch = world.assignment().epoch
    failure = world.fail("a")
    world.pause(cluster=cluster)
    world.run()
    assert (world.primary(), world.backups(), world.assignment().epoch) == ("b", [], epoch + 1)
    assert (world.assignment().paused, world.assignment().successor, world.assignment().strikes) == (True, None, 1)
    assert world.events[failure.incarnation].action == "b promoted"
    assert not world.app().failures
    world.unpause(cluster=cluster)
    world.run()
    assert world.backups() == ["c"]


def test_registration_waits(cluster: bool) -> None:
    """Nothing is written for an application that is not placed yet."""
    world = World("a", "b")
    world.register(origin="a")
    world.pause(cluster=cluster)
    assert world.run() == Decision()
    assert world.app().assignment is None
    world.unpause(cluster=cluster)
    world.run()
    assert world.primary() == "a"


def test_removal_does_not_wait(cluster: bool) -> None:
    """What a user asks for is done, and an application's pause goes with it."""
    world = paused("a", "b", cluster=cluster)
    world.commit(("registrations", (APP,), None))  # whoever deletes only this leaves the pause to the manager
    world.run()
    for host in ("a", "b"):
        world.commit(("replicas", (APP, host), None))
    world.run()
    assert APP not in world.view.apps
    assert (world.view.pause is not None) == cluster


def test_completed_and_parked_take_it_too(cluster: bool) -> None:
    """So that whoever waits for all to be paused does not wait for ever; and they stay what they are."""
    world = placed("a", "b")
    world.fail("a", FailureKind.DONE)
    world.run()
    world.pause(cluster=cluster)
    world.run()
    assert (world.assignment().state, world.assignment().paused) == (AssignmentState.COMPLETED, True)
    world.unpause(cluster=cluster)
    world.run()
    assert (world.assignment().state, world.assignment().paused) == (AssignmentState.COMPLETED, False)


def test_new_manager_holds_still_too(cluster: bool) -> None:
    """The pause stands in etcd."""
    world = paused("a", "b", cluster=cluster)
    world.restart_manager()
    world.fail("a")
    assert world.run() == Decision()


def test_pause_of_nothing_is_cleared_away(cluster: bool) -> None:
    """An application's pause that outlived its registration is deleted; the cluster's concerns nobody."""
    world = World("a")
    world.pause(cluster=cluster)
    if not cluster:
        world.run()
    assert not world.view.apps
