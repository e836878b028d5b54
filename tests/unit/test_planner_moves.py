"""The planner and what people ask for: planned changes of primary, drained hosts, stopped applications, another style."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve

from etcdreplica.core.moves import obstacle, remains
from etcdreplica.model import (
    Ask,
    AssignmentState,
    Checkpoint,
    FailureKind,
    InSync,
    Member,
    Placement,
    Replica,
    ReplicaState,
)
from etcdreplica.words import Style
from tests.unit.planner_world import APP, World, placed


def placement(world: World, host: str) -> Placement:
    """Return what a host was told last."""
    return world.placements[host, APP][0]


def hand_over(world: World) -> None:
    """Have the primary end as it was asked to, and everybody show what follows."""
    host = world.primary() or ""
    assert placement(world, host).leaving is not None
    world.fail(host, FailureKind.HANDOVER)
    world.run()
    world.show_all()
    world.run()


def why(world: World, ask: Ask = Ask.SWITCHOVER, to: str | None = None) -> str:
    """Say what is in the way of a change of primary."""
    return obstacle(world.app(), world.view, ask, to)


# --- a change of primary -----------------------------------------------------------------------------------------------


def test_switchover() -> None:
    """One write names the heir, asks the primary, and takes the request away, so that it cannot happen twice."""
    world = placed("a", "b", "c", degree=3)
    before = world.assignment()
    world.ask(Ask.SWITCHOVER, "c")
    assert world.step().plan is not None
    after = world.assignment()
    assert (after.primary, after.epoch, after.successor) == (before.primary, before.epoch, "c")
    told = placement(world, "a")
    assert (told.successor, told.leaving) == ("c", after.leaving)
    assert told.leaving is not None
    assert (told.leaving.reason, told.leaving.at_once) == ("switchover to c, asked for by ann@desk", False)
    assert placement(world, "c").leaving is None
    assert world.app().request is None
    assert world.run().plan is None
    hand_over(world)
    assert (world.primary(), world.backups(), world.assignment().epoch) == ("c", ["b", "a"], before.epoch + 1)
    assert (world.assignment().leaving, world.assignment().strikes) == (None, 0)
    assert next(iter(world.events.values())).action == "c promoted"


def test_old_host_has_its_seat_back() -> None:
    """Although another one is emptier."""
    world = placed("a", "b", "c")
    for number in range(3):
        world.register(f"other-{number}", degree=1, hosts=["a"])
        world.run(f"other-{number}")
    world.ask(Ask.SWITCHOVER)
    world.run()
    hand_over(world)
    assert (world.primary(), world.backups()) == ("b", ["a"])


def test_failover_is_for_what_does_not_end() -> None:
    """It kills at once, also a primary that was asked in order before."""
    world = placed("a", "b")
    world.ask(Ask.SWITCHOVER)
    world.run()
    assert "ending already" in why(world)
    assert why(world, Ask.FAILOVER) == ""
    world.ask(Ask.FAILOVER)
    world.run()
    told = placement(world, "a").leaving
    assert told is not None
    assert told.at_once
    hand_over(world)
    assert world.primary() == "b"


def test_request_that_came_too_late() -> None:
    """When another one is primary already, it is taken away and nobody is asked."""
    world = placed("a", "b", "c")
    world.ask(Ask.SWITCHOVER)
    world.fail("a")
    world.run()
    assert world.primary() == "b"
    assert world.app().request is None
    world.show_all()
    world.run()
    assert world.assignment().leaving is None


@pytest.mark.parametrize("taken_back", [False, True])
def test_request_waits_for_an_heir(taken_back: bool) -> None:
    """It is carried out once somebody can follow, unless it has ended by then."""
    world = placed("a", "b")
    world.show("b", state=ReplicaState.STARTING)
    world.run()
    assert "the copy on b is starting" in why(world)
    world.ask(Ask.SWITCHOVER, "b")
    assert world.run().plan is None
    assert world.app().request is not None
    if taken_back:
        world.commit(("requests", (APP,), None))
    world.show("b")
    world.run()
    assert (world.assignment().leaving is None) == taken_back


def test_ladder_is_for_failures() -> None:
    """Neither strikes nor `restarts_here` keep a primary on its host that a person wants elsewhere."""
    world = placed("a", "b", restarts_here=3)
    assert world.assignment().successor is None
    world.ask(Ask.SWITCHOVER)
    world.run()
    assert world.assignment().successor == "b"
    hand_over(world)
    assert world.primary() == "b"


def test_heir_that_dies_meanwhile() -> None:
    """Another one follows, or the manager decides when the primary has ended."""
    world = placed("a", "b", "c", "d", degree=3)
    world.ask(Ask.SWITCHOVER, "b")
    world.run()
    world.fail("b")
    world.run()
    assert world.assignment().successor == "c"
    hand_over(world)
    assert world.primary() == "c"


def test_refusals() -> None:
    """Each says what is in the way."""
    world = placed("a", "b")
    assert why(world) == ""
    assert why(world, to="c") == "c is no backup of it: its backups are on b"
    world.drain("b")
    assert why(world) == "no backup can take over: b is drained"
    world.undrain("b")
    world.pause()
    assert "paused" in why(world)
    world.ask(Ask.SWITCHOVER)
    world.run()
    assert world.assignment().leaving is None
    world.unpause()
    world.lose("b")
    assert why(world) == "no backup can take over: b is down"
    assert why(placed("a", degree=1)) == "it has no backup"


# --- drained hosts -----------------------------------------------------------------------------------------------------


def test_drain_of_a_backup() -> None:
    """It ends when another one is ready that holds what it held, and not before."""
    world = placed("a", "b", "c")
    world.commit(("checkpoints", (APP,), Checkpoint(world.assignment().epoch, 1, "", 5, ("a", "b"))))
    world.run()
    world.drain("b")
    world.run()
    assert world.backups() == ["b", "c"]
    assert world.assignment().successor == "b"
    world.show("c")
    world.run()
    assert world.backups() == ["b", "c"]
    assert remains(world.app(), world.view, "b") == "c does not hold the last checkpoint yet"
    world.commit(("checkpoints", (APP,), Checkpoint(world.assignment().epoch, 1, "", 5, ("a", "b", "c"))))
    world.run()
    assert (world.backups(), world.assignment().successor) == (["c"], "c")


def test_drain_of_a_primary() -> None:
    """First a copy elsewhere, then a handover; the host has nothing back."""
    world = placed("a", "b", "c")
    world.drain("a")
    world.run()
    assert (world.backups(), world.assignment().leaving) == (["b", "c"], None)
    world.show("c")
    world.run()
    assert world.assignment().leaving is not None
    hand_over(world)
    assert (world.primary(), world.backups(), world.assignment().degraded) == ("b", ["c"], False)


def test_drain_of_the_only_copy() -> None:
    """The next primary is ready before the only one ends."""
    world = placed("a", "b", degree=1)
    world.drain("a")
    world.run()
    world.show("b")
    world.run()
    hand_over(world)
    assert (world.primary(), world.backups()) == ("b", [])


def test_drain_with_nowhere_to_go() -> None:
    """The primary goes to the backup there is, and a backup stays until another host comes."""
    world = placed("a", "b")
    world.drain("a")
    world.run()
    hand_over(world)
    assert (world.primary(), world.backups(), world.assignment().degraded) == ("b", ["a"], False)
    assert remains(world.app(), world.view, "a") == "no other host is up, allowed and able"
    assert world.view.seatless == {APP}
    world.fail("a", uptime_s=60.0)
    world.run()
    assert world.backups() == ["a"]  # in place of the one that failed
    world.show_all()
    world.join("c")
    world.run()
    world.show("c")
    world.run()
    assert world.backups() == ["c"]
    assert world.view.seatless == set()


def test_drain_of_an_object() -> None:
    """A member leaves when the copy in its place is in sync."""
    world = placed("a", "b", "c", style=Style.HOT, object=True)

    def in_sync(*hosts: str) -> None:
        members = tuple(Member(host, world.seat(host).incarnation) for host in hosts)
        world.commit(("insync", (APP,), InSync(world.assignment().epoch, world.seat("a").incarnation, members)))
        world.run()

    in_sync("a", "b")
    world.drain("b")
    world.run()
    world.show("c", state=ReplicaState.RUNNING)
    world.run()
    assert world.backups() == ["b", "c"]
    assert remains(world.app(), world.view, "b") == "the copy on c is not in sync"
    in_sync("a", "b", "c")
    assert world.backups() == ["c"]


def test_undrain_gives_back_what_is_too_much() -> None:
    """What was placed in the meantime goes again, and the primary stays."""
    world = placed("a", "b", "c")
    world.drain("a")
    world.run()
    world.undrain("a")
    world.run()
    assert (world.primary(), world.backups()) == ("a", ["b"])


def test_all_hosts_drained() -> None:
    """Nothing moves, and what crashes comes back; nothing new comes."""
    world = placed("a", "b", "c")
    world.drain("a", "b", "c")
    world.run()
    assert (world.primary(), world.backups(), world.assignment().leaving) == ("a", ["b"], None)
    world.fail("a", uptime_s=60.0)
    world.run()
    assert (world.primary(), world.backups()) == ("b", ["a"])
    world.register("late", origin="a")
    world.run("late")
    late = world.view.apps["late"].assignment
    assert late is not None
    assert late.seats == ()


# --- stopped applications ----------------------------------------------------------------------------------------------


def test_stop() -> None:
    """The primary first, with nobody to follow, then the rest; started again it has a later epoch, and its checkpoint."""
    world = placed("a", "b")
    epoch = world.assignment().epoch
    world.ask(Ask.STOP)
    world.run()
    assert (world.primary(), world.backups(), world.assignment().successor) == ("a", ["b"], None)
    assert placement(world, "a").leaving is not None
    world.fail("a", FailureKind.HANDOVER)
    world.run()
    assert (world.assignment().state, world.assignment().seats) == (AssignmentState.STOPPED, ())
    assert not world.placements
    world.restart_manager()
    assert world.run().plan is None
    world.commit(("requests", (APP,), None))
    assert world.run().plan is None  # the backup has not ended yet
    world.commit(("replicas", (APP, "b"), None))
    world.run()
    assert (world.primary(), world.assignment().state) == ("a", AssignmentState.ACTIVE)
    assert world.assignment().epoch > epoch
    assert world.assignment().born < epoch + 1


def test_stop_that_is_taken_back() -> None:
    """A primary that was asked to end cannot be called back, so its successor follows."""
    world = placed("a", "b")
    world.ask(Ask.STOP)
    world.run()
    world.commit(("requests", (APP,), None))
    world.run()
    assert world.assignment().successor == "b"
    hand_over(world)
    assert world.primary() == "b"


def test_removal_of_what_is_stopped() -> None:
    """Nothing is left, the request included."""
    world = placed("a", "b")
    world.ask(Ask.STOP)
    world.run()
    world.unregister()
    for host in ("a", "b"):
        world.commit(("replicas", (APP, host), None))
    world.run()
    assert APP not in world.view.apps


def test_completed_is_not_stopped() -> None:
    """A request that comes too late for it is taken away, so that it does not stop the next application of its name."""
    world = placed("a", "b")
    world.ask(Ask.STOP)
    world.fail("a", FailureKind.DONE)
    world.run()
    assert world.assignment().state is AssignmentState.COMPLETED
    assert world.app().request is None


# --- another degree or style -------------------------------------------------------------------------------------------


def rescale(world: World, **changes: Any) -> None:
    """Write the registration anew."""
    registration = world.app().registration
    assert registration is not None
    world.commit(("registrations", (APP,), evolve(registration, **changes)))
    world.run()


def show_styles(world: World, style: Style, *hosts: str) -> None:
    """Have copies say under which style they were begun."""
    for host in hosts:
        replica = world.app().replicas[host]
        world.commit(("replicas", (APP, host), evolve(replica, style=style)))
    world.run()


def test_degree_is_known_to_all() -> None:
    """A primary that runs has to know on how many hosts a checkpoint is to be; it and the others go on."""
    world = placed("a", "b", "c")
    before = world.assignment().seats
    rescale(world, degree=3)
    assert world.assignment().seats[:2] == before
    assert {placement(world, host).degree for host in "abc"} == {3}
    rescale(world, degree=1)
    assert (world.assignment().seats, placement(world, "a").degree) == (before[:1], 1)


def test_style_is_changed_one_by_one() -> None:
    """Each backup begins anew on its host, while the others could take over; the primary goes on."""
    world = placed("a", "b", "c", "d", degree=3)
    show_styles(world, Style.WARM, "a", "b", "c")
    before = world.assignment()
    rescale(world, style=Style.HOT)
    first = world.assignment()
    assert (first.primary, first.backups[0], first.backups[1].host) == (before.primary, before.backups[0], "c")
    assert first.backups[1].incarnation > before.backups[1].incarnation
    assert first.successor == "b"
    world.commit(("replicas", (APP, "c"), None))
    assert world.run().plan is None
    seat = world.seat("c")
    ready = Replica(seat.incarnation, first.epoch, placement(world, "c").role, ReplicaState.RUNNING, style=Style.HOT)
    world.commit(("replicas", (APP, "c"), ready))
    world.run()
    assert world.backups() == ["c", "b"]
    assert world.seat("b").incarnation > seat.incarnation
