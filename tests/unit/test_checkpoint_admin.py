"""Exporting and importing checkpoints: which one is taken and from where, what speaks against bringing one in, who gets it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest
from attrs import evolve

from etcdreplica.checkpoint.admin import Answer, Choice, check_stopped, choose, fetch, objections
from etcdreplica.checkpoint.format import CHUNK, Manifest, digests
from etcdreplica.checkpoint.peers import Holds, Peers
from etcdreplica.core.view import AppView, ClusterView
from etcdreplica.errors import CheckpointError, CheckpointUnavailableError, RefusedError
from etcdreplica.model import (
    Assignment,
    AssignmentState,
    Checkpoint,
    Failure,
    FailureKind,
    Program,
    Registration,
    Replica,
    ReplicaState,
    Seat,
    Server,
    Stamp,
)
from etcdreplica.words import Role, Style

DATA = bytes(range(256)) * 1000  # 3.9 chunks
REGISTRATION = Registration("shop", Style.WARM, 2, Program(("app",), "/srv"))
PRIMARY = Seat("a", 1, 7)
PARKED = Assignment(5, 9, 1, AssignmentState.FAILED, born=3)
STANDING = evolve(PARKED, state=AssignmentState.ACTIVE, primary=PRIMARY, paused=True)
FAILURE = Failure("a", 7, 5, Role.PRIMARY, FailureKind.EXIT, "boom", "a")


def manifest(epoch: int, sequence: int, data: bytes = DATA) -> Manifest:
    """Return that of a checkpoint."""
    return Manifest("shop", Stamp(epoch, sequence), "msgpack", len(data), digests(data))


def holding(host: str, *manifests: Manifest) -> Answer:
    """Return a host's answer."""
    return Answer(host, Holds(manifests))


def shop(assignment: Assignment = PARKED, *holders: str) -> AppView:
    """Return the view of an application."""
    return AppView("shop", REGISTRATION, 1, assignment, checkpoint=Checkpoint(5, 1, "", 0, holders) if holders else None)


