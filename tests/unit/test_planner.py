"""The planner in scenarios: where replicas are placed, and who follows a primary that fails."""

from __future__ import annotations

import pytest

from etcdreplica.core.plan import HISTORY_KEPT, Decision
from etcdreplica.model import AssignmentState, Failure, FailureKind, ReplicaState, Succession
from etcdreplica.words import Role
from tests.unit.planner_world import APP, SETTINGS, World, placed

# --- first placement ---------------------------------------------------------------------------------------------------


def test_first_primary_is_the_host_that_registered() -> None:
    """The process that the user started becomes the first primary."""
    world = World("a", "b", "c")
    world.register(degree=2, origin="c")
    world.run()
    assert world.primary() == "c"
    assert world.backups() == ["a"]
    assert world.assignment().state is AssignmentState.ACTIVE


def test_first_epoch_lies_above_the_cluster_revision() -> None:
    """Epochs begin at the revision of etcd, so they lie above those of an earlier application of the same name."""
    world = World("a")
    world.register(degree=1)
    before = world.view.revision
    world.run()
    assert world.assignment().epoch == before + 1
    assert world.assignment().seats[0].incarnation > before


def test_nothing_is_written_without_hosts_but_that_it_waits() -> None:
    """An application that no host can run is pending and says so."""
    world = World()
    world.register(degree=2)
    decision = world.run()
    assert world.assignment().state is AssignmentState.PENDING
    assert world.assignment().degraded
    assert "0 of 2 copies" in world.assignment().reason
    assert decision == Decision()


def test_least_loaded_host_is_chosen() -> None:
    """A host that already has replicas comes after one that has none."""
    world = World("a", "b", "c")
    for number, origin in enumerate(("a", "b")):
        world.register(f"other-{number}", degree=1, origin=origin)
        world.run(f"other-{number}")
    world.register(degree=1)
    world.run()
    assert world.primary() == "c"


def test_load_is_measured_against_capacity() -> None:
    """Two seats of a hundred are less than one seat of two."""
    world = World()
    world.join("big", capacity=100)
    world.join("small", capacity=2)
    for number, origin in enumerate(("small", "big", "big")):
        world.register(f"other-{number}", degree=1, origin=origin)
        world.run(f"other-{number}")
    world.register(degree=1)
    world.run()
    assert world.primary() == "big"


def test_many_plans_spread_although_none_is_written_yet() -> None:
    """Seats that are only expected count as load already."""
    world = World("a", "b")
    for name in ("x", "y"):
        world.register(name, degree=1)
        plan = world.decide(name).plan
        assert plan is not None
        world.view.expect(world.app(name), plan.assignment)
    assert world.view.seats == {"a": 1, "b": 1}


def test_replicas_are_spread_over_zones() -> None:
    """A host in another zone is preferred to a less loaded one in the same."""
    world = World()
    world.join("a", "b", zone="x")
    world.join("c", zone="y")
    world.register("other", degree=1, origin="c")
    world.run("other")
    world.register(degree=3, origin="a")
    world.run()
    assert world.backups() == ["c", "b"]


def test_labels_restrict_the_hosts() -> None:
    """Every label of the registration must be on the host, with its value."""
    world = World("plain")
    world.join("gpu", disk="ssd", gpu="yes")
    world.join("half", disk="ssd")
    world.join("wrong", disk="ssd", gpu="no")
    world.register(degree=2, labels={"disk": "ssd", "gpu": "yes"})
    world.run()
    assert (world.primary(), world.backups()) == ("gpu", [])
    assert world.assignment().degraded


def test_allowed_hosts_restrict_the_hosts() -> None:
    """Only hosts that the registration names are used."""
    world = World("a", "b", "c")
    world.register(degree=2, hosts=("b", "c"))
    world.run()
    assert {seat.host for seat in world.assignment().seats} == {"b", "c"}


def test_full_host_gets_nothing() -> None:
    """A host whose capacity is taken is left out."""
    world = World()
    world.join("a", capacity=1)
    world.register("other", degree=1)
    world.run("other")
    world.register(degree=1)
    world.run()
    assert world.assignment().state is AssignmentState.PENDING
    world.join("b")
    world.run()
    assert world.primary() == "b"


