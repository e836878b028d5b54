"""The brake: when the loss of hosts is believed at once, and when only after a wait."""

from __future__ import annotations

from attrs import define

from etcdreplica.core.brake import AGAIN_S, Brake, Occupancy, lost_seats
from etcdreplica.model import FailureKind
from tests.unit.planner_world import APP, World, placed

TTL_S = 5.0


@define
class Fleet:
    """Hosts by name, all with something placed on them, and the brake that looks at them."""

    up: set[str]
    absent: set[str]
    brake: Brake
    now: float = 100.0

    def lose(self, hosts: str, after_s: float = 0.0) -> set[str]:
        """Lose some, and return which absent hosts may be reported."""
        self.now += after_s
        self.up -= set(hosts)
        self.absent |= set(hosts)
        return self.look()

    def come_back(self, hosts: str) -> set[str]:
        """Have some come back; return which of the rest may be reported."""
        self.up |= set(hosts)
        self.absent -= set(hosts)
        return self.look()

    def look(self, after_s: float = 0.0) -> set[str]:
        """Look once more."""
        self.now += after_s
        self.brake.look(self.up, self.absent, self.now)
        return self.absent - set(self.brake.held)

    def vacate(self, hosts: str) -> set[str]:
        """Have the seats of lost hosts given to others."""
        self.absent -= set(hosts)
        return self.look()

    def release(self) -> set[str]:
        """Read the hosts again."""
        self.brake.release(self.up, self.now)
        return self.absent - set(self.brake.held)


def fleet(hosts: str) -> Fleet:
    """Return a fleet that has been seen once."""
    made = Fleet(set(hosts), set(), Brake(TTL_S))
    made.look()
    return made


def test_one_host_is_lost_at_once() -> None:
    """No wait for what happens every day, even if it is half of the hosts, or all of them."""
    for hosts in ("a", "ab", "abc", "abcdefgh"):
        many = fleet(hosts)
        assert many.lose("a") == {"a"}
        assert many.brake.until is None


def test_half_of_the_hosts_is_believed() -> None:
    """Only more than half is hard to believe."""
    many = fleet("abcdef")
    assert many.lose("abc") == {"a", "b", "c"}


def test_more_than_half_is_held_for_one_ttl() -> None:
    """Then, read again, those that are still gone are lost."""
    many = fleet("abcde")
    assert many.lose("abc") == set()
    assert (many.brake.until, many.brake.held) == (many.now + TTL_S, ["a", "b", "c"])
    assert many.look(TTL_S - 0.1) == set()
    many.look(0.1)
    assert many.release() == {"a", "b", "c"}
    assert many.brake.until is None
    assert many.look() == {"a", "b", "c"}


def test_hosts_that_come_back_are_not_lost() -> None:
    """That is what the wait is for."""
    many = fleet("abc")
    many.lose("abc")
    many.come_back("ab")
    assert many.look(TTL_S) == set()
    assert many.release() == {"c"}


def test_one_by_one_within_a_ttl() -> None:
    """The first ones are believed; from more than half on, the later ones are held, and the earlier ones stay lost."""
    many = fleet("abcde")
    assert many.lose("a", 1.0) == {"a"}
    assert many.lose("b", 1.0) == {"a", "b"}
    assert many.vacate("a") == {"b"}
    assert many.lose("c", 1.0) == {"b"}
    assert many.brake.held == ["c"]


def test_one_by_one_more_than_a_ttl_apart() -> None:
    """However many, each is a loss of one."""
    many = fleet("abcde")
    for host in "abcd":
        assert host in many.lose(host, TTL_S)
        assert many.brake.until is None


def test_hosts_that_vanished_and_are_back_count_for_a_ttl() -> None:
    """Those of a stalled etcd come back one after the other."""
    many = fleet("abc")
    assert many.lose("a") == {"a"}
    many.come_back("a")
    assert many.lose("b", 0.5) == set()
    assert many.brake.held == ["b"]


def test_further_losses_do_not_prolong_the_wait() -> None:
    """It is bounded, whatever happens meanwhile."""
    many = fleet("abcdef")
    many.lose("abcd")
    until = many.brake.until
    many.lose("e", TTL_S - 0.1)
    assert many.brake.until == until
    many.look(0.1)
    assert many.release() == {"a", "b", "c", "d", "e"}


def test_after_the_wait_a_single_loss_is_believed_at_once() -> None:
    """What was counted once is not counted again."""
    many = fleet("abcdefg")
    many.lose("abcd")
    many.look(TTL_S)
    many.release()
    assert "e" in many.lose("e", 0.1)


