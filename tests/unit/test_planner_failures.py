"""The planner in scenarios: repeated failures, hosts that refuse and hosts that are lost."""

from __future__ import annotations

import pytest

from etcdreplica.core.brake import lost_seats
from etcdreplica.core.plan import Decision
from etcdreplica.model import AssignmentState, FailureKind
from etcdreplica.words import Role
from tests.unit.planner_world import APP, SETTINGS, World, crash, delay_s, placed

# --- repeated failures -------------------------------------------------------------------------------------------------

LOST_AFTER_S = SETTINGS.start_grace_s + 10.0  # and the stop timeout of the registration


def test_first_quick_failures_cost_no_time() -> None:
    """An ordinary crash is made good at once, even twice."""
    world = placed("a", "b", degree=1)
    crash(world, SETTINGS.restart.free_strikes)
    assert world.primary() is not None
    assert world.assignment().strikes == SETTINGS.restart.free_strikes


def test_quick_failures_back_off() -> None:
    """After the free strikes nothing is started before `wake_at`."""
    world = placed("a", "b", degree=1)
    strikes = SETTINGS.restart.free_strikes + 1
    decision = crash(world, strikes)
    assert decision.wake_at == world.now + delay_s(strikes)
    assert world.assignment().state is AssignmentState.BACKING_OFF
    assert world.primary() is None
    assert f"failed {strikes} times" in world.assignment().reason
    assert f"{FailureKind.EXIT} on" in world.assignment().reason
    assert world.run() == Decision(wake_at=decision.wake_at)
    world.wait(delay_s(strikes))
    world.run()
    assert world.primary() is not None
    assert world.assignment().state is AssignmentState.ACTIVE


def test_delays_grow_up_to_the_cap() -> None:
    """Each strike waits longer than the one before, until the cap."""
    world = placed("a", degree=1)
    crash(world, SETTINGS.restart.free_strikes)
    waits = []
    for _ in range(8):
        decision = crash(world, 1)
        assert decision.wake_at is not None
        waits.append(decision.wake_at - world.now)
        world.now = decision.wake_at
        world.run()
    assert waits[0] < waits[1] < waits[2] < waits[3]
    assert max(waits) <= SETTINGS.restart.cap_s
    assert min(waits[4:]) >= 0.75 * SETTINGS.restart.cap_s


def test_backups_stay_while_the_primary_waits() -> None:
    """A back-off takes no seat from a backup, and the backup is promoted after it."""
    world = placed("a", "b", degree=2)
    crash(world, SETTINGS.restart.free_strikes)
    world.show_all()
    world.run()
    (waiting,) = world.backups()
    world.fail(world.primary() or "")
    decision = world.step()
    assert (world.primary(), world.backups()) == (None, [waiting])
    assert decision.wake_at is not None
    world.now = decision.wake_at
    world.run()
    assert world.primary() == waiting


def test_new_manager_waits_again() -> None:
    """A manager that knows nothing of the back-off waits once more, rather too long than not at all."""
    world = placed("a", degree=1)
    strikes = SETTINGS.restart.free_strikes + 1
    crash(world, strikes)
    reason = world.assignment().reason
    world.wait(0.9 * delay_s(strikes))
    world.restart_manager()
    assert world.run() == Decision(wake_at=world.now + delay_s(strikes))
    assert world.assignment().reason == reason
    world.wait(delay_s(strikes))
    world.run()
    assert world.primary() == "a"


def test_settled_primary_has_a_successor_again() -> None:
    """A primary that has settled may have a successor again: its next failure would be a first one."""
    world = placed("a", "b")
    crash(world, SETTINGS.restart.free_strikes)
    world.show_all()
    decision = world.run()
    assert decision.wake_at == world.now + SETTINGS.restart.settle_s
    world.wait(SETTINGS.restart.settle_s)
    world.run()
    assert world.assignment().successor is not None


def test_failure_after_a_long_run_is_a_first_strike() -> None:
    """A body that had settled begins the count anew when it fails."""
    world = placed("a", "b")
    crash(world, SETTINGS.restart.free_strikes)
    world.fail(world.primary() or "", uptime_s=60.0)
    world.run()
    assert world.assignment().strikes == 1
    assert world.primary() is not None


@pytest.mark.parametrize("kind", [FailureKind.HANDOVER, FailureKind.HOST, FailureKind.FENCED])
def test_what_is_not_the_programs_fault_is_no_strike(kind: FailureKind) -> None:
    """A hand-over, a lost host and a lost lease move the application and cost it nothing."""
    world = placed("a", "b", "c")
    for _ in range(SETTINGS.restart.free_strikes + 2):
        before = world.primary()
        world.fail(before or "", kind)
        world.run()
        world.show_all()
        world.run()
        assert world.primary() not in (None, before)
    assert world.assignment().strikes == 0


@pytest.mark.parametrize("kind", [FailureKind.EXIT, FailureKind.HANG, FailureKind.RETURNED, FailureKind.LOST])
def test_what_is_the_programs_fault_is_a_strike(kind: FailureKind) -> None:
    """A crash, a hang, a body that returned against its keep, and a replica that never came count."""
    world = placed("a", "b", "c")
    world.fail("a", kind)
    world.run()
    assert world.assignment().strikes == 1


def test_backup_that_keeps_failing_waits_too_but_the_primary_stays() -> None:
    """A crash loop of a backup is slowed down without touching the primary."""
    world = placed("a", "b")
    epoch = world.assignment().epoch
    decision = Decision()
    for _ in range(SETTINGS.restart.free_strikes + 1):
        world.fail("b", uptime_s=None)
        decision = world.step()
    assert (world.primary(), world.backups()) == ("a", [])
    assert decision.wake_at == world.now + delay_s(SETTINGS.restart.free_strikes + 1)
    assert world.assignment().state is AssignmentState.ACTIVE
    assert world.assignment().degraded
    world.now = decision.wake_at
    world.run()
    assert (world.primary(), world.backups(), world.assignment().epoch) == ("a", ["b"], epoch)