def test_failed_replica_frees_its_own_place_on_a_full_host() -> None:
    """The only host, with room for one replica, gets the application again after a crash."""
    world = World()
    world.join("a", capacity=1)
    world.register(degree=1)
    world.run()
    world.show_all()
    world.fail("a")
    world.run()
    assert world.primary() == "a"


def test_two_replicas_never_share_a_host() -> None:
    """A degree above the number of hosts leaves the application degraded, not doubled up."""
    world = placed("a", "b", degree=3)
    assert sorted(seat.host for seat in world.assignment().seats) == ["a", "b"]
    assert world.assignment().degraded
    assert "2 of 3 copies" in world.assignment().reason


def test_degraded_application_is_healed_when_a_host_appears() -> None:
    """The missing copy is placed as soon as there is where to."""
    world = placed("a", "b", degree=3)
    world.join("c")
    world.run()
    assert world.backups() == ["b", "c"]
    assert not world.assignment().degraded
    assert world.assignment().reason == ""


def test_lower_degree_gives_the_last_backups_back() -> None:
    """What is above the degree is given back; the primary stays."""
    world = placed("a", "b", "c", degree=3)
    epoch = world.assignment().epoch
    world.register(degree=2)
    world.run()
    assert (world.primary(), world.backups()) == ("a", ["b"])
    assert world.assignment().epoch == epoch


# --- fail-over ---------------------------------------------------------------------------------------------------------


def test_first_backup_is_promoted_and_the_degree_restored() -> None:
    """The backups follow in order, and a spare host takes the free seat."""
    world = placed("a", "b", "c", "d", degree=3)
    epoch = world.assignment().epoch
    world.fail("a", succession=False)
    world.run()
    assert (world.primary(), world.backups()) == ("b", ["c", "d"])
    assert world.assignment().epoch == epoch + 1


def test_ready_backup_is_preferred() -> None:
    """A backup that still starts is passed over for one that can take over at once."""
    world = World("a", "b", "c")
    world.register(degree=3, origin="a")
    world.run()
    world.show("a", "c")
    world.show("b", state=ReplicaState.STARTING)
    world.fail("a", succession=False)
    world.run()
    assert world.primary() == "c"
    assert world.backups()[0] == "b"


def test_starting_backup_is_better_than_none() -> None:
    """With no backup ready, the first that is there takes over."""
    world = World("a", "b", "c")
    world.register(degree=2, origin="a")
    world.run()
    world.show("b", state=ReplicaState.STARTING)
    world.fail("a", succession=False)
    world.run()
    assert world.primary() == "b"


def test_without_a_backup_a_new_seat_is_given() -> None:
    """An application of one copy is started anew, with a new incarnation, on the host that did not fail."""
    world = placed("a", "b", degree=1)
    old = world.assignment()
    world.fail("a")
    world.run()
    assert world.primary() == "b"
    assert world.assignment().epoch == old.epoch + 1
    assert world.seat("b").incarnation > old.incarnation


def test_failed_backup_is_replaced_without_a_new_epoch() -> None:
    """The primary does not notice the failure of a backup."""
    world = placed("a", "b", "c")
    epoch = world.assignment().epoch
    world.fail("b")
    world.run()
    assert (world.primary(), world.backups(), world.assignment().epoch) == ("a", ["c"], epoch)


def test_host_that_just_failed_is_chosen_last() -> None:
    """For a while a free host is preferred, even when it has more to do."""
    world = placed("a", "b", "c")
    world.register("other", degree=1, origin="c")
    world.run("other")
    world.fail("b", uptime_s=60.0)
    world.run()
    assert world.backups() == ["c"]


def test_failed_host_is_as_good_as_others_after_a_while() -> None:
    """Later only the load counts again."""
    world = placed("a", "b", degree=2)
    world.fail("b", uptime_s=60.0)
    world.run()  # back on b: there is no other host
    world.show_all()
    world.wait(SETTINGS.failed_host_s)
    world.register("other", degree=1, origin="c")
    world.join("c")
    world.run("other")
    world.fail("b", FailureKind.HANDOVER)
    world.run()
    assert world.backups() == ["b"]


