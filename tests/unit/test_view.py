"""The elected roles' picture of the cluster: every kind of change, and the count of seats."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from etcdreplica.core.view import AppView, ClusterView, HostView
from etcdreplica.model import (
    Assignment,
    AssignmentState,
    Event,
    Failure,
    FailureKind,
    Host,
    InSync,
    Member,
    Pause,
    Program,
    Registration,
    Replica,
    ReplicaState,
    Seat,
    Succession,
)
from etcdreplica.words import Role, Style

HOST = Host("10.0.0.1", 1)
REGISTRATION = Registration("shop", Style.WARM, 2, Program(("app",), "/srv"))
REPLICA = Replica(7, 5, Role.PRIMARY, ReplicaState.RUNNING)
FAILURE = Failure("a", 7, 5, Role.PRIMARY, FailureKind.EXIT, "boom", "a")
EVENT = Event(FAILURE, 6, "b", "b promoted", 0.0)
PAUSE = Pause("ann@desk", "the roof leaks", 5.0)


def assigned(*hosts: str) -> Assignment:
    """Return an assignment with a seat on each host, the primary first."""
    seats = tuple(Seat(host, 1, 7 + number) for number, host in enumerate(hosts))
    return Assignment(5, 9, 1, AssignmentState.ACTIVE, seats[0] if seats else None, seats[1:])


def test_host_comes_and_goes() -> None:
    """The session is the revision at which the host's key was made; a change concerns who has a seat there, or lacks one."""
    view = ClusterView()
    view.apply("registrations", ("shop",), REGISTRATION, 2, 2)
    assert view.apply("hosts", ("a",), HOST, 9, 4) == set()
    assert view.offers
    assert view.seatless == {"shop"}
    assert view.hosts == {"a": HostView(HOST, 4)}
    view.apply("assignments", ("shop",), assigned("a"), 9, 9)
    view.apply("assignments", ("bank",), assigned("b"), 9, 9)
    assert view.apply("hosts", ("a",), HOST, 10, 10) == {"shop"}
    assert view.apply("hosts", ("a",), None, 11, 0) == {"shop"}
    assert view.hosts == {}


def test_deleting_an_unknown_host_does_nothing() -> None:
    """A deletion may be seen without what it deleted."""
    view = ClusterView()
    assert view.apply("hosts", ("a",), None, 10, 0) == set()


@pytest.mark.parametrize(
    ("kind", "names", "value", "attribute", "held"),
    [
        ("registrations", ("shop",), REGISTRATION, "registration", REGISTRATION),
        ("assignments", ("shop",), assigned("a"), "assignment", assigned("a")),
        ("replicas", ("shop", "a"), REPLICA, "replicas", {"a": REPLICA}),
        ("failures", ("shop", "7"), FAILURE, "failures", {7: FAILURE}),
        ("successions", ("b", "shop"), Succession(6, 7), "successions", {"b": (7, 30)}),
        ("history", ("shop", "7"), EVENT, "history", {7}),
        ("pauses", ("app", "shop"), PAUSE, "pause", PAUSE),
    ],
)
def test_each_kind_is_kept_and_deleted(kind: str, names: tuple[str, ...], value: Any, attribute: str, held: object) -> None:
    """A change is kept in its application's view; the deletion takes it out again."""
    view = ClusterView()
    view.apply("replicas", ("shop", "z"), REPLICA, 1, 1)  # keeps the application known throughout
    empty = AppView("shop", replicas={"z": REPLICA})
    assert view.apps["shop"] == empty
    assert view.apply(kind, names, value, 30, 30) == {"shop"}
    expected = {"z": REPLICA, **held} if attribute == "replicas" and isinstance(held, dict) else held
    assert getattr(view.apps["shop"], attribute) == expected
    assert view.apply(kind, names, None, 31, 0) == {"shop"}
    assert view.apps["shop"] == empty


