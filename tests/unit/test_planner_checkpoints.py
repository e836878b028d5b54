"""The planner and checkpoints: who holds one comes first, and no application gets those of an earlier one of its name."""

from __future__ import annotations

import pytest

from etcdreplica.core.plan import Plan
from etcdreplica.daemon.replica_manager import ReplicaManager
from etcdreplica.model import AssignmentState, Checkpoint, FailureKind
from etcdreplica.store import Delete, Key, Kind
from etcdreplica.words import Style
from tests.unit.planner_world import APP, World, placed


def record(world: World, *holders: str) -> None:
    """Have a CheckpointServer write which hosts hold what is durable."""
    world.commit(("checkpoints", (APP,), Checkpoint(world.assignment().epoch, 1, "", 5, holders)))


# --- who holds it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", [Style.WARM, Style.COLD])
def test_holder_is_the_successor(style: Style) -> None:
    """The backup that is called at once should be one that need not fetch anything."""
    world = placed("a", "b", "c", degree=3, style=style)
    assert world.assignment().successor == "b"
    record(world, "a", "c")
    world.run()
    assert world.assignment().successor == "c"
    record(world, "a", "b", "c")
    world.run()
    assert world.assignment().successor == "b"


def test_holder_that_cannot_take_over_is_no_successor() -> None:
    """What matters first is that it can be promoted."""
    world = placed("a", "b", "c", degree=3)
    world.commit(("replicas", (APP, "c"), None))
    record(world, "a", "c")
    world.run()
    assert world.assignment().successor == "b"


def test_holder_is_the_next_primary() -> None:
    """Also when nobody was called, as after the loss of a host."""
    world = placed("a", "b", "c", degree=3)
    record(world, "a", "c")
    world.lose("a")
    world.report_losses()
    world.run()
    assert world.primary() == "c"


def test_without_a_record_the_order_of_the_backups_counts() -> None:
    """As for an application that stores nothing."""
    world = placed("a", "b", "c", degree=3)
    world.lose("a")
    world.report_losses()
    world.run()
    assert world.primary() == "b"


def test_holder_gets_the_new_seat() -> None:
    """A host that has it already costs no transfer, however busy it is."""
    world = placed("a", "b", "c", "d", degree=2)
    world.register("other", degree=1, origin="d")
    world.run("other")
    record(world, "a", "d")
    world.lose("b")
    world.report_losses()
    world.run()
    assert world.backups() == ["d"]


def test_holder_where_it_has_just_failed_gets_no_new_seat() -> None:
    """A program that cannot run there is no better with its state."""
    world = placed("a", "b", "c", degree=2)
    record(world, "a", "b")
    world.fail("b", uptime_s=100.0)
    world.run()
    assert world.backups() == ["c"]


def test_last_holder_is_the_next_primary_without_a_seat() -> None:
    """When all seats are lost, a host that was given up but holds the state is chosen again."""
    world = placed("a", "b", "c", "d", degree=1)
    record(world, "a", "d")
    world.lose("a")
    world.report_losses()
    world.run()
    assert world.primary() == "d"


# --- born --------------------------------------------------------------------------------------------------------------


def test_born_lies_below_every_epoch() -> None:
    """And above those of an earlier application of this name; each placement has it."""
    world = placed("a", "b", degree=2)
    born = world.assignment().born
    assert 1000 < born < world.assignment().epoch
    for host in ("a", "b"):
        placement, _ = world.placements[host, APP]
        assert placement.born == born
    assert [world.placements[host, APP][0].peers for host in ("a", "b")] == [("b",), ("a",)]


def test_born_stays_through_failures() -> None:
    """Whoever is primary, it is the same application."""
    world = placed("a", "b", "c", degree=2)
    born = world.assignment().born
    for _ in range(3):
        world.fail(world.primary() or "", uptime_s=100.0)
        world.run()
        world.wait(60.0)
        world.run()
        world.show_all()
        world.run()
    assert world.assignment().born == born


def test_born_stays_when_an_application_is_resumed() -> None:
    """One that was parked goes on with its state."""
    world = placed("a", "b", degree=2, max_restarts=1)
    born = world.assignment().born
    while world.assignment().state is not AssignmentState.FAILED:
        world.show_all()
        world.run()
        world.fail(world.primary() or "", uptime_s=100.0)
        world.run()
        world.wait(5.0)
        world.run()
    for host in list(world.app().replicas):
        world.commit(("replicas", (APP, host), None))
    world.wait(1000.0)
    world.resume()
    world.run()
    assert world.assignment().state is AssignmentState.ACTIVE
    assert world.assignment().born == born


def test_born_stays_when_a_complete_application_is_registered_again() -> None:
    """Its record still stands, so what it has stored is still its own."""
    world = placed("a", "b", degree=2)
    born, epoch = world.assignment().born, world.assignment().epoch
    record(world, "a", "b")
    world.fail("a", FailureKind.DONE)
    world.run()
    world.commit(("replicas", (APP, "b"), None))
    assert world.assignment().state is AssignmentState.COMPLETED
    world.register(degree=2, origin="b")
    world.run()
    assert world.assignment().state is AssignmentState.ACTIVE
    assert world.assignment().born == born
    assert world.assignment().epoch > epoch


def test_born_is_new_after_a_removal() -> None:
    """Another application of the same name begins with nothing."""
    world = placed("a", "b", degree=2)
    before = world.assignment()
    world.unregister()
    world.run()
    for host in ("a", "b"):
        world.commit(("replicas", (APP, host), None))
    world.run()
    assert APP not in world.view.apps
    world.register(degree=2, origin="a")
    world.run()
    assert world.assignment().born >= before.epoch
    assert world.assignment().born > before.born


# --- the record --------------------------------------------------------------------------------------------------------


def test_removal_deletes_the_record() -> None:
    """In the same transaction as the assignment; while an application lives, no plan does."""
    world = placed("a", "b", degree=2)
    record(world, "a", "b")
    key = Key(Kind.CHECKPOINTS, (APP,))
    operations = ReplicaManager._operations
    manager = object.__new__(ReplicaManager)
    app, old = world.app(), world.assignment()
    assert Delete(key) in list(operations(manager, app, Plan(None), old, None))
    assert Delete(key) not in list(operations(manager, app, Plan(old), old, old))


def test_record_alone_keeps_no_application() -> None:
    """A view of one that has gone is forgotten once its record is deleted, and there is nothing to plan before."""
    world = World("a")
    world.commit(("checkpoints", ("gone",), Checkpoint(5, 1, "", 5, ("a",))))
    if "gone" in world.view.apps:
        assert world.decide("gone").plan is None
    world.commit(("checkpoints", ("gone",), None))
    assert "gone" not in world.view.apps
