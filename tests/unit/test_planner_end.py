"""The planner in scenarios: completion, removal, what cannot be read, what is late and what is done already."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from etcdreplica.core.plan import Decision
from etcdreplica.model import AssignmentState, Failure, FailureKind, Origin
from etcdreplica.words import MAX_DEGREE, Role, Style
from tests.unit.planner_world import APP, SETTINGS, World, crash, placed

# --- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["a", "b"])
def test_body_that_returned_completes_the_application(host: str) -> None:
    """A result on any copy is the result."""
    world = placed("a", "b", style=Style.HOT)
    epoch = world.assignment().epoch
    world.fail(host, FailureKind.DONE)
    world.run()
    assert world.assignment().state is AssignmentState.COMPLETED
    assert world.assignment().seats == ()
    assert world.assignment().epoch == epoch
    assert host in world.assignment().reason
    assert not world.app().failures
    assert not world.placements


def test_completed_application_stays_so() -> None:
    """New hosts, late reports and time change nothing."""
    world = placed("a", "b")
    world.fail("a", FailureKind.DONE)
    world.run()
    done = world.assignment()
    late = Failure("b", done.incarnation, done.epoch, Role.BACKUP, FailureKind.EXIT, "late", "b")
    world.commit(("failures", (APP, str(done.incarnation)), late))
    world.join("c")
    world.wait(1000.0)
    assert world.run() == Decision()
    assert world.assignment() == done
    assert not world.app().failures


def test_completion_of_a_replaced_copy_does_not_count() -> None:
    """A copy that was given up before has no result."""
    world = placed("a", "b", "c")
    seat = world.seat("b")
    world.fail("b")
    world.run()
    late = Failure("b", seat.incarnation, world.assignment().epoch, Role.BACKUP, FailureKind.DONE, "returned", "b")
    world.commit(("failures", (APP, str(seat.incarnation)), late))
    world.run()
    assert world.assignment().state is AssignmentState.ACTIVE


def test_registering_again_after_completion_starts_with_a_larger_epoch() -> None:
    """A new life has new epochs and incarnations and no strikes."""
    world = placed("a", "b")
    crash(world, SETTINGS.restart.free_strikes)
    world.show_all()
    world.fail(world.primary() or "", FailureKind.DONE)
    world.run()
    world.lose("a")
    world.lose("b")
    world.join("a", "b")
    old = world.assignment()
    world.register(degree=2, origin="b")
    world.run()
    assert world.primary() == "b"
    assert world.assignment().state is AssignmentState.ACTIVE
    assert world.assignment().epoch > old.epoch
    assert min(seat.incarnation for seat in world.assignment().seats) > old.incarnation
    assert world.assignment().strikes == 0


def test_registering_again_waits_for_the_copies_of_the_former_life() -> None:
    """One primary (G1): what was primary before may still be stopping, so nothing starts until it is gone."""
    world = placed("a", "b", style=Style.HOT)
    world.fail("b", FailureKind.DONE)  # the copy on a is still primary, and has up to stop_timeout to end
    world.run()
    assert "a" in world.app().replicas
    world.register(degree=2, style=Style.HOT, origin="b")
    world.run()
    assert world.assignment().primary is None
    world.commit(("replicas", (APP, "a"), None))
    world.run()
    assert world.primary() == "b"


def test_removal_waits_until_every_copy_is_gone() -> None:
    """First all seats are taken away, then, when no replica is left, everything is deleted."""
    world = placed("a", "b")
    world.unregister()
    world.run()
    assert world.assignment().state is AssignmentState.REMOVING
    assert world.assignment().seats == ()
    assert not world.placements
    world.commit(("replicas", (APP, "b"), None))
    assert world.run() == Decision()
    world.commit(("replicas", (APP, "a"), None))
    plan = world.step().plan
    assert plan is not None
    assert plan.assignment is None
    assert APP not in world.view.apps


def test_removal_of_what_failed_leaves_nothing() -> None:
    """Reports and history go with the application."""
    world = placed("a", "b")
    world.fail("b")
    world.run()
    world.show_all()
    world.fail("a", succession=False)
    world.unregister()
    world.run()
    for host in list(world.app().replicas):
        world.commit(("replicas", (APP, host), None))
    world.run()
    assert APP not in world.view.apps
    assert not world.view.seats.total()


def test_late_report_of_a_removed_application_is_deleted() -> None:
    """A WatchDog that was cut off may report when everything is gone."""
    world = World("a")
    world.commit(("failures", (APP, "7"), Failure("a", 7, 7, Role.PRIMARY, FailureKind.EXIT, "late", "a")))
    world.run()
    assert APP not in world.view.apps


def test_removed_application_is_not_brought_back_by_a_registration_in_between() -> None:
    """A removal that has begun is carried through first."""
    world = placed("a")
    world.unregister()
    world.run()
    world.register(degree=1)
    world.run()
    assert world.assignment().state is AssignmentState.REMOVING
    world.commit(("replicas", (APP, "a"), None))
    world.run()
    assert world.assignment().state is AssignmentState.ACTIVE


@pytest.mark.parametrize("degree", [1, 8, 30])
def test_next_life_uses_no_number_again(degree: int) -> None:
    """Epochs and incarnations are never reused, not even by an application that was removed before any copy was shown."""
    world = World(*(f"h{number}" for number in range(30)))
    world.register(degree=degree)
    world.run()
    old = world.assignment()
    world.unregister()
    world.run()
    assert APP not in world.view.apps
    world.register(degree=degree)
    world.run()
    assert world.assignment().epoch > old.epoch
    assert min(seat.incarnation for seat in world.assignment().seats) > max(seat.incarnation for seat in old.seats)


@pytest.mark.parametrize("again", [False, True], ids=["as it was", "registered anew"])
def test_another_etcd_that_was_accepted_uses_no_number_again(again: bool) -> None:
    """Whatever the etcd before it went on to use is below its floor."""
    world = World("a", "b", "c")
    world.register()
    world.run()
    floor = world.assignment().epoch + 1000
    world.commit(("origin", ("test",), Origin("new", "old", floor)))
    if again:
        world.unregister()
        world.run()
        world.register()
    world.run()
    before = world.assignment().seats
    for host in ("a", "b", "c"):
        world.lose(host)
    world.report_losses()
    world.join("a", "b", "c")
    world.run()
    assert world.assignment().epoch > floor
    assert not set(before) & set(world.assignment().seats)
    assert all(seat.incarnation > floor * MAX_DEGREE for seat in world.assignment().seats)


# --- what cannot be read, what is late, what is done already ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["registrations", "assignments", "failures"])
def test_corrupt_value_stops_decisions_until_it_is_mended(kind: str) -> None:
    """Nobody can tell what is right, so nothing is written."""
    world = placed("a", "b")
    names = (APP, "1") if kind == "failures" else (APP,)
    value = world.app().registration if kind == "registrations" else world.app().assignment
    world.view.apply(kind, names, None, world.view.revision, 0, error="not JSON")
    world.fail("a", succession=False)
    assert world.decide() == Decision()
    world.commit((kind, names, None if kind == "failures" else value))
    world.run()
    assert world.primary() == "b"


def test_stale_failure_is_only_consumed() -> None:
    """A report of a seat that was dealt with before changes no assignment."""
    world = placed("a", "b", "c")
    seat = world.seat("b")
    failure = world.fail("b")
    world.run()
    world.show_all()
    world.run()
    before = world.assignment()
    world.commit(("failures", (APP, str(seat.incarnation)), failure))
    plan = world.step().plan
    assert plan is not None
    assert plan.consumed == (seat.incarnation,)
    assert plan.assignment == before
    assert world.run().plan is None


def test_stale_failure_does_not_rewrite_history() -> None:
    """The event that tells how the fail-over went stays as it is when a late second report comes in."""
    world = placed("a", "b", "c")
    seat = world.seat("a")
    world.lose("a")
    world.report_losses()
    world.run()
    told = world.events[seat.incarnation]
    assert told.action == "b promoted"
    late = Failure("a", seat.incarnation, told.failure.epoch, Role.PRIMARY, FailureKind.FENCED, "cut off", "a")
    world.commit(("failures", (APP, str(seat.incarnation)), late))
    world.run()
    assert world.events[seat.incarnation] == told


def lose_reported(world: World) -> None:
    """Lose the primary's host and report it."""
    world.lose("a")
    world.report_losses()


