"""Who holds a checkpoint, and what may be acknowledged and restored: each rule on its own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcdreplica.core.holders import NOTHING, acknowledged, durable, enough, may_restore, next_holders
from etcdreplica.model import Stamp

OLD, NEW, NEWER = Stamp(3, 9), Stamp(4, 1), Stamp(4, 2)

stamps = st.builds(Stamp, st.integers(0, 3), st.integers(0, 3))
hosts = st.frozensets(st.sampled_from("abcd"))
helds = st.dictionaries(st.sampled_from("abcd"), stamps)


@pytest.mark.parametrize(
    ("holders", "held", "stamp"),
    [
        ("", {}, NOTHING),
        ("", {"a": NEW}, NOTHING),
        ("a", {}, NOTHING),
        ("a", {"a": NEW}, NEW),
        ("ab", {"a": NEW}, NOTHING),
        ("ab", {"a": NEW, "b": OLD}, OLD),
        ("ab", {"a": NEW, "b": NEWER, "c": OLD}, NEW),
    ],
)
def test_durable(holders: str, held: dict[str, Stamp], stamp: Stamp) -> None:
    """Only what every holder has is durable; others do not matter."""
    assert durable(holders, held) == stamp


@pytest.mark.parametrize(
    ("holders", "changing", "copies", "stamp"),
    [
        ("", "", 1, NOTHING),
        ("a", "", 1, NEWER),
        ("a", "", 2, NOTHING),
        ("ab", "", 2, NEW),
        ("ab", "", 1, NEW),
        ("ab", "", 3, NOTHING),
        ("ab", "abc", 2, OLD),
        ("ab", "a", 2, NEW),
        ("ab", "abd", 2, NOTHING),
        ("a", "ab", 2, NOTHING),
    ],
)
def test_acknowledged(holders: str, changing: str, copies: int, stamp: Stamp) -> None:
    """There must be as many holders as copies, and all of them, and of a set that may stand in etcd by now, must have it."""
    held = {"a": NEWER, "b": NEW, "c": OLD}
    assert acknowledged(frozenset(holders), frozenset(changing), held, copies) == stamp


@given(hosts, hosts, helds, st.integers(1, 4))
def test_acknowledged_is_durable_on_each(
    holders: frozenset[str], changing: frozenset[str], held: dict[str, Stamp], copies: int
) -> None:
    """Whatever is acknowledged is on every host of both sets."""
    stamp = acknowledged(holders, changing, held, copies)
    assert all(held.get(host, NOTHING) >= stamp for host in holders | changing)


@pytest.mark.parametrize(
    ("holders", "seats", "silent", "held", "found"),
    [
        ("", "a", "", {}, None),
        ("", "a", "", {"a": NEW}, "a"),
        ("", "ab", "", {"a": NEW}, "a"),
        ("", "ab", "", {"a": NEW, "b": NEW}, "ab"),
        ("", "ab", "b", {"a": NEW, "b": NEW}, "a"),
        ("ab", "ab", "", {"a": NEW}, None),
        ("ab", "abc", "", {"a": NEW, "c": OLD}, None),
        ("ab", "abc", "", {"a": NEW, "c": NEW}, "abc"),
        ("abc", "ab", "", {"a": NEW, "b": NEW}, "ab"),
        ("abc", "abc", "b", {"a": NEW, "b": NEW}, "ac"),
        ("bc", "ab", "", {"a": NEW, "b": NEW}, "ab"),
        ("bc", "ab", "", {"a": OLD, "b": NEW}, None),
        ("bc", "ab", "", {"b": NEW}, None),
    ],
)
def test_next_holders(holders: str, seats: str, silent: str, held: dict[str, Stamp], found: str | None) -> None:
    """Holders stay while they have a seat and answer; others join with all that was acknowledged; who knows less is silent."""
    expected = None if found is None else frozenset(found)
    assert next_holders("a", frozenset(holders), frozenset(seats), frozenset(silent), held, NEW, 1) == expected


@pytest.mark.parametrize(
    ("holders", "seats", "silent", "found"),
    [
        ("ab", "ab", "b", None),
        ("abc", "abc", "bc", "ab"),
        ("ab", "ac", "", None),
        ("bc", "a", "", "ab"),
        ("cd", "ad", "d", "ad"),
        ("abc", "ad", "", "ab"),
    ],
)
def test_nobody_leaves_before_there_are_enough(holders: str, seats: str, silent: str, found: str | None) -> None:
    """Of two copies that were promised the second is given up only for another one; who has a seat is kept rather."""
    held = {"a": NEW, "b": NEW}
    expected = None if found is None else frozenset(found)
    assert next_holders("a", frozenset(holders), frozenset(seats), frozenset(silent), held, NEW, 2) == expected


@given(hosts, hosts, hosts, helds, stamps, st.integers(0, 4))
def test_next_holders_keep_what_was_acknowledged(
    holders: frozenset[str], seats: frozenset[str], silent: frozenset[str], held: dict[str, Stamp], least: Stamp, copies: int
) -> None:
    """Whoever joins has it, I am among them, there are no fewer than promised if there were as many, and it comes to rest."""
    found = next_holders("a", holders, seats | {"a"}, silent - {"a"}, held, least, copies)
    if found is None:
        return
    assert "a" in found
    assert all(held[host] >= max(least, Stamp(1)) for host in found - holders)
    assert len(found) >= min(copies, len(holders))
    assert next_holders("a", found, seats | {"a"}, silent - {"a"}, held, least, copies) is None


@pytest.mark.parametrize(
    ("holders", "here", "damaged", "may"),
    [
        ("", NOTHING, False, True),
        ("", OLD, True, True),
        ("ab", NEW, False, True),
        ("ab", NEWER, False, True),
        ("ab", OLD, False, False),
        ("ab", NOTHING, False, False),
        ("ab", NEW, True, False),
        ("bc", NEWER, False, False),
    ],
)
def test_may_restore(holders: str, here: Stamp, damaged: bool, may: bool) -> None:
    """Without asking only a holder that has lost nothing may, or anybody while nothing was ever acknowledged."""
    assert may_restore("a", frozenset(holders), here, NEW, damaged=damaged) is may


@pytest.mark.parametrize(
    ("answers", "lossy", "is_enough"),
    [
        ({}, "", False),
        ({"c": NEWER}, "", False),
        ({"a": OLD}, "", False),
        ({"a": NEW}, "", True),
        ({"a": NEW}, "a", False),
        ({"a": OLD, "b": OLD}, "", True),
        ({"a": NOTHING, "b": NOTHING}, "ab", True),
        ({"a": OLD, "b": NEW}, "a", True),
    ],
)
def test_enough(answers: dict[str, Stamp], lossy: str, is_enough: bool) -> None:
    """One holder that has lost nothing knows all that was acknowledged; otherwise all of them know what is left of it."""
    assert enough(frozenset("ab"), answers, frozenset(lossy), NEW) is is_enough


def test_without_holders_there_is_nothing_to_know() -> None:
    """Then any answer is enough, also none."""
    assert enough(frozenset(), {}, frozenset(), NOTHING)
