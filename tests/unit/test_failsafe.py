"""failsafe: whom a primary leaves in doubt, who may follow it, and what is asked of whom."""

from __future__ import annotations

import pytest
from attrs import evolve

from etcdreplica.core.failsafe import VOUCH_S, Promises, in_doubt
from etcdreplica.core.view import AppView, ClusterView, HostView
from etcdreplica.daemon.failsafe import Backing
from etcdreplica.errors import UsageError
from etcdreplica.model import Failure, FailureKind, Host, Program, Registration, Replica, ReplicaState, Vouchers
from etcdreplica.words import Role, Style

RECORD = Vouchers(epoch=7, incarnation=70, host="a", session=1, hosts=("b",))


def _app(**more: object) -> AppView:
    return AppView("shop", vouchers=RECORD, **more)  # type: ignore[arg-type]


def _cluster(session: int | None) -> ClusterView:
    cluster = ClusterView()
    if session is not None:
        cluster.hosts["a"] = HostView(Host("a", 1), session)
    return cluster


def _failure(kind: FailureKind) -> Failure:
    return Failure("a", 70, 7, Role.PRIMARY, kind, "", by="x")


@pytest.mark.parametrize("kind", [FailureKind.HOST, FailureKind.LOST])
def test_nobody_has_seen_it_dead(kind: FailureKind) -> None:
    """That a lease has ended, or that nothing is shown, is no proof."""
    assert in_doubt(_app(), _cluster(None)) == RECORD
    assert in_doubt(_app(), _cluster(1)) == RECORD
    assert in_doubt(_app(failures={70: _failure(kind)}), _cluster(None)) == RECORD
    assert in_doubt(_app(failures={71: _failure(FailureKind.EXIT)}), _cluster(None)) == RECORD
    assert in_doubt(_app(successions={"b": (71, 3)}), _cluster(None)) == RECORD


@pytest.mark.parametrize("kind", [kind for kind in FailureKind if kind not in (FailureKind.HOST, FailureKind.LOST)])
def test_its_watchdog_has_reported_it(kind: FailureKind) -> None:
    """Whatever it died of, it was seen dead."""
    assert in_doubt(_app(failures={70: _failure(kind)}), _cluster(None)) is None


def test_other_proofs() -> None:
    """Its host has begun anew, its successor was called, or somebody else leads, who has waited."""
    assert in_doubt(_app(), _cluster(2)) is None
    assert in_doubt(_app(successions={"b": (70, 3)}), _cluster(None)) is None
    replica = Replica(71, 8, Role.PRIMARY, ReplicaState.RUNNING)
    assert in_doubt(_app(replicas={"b": replica}), _cluster(None)) is None
    assert in_doubt(_app(replicas={"b": evolve(replica, role=Role.BACKUP)}), _cluster(None)) == RECORD
    assert in_doubt(_app(replicas={"b": evolve(replica, epoch=7)}), _cluster(None)) == RECORD


def test_without_vouchers_nothing_is_in_doubt() -> None:
    """Such a primary never runs without its lease."""
    assert in_doubt(evolve(_app(), vouchers=None), _cluster(None)) is None
    assert in_doubt(evolve(_app(), vouchers=evolve(RECORD, hosts=())), _cluster(None)) is None


def test_promises() -> None:
    """One holds from when it was given; a WatchDog that has just started waits for those it does not know."""
    promises = Promises(began_at=100.0)
    assert promises.free_at("shop") == 100.0 + VOUCH_S
    assert promises.give("shop", 103.0) == 103.0 + VOUCH_S
    assert promises.free_at("shop") == 103.0 + VOUCH_S
    assert promises.free_at("other") == 100.0 + VOUCH_S


def test_whom_to_ask_while_a_write_is_under_way() -> None:
    """Both sets may stand then; an empty one among them means that anybody may be promoted."""
    assert Backing().hosts == frozenset()
    assert Backing([frozenset("b")]).hosts == {"b"}
    assert Backing([frozenset("b"), frozenset("c")]).hosts == {"b", "c"}
    assert Backing([frozenset(), frozenset("c")]).hosts == frozenset()
    assert Backing([frozenset("b"), frozenset("c")], {"b": "x"}).settled == {}
    assert Backing([frozenset("b")], {"b": "x"}).settled == {"b": "x"}


def test_it_takes_backups() -> None:
    """A single copy has nobody who could vouch for it."""
    with pytest.raises(UsageError, match="degree of 2 or more"):
        Registration("shop", Style.WARM, 1, Program((), "/"), failsafe=True)