def test_revisions_are_kept_for_conditions() -> None:
    """The mod revisions of registration and assignment are what writes are conditional on."""
    view = ClusterView()
    view.apply("registrations", ("shop",), REGISTRATION, 2, 2)
    view.apply("assignments", ("shop",), assigned("a"), 3, 3)
    view.apply("assignments", ("shop",), assigned("b"), 8, 3)
    app = view.apps["shop"]
    assert (app.registration_revision, app.assignment_revision) == (2, 8)


def test_application_is_forgotten_with_its_last_record() -> None:
    """Nothing is left of an application that has nothing left in etcd."""
    view = ClusterView()
    view.apply("registrations", ("shop",), REGISTRATION, 2, 2)
    view.apply("failures", ("shop", "7"), FAILURE, 3, 3)
    view.apply("registrations", ("shop",), None, 4, 0)
    assert "shop" in view.apps
    assert view.apply("failures", ("shop", "7"), None, 5, 0) == {"shop"}
    assert view.apps == {}


@pytest.mark.parametrize("kind", ["leaders", "placements"])
def test_kinds_that_do_not_matter(kind: str) -> None:
    """Elections and placements are no part of the picture."""
    view = ClusterView()
    view.apply(kind, ("a", "shop"), object(), 2, 2)
    assert view == ClusterView()


def test_corrupt_placement_is_noted() -> None:
    """It is named under its application, until it has been written anew."""
    view = ClusterView()
    assert view.apply("placements", ("a", "shop"), None, 2, 2, error="not JSON") == {"shop"}
    assert view.apps["shop"].corrupt == {"placements/a/shop": "not JSON"}
    view.apply("placements", ("a", "shop"), object(), 3, 2)
    assert view == ClusterView()


def test_corrupt_value_is_noted_until_it_is_mended() -> None:
    """The label names the key; what was known before is kept."""
    view = ClusterView()
    view.apply("assignments", ("shop",), assigned("a"), 3, 3)
    assert view.apply("assignments", ("shop",), None, 4, 3, error="not JSON") == {"shop"}
    app = view.apps["shop"]
    assert app.corrupt == {"assignments/shop": "not JSON"}
    assert app.assignment == assigned("a")
    view.apply("assignments", ("shop",), assigned("b"), 5, 3)
    assert view.apps["shop"].corrupt == {}


def test_corrupt_value_alone_keeps_the_application() -> None:
    """An application of which only a corrupt value is known is known."""
    view = ClusterView()
    view.apply("registrations", ("shop",), None, 4, 3, error="not JSON")
    assert not view.apps["shop"].is_empty()
    view.apply("registrations", ("shop",), None, 5, 0)
    assert view.apps == {}


def test_corrupt_host_record_is_no_lost_host() -> None:
    """The host's key is there, so its lease is alive: its replicas run, and must not be replaced (G1, G5)."""
    view = ClusterView()
    view.apply("hosts", ("a",), HOST, 4, 4)
    view.apply("hosts", ("a",), None, 5, 4, error="not JSON")
    assert "a" in view.hosts


def test_in_sync_set_has_its_revision() -> None:
    """It comes, changes and goes; a value that cannot be read changes nothing, but is noted."""
    view, record = ClusterView(), InSync(5, 7, (Member("a", 7),))
    view.apply("assignments", ("shop",), assigned("a", "b"), 3, 3)
    assert view.apply("insync", ("shop",), record, 4, 4) == {"shop"}
    app = view.apps["shop"]
    assert (app.own_in_sync, app.in_sync_revision) == (record, 4)
    assert view.apply("insync", ("shop",), None, 5, 4, error="not JSON") == {"shop"}
    assert (app.own_in_sync, app.corrupt) == (record, {"insync/shop": "not JSON"})
    view.apply("insync", ("shop",), None, 6, 0)
    assert (app.own_in_sync, app.in_sync_revision, app.corrupt) == (None, 0, {})


def test_in_sync_set_of_an_earlier_application_does_not_count() -> None:
    """Its revision does, because whoever writes must name it."""
    view = ClusterView()
    view.apply("assignments", ("shop",), evolve(assigned("a"), born=6), 3, 3)
    view.apply("insync", ("shop",), InSync(5, 7, (Member("a", 7),)), 4, 4)
    assert (view.apps["shop"].own_in_sync, view.apps["shop"].in_sync_revision) == (None, 4)