def test_what_etcd_knows_better_is_held_on() -> None:
    """A host that is in etcd but not yet seen here is not lost; it is read again soon."""
    many = fleet("abc")
    many.lose("ab")
    many.look(TTL_S)
    many.brake.release({"a", "c"}, many.now)
    assert (many.brake.held, many.brake.until) == (["a"], many.now + AGAIN_S)
    many.come_back("a")
    assert many.release() == {"b"}
    assert many.brake.until is None


def test_first_look_of_a_new_manager() -> None:
    """Hosts that are absent when it is elected count as vanished then."""
    few = Fleet({"c"}, {"a", "b"}, Brake(TTL_S))
    assert few.look() == set()
    assert few.brake.until == few.now + TTL_S
    one = Fleet({"b", "c"}, {"a"}, Brake(TTL_S))
    assert one.look() == {"a"}


def absent(occupancy: Occupancy, world: World) -> set[str]:
    """Look once more, and return the absent hosts."""
    occupancy.look(APP, world.view)
    return occupancy.absent


def test_absent_hosts_are_those_with_seats() -> None:
    """A host that nothing is placed on may go as it likes."""
    world, occupancy = placed("a", "b", "c"), Occupancy()
    assert absent(occupancy, world) == set()
    world.lose("c")
    assert absent(occupancy, world) == set()
    world.lose("a")
    assert absent(occupancy, world) == {"a"}


def test_hosts_absent_at_first_count() -> None:
    """A SuperWatchDog that was just elected cannot know what ran there."""
    world = placed("a", "b")
    world.lose("a")
    assert absent(Occupancy(), world) == {"a"}


def test_what_a_new_superwatchdog_has_not_seen_may_have_run() -> None:
    """The leases of lost hosts end one by one: when it is elected, that of a replica has ended and its host's has not."""
    world, occupancy = placed("a", "b"), Occupancy()
    world.commit(("replicas", (APP, "b"), None))
    assert absent(occupancy, world) == set()
    world.lose("b")
    assert absent(occupancy, world) == {"b"}


def test_a_seat_that_was_never_used_does_not_count() -> None:
    """It was given to a host that was on its way out."""
    world, occupancy = placed("a", "b"), Occupancy()
    world.fail("b", FailureKind.HANDOVER)
    absent(occupancy, world)
    world.run()
    assert world.backups() == ["b"]
    absent(occupancy, world)
    world.lose("b")
    assert absent(occupancy, world) == set()
    assert [seat.host for seat, _ in lost_seats(world.app(), world.view)] == ["b"]


def test_what_is_removed_is_forgotten() -> None:
    """Nothing is kept of an application that is gone."""
    world, occupancy = placed("a", "b"), Occupancy()
    absent(occupancy, world)
    world.lose("a")
    assert absent(occupancy, world) == {"a"}
    world.view.clear()
    assert absent(occupancy, world) == set()
    assert occupancy == Occupancy()


def test_a_replica_whose_lease_ended_first_was_there() -> None:
    """The leases of a host's replicas and its own end in any order."""
    world, occupancy = placed("a", "b"), Occupancy()
    absent(occupancy, world)
    world.commit(("replicas", (APP, "b"), None))
    absent(occupancy, world)
    world.lose("b")
    assert absent(occupancy, world) == {"b"}


def test_host_that_handed_over_is_not_absent() -> None:
    """Its copies ended before it went; a loss that is reported already still counts."""
    world = placed("a", "b", "c")
    occupancy = Occupancy()
    world.fail("a", FailureKind.HANDOVER)
    world.lose("a")
    assert absent(occupancy, world) == set()
    world.lose("b")
    world.report_losses()
    assert absent(occupancy, world) == {"b"}


def test_a_seat_that_was_never_written_is_not_lost() -> None:
    """The manager that fails to write a plan gives the same incarnation to another host, which is not lost."""
    world = placed("a", "b", degree=1)
    world.fail("a")
    plan = world.decide().plan
    assert plan is not None
    assert plan.assignment is not None
    assert plan.assignment.primary is not None
    world.view.expect(world.app(), plan.assignment)
    world.lose(plan.assignment.primary.host)
    assert list(lost_seats(world.app(), world.view)) == []
    assert absent(Occupancy(), world) == set()


def test_nothing_moves_before_the_loss_is_reported() -> None:
    """The planner leaves seats on absent hosts as they are, for however long; only the report moves them."""
    world = placed("a", "b", "c", "d", degree=3)
    before = world.assignment()
    for host in ("a", "b"):
        world.lose(host)
    for _ in range(3):
        world.wait(1000.0)
        world.run()
    assert world.assignment().seats == before.seats
    assert world.assignment().epoch == before.epoch
    assert world.assignment().primary is not None
    assert not world.app(APP).failures
    world.report_losses()
    world.run()
    assert (world.primary(), world.backups()) == ("c", ["d"])
