"""What `explain` says is what the planner does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcdreplica.core.explain import Explanation, explain
from etcdreplica.model import AssignmentState, FailureKind, ReplicaState
from tests.unit.planner_world import World


def settled(*hosts: str, degree: int = 2, **options: object) -> World:
    """An application on some of these hosts whose copies are all there, for long."""
    world = World(*hosts)
    world.register(degree=degree, **options)  # type: ignore[arg-type]
    world.run()
    world.show_all()
    world.run()
    world.wait(5)
    world.run()
    return world


def told(world: World) -> Explanation:
    """Explain it, with its history."""
    return explain(world.app(), world.view, tuple(sorted(world.events.values(), key=lambda event: event.epoch)))


def parts(world: World) -> dict[str, str]:
    """Return the part of each host."""
    return {part.host: part.part for part in told(world).hosts}


def reason(world: World, host: str) -> str:
    """Return the reason for that of one host."""
    (found,) = (part for part in told(world).hosts if part.host == host)
    return found.reason


def test_healthy() -> None:
    """Who leads, who follows, who would be next, and what a failure would come to."""
    world = settled("a", "b", "c", "d")
    assert parts(world) == {"a": "primary", "b": "successor", "c": "next", "d": "spare"}
    assert told(world).reasons == ("when its primary fails, b takes over at once, without a manager",)


def test_after_a_failover() -> None:
    """The primary is where it is because another one ended."""
    world = settled("a", "b", "c")
    world.fail("a", uptime_s=100.0)
    world.run()
    assert parts(world)["b"] == "primary"
    assert "the primary on a ended" in reason(world, "b")


def test_hosts_that_cannot() -> None:
    """Each says what is in its way: the planner gives it no seat either."""
    world = settled("a", hosts=("a", "b", "x"), degree=2)
    world.join("b", "c")
    world.drain("b")
    world.run()
    assert parts(world) == {"a": "primary", "b": "unfit", "c": "unfit", "x": "down"}
    assert "drained" in reason(world, "b")
    assert "not among its hosts" in reason(world, "c")
    assert any(text.startswith("it is degraded: 1 of 2 copies") for text in told(world).reasons)
    world.undrain("b")
    world.run()
    assert world.backups() == ["b"]


def test_refusal_is_told() -> None:
    """With the words of the host."""
    world = settled("a", "b")
    world.fail("b", FailureKind.REFUSED)
    world.run()
    assert parts(world)["b"] == "unfit"
    assert "cannot run it" in reason(world, "b")


def test_backup_that_is_not_there_yet() -> None:
    """Nobody takes over at once, and the reason is that of the backup."""
    world = World("a", "b")
    world.register(degree=2)
    world.run()
    world.show("a")
    world.show("b", state=ReplicaState.STARTING)
    world.run()
    assert parts(world) == {"a": "primary", "b": "backup"}
    assert told(world).reasons == ("when its primary fails, nobody takes over at once: the copy on b is starting",)


@pytest.mark.parametrize(
    ("options", "why"),
    [({"restarts_here": 2}, "first started again on its own host"), ({"max_restarts": 1}, "one more time parks it")],
)
def test_why_nobody_takes_over_at_once(options: dict[str, int], why: str) -> None:
    """By the same rule that names no successor."""
    world = settled("a", "b", **options)
    if "max_restarts" in options:
        world.fail("a", uptime_s=100.0)
        world.run()
        world.show_all()
        world.run()
    assert world.assignment().successor is None
    assert any(why in text for text in told(world).reasons)


def test_what_stands_still_says_who_and_what_to_do() -> None:
    """Paused, parked, and not yet looked at."""
    world = World("a")
    world.register()
    assert told(world).reasons[0].startswith("no manager has looked at it yet")
    world.run()
    world.pause()
    world.run()
    assert any("'etcdreplica resume shop' ends that" in text for text in told(world).reasons)
    world.unpause()
    world = settled("a", "b", max_restarts=1)
    for _ in range(3):
        if world.assignment().state is AssignmentState.ACTIVE:
            world.fail(str(world.primary()), uptime_s=100.0)
            world.run()
            world.show_all()
            world.run()
    assert world.assignment().state is AssignmentState.FAILED
    assert "'etcdreplica resume shop' starts it again" in told(world).reasons


@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["", "x", "y"])), min_size=3, max_size=6),
    st.integers(1, 3),
    st.data(),
)
def test_next_is_where_the_next_copy_goes(hosts: list[tuple[int, str]], degree: int, data: st.DataObject) -> None:
    """Whatever zones and capacities there are: lose a backup's host, and the planner takes the host that was named."""
    world = World()
    for number, (capacity, zone) in enumerate(hosts):
        world.join(f"h{number}", capacity=capacity, **({"zone": zone} if zone else {}))
    world.register(degree=degree)
    world.run()
    world.show_all()
    world.run()
    expected = [part.host for part in told(world).hosts if part.part == "next"]
    seats = {seat.host for seat in world.assignment().seats}
    assert not expected or expected[0] not in seats
    world.register(degree=degree + 1)
    world.run()
    assert [seat.host for seat in world.assignment().seats if seat.host not in seats] == expected