def test_event_tells_who_was_promoted() -> None:
    """Each failure becomes one event in the history."""
    world = placed("a", "b")
    failure = world.fail("a", succession=False)
    plan = world.step().plan
    assert plan is not None
    (event,) = plan.events
    assert (event.failure, event.primary, event.action) == (failure, "b", "b promoted")
    assert plan.consumed == (failure.incarnation,)
    assert not world.app().failures


def test_history_is_bounded() -> None:
    """Old events are deleted when new ones are written."""
    world = placed("a", "b", "c")
    for _ in range(HISTORY_KEPT + 5):
        world.fail(world.backups()[0], uptime_s=60.0)
        world.run()
        world.show_all()
    assert len(world.app().history) == HISTORY_KEPT


# --- succession --------------------------------------------------------------------------------------------------------


def test_successor_is_the_first_backup_that_can_take_over() -> None:
    """A backup that still starts is not named."""
    world = World("a", "b", "c")
    world.register(degree=3, origin="a")
    world.run()
    assert world.assignment().successor is None
    world.show("a", "c")
    world.show("b", state=ReplicaState.STARTING)
    world.run()
    assert world.assignment().successor == "c"
    world.show("b")
    world.run()
    assert world.assignment().successor == "b"


@pytest.mark.parametrize("state", [ReplicaState.STANDBY, ReplicaState.READY, ReplicaState.RUNNING])
def test_backups_of_every_style_can_succeed(state: ReplicaState) -> None:
    """A cold backup stands by, a warm one is ready, a hot one runs: all can take over."""
    world = World("a", "b")
    world.register(degree=2, origin="a")
    world.run()
    world.show("a")
    world.show("b", state=state)
    world.run()
    assert world.assignment().successor == "b"


@pytest.mark.parametrize("state", [ReplicaState.STARTING, ReplicaState.STOPPING])
def test_backup_in_another_state_is_no_successor(state: ReplicaState) -> None:
    """What starts or ends cannot take over."""
    world = World("a", "b")
    world.register(degree=2, origin="a")
    world.run()
    world.show("a")
    world.show("b", state=state)
    world.run()
    assert world.assignment().successor is None


def test_succession_is_folded_into_the_next_epoch() -> None:
    """What the WatchDogs have done already is written down, not done again."""
    world = placed("a", "b", "c")
    epoch = world.assignment().epoch
    world.fail("a")
    assert world.app().successions
    plan = world.step().plan
    assert plan is not None
    assert [event.action for event in plan.events] == ["b promoted"]
    assert (world.primary(), world.assignment().epoch) == ("b", epoch + 1)
    assert world.backups() == ["c"]
    assert not world.app().successions
    assert world.run().plan is None


def test_successor_that_died_too_costs_another_epoch() -> None:
    """The epoch that the successor had may have been seen by somebody, so the next primary gets a larger one."""
    world = placed("a", "b", "c", degree=3)
    epoch, died = world.assignment().epoch, world.seat("b").incarnation
    world.fail("a")
    failure = Failure("b", died, epoch + 1, Role.PRIMARY, FailureKind.EXIT, "boom", "b", 60.0)
    world.commit(("replicas", (APP, "b"), None), ("failures", (APP, str(died)), failure))
    world.run()
    assert (world.primary(), world.assignment().epoch) == ("c", epoch + 2)


def test_succession_of_another_death_means_nothing() -> None:
    """A succession counts only when it names the very primary that is assigned."""
    world = placed("a", "b")
    epoch, primary = world.assignment().epoch, world.assignment().primary
    assert primary is not None
    world.commit(("successions", ("b", APP), Succession(epoch + 1, primary.incarnation - 1)))
    world.run()
    assert (world.primary(), world.assignment().epoch) == ("a", epoch)


def test_no_successor_when_the_next_failure_would_have_to_wait() -> None:
    """A back-off must not be passed by."""
    world = placed("a", "b", "c")
    for _ in range(SETTINGS.restart.free_strikes):
        assert world.assignment().successor is not None
        world.fail(world.primary() or "")
        world.run()
        world.show_all()
        world.run()
    assert world.assignment().strikes == SETTINGS.restart.free_strikes
    assert world.assignment().successor is None
