"""The planner in scenarios: restarts on the same host, failures counted in a window, and applications that are parked."""

from __future__ import annotations

import pytest

from etcdreplica.core.plan import Decision
from etcdreplica.model import AssignmentState, Failure, FailureKind
from etcdreplica.words import Role
from tests.unit.planner_world import APP, SETTINGS, World, crash, delay_s, placed

LONG_S = 60.0  # a body that ran for this long is no strike
WINDOW_S = 600.0


def fail_primary(world: World, kind: FailureKind = FailureKind.EXIT, uptime_s: float = LONG_S) -> Decision:
    """Have the primary fail after a good run, the manager deal with it and every copy be shown."""
    world.fail(world.primary() or "", kind, uptime_s=uptime_s)
    decision = world.run()
    if world.assignment().state is not AssignmentState.FAILED:
        world.show_all()
        decision = world.run()
    return decision


# --- the window --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FailureKind.EXIT, FailureKind.HANG, FailureKind.RETURNED, FailureKind.LOST])
def test_one_failure_too_many_parks(kind: FailureKind) -> None:
    """Up to `max_restarts` failures are made good, the next one vacates every seat and says why."""
    world = placed("a", "b", max_restarts=3, restart_window_s=WINDOW_S)
    for number in range(1, 4):
        fail_primary(world, kind)
        assert (world.assignment().state, world.assignment().recent) == (AssignmentState.ACTIVE, number)
        world.wait(100.0)
    host = world.primary()
    fail_primary(world, kind)
    parked = world.assignment()
    assert (parked.state, parked.seats, parked.successor, parked.degraded) == (AssignmentState.FAILED, (), None, False)
    assert parked.reason == f"failed 4 times within 600 s, at last: {kind} on {host}"
    assert not world.placements
    assert not world.app().failures
    assert world.events[max(world.events)].action == parked.reason


@pytest.mark.parametrize("kind", [FailureKind.HANDOVER, FailureKind.HOST, FailureKind.FENCED, FailureKind.REFUSED])
def test_what_is_not_the_programs_fault_parks_nothing(kind: FailureKind) -> None:
    """Hosts come and go without being counted."""
    world = placed("a", "b", "c", max_restarts=1)
    for _ in range(3):
        fail_primary(world, kind)
        world.wait(SETTINGS.refusal_retry_s)
    assert world.assignment().recent == 0
    assert world.assignment().state is AssignmentState.ACTIVE


def test_failing_backups_never_park_a_primary_that_works() -> None:
    """A host that cannot run a backup must not cost the service; its restarts only become slower."""
    world = placed("a", "b", max_restarts=2)
    for _ in range(10):
        world.fail("b", uptime_s=None)
        world.run()
        while not world.backups():
            world.now = max(world.now, world.run().wake_at or 0.0)
        world.show_all()
        world.run()
    assert (world.primary(), world.assignment().recent) == ("a", 0)


def test_failures_far_apart_do_not_add_up() -> None:
    """Only those within the window count."""
    world = placed("a", "b", max_restarts=2, restart_window_s=WINDOW_S)
    for _ in range(10):
        fail_primary(world)
        world.wait(WINDOW_S / 2)
    assert world.assignment().state is AssignmentState.ACTIVE
    assert world.assignment().recent == 2


def test_never_parked_with_zero() -> None:
    """`max_restarts=0` switches parking off."""
    world = placed("a", "b", max_restarts=0)
    for _ in range(30):
        fail_primary(world)
    assert world.assignment().state is AssignmentState.ACTIVE


def test_a_failure_is_counted_once_however_often_it_is_planned() -> None:
    """A plan that could not be written is made again from the same failure."""
    world = placed("a", "b", max_restarts=2)
    world.fail("a", uptime_s=LONG_S)
    for _ in range(5):
        plan = world.decide().plan
        assert plan is not None
        assert plan.assignment is not None
        assert plan.assignment.recent == 1
        world.wait(1.0)


def test_quiet_window_clears_the_count_with_one_write() -> None:
    """So that a manager elected much later does not count old failures again."""
    world = placed("a", "b", max_restarts=3, restart_window_s=WINDOW_S)
    fail_primary(world)
    decision = fail_primary(world)
    assert decision == Decision(wake_at=world.now + WINDOW_S)
    world.wait(WINDOW_S)
    before = world.view.revision
    assert world.run() == Decision()
    assert (world.assignment().recent, world.view.revision) == (0, before + 1)


def test_new_manager_goes_on_counting() -> None:
    """The count stands in the assignment; its failures count as having happened when the new manager first looked."""
    world = placed("a", "b", max_restarts=3, restart_window_s=WINDOW_S)
    for _ in range(3):
        fail_primary(world)
    world.wait(WINDOW_S - 1)
    world.restart_manager()
    assert world.run() == Decision(wake_at=world.now + WINDOW_S)
    fail_primary(world)
    assert world.assignment().state is AssignmentState.FAILED


def test_new_manager_forgets_after_a_quiet_window_of_its_own() -> None:
    """Rather too long than not at all, but not for ever."""
    world = placed("a", "b", max_restarts=3, restart_window_s=WINDOW_S)
    for _ in range(3):
        fail_primary(world)
    world.restart_manager()
    world.run()
    world.wait(WINDOW_S)
    fail_primary(world)
    assert (world.assignment().state, world.assignment().recent) == (AssignmentState.ACTIVE, 1)


def test_no_successor_when_the_next_failure_parks() -> None:
    """A body that begins only to be ended at once helps nobody; when the oldest failure is forgotten it may be named again."""
    world = placed("a", "b", max_restarts=2, restart_window_s=WINDOW_S)
    fail_primary(world)
    world.wait(10.0)
    assert world.assignment().successor is not None
    decision = fail_primary(world)
    assert world.assignment().successor is None
    assert decision.wake_at == world.now - 10.0 + WINDOW_S
    world.now = decision.wake_at
    world.run()
    assert world.assignment().successor is not None


