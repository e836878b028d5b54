"""Keys and records as bytes: round trips, what cannot be read, and keys that nobody of ours wrote."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcdreplica.errors import UsageError
from etcdreplica.model import (
    Ask,
    Assignment,
    AssignmentState,
    Checkpoint,
    Drain,
    Event,
    Failure,
    FailureKind,
    Host,
    InSync,
    Leader,
    Leaving,
    Member,
    Origin,
    Override,
    Pause,
    Placement,
    Probe,
    Program,
    Registration,
    Replica,
    ReplicaState,
    Request,
    Seat,
    Server,
    Succession,
    Vouchers,
)
from etcdreplica.store.keys import RECORDS, Corrupt, Key, Keyspace, Kind, decode, encode
from etcdreplica.words import Failover, Keep, Role, Style

PROGRAM = Program(("python", "naïve.py", ""), "/srv", {"A": "1"}, ("/srv/naïve.py",))
FAILURE = Failure("a", 7, 5, Role.PRIMARY, FailureKind.EXIT, "böse\n\x00\u2028", "a", 0.25, 1.5, 1e9)
NAMES: dict[Kind, tuple[str, ...]] = {
    Kind.HOSTS: ("a",),
    Kind.REGISTRATIONS: ("shop",),
    Kind.ASSIGNMENTS: ("shop",),
    Kind.PLACEMENTS: ("a", "shop"),
    Kind.SUCCESSIONS: ("a", "shop"),
    Kind.REPLICAS: ("shop", "a"),
    Kind.FAILURES: ("shop", "7"),
    Kind.HISTORY: ("shop", "7"),
    Kind.LEADERS: ("manager", "694d8a1b"),
    Kind.PAUSES: ("app", "shop"),
    Kind.REQUESTS: ("shop",),
    Kind.DRAINS: ("a",),
    Kind.CHECKPOINTS: ("shop",),
    Kind.IN_SYNC: ("shop",),
    Kind.VOUCHERS: ("shop",),
    Kind.ORIGIN: ("shop",),
    Kind.SERVERS: ("a",),
    Kind.VOUCHERS: ("shop",),
}
LEAST: dict[Kind, Any] = {
    Kind.HOSTS: Host("10.0.0.1", 1),
    Kind.REGISTRATIONS: Registration("shop", Style.COLD, 1, Program((), "")),
    Kind.ASSIGNMENTS: Assignment(1, 1, 1, AssignmentState.PENDING),
    Kind.PLACEMENTS: Placement(Role.BACKUP, 5, 7, 1),
    Kind.SUCCESSIONS: Succession(6, 7),
    Kind.REPLICAS: Replica(7, 5, Role.BACKUP, ReplicaState.STARTING),
    Kind.FAILURES: Failure("a", 7, 5, Role.BACKUP, FailureKind.HOST, "", "b"),
    Kind.HISTORY: Event(FAILURE, 6, None, "", 0.0),
    Kind.LEADERS: Leader("a", 1),
    Kind.PAUSES: Pause("ann"),
    Kind.REQUESTS: Request(Ask.STOP, "ann"),
    Kind.DRAINS: Drain("ann"),
    Kind.CHECKPOINTS: Checkpoint(5, 1, "", 0, ()),
    Kind.IN_SYNC: InSync(5, 7, ()),
    Kind.VOUCHERS: Vouchers(5, 7, "a", 3, ()),
    Kind.ORIGIN: Origin("1f"),
    Kind.SERVERS: Server("10.0.0.1:7002", 1),
    Kind.VOUCHERS: Vouchers(5, 7, "a", 1, ()),
}
FULL: dict[Kind, Any] = {
    Kind.HOSTS: Host("10.0.0.1", 1, {"zone": "x"}, 5, "0.1.0", 1e9, "10.0.0.1:7001"),
    Kind.REGISTRATIONS: Registration(
        name="shop",
        style=Style.HOT,
        degree=2,
        program=PROGRAM,
        hosts=("a", "b"),
        labels={"disk": "ssd"},
        keep=Keep.ALWAYS,
        stop_timeout_s=0.5,
        overrides={"a": Override(("x",), "py", "/opt", {"C": "3"})},
        origin="a",
        hang_timeout_s=0.0,
        start_timeout_s=5.0,
        probes=(Probe("tcp:80", 1.0, 0.5, 2, 0.0), Probe("exec:true")),
        restarts_here=1,
        max_restarts=0,
        restart_window_s=60.0,
        failover=Failover.FAST,
        object=True,
        min_in_sync=2,
        durable=True,
    ),
    Kind.ASSIGNMENTS: Assignment(
        epoch=2**62,
        incarnation=2**62,
        registration_revision=3,
        state=AssignmentState.ACTIVE,
        primary=Seat("a", 1, 7),
        backups=(Seat("b", 2, 8), Seat("c", 3, 9)),
        successor="b",
        degraded=True,
        paused=True,
        reason="böse",
        strikes=3,
        refusals={"d": "no program"},
        changed_wall=1e9,
        born=2**61,
        leaving=Leaving("switchover", "b", at_once=True),
    ),
    Kind.PLACEMENTS: Placement(Role.PRIMARY, 5, 7, 1, "b", ("b", "c"), 4, True, Leaving("switchover", "b"), 3, "a"),
    Kind.SUCCESSIONS: Succession(6, 7, InSync(5, 7, (Member("a", 7), Member("b", 8))), 99),
    Kind.REPLICAS: Replica(7, 5, Role.PRIMARY, ReplicaState.RUNNING, 42, "tcp:1", "b", 1.0, 2.0, 3.0, 4.0, "10.0.0.1:7003"),
    Kind.FAILURES: FAILURE,
    Kind.HISTORY: Event(FAILURE, 6, "b", "b promoted", 1e9),
    Kind.LEADERS: Leader("a", 1),
    Kind.PAUSES: Pause("ann", "new disks", 1e9),
    Kind.REQUESTS: Request(Ask.FAILOVER, "ann", 2**62, "b", 1e9),
    Kind.DRAINS: Drain("ann", "new disks", 1e9),
    Kind.CHECKPOINTS: Checkpoint(2**62, 2**62, "0a" * 16, 2**40, ("a", "b"), 1e9),
    Kind.IN_SYNC: InSync(2**62, 2**62, (Member("a", 2**62), Member("b", 8))),
    Kind.VOUCHERS: Vouchers(2**62, 2**62, "a", 2**60, ("b", "c")),
    Kind.ORIGIN: Origin("1f", "1e", 2**60, "ann@a"),
    Kind.SERVERS: Server("10.0.0.1:7002", 1, "0.1.0", {"shop": "5-1: its header is damaged"}),
    Kind.VOUCHERS: Vouchers(2**62, 2**62, "a", 2**62, ("b", "c")),
}


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("records", [LEAST, FULL], ids=["least", "full"])
def test_every_record_survives_the_round_trip(kind: Kind, records: dict[Kind, Any]) -> None:
    """What is read is what was written, of the same type."""
    record, key = records[kind], Key(kind, NAMES[kind])
    found = decode(key, encode(record))
    assert type(found) is RECORDS[kind]
    assert found == record
    if kind is Kind.ASSIGNMENTS:
        assert found.changed_wall == record.changed_wall


@pytest.mark.parametrize("kind", Kind)
def test_unknown_fields_are_ignored(kind: Kind) -> None:
    """A newer version may write more."""
    record, key = FULL[kind], Key(kind, NAMES[kind])
    assert decode(key, encode(record)[:-1] + b',"from_the_future":[1,{}]}') == record


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("data", [b"", b"{", b"null", b"[]", b"{}", b'"a"', b"\xff\xfe", b'{"a":"\\ud800"}', b"[" * 100_000])
def test_what_cannot_be_read_is_corrupt_and_names_its_key(kind: Kind, data: bytes) -> None:
    """No exception leaves, whatever stands there."""
    key = Key(kind, NAMES[kind])
    found = decode(key, data)
    assert isinstance(found, Corrupt)
    assert str(key) in found.error
    assert "corrupt" in found.error


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"degree":2', b'"degree":0'),
        (b'"degree":2', b'"degree":true'),
        (b'"degree":2', b'"degree":"2"'),
        (b'"style":"hot"', b'"style":"lukewarm"'),
        (b'"name":"shop"', b'"name":"a/b"'),
        (b'"hosts":["a","b"]', b'"hosts":["a","../b"]'),
        (b'"hosts":["a","b"]', b'"hosts":["a"]'),
        (b'"stop_timeout_s":0.5', b'"stop_timeout_s":-1'),
        (b'"min_in_sync":2', b'"min_in_sync":3'),
        (b'"object":true', b'"object":false'),
    ],
)
def test_rules_hold_for_what_is_read_too(old: bytes, new: bytes) -> None:
    """A registration that could not be made here cannot come from etcd either."""
    data = encode(FULL[Kind.REGISTRATIONS])
    assert old in data
    assert isinstance(decode(Key(Kind.REGISTRATIONS, ("shop",)), data.replace(old, new)), Corrupt)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_record_or_corrupt(data: bytes) -> None:
    """Decoding never raises."""
    assert isinstance(decode(Key(Kind.SUCCESSIONS, ("a", "shop")), data), Succession | Corrupt)


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_any_text_survives(text: str) -> None:
    """Reasons are whatever programs say."""
    failure = Failure("a", 7, 5, Role.PRIMARY, FailureKind.EXIT, text, "a")
    assert decode(Key(Kind.FAILURES, ("shop", "7")), encode(failure)) == failure


def test_report_of_unprintable_last_words_can_be_written() -> None:
    """A body may raise an error whose text has lone surrogates, as undecodable file names do; its death must be reported."""
    failure = Failure("a", 7, 5, Role.PRIMARY, FailureKind.EXIT, "cannot open caf\udce9", "a")
    found = decode(Key(Kind.FAILURES, ("shop", "7")), encode(failure))
    assert isinstance(found, Failure)
    assert found.reason.startswith("cannot open caf")


# --- keys ----------------------------------------------------------------------------------------------------------------

KEYS = Keyspace("test")


@pytest.mark.parametrize("kind", Kind)
def test_every_key_survives_the_round_trip(kind: Kind) -> None:
    """The path of a key is parsed back to it."""
    key = Key(kind, NAMES[kind])
    assert KEYS.path(key) == f"/etcdreplica/test/{kind}/{'/'.join(NAMES[kind])}".encode()
    assert KEYS.parse(KEYS.path(key)) == key


@pytest.mark.parametrize(
    "path",
    [
        b"",
        b"/",
        b"hosts",
        b"/etcdreplica/test/",
        b"/etcdreplica/test/hosts",
        b"/etcdreplica/test/unknown/a",
        b"/etcdreplica/test/HOSTS/a",
        b"/etcdreplica/other/hosts/a",
        b"/etcdreplica/testing/hosts/a",
        b"/etcdreplica/test//hosts/a",
        b"\xff\xfe/\x00",
    ],
)
def test_strange_key_is_none_of_ours(path: bytes) -> None:
    """What has no kind, another cluster or an unknown kind is passed over."""
    assert KEYS.parse(path) is None


@pytest.mark.parametrize(
    "tail",
    [
        "hosts/",
        "hosts/a/b",
        "registrations/shop/extra",
        "assignments/",
        "placements/a",
        "successions/a",
        "replicas/shop",
        "replicas/shop/",
        "replicas/shop/a/b",
        "failures/shop",
        "failures/shop/seven",
        "failures/shop/7/8",
        "history/shop/",
        "history/shop/x1",
    ],
)
def test_key_of_the_wrong_shape_is_none_of_ours(tail: str) -> None:
    """A known kind with names too few, too many, empty, or not a number where one belongs, must end no daemon's loop."""
    assert KEYS.parse(f"/etcdreplica/test/{tail}".encode()) is None


def test_prefixes() -> None:
    """A prefix ends with a slash, so that `shop` does not include `shop2`."""
    assert KEYS.prefix() == b"/etcdreplica/test/"
    assert KEYS.prefix(Kind.HOSTS) == b"/etcdreplica/test/hosts/"
    assert KEYS.prefix(Kind.REPLICAS, "shop") == b"/etcdreplica/test/replicas/shop/"
    assert KEYS.path(Key(Kind.REPLICAS, ("shop2", "a"))).startswith(KEYS.prefix(Kind.REPLICAS, "shop")) is False


@pytest.mark.parametrize("cluster", ["", "a/b", "../x", "a b"])
def test_bad_cluster_name(cluster: str) -> None:
    """A cluster name must not lead out of its prefix."""
    with pytest.raises(UsageError, match="bad cluster name"):
        Keyspace(cluster)
