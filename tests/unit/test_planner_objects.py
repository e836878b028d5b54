"""The planner and replicated objects: only a copy that is in sync may lead, and who leads is written for one in-sync set."""

from __future__ import annotations

from typing import Any

import pytest

from etcdreplica.core.plan import Plan
from etcdreplica.daemon.replica_manager import ReplicaManager
from etcdreplica.model import AssignmentState, Checkpoint, FailureKind, InSync, Member, ReplicaState
from etcdreplica.store import Delete, Key, Kind, Unchanged
from etcdreplica.store.keys import Keyspace
from etcdreplica.words import Style
from tests.unit.planner_world import APP, World, placed


def in_sync(world: World, *hosts: str) -> None:
    """Have the primary write that the copies on these hosts, as they are seated now, are in sync."""
    seats = tuple(Member(host, world.seat(host).incarnation) for host in hosts)
    primary = world.assignment().primary
    assert primary is not None
    world.commit(("insync", (APP,), InSync(world.assignment().epoch, primary.incarnation, seats)))
    world.run()


def ledger(*members: str, hosts: str = "abc", degree: int = 3, **more: Any) -> World:
    """Return a world with an object that runs on the first of the hosts; these copies are in sync."""
    world = placed(*hosts, degree=degree, style=Style.HOT, object=True, **more)
    in_sync(world, *members)
    return world


def lose(world: World, *hosts: str) -> None:
    """Lose hosts, and have that reported."""
    for host in hosts:
        world.lose(host)
    world.report_losses()
    world.run()


# --- who takes over ----------------------------------------------------------------------------------------------------


def test_member_is_the_successor() -> None:
    """And comes first among the backups; a copy that is not in sync is never called."""
    world = ledger("a", "c")
    assert world.assignment().successor == "c"
    assert world.backups() == ["c", "b"]
    in_sync(world, "a", "b", "c")
    assert world.assignment().successor == "c"
    in_sync(world, "a")
    assert world.assignment().successor is None


def test_before_the_first_record_every_copy_is_as_good() -> None:
    """There is no state yet that could be lost."""
    world = placed("a", "b", "c", degree=3, object=True)
    assert world.assignment().successor == "b"


def test_member_is_the_next_primary() -> None:
    """Also when nobody was called, as after the loss of a host."""
    world = ledger("a", "c")
    lose(world, "a")
    assert world.primary() == "c"


def test_checkpoint_is_no_state_of_an_object() -> None:
    """A host that holds one is not preferred to a member."""
    world = ledger("a", "c")
    world.commit(("checkpoints", (APP,), Checkpoint(world.assignment().epoch, 1, "", 5, ("a", "b"))))
    world.run()
    assert world.assignment().successor == "c"


def test_new_incarnation_on_the_host_of_a_member_is_no_member() -> None:
    """What it held went with its process."""
    world = ledger("a", "b", restarts_here=0)
    world.fail("b", uptime_s=100.0)
    world.run()
    world.show_all()
    world.run()
    assert sorted(world.backups()) == ["b", "c"]
    assert world.assignment().successor is None


@pytest.mark.parametrize("state", [ReplicaState.STARTING, ReplicaState.STOPPING])
def test_member_that_cannot_take_over_is_no_successor(state: ReplicaState) -> None:
    """It leads all the same if the primary fails, because nobody else may."""
    world = ledger("a", "c")
    world.show("c", state=state)
    world.run()
    assert world.assignment().successor is None
    lose(world, "a")
    assert world.primary() == "c"


# --- who is waited for -------------------------------------------------------------------------------------------------


def test_member_whose_host_is_down_is_waited_for_until_that_is_reported() -> None:
    """Its host may be back, and the state with it; that it is lost has to be said by the SuperWatchDog."""
    world = ledger("a", "b", hosts="abcd")
    world.lose("b")
    world.fail("a", uptime_s=100.0, succession=False)
    world.run()
    assert world.primary() is None
    assert world.assignment().state is AssignmentState.PENDING
    assert world.assignment().reason.startswith("waiting for b: ")
    assert world.decide().plan is None
    world.report_losses()
    world.run()
    assert world.primary() in {"a", "c", "d"}
    assert world.assignment().state is AssignmentState.ACTIVE


def test_when_all_members_are_dead_any_host_leads() -> None:
    """The state is gone, and the application begins anew."""
    world = ledger("a", "b")
    lose(world, "a", "b")
    assert world.primary() == "c"