def test_replica_of_a_seat() -> None:
    """Only what its host reports of this very incarnation counts."""
    app = AppView("shop", replicas={"a": REPLICA})
    assert app.replica(Seat("a", 1, 7)) is REPLICA
    assert app.replica(Seat("a", 1, 8)) is None
    assert app.replica(Seat("b", 1, 7)) is None


def test_clear_forgets_all() -> None:
    """A snapshot begins with nothing."""
    view = ClusterView()
    view.apply("hosts", ("a",), HOST, 2, 2)
    view.apply("assignments", ("shop",), assigned("a", "b"), 3, 3)
    view.clear()
    assert view == ClusterView()


def test_expected_assignment_counts_until_the_written_one_comes() -> None:
    """A plan counts its seats while it is written; the change that follows counts nothing twice."""
    view = ClusterView()
    view.apply("assignments", ("shop",), assigned("a"), 3, 3)
    view.expect(view.apps["shop"], assigned("a", "b"))
    assert +view.seats == {"a": 1, "b": 1}
    view.apply("assignments", ("shop",), assigned("a", "b"), 4, 3)
    assert +view.seats == {"a": 1, "b": 1}


apps = st.sampled_from(["shop", "mail", "news"])
host_sets = st.lists(st.sampled_from("abcd"), unique=True, max_size=4)


@given(st.lists(st.tuples(apps, st.none() | host_sets, st.sampled_from(["apply", "expect", "corrupt"]))))
def test_seats_are_always_the_sum_of_the_assignments(steps: list[tuple[str, list[str] | None, str]]) -> None:
    """Whatever is written, expected, taken back or corrupted, no seat is counted twice and none is forgotten."""
    view = ClusterView()
    for number, (name, hosts, how) in enumerate(steps):
        assignment = None if hosts is None else assigned(*hosts)
        if how == "expect":
            view.expect(view.app(name), assignment)
        elif how == "corrupt":
            view.apply("assignments", (name,), None, number, 1, error="not JSON")
        else:
            view.apply("assignments", (name,), assignment, number, 1)
        seats = [seat.host for app in view.apps.values() if app.assignment for seat in app.assignment.seats]
        assert +view.seats == Counter(seats)
        assert min(view.seats.values(), default=0) >= 0


def test_pause_of_the_cluster_touches_every_application() -> None:
    """It is kept with its revision, comes and goes for all of them, and a snapshot forgets it."""
    view = ClusterView()
    for name in ("shop", "mail"):
        view.apply("registrations", (name,), REGISTRATION, 2, 2)
    assert view.apply("pauses", ("cluster", "default"), PAUSE, 9, 9) == {"shop", "mail"}
    assert (view.pause, view.pause_revision) == (PAUSE, 9)
    assert view.apply("pauses", ("cluster", "default"), None, 10, 0) == {"shop", "mail"}
    assert (view.pause, view.pause_revision) == (None, 0)
    view.apply("pauses", ("cluster", "default"), PAUSE, 11, 11)
    view.clear()
    assert (view.pause, view.pause_revision) == (None, 0)
    assert set(view.apps) == set()


def test_pause_of_the_cluster_that_cannot_be_read_pauses() -> None:
    """Whoever wrote it wanted nothing to move."""
    view = ClusterView()
    view.apply("pauses", ("cluster", "default"), None, 9, 9, "no JSON")
    assert view.pause is not None
    assert (view.pause.reason, view.pause_revision) == ("no JSON", 9)


def test_pause_of_an_application_has_its_revision() -> None:
    """Plans are written only if it is still the same."""
    view = ClusterView()
    view.apply("registrations", ("shop",), REGISTRATION, 2, 2)
    view.apply("pauses", ("app", "shop"), PAUSE, 9, 9)
    assert view.apps["shop"].pause_revision == 9
    view.apply("pauses", ("app", "shop"), None, 10, 0)
    assert view.apps["shop"].pause_revision == 0
