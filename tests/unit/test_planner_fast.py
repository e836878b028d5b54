"""A host that its peers cannot reach although its lease lives: which seats are lost, and where the next ones go."""

from __future__ import annotations

from attrs import evolve

from etcdreplica.core.brake import lost_seats
from etcdreplica.core.view import Loss
from etcdreplica.words import Failover, Role
from tests.unit.planner_world import APP, World, placed


def make_fast(world: World) -> World:
    """Let the application under test be of failover="fast"."""
    registration = world.app().registration
    assert registration is not None
    world.commit(("registrations", (APP,), evolve(registration, failover=Failover.FAST)))
    world.run()
    return world


def fast(*hosts: str, degree: int = 2) -> World:
    """Return a world in which an application of failover="fast" runs."""
    return make_fast(placed(*hosts, degree=degree))


def fall_silent(world: World, host: str) -> None:
    """Let the peers confirm the loss of a host."""
    seats = world.view.fast_seats(host)
    world.view.losses[host] = Loss(world.view.hosts[host].session, f"{host} is silent", seats)


def test_only_fast_seats_are_lost() -> None:
    """The seat of an application of failover="safe" on the same host waits for the lease."""
    world = placed("a", "b", "c")
    fall_silent(world, "a")
    assert list(lost_seats(world.app(), world.view)) == []
    make_fast(world)
    fall_silent(world, "a")
    assert [(seat.host, role) for seat, role in lost_seats(world.app(), world.view)] == [("a", Role.PRIMARY)]


def test_only_the_stay_that_is_lost() -> None:
    """A later session of the host is another one."""
    world = fast("a", "b", "c")
    fall_silent(world, "b")
    world.lose("b")
    world.join("b")
    assert not world.view.is_silent("b")


def test_backup_is_promoted_and_the_degree_restored_elsewhere() -> None:
    """The primary goes to the backup, the new backup to the third host, though the lost one is up."""
    world = fast("a", "b", "c")
    epoch = world.assignment().epoch
    other = world.backups()[0]
    fall_silent(world, "a")
    world.report_losses()
    world.run()
    assert world.assignment().epoch == epoch + 1
    assert world.primary() == other
    assert world.backups() == [({"b", "c"} - {other}).pop()]


def test_no_backup_goes_to_a_silent_host_until_it_answers() -> None:
    """It stays degraded, and is whole as soon as the host answers again."""
    world = fast("a", "b")
    fall_silent(world, "a")
    world.report_losses()
    world.run()
    assert (world.primary(), world.backups(), world.assignment().degraded) == ("b", [], True)
    del world.view.losses["a"]
    world.run()
    assert (world.primary(), world.backups(), world.assignment().degraded) == ("b", ["a"], False)


def test_primary_goes_to_a_silent_host_as_the_last_resort() -> None:
    """Where no other host is allowed it is tried there, once: that seat is not lost by the same loss."""
    world = fast("a", degree=1)
    epoch = world.assignment().epoch
    fall_silent(world, "a")
    world.report_losses()
    world.run()
    assert (world.primary(), world.assignment().epoch) == ("a", epoch + 1)
    assert list(lost_seats(world.app(), world.view)) == []


def test_new_primary_avoids_a_silent_host() -> None:
    """Also for an application that was not lost there, and although it is the less loaded one."""
    world = placed("a", "b", "c", degree=1)
    fall_silent(world, "b")
    world.lose("a")
    world.report_losses()
    world.run()
    assert world.primary() == "c"


def test_backup_on_a_silent_host_is_promoted_last() -> None:
    """A ready backup elsewhere goes first."""
    world = placed("a", "b", "c", degree=3)
    first, second = world.backups()
    fall_silent(world, first)
    world.lose("a")
    world.report_losses()
    world.run()
    assert world.primary() == second


def test_snapshot_keeps_losses() -> None:
    """What the peers found does not come from etcd, so a snapshot of it says nothing about them."""
    world = fast("a", "b")
    fall_silent(world, "a")
    world.view.clear()
    assert set(world.view.losses) == {"a"}


def test_fast_seats_are_those_of_the_present_stay() -> None:
    """A void seat is the lease's business; an application without seats has none."""
    world = fast("a", "b", "c")
    assert set(world.view.fast_hosts) == {seat.host for seat in world.assignment().seats}
    backup = world.backups()[0]
    world.lose(backup)
    assert set(world.view.fast_hosts) == {"a"}
    world.join(backup)
    assert set(world.view.fast_hosts) == {"a"}
