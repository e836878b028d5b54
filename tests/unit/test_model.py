"""The records: their checks, what an override makes of a program, and how two registrations differ."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve

from etcdreplica.errors import UsageError
from etcdreplica.model import Assignment, AssignmentState, Override, Placement, Program, Registration, Seat
from etcdreplica.words import Keep, Role, Style

PROGRAM = Program(("python", "app.py", "--fast"), "/srv", {"A": "1", "B": "2"}, ("/srv/app.py",))
REGISTRATION = Registration("shop", Style.WARM, 2, PROGRAM)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "bad application name"),
        ({"name": ""}, "bad application name"),
        ({"degree": 0}, "bad degree"),
        ({"degree": True}, "bad degree"),
        ({"degree": 31}, "bad degree"),
        ({"hosts": ("a",)}, "cannot be met on 1 host"),
        ({"hosts": ("a", "b/c")}, "bad host name 'b/c'"),
        ({"overrides": {"": Override()}}, "bad host name ''"),
        ({"stop_timeout_s": -1.0}, "bad stop_timeout"),
        ({"object": 1}, "True or False"),
        ({"object": True, "durable": "yes"}, "True or False"),
        ({"object": True, "min_in_sync": 0}, "bad min_in_sync 0: a whole number from 1 to 2"),
        ({"object": True, "min_in_sync": 3}, "bad min_in_sync 3: a whole number from 1 to 2"),
        ({"min_in_sync": 2}, "this is none"),
        ({"durable": True}, "this is none"),
    ],
)
def test_registration_refuses(change: dict[str, Any], message: str) -> None:
    """A registration that makes no sense cannot be built."""
    with pytest.raises(UsageError, match=message):
        evolve(REGISTRATION, **change)


def test_empty_override_changes_nothing() -> None:
    """A host without peculiarities runs the program as registered."""
    assert Override().apply(PROGRAM) == PROGRAM


def test_override_of_the_interpreter() -> None:
    """Another Python runs the same command; the files are needed still."""
    applied = Override(python="/opt/python").apply(PROGRAM)
    assert applied == evolve(PROGRAM, argv=("/opt/python", "app.py", "--fast"))


def test_override_of_the_command() -> None:
    """Another command needs other files, which nobody has named."""
    applied = Override(argv=("redis", "-x")).apply(PROGRAM)
    assert applied == evolve(PROGRAM, argv=("redis", "-x"), needs=())


def test_override_of_the_directory() -> None:
    """In another directory the files are elsewhere."""
    assert Override(cwd="/opt").apply(PROGRAM) == evolve(PROGRAM, cwd="/opt", needs=())


def test_override_adds_to_the_environment() -> None:
    """What it names is replaced or added; the rest stays."""
    assert Override(env={"B": "3", "C": "4"}).apply(PROGRAM).env == {"A": "1", "B": "3", "C": "4"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"style": Style.HOT}, ["style", "warm", "hot"]),
        ({"degree": 3}, ["degree", "2", "3"]),
        ({"hosts": ("a", "b")}, ["hosts", "a", "b"]),
        ({"labels": {"disk": "ssd"}}, ["labels", "disk", "ssd"]),
        ({"keep": Keep.ALWAYS}, ["keep", "until-done", "always"]),
        ({"stop_timeout_s": 5.0}, ["stop_timeout", "10.0", "5.0"]),
        ({"overrides": {"a": Override(cwd="/opt")}}, ["overrides", "/opt"]),
        ({"program": evolve(PROGRAM, argv=("python", "other.py"))}, ["program", "app.py", "other.py"]),
        ({"program": evolve(PROGRAM, cwd="/opt")}, ["program", "/srv", "/opt"]),
    ],
)
def test_difference_is_named(change: dict[str, Any], words: list[str]) -> None:
    """One setting that differs is one difference, and it shows what was and what is."""
    (difference,) = REGISTRATION.differences(evolve(REGISTRATION, **change))
    assert all(word in difference for word in words), difference


def test_several_differences_are_all_named() -> None:
    """Nobody has to try again and again."""
    other = evolve(REGISTRATION, style=Style.COLD, degree=1, keep=Keep.ALWAYS)
    assert [d.split()[0] for d in REGISTRATION.differences(other)] == ["style", "degree", "keep"]


@pytest.mark.parametrize(
    "change", [{}, {"origin": "b"}, {"program": evolve(PROGRAM, env={"A": "9"})}, {"program": evolve(PROGRAM, needs=())}]
)
def test_what_does_not_count_as_a_difference(change: dict[str, Any]) -> None:
    """Who registered it, and the environment, may differ from host to host."""
    assert REGISTRATION.differences(evolve(REGISTRATION, **change)) == []


PRIMARY, FIRST, SECOND = Seat("a", 1, 7), Seat("b", 2, 8), Seat("c", 3, 9)
ASSIGNMENT = Assignment(5, 9, 1, AssignmentState.ACTIVE, PRIMARY, (FIRST, SECOND), successor="b")


def test_seats_begin_with_the_primary() -> None:
    """The backups follow in the order of promotion."""
    assert ASSIGNMENT.seats == (PRIMARY, FIRST, SECOND)
    assert evolve(ASSIGNMENT, primary=None).seats == (FIRST, SECOND)


def test_placement_is_what_a_host_must_know() -> None:
    """Only the primary's host is told whom to call."""
    assert ASSIGNMENT.placement(PRIMARY) == Placement(Role.PRIMARY, 5, 7, 1, "b", peers=("b", "c"))
    assert ASSIGNMENT.placement(FIRST) == Placement(Role.BACKUP, 5, 8, 2, None, peers=("a", "c"), primary="a")


def test_promoted_placement_has_the_next_epoch() -> None:
    """A successor is primary in the epoch after, and has no successor of its own yet."""
    assert ASSIGNMENT.placement(FIRST).promoted() == Placement(Role.PRIMARY, 6, 8, 2, None, peers=("a", "c"))


def test_time_of_change_does_not_make_another_assignment() -> None:
    """What is for people only starts no write."""
    assert evolve(ASSIGNMENT, changed_wall=9.0) == ASSIGNMENT