# --- hosts that refuse, hosts that are lost ----------------------------------------------------------------------------


def test_refusal_moves_the_application_on_and_is_kept() -> None:
    """A host that cannot run the program is passed over without a strike, and people can read why."""
    world = World("a", "b")
    world.register(degree=1, origin="a")
    world.run()
    failure = world.fail("a", FailureKind.REFUSED)
    world.run()
    assert world.primary() == "b"
    assert world.assignment().refusals == {"a": failure.reason}
    assert world.assignment().strikes == 0


def test_refusing_host_is_asked_again_after_a_while() -> None:
    """The missing file may have been put there meanwhile."""
    world = placed("a", "b")
    failure = world.fail("b", FailureKind.REFUSED)
    decision = world.run()
    assert world.backups() == []
    assert f"b: {failure.reason}" in world.assignment().reason
    assert decision == Decision(wake_at=world.now + SETTINGS.refusal_retry_s)
    world.wait(SETTINGS.refusal_retry_s)
    world.run()
    assert world.backups() == ["b"]
    assert world.assignment().refusals == {}
    assert world.assignment().reason == ""


def test_new_manager_waits_before_it_asks_a_refusing_host() -> None:
    """When it refused is not written down, so a new manager counts from when it saw it."""
    world = placed("a", "b")
    world.fail("b", FailureKind.REFUSED)
    world.run()
    world.wait(SETTINGS.refusal_retry_s - 1)
    world.restart_manager()
    assert world.run() == Decision(wake_at=world.now + SETTINGS.refusal_retry_s)


def test_every_host_refuses() -> None:
    """With no host left the application is pending and names every error."""
    world = World("a", "b")
    world.register(degree=1)
    for _ in range(2):
        world.run()
        world.fail(world.primary() or "", FailureKind.REFUSED)
    decision = world.run()
    assert world.assignment().state is AssignmentState.PENDING
    assert set(world.assignment().refusals) == {"a", "b"}
    assert decision.wake_at is not None


def test_replica_that_is_never_shown_is_lost() -> None:
    """A host that is up but does not start what it was given is given up after a grace."""
    world = World("a", "b")
    world.register(degree=1, origin="a")
    decision = world.run()
    assert decision == Decision(wake_at=world.now + LOST_AFTER_S)
    epoch = world.assignment().epoch
    world.wait(LOST_AFTER_S - 0.1)
    assert world.run().plan is None
    world.wait(0.1)
    plan = world.step().plan
    assert plan is not None
    assert [event.failure.kind for event in plan.events] == [FailureKind.LOST]
    assert (world.primary(), world.assignment().epoch) == ("b", epoch + 1)


def test_replica_that_is_shown_in_time_is_not_lost() -> None:
    """Once shown, the grace begins anew when the replica vanishes."""
    world = placed("a", "b", degree=1)
    world.wait(10 * LOST_AFTER_S)
    assert world.run() == Decision()
    world.commit(("replicas", (APP, "a"), None))
    assert world.run() == Decision(wake_at=world.now + LOST_AFTER_S)


def test_replica_of_another_incarnation_does_not_count() -> None:
    """What the host ran before is not what it was given now."""
    world = placed("a", "b", degree=1)
    old = world.app().replicas["a"]
    world.lose("b")
    world.fail("a")
    world.run()
    world.commit(("replicas", (APP, "a"), old))
    assert world.run().wake_at == world.now + LOST_AFTER_S


def test_seats_of_a_lost_host_are_found() -> None:
    """The SuperWatchDog reports each seat of a host that is down, once, with its role."""
    world = placed("a", "b")
    world.lose("a")
    (lost,) = lost_seats(world.app(), world.view)
    assert lost == (world.seat("a"), Role.PRIMARY)
    world.lose("b")
    assert {role for _, role in lost_seats(world.app(), world.view)} == {Role.PRIMARY, Role.BACKUP}
    world.report_losses()
    assert not list(lost_seats(world.app(), world.view))


def test_host_that_began_anew_has_lost_its_seats() -> None:
    """A WatchDog that restarted runs nothing of its former session."""
    world = placed("a", "b")
    world.lose("a")
    world.join("a")
    assert [seat for seat, _ in lost_seats(world.app(), world.view)] == [world.seat("a")]


def test_manager_waits_for_the_superwatchdog() -> None:
    """The loss of a host is not the manager's to declare."""
    world = placed("a", "b")
    epoch = world.assignment().epoch
    world.lose("a")
    world.wait(10 * LOST_AFTER_S)
    world.run()
    assert (world.primary(), world.assignment().epoch) == ("a", epoch)
    world.report_losses()
    world.run()
    assert (world.primary(), world.assignment().epoch) == ("b", epoch + 1)


def test_backup_on_a_lost_host_is_not_promoted() -> None:
    """With two hosts gone, the third takes over, whichever loss was reported first."""
    world = placed("a", "b", "c", degree=3)
    world.lose("b")
    world.fail("a", succession=False)
    world.run()
    assert world.primary() == "c"


def test_all_hosts_gone_and_back() -> None:
    """When everything is lost the application is pending, and comes back with a larger epoch."""
    world = placed("a", "b")
    epoch = world.assignment().epoch
    world.lose("a")
    world.lose("b")
    world.report_losses()
    world.run()
    assert world.assignment().state is AssignmentState.PENDING
    world.join("b")
    world.run()
    assert world.primary() == "b"
    assert world.assignment().epoch > epoch
