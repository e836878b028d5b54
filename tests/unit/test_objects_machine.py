"""The machine of an object: sessions, errors as results, snapshots, digests, chance and time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import attrs
import msgspec
import pytest

from etcdreplica import query, replica, update
from etcdreplica.app.state import Codec
from etcdreplica.errors import CheckpointError, DivergedError, UsageError
from etcdreplica.objects import machine as machine_module
from etcdreplica.objects.machine import BARRIER, CALLS, CHECK, TICK, Machine, canonical, record_of
from etcdreplica.objects.wire import DONE, EXPIRED, NO_METHOD, RAISED, Call, Calls, encode_value

ONE, OTHER = b"1" * 16, b"2" * 16


@dataclass
class Item:
    """As a dataclass."""

    name: str
    tags: set[str]


@attrs.define
class Account:
    """As attrs makes it."""

    balance: int = 0


@dataclass(eq=False)
class Equal:
    """Equal only to itself."""

    value: int = 0


class Hidden:
    """An ordinary class, as pickle takes it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


class Store:
    """Of everything a little."""

    items: dict[int, Item]
    accounts: dict[str, Account]
    pair: tuple[int, str]
    seen: set[str]

    def __init__(self) -> None:
        self.items = {}
        self.accounts = {}
        self.pair = (0, "")
        self.seen = set()
        self.calls: list[Any] = []

    @update
    def put(self, name: str, number: int = 0, *, tag: str = "") -> int:
        """Put an item."""
        self.items[number] = Item(name, {tag})
        self.accounts.setdefault(name, Account()).balance += 1
        self.pair = (number, name)
        self.seen.add(name)
        return len(self.items)

    @update
    def call(self, entry: object) -> int:
        """Note a call."""
        self.calls.append(entry)
        return len(self.calls)

    @update
    def fail(self, kind: str) -> object:
        """Change something, and then raise or return something odd."""
        self.calls.append(kind)
        if kind == "value":
            raise ValueError("no", 1)
        if kind == "odd":
            raise KeyError(object())
        if kind == "text":
            raise BadText
        return object()

    @update
    def chance(self) -> list[object]:
        """Depend on chance and time."""
        return [replica.now(), replica.random(), replica.new_id(), replica.rng().randrange(1000)]

    @query
    def count(self) -> int:
        """Count."""
        return len(self.calls)


class BadText(Exception):  # noqa: N818
    """One that cannot be turned into text."""

    def __str__(self) -> str:
        raise RuntimeError


def begun(cls: type[Any] = Store, codec: str = "msgpack") -> Machine:
    """Return the first copy."""
    machine = Machine(cls, Codec(codec))
    machine.begin(5.0)
    return machine


def calls(*entries: Call, session: bytes = ONE, new: bool = True, below: int = 1, time: float = 0.0) -> bytes:
    """Return a record."""
    return record_of(CALLS, time, encode_value(Calls(session, new, below, list(entries))))


def note(number: int, entry: object = "x") -> Call:
    """Return a call."""
    return number, "call", [entry], None


def outcomes(results: list[Any]) -> list[tuple[int, int, Any]]:
    """Return results as values."""
    return [(number, code, msgspec.msgpack.decode(value)) for number, code, value in results]


def test_a_call_that_comes_again_is_answered_as_before() -> None:
    """Once applied, in one message or in another, it is not applied again."""
    machine = begun()
    assert outcomes(machine.apply(calls(note(1), note(1), note(3)))) == [(1, DONE, 1), (1, DONE, 1), (3, DONE, 2)]
    assert outcomes(machine.apply(calls(note(3), note(4), new=False))) == [(3, DONE, 2), (4, DONE, 3)]
    assert machine.instance.calls == ["x"] * 3


def test_calls_may_come_out_of_order() -> None:
    """One that was refused and comes again after a later one is applied; what lies below what is waited for is not."""
    machine = begun()
    machine.apply(calls(note(5)))
    assert outcomes(machine.apply(calls(note(4), note(0), note(-1)))) == [(4, DONE, 2), (0, EXPIRED, None), (-1, EXPIRED, None)]
    assert machine.instance.calls == ["x"] * 2


@pytest.mark.parametrize("below", [2, 3, 100, 200])
def test_answers_below_are_forgotten(below: int) -> None:
    """What the client waits for no longer is not kept, and not applied again either."""
    machine = begun()
    machine.apply(calls(note(1), note(2)))
    machine.apply(calls(note(200), below=below))
    session = machine.sessions[ONE]
    assert sorted(session.done) == [number for number in (1, 2, 200) if number >= below]
    assert outcomes(machine.apply(calls(note(1), below=1))) == [(1, EXPIRED, None)]
    assert session.below == below