SCENARIOS: dict[str, Callable[[World], object]] = {
    "nothing": lambda world: None,
    "crash": lambda world: world.fail("a"),
    "crash without succession": lambda world: world.fail("a", succession=False),
    "backup crash": lambda world: world.fail("b"),
    "hand-over": lambda world: world.fail("a", FailureKind.HANDOVER),
    "refusal": lambda world: world.fail("b", FailureKind.REFUSED),
    "host lost": lose_reported,
    "host lost, not reported": lambda world: world.lose("a"),
    "crash loop": lambda world: crash(world, SETTINGS.restart.free_strikes + 1),
    "done": lambda world: world.fail("a", FailureKind.DONE),
    "removal": lambda world: world.unregister(),
    "registered again": lambda world: world.register(degree=3),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("restarted", [False, True], ids=["same manager", "new manager"])
def test_deciding_again_yields_no_plan(scenario: str, restarted: bool) -> None:
    """After its plans are written the planner is content, whoever asks."""
    world = placed("a", "b", "c")
    SCENARIOS[scenario](world)
    world.run()
    if restarted:
        world.restart_manager()
    assert world.decide().plan is None


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_asking_twice_before_writing_gives_the_same_plan(scenario: str) -> None:
    """A plan that was lost, as by a failed write, is made again."""
    world = placed("a", "b", "c")
    SCENARIOS[scenario](world)
    assert world.decide().plan == world.decide().plan