def test_members_that_fail_together() -> None:
    """Whoever has failed is not waited for, in whatever order that is seen."""
    for first, second in (("a", "b"), ("b", "a")):
        world = ledger("a", "b")
        world.fail(first, uptime_s=100.0, succession=False)
        world.fail(second, uptime_s=100.0, succession=False)
        world.run()
        assert world.primary() == "c"


def test_record_of_an_earlier_application_holds_nobody_up() -> None:
    """Its epoch is below that at which this one was born."""
    world = placed("a", "b", "c", degree=3, object=True)
    old = InSync(world.assignment().born - 1, 1, (Member("x", 1),))
    world.commit(("insync", (APP,), old))
    world.run()
    assert world.assignment().successor == "b"


def test_corrupt_record_leaves_the_application_alone() -> None:
    """Nobody can tell who may lead until it is mended."""
    world = ledger("a", "b")
    world.view.apply("insync", (APP,), None, world.view.revision + 1, 1, error="not JSON")
    world.fail("a", succession=False)
    assert world.decide().plan is None


# --- restarts here -----------------------------------------------------------------------------------------------------


def test_primary_is_not_restarted_where_it_failed_if_a_member_can_take_over() -> None:
    """Its memory is gone, and the state with it; so a successor is named as well."""
    world = ledger("a", "c", restarts_here=3)
    assert world.assignment().successor == "c"
    world.fail("a", uptime_s=100.0, succession=False)
    world.run()
    assert world.primary() == "c"


@pytest.mark.parametrize("durable", [False, True])
def test_only_member_may_be_restarted_where_it_failed(durable: bool) -> None:
    """Elsewhere the state is no better, and for a durable object it is only there."""
    world = ledger("a", restarts_here=3, durable=durable)
    before = world.seat("a")
    world.fail("a", uptime_s=100.0)
    world.run()
    assert world.primary() == "a"
    assert world.seat("a") != before


# --- durable objects ---------------------------------------------------------------------------------------------------


def test_durable_object_is_led_where_its_log_is() -> None:
    """When no copy is left, a host that had a member leads, and takes the log from its disk."""
    world = ledger("a", "b", hosts="abcd", durable=True)
    lose(world, "a", "b")
    assert world.primary() is None
    assert world.assignment().state is AssignmentState.PENDING
    assert world.assignment().reason.startswith("waiting for a or b: ")
    world.join("b")
    world.run()
    assert world.primary() == "b"
    assert len(world.assignment().seats) == 3


def test_durable_object_is_led_by_the_backup_on_such_a_host() -> None:
    """A new copy there has the log as well."""
    world = ledger("a", "b", durable=True)
    world.fail("b", uptime_s=100.0)
    world.run()
    world.show_all()
    world.run()
    lose(world, "a")
    assert world.primary() == "b"


def test_durable_object_without_a_record_is_led_anywhere() -> None:
    """It has no log yet."""
    world = placed("a", "b", "c", degree=2, object=True, durable=True)
    lose(world, "a", "b")
    assert world.primary() == "c"


# --- what is written ---------------------------------------------------------------------------------------------------


def transaction(world: World, plan: Plan) -> Any:
    """Return the transaction that a manager would write."""
    manager: Any = object.__new__(ReplicaManager)
    manager._leadership = type("Leadership", (), {"condition": Unchanged(Key(Kind.LEADERS, ("manager", "1")), 1)})
    manager._view = world.view
    manager._cluster_pause = Key(Kind.PAUSES, ("cluster", Keyspace("test").cluster))
    return manager._transaction(world.app(), plan)


@pytest.mark.parametrize("is_object", [False, True])
def test_plan_is_for_one_in_sync_set(is_object: bool) -> None:
    """A primary that changes the set meanwhile makes the plan void."""
    world = placed("a", "b", degree=2, object=is_object)
    if is_object:
        in_sync(world, "a", "b")
    condition = Unchanged(Key(Kind.IN_SYNC, (APP,)), world.app().in_sync_revision)
    assert (condition in transaction(world, Plan(world.assignment())).when) is is_object


def test_removal_deletes_the_record() -> None:
    """In the same transaction as the assignment."""
    world = ledger("a", "b")
    assert Delete(Key(Kind.IN_SYNC, (APP,))) in transaction(world, Plan(None)).then
    assert Delete(Key(Kind.IN_SYNC, (APP,))) not in transaction(world, Plan(world.assignment())).then


def test_handover_goes_to_a_member() -> None:
    """A planned change of primary is no exception."""
    world = ledger("a", "c")
    world.fail("a", FailureKind.HANDOVER)
    world.run()
    assert world.primary() == "c"