def test_an_unknown_session_is_only_begun_by_a_new_client() -> None:
    """Else what it sends might have been applied before its session was forgotten."""
    machine = begun()
    (number, code, _), *more = outcomes(machine.apply(calls(note(7), new=False)))
    assert (number, more) == (7, [])
    assert code not in (DONE, RAISED)
    assert not machine.sessions
    assert not machine.instance.calls


def test_sessions_expire_by_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was used meanwhile stays."""
    monkeypatch.setattr(machine_module, "SESSION_TICKS", 2)
    machine = begun()
    machine.apply(calls(note(1), session=ONE))
    machine.apply(calls(note(1), session=OTHER))
    for number in range(2, 5):
        machine.apply(record_of(TICK, 0.0))
        machine.apply(calls(note(number), session=ONE))
    assert list(machine.sessions) == [ONE]


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("value", ["builtins", "ValueError", "('no', 1)", ["no", 1]]),
        ("text", [__name__, "BadText", "(an error whose text cannot be had)", None]),
    ],
)
def test_errors_are_results(kind: str, wanted: list[object]) -> None:
    """What a method raises is its answer, and is kept as such."""
    machine = begun()
    for _ in range(2):
        assert outcomes(machine.apply(calls((1, "fail", [kind], None)))) == [(1, RAISED, wanted)]
    assert machine.instance.calls == [kind]


def test_what_cannot_be_sent_is_an_error() -> None:
    """Of a return value it says so; of the arguments of an error it is left out."""
    machine = begun()
    ((_, code, value),) = outcomes(machine.apply(calls((1, "fail", ["return"], None))))
    assert (code, value[:2]) == (RAISED, ["etcdreplica.errors", "UsageError"])
    assert "what fail returned cannot be sent" in value[2]
    ((_, code, value),) = outcomes(machine.apply(calls((2, "fail", ["odd"], None))))
    assert (code, value[1], value[3]) == (RAISED, "KeyError", None)


@pytest.mark.parametrize(
    ("call", "fits"),
    [
        ((1, "put", ["a"], None), True),
        ((1, "put", ["a", 1], {"tag": "t"}), True),
        ((1, "put", [], {"name": "a"}), True),
        ((1, "put", [], None), False),
        ((1, "put", ["a", 1, "t"], None), False),
        ((1, "put", ["a"], {"name": "a"}), False),
        ((1, "put", ["a"], {"self": 1}), False),
        ((1, "count", [], None), False),
        ((1, "missing", [], None), False),
        ((1, "__init__", [], None), False),
    ],
)
def test_arguments_that_do_not_fit(call: Call, fits: bool) -> None:
    """They are not accepted; a copy that finds them in the log has another class."""
    machine = begun()
    assert machine.accepts(call, "update") is fits
    if not fits:
        with pytest.raises(DivergedError, match="run the same version"):
            machine.apply(calls(call))


def test_queries_are_answered_or_not_known() -> None:
    """An update is no query."""
    machine = begun()
    assert outcomes([machine.ask((3, "count", [], None))]) == [(3, DONE, 0)]
    assert outcomes([machine.ask((4, "call", [1], None))]) == [(4, NO_METHOD, None)]


@pytest.mark.parametrize("record", [record_of(9, 0.0), record_of(CALLS, 0.0, encode_value([5, [], None]))])
def test_records_of_unknown_kinds(record: bytes) -> None:
    """They are an error, never skipped."""
    with pytest.raises(DivergedError):
        begun().apply(record)


def test_time_never_goes_back() -> None:
    """Whatever the clocks of primaries say."""
    machine = begun()
    for time, wanted in ((7.0, 7.0), (6.0, 7.0), (8.0, 8.0)):
        machine.apply(record_of(BARRIER, time))
        assert machine.time == wanted


def test_chance_is_the_same_on_all_copies() -> None:
    """Now, random and new_id follow from the log; each update has its own."""
    one, other = begun(), Machine(Store, Codec())
    other.load(one.snapshot())
    record = calls((1, "chance", [], None), (2, "chance", [], None), time=9.0)
    answers = outcomes(one.apply(record))
    assert answers == outcomes(other.apply(record))
    assert answers[0][2][0] == answers[1][2][0] == 9.0
    assert all(a != b for a, b in zip(answers[0][2][1:], answers[1][2][1:], strict=True))
    again = begun()
    assert outcomes(again.apply(record))[0][2][2] != answers[0][2][2], "another object has other ids"
    with pytest.raises(UsageError, match="nothing is being applied"):
        replica.now()


def test_snapshots_bring_everything_back() -> None:
    """Types by the annotations, and what was answered."""
    one, other = begun(), Machine(Store, Codec())
    one.apply(calls((1, "put", ["ann", 7], {"tag": "t"}), (2, "fail", ["value"], None), time=11.0))
    one.check_state()
    other.load(one.snapshot())
    assert vars(other.instance) == vars(one.instance)
    assert (other.index, other.time, other.history) == (1, 11.0, one.history)
    assert other.digest() == one.digest()
    again = calls((1, "put", ["bob"], None), (2, "fail", ["value"], None))
    assert outcomes(one.apply(again)) == outcomes(other.apply(again))
    assert one.snapshot() == other.snapshot()


@pytest.mark.parametrize("data", [b"", b"\xc1", encode_value([1, 2]), b"\x90" * 100])
def test_what_is_no_snapshot(data: bytes) -> None:
    """It is refused, and the copy is as before."""
    machine = begun()
    with pytest.raises(CheckpointError):
        machine.load(data)
    assert machine.instance.calls == []


def holder(value: object, *, annotation: object = None) -> Machine:
    """Return the machine of a class with this state."""

    class Holder:
        def __init__(self) -> None:
            self.value = value

        @update
        def put(self, value: object) -> None:
            """Replace it."""
            self.value = value

    if annotation is not None:
        Holder.__annotations__ = {"value": annotation}
    return begun(Holder)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ([float("nan")], None),
        ({"a": Equal(1)}, dict[str, Equal]),
        ({1: {2}}, dict[int, set[int]]),
        ((1, (2,)), tuple[int, tuple[int]]),
        (b"bytes", None),
    ],
)
def test_states_that_come_back(value: object, annotation: object) -> None:
    """Also what equals only itself."""
    holder(value, annotation=annotation).check_state()


@pytest.mark.parametrize(
    ("value", "annotation", "error"),
    [
        ((1, 2), None, "annotate it in the body"),
        ({1, 2}, None, "annotate it in the body"),
        ([Account()], None, "annotate it in the body"),
        ({"a": (1,)}, None, "annotate it in the body"),
        ({"a": "text"}, dict[str, int], "not what its annotation says"),
        ([], "Missing", "annotations in the body of Holder cannot be read"),
    ],
)
def test_states_that_would_not_come_back(value: object, annotation: object, error: str) -> None:
    """They are told before a copy needs them."""
    with pytest.raises((UsageError, CheckpointError), match=error):
        holder(value, annotation=annotation).check_state()


def test_a_class_with_slots_needs_its_own_snapshot() -> None:
    """Its state has no names that we could see."""

    @attrs.define
    class Slotted:
        count: int = 0

        @update
        def add(self) -> None:
            """Count."""
            self.count += 1

    with pytest.raises(UsageError, match="has __slots__: give it methods snapshot"):
        begun(Slotted).digest()


ORDERS: list[Callable[[list[Any]], object]] = [
    lambda items: {f"{item}": item for item in items},
    lambda items: dict.fromkeys(items, 1),
    lambda items: {"a": {f"{item}" for item in items}, "b": {1: {(item, "x") for item in items}}},
    lambda items: [{item if item % 2 else str(item) for item in items}],
    lambda items: {1: Item("name", {str(item) for item in items})},
    lambda items: [Hidden("one"), {Hidden: 1}.keys() and dict.fromkeys(items)],
]


@pytest.mark.parametrize("make", ORDERS)
def test_digests_do_not_depend_on_order(make: Callable[[list[Any]], object]) -> None:
    """Dicts and sets have none of their own, at any depth."""
    items = list(range(50))
    wanted = canonical(make(items))
    assert wanted
    for seed in range(5):
        random.Random(seed).shuffle(items)
        assert canonical(make(items)) == wanted
    assert canonical(make([*items, 77])) != wanted


def test_digests_of_pickled_objects_do_not_depend_on_how_they_came() -> None:
    """Equal objects pickle differently when they share parts; a copy from a snapshot shares others than the first one."""

    class Bag:
        def __init__(self) -> None:
            self.items: list[Hidden] = []

        @update
        def add(self) -> None:
            """Add an object with a constant in it."""
            self.items.append(Hidden("a constant"))

    one, other = begun(Bag, "pickle"), Machine(Bag, Codec("pickle"))
    one.apply(calls((1, "add", [], None)))
    other.load(one.snapshot())
    for machine in (one, other):
        machine.apply(calls((2, "add", [], None)))
    assert one.digest() == other.digest()
    one.apply(record_of(CHECK, 0.0))
    one.instance.items[0].kind = "changed"
    assert one.digest() != other.digest()


def test_what_cannot_be_put_in_order_has_no_digest() -> None:
    """A cycle, for one. Copies are not compared then."""
    cycle: list[Any] = []
    cycle.append(cycle)
    assert canonical({"a": cycle}) == b""