# --- parked ------------------------------------------------------------------------------------------------------------


def parked(*hosts: str) -> World:
    """Return a world in which the application was parked after its second failure."""
    world = placed(*hosts, max_restarts=1)
    for _ in range(2):
        fail_primary(world)
    assert world.assignment().state is AssignmentState.FAILED
    return world


def test_parked_stays_parked() -> None:
    """Time, hosts, managers and late reports change nothing."""
    world = parked("a", "b")
    before = world.assignment()
    late = Failure("a", before.incarnation, before.epoch, Role.PRIMARY, FailureKind.EXIT, "late", "a")
    world.commit(("failures", (APP, str(before.incarnation)), late))
    world.join("c")
    world.restart_manager()
    world.wait(10 * WINDOW_S)
    assert world.run() == Decision()
    assert world.assignment() == before
    assert not world.app().failures


def test_resume_begins_anew() -> None:
    """The registration written again starts it with a larger epoch and nothing counted."""
    world = parked("a", "b")
    old = world.assignment()
    for host in ("a", "b"):
        world.commit(("replicas", (APP, host), None))
    world.resume()
    world.run()
    new = world.assignment()
    assert (new.state, new.recent, new.strikes, new.reason) == (AssignmentState.ACTIVE, 0, 0, "")
    assert new.epoch > old.epoch
    assert min(seat.incarnation for seat in new.seats) > old.incarnation
    fail_primary(world)
    assert world.assignment().recent == 1


def test_resume_waits_for_copies_that_still_end() -> None:
    """One primary (G1): what was there before must be gone."""
    world = parked("a", "b")
    assert world.app().replicas
    world.resume()
    assert world.run() == Decision()
    assert world.assignment().state is AssignmentState.FAILED


def test_parked_can_be_removed() -> None:
    """Nothing is left of it."""
    world = parked("a", "b")
    for host in ("a", "b"):
        world.commit(("replicas", (APP, host), None))
    world.unregister()
    world.run()
    assert APP not in world.view.apps


# --- restarts on the same host -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FailureKind.EXIT, FailureKind.HANG, FailureKind.RETURNED])
def test_primary_is_started_again_on_its_host(kind: FailureKind) -> None:
    """As often as the registration says, with new epochs and incarnations; then the backup takes over."""
    world = placed("a", "b", restarts_here=2)
    for here in (1, 2):
        old = world.assignment()
        assert old.successor is None
        failure = world.fail("a", kind, uptime_s=LONG_S)
        world.run()
        new = world.assignment()
        assert (world.primary(), world.backups(), new.here) == ("a", ["b"], here)
        assert (new.epoch, new.backups) == (old.epoch + 1, old.backups)
        assert world.seat("a").incarnation > old.incarnation
        assert world.events[failure.incarnation].action == "started again on a"
        world.show_all()
        world.run()
    assert world.assignment().successor == "b"
    world.fail("a", kind, uptime_s=LONG_S)
    world.run()
    assert (world.primary(), world.assignment().here) == ("b", 0)


@pytest.mark.parametrize("kind", [FailureKind.LOST, FailureKind.HOST, FailureKind.FENCED, FailureKind.HANDOVER])
def test_what_a_restart_would_not_mend_moves_on(kind: FailureKind) -> None:
    """A host that is gone, that does not start what it was given or that was asked to end it is not asked again."""
    world = placed("a", "b", "c", restarts_here=2)
    world.fail("a", kind, uptime_s=LONG_S)
    world.run()
    assert world.primary() == "b"


def test_host_that_began_anew_meanwhile_is_not_waited_for() -> None:
    """Only the stay in which it failed counts."""
    world = placed("a", "b", restarts_here=2)
    world.fail("a", uptime_s=LONG_S)
    world.lose("a")
    world.join("a")
    world.run()
    assert world.primary() == "b"


def test_back_off_counts_on_the_same_host_too() -> None:
    """After the free strikes the restart waits, nobody else takes the seat, and a new manager comes to the same place."""
    world = placed("a", "b", "c", restarts_here=5)
    strikes = SETTINGS.restart.free_strikes + 1
    crash(world, strikes)
    waiting = world.assignment()
    assert (waiting.state, waiting.primary, world.backups()) == (AssignmentState.BACKING_OFF, None, ["b"])
    assert waiting.again is not None
    world.restart_manager()
    world.run()
    world.wait(delay_s(strikes))
    world.run()
    assert (world.primary(), world.backups(), world.assignment().here) == ("a", ["b"], strikes)
    assert world.assignment().again is None


def test_full_host_has_room_for_its_own() -> None:
    """The seat that failed is the one that is filled again."""
    world = World()
    world.join("a", "b", capacity=1)
    world.register(degree=1, origin="a", restarts_here=1)
    world.run()
    world.show_all()
    world.fail("a", uptime_s=LONG_S)
    world.run()
    assert world.primary() == "a"


def test_restarts_here_count_anew_after_a_quiet_window() -> None:
    """What was long ago is forgotten."""
    world = placed("a", "b", restarts_here=1, restart_window_s=WINDOW_S)
    fail_primary(world)
    assert world.assignment().here == 1
    world.wait(WINDOW_S)
    world.run()
    assert world.assignment().here == 0
    fail_primary(world)
    assert world.primary() == "a"


def test_restarts_here_end_in_parking_too() -> None:
    """The window counts wherever it was started."""
    world = placed("a", "b", restarts_here=10, max_restarts=2)
    for _ in range(3):
        fail_primary(world)
    assert world.assignment().state is AssignmentState.FAILED