class FakePeers:
    """Hosts that send a state in pieces of two chunks; `fails` says after how many pieces a host's connection is lost."""

    def __init__(self, fails: dict[str, int], damaged: Sequence[str] = ()) -> None:
        self.fails = fails
        self.damaged = damaged
        self.asked: list[tuple[str, int]] = []

    async def fetch(self, address: str, manifest: Manifest, chunks: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
        """Send chunks."""
        self.asked.append((address, chunks[0]))
        for count, first in enumerate(range(chunks[0], manifest.count, 2)):
            if self.fails.get(address) == count:
                raise CheckpointError("the connection was closed")
            data = DATA[CHUNK * first : CHUNK * (first + 2)]
            yield first, bytes(len(data)) if address in self.damaged else data


def fetched(peers: FakePeers, *hosts: str) -> bytes:
    """Return a state that is fetched from hosts."""
    view = ClusterView(servers={host: Server(host, 1) for host in hosts})

    async def work() -> bytes:
        choice = Choice(manifest(5, 1), hosts)
        return b"".join([data async for data in fetch(view, cast("Peers", peers), choice)])

    return asyncio.run(work())


def test_the_newest_is_taken_from_a_holder() -> None:
    """The order of the answers does not matter; other hosts that have the same one come after the holder."""
    answers = [holding("a", manifest(5, 2)), holding("b", manifest(5, 2), manifest(5, 1)), holding("c", manifest(4, 9))]
    assert choose(shop(PARKED, "b"), answers) == Choice(manifest(5, 2), ("b", "a"))


def test_one_that_differs_from_the_holders_is_not_mixed_in() -> None:
    """Two hosts with the same stamp but another state: that of the holder is meant."""
    answers = [holding("a", manifest(5, 2, b"other")), holding("b", manifest(5, 2))]
    assert choose(shop(PARKED, "b"), answers) == Choice(manifest(5, 2), ("b",))


@pytest.mark.parametrize(("wanted", "stamp"), [((5, None), (5, 2)), ((5, 1), (5, 1)), ((4, None), (4, 9))])
def test_one_that_is_named(wanted: tuple[int, int | None], stamp: tuple[int, int]) -> None:
    """By its epoch, or by epoch and sequence."""
    answers = [holding("a", manifest(5, 2), manifest(5, 1)), holding("b", manifest(4, 9))]
    assert choose(shop(), answers, *wanted).manifest.stamp == Stamp(*stamp)


def test_none_to_be_had_names_who_is_silent() -> None:
    """The hosts that do not answer may have it."""
    with pytest.raises(CheckpointUnavailableError, match=r"checkpoint 5\.3; these do not answer: b"):
        choose(shop(), [holding("a", manifest(5, 2)), Answer("b", error="gone")], 5, 3)


def test_where_one_host_fails_the_next_goes_on() -> None:
    """From the chunk that is missing, without a gap and without asking anybody twice."""
    peers = FakePeers({"a": 1})
    assert fetched(peers, "a", "b") == DATA
    assert peers.asked == [("a", 0), ("b", 2)]


def test_what_comes_damaged_is_taken_from_another_host() -> None:
    """Nothing of it is given on."""
    assert fetched(FakePeers({}, damaged=["a"]), "a", "b") == DATA


def test_when_all_hosts_fail_each_says_why() -> None:
    """And how an older one can be had."""
    with pytest.raises(CheckpointUnavailableError, match=r"a: it is damaged.*b: the connection.*--epoch"):
        fetched(FakePeers({"b": 0}, damaged=["a"]), "a", "b")


@pytest.mark.parametrize("state", [AssignmentState.FAILED, AssignmentState.PENDING, AssignmentState.COMPLETED])
def test_nothing_speaks_against_one_that_stands_still(state: AssignmentState) -> None:
    """Nor against one that is paused and has no primary."""
    own = [holding("a", manifest(5, 1))]
    for app in (shop(evolve(PARKED, state=state)), shop(evolve(PARKED, state=AssignmentState.BACKING_OFF, paused=True))):
        check_stopped(app)
        assert objections(app, manifest(4, 1), own) == []


def test_a_primary_that_has_failed_under_a_pause_does_not_run() -> None:
    """Its seat is still there, but an incarnation runs at most once."""
    app = shop(STANDING)
    assert "may run on a" in objections(app, manifest(4, 1), [])[0]
    app.failures[7] = FAILURE
    assert objections(app, manifest(4, 1), []) == []


@pytest.mark.parametrize(
    "assignment",
    [evolve(STANDING, paused=False), evolve(PARKED, state=AssignmentState.BACKING_OFF)],
    ids=["failed", "backing off"],
)
def test_one_that_is_about_to_be_started(assignment: Assignment) -> None:
    """Pause it first."""
    app = shop(assignment)
    app.failures[7] = FAILURE
    assert objections(app, manifest(4, 1), []) == ["it is about to be started again: 'etcdreplica pause shop' first"]


def test_what_belongs_to_another_application() -> None:
    """Its name and its codec are told."""
    other: Any = evolve(manifest(4, 1), app="mail", codec="pickle")
    told = objections(shop(), other, [holding("a", manifest(5, 1))])
    assert told == [
        "the file is a checkpoint of mail",
        "the file was made with the codec pickle, and its own checkpoints with msgpack",
    ]


def test_a_primary_that_is_seen_to_run_is_left_alone() -> None:
    """Also when the assignment does not know of it any more; a backup may run."""
    app = shop()
    app.replicas["b"] = Replica(8, 5, Role.BACKUP, ReplicaState.READY)
    check_stopped(app)
    app.replicas["a"] = Replica(7, 5, Role.PRIMARY, ReplicaState.STOPPING, pid=99)
    with pytest.raises(RefusedError, match=r"runs on a \(process 99\)"):
        check_stopped(app)


def test_one_that_nobody_has_taken_yet() -> None:
    """Without an assignment there is no epoch to import into."""
    with pytest.raises(RefusedError, match="no ReplicaManager"):
        check_stopped(AppView("shop", REGISTRATION, 1))
