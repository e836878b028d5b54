"""Which etcd is believed: by name, number and revision; what is remembered across a restart; what a person can accept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from attrs import define

from etcdreplica.errors import EtcdReplacedError
from etcdreplica.model import Origin
from etcdreplica.store import Lineage
from etcdreplica.store.lineage import accepted_origin, first_origin

TTL_S = 5.0
ORIGIN = first_origin()


@define
class Clock:
    """Time that a test sets."""

    now: float = 100.0

    def __call__(self) -> float:
        """Return it."""
        return self.now


def header(revision: int, etcd: int = 7) -> SimpleNamespace:
    """What stands in the header of an answer."""
    return SimpleNamespace(cluster_id=etcd, revision=revision)


def lineage(path: Path | None = None, clock: Clock | None = None, revision: int = 50) -> Lineage:
    """Return what a daemon knows that has worked with an etcd until this revision."""
    made = Lineage(path, TTL_S, clock or Clock())
    made.verify(header(10), ORIGIN, 0)
    made.see(header(revision))
    return made


def test_first_etcd_is_believed() -> None:
    """A daemon that has never seen one has nothing to compare with."""
    assert lineage().revision == 50


def test_same_etcd_is_believed_again() -> None:
    """It is restarted, and has what it had."""
    lineage().verify(header(50), ORIGIN, 50)


@pytest.mark.parametrize(
    ("revision", "etcd", "origin", "words"),
    [
        (60, 7, None, "empty"),
        (60, 7, Origin("another"), "another"),
        (49, 7, ORIGIN, "old backup"),
        (60, 8, ORIGIN, "another etcd cluster"),
        (60, 7, Origin("new", replaces="somebody", floor=10**12), "new"),
        (60, 7, Origin("new", replaces=ORIGIN.id, floor=50), "new"),
    ],
    ids=["empty", "of others", "old", "another cluster", "accepted for others", "floor too low"],
)
def test_other_etcds_are_refused(revision: int, etcd: int, origin: Origin | None, words: str) -> None:
    """The error says what is wrong, and what can be done about it."""
    known = lineage()
    with pytest.raises(EtcdReplacedError, match=words) as caught:
        known.verify(header(revision, etcd), origin, known.revision)
    assert f"accept-etcd {ORIGIN.id}" in str(caught.value)
    assert known.revision == 50
    known.verify(header(51), ORIGIN, 50)  # and the right one is taken as soon as it is back


def test_answers_that_may_be_older_are_not_compared() -> None:
    """Members of etcd may be behind one another in what they send by themselves."""
    known = lineage()
    known.see(header(40))
    assert known.revision == 50
    with pytest.raises(EtcdReplacedError):
        known.see(header(40), at_least=50)
    with pytest.raises(EtcdReplacedError):
        known.see(header(60, etcd=8))


def test_accepted_etcd_is_used_when_the_leases_of_before_are_over() -> None:
    """Not sooner: copies of hosts that have not heard of it may run until then."""
    clock = Clock()
    known, accepted = lineage(clock=clock), accepted_origin(ORIGIN.id, "ann")
    with pytest.raises(EtcdReplacedError):
        known.verify(header(5), ORIGIN, known.revision)
    clock.now += TTL_S - 0.1
    with pytest.raises(EtcdReplacedError, match="accepted"):
        known.verify(header(6), accepted, known.revision)
    clock.now += 0.2
    known.verify(header(7), accepted, known.revision)
    assert known.revision == 7
    with pytest.raises(EtcdReplacedError):  # a backup from before the acceptance
        known.verify(header(60), ORIGIN, known.revision)


def test_next_daemon_remembers(tmp_path: Path) -> None:
    """By the file, which is not older than some seconds."""
    clock = Clock()
    known = lineage(tmp_path / "etcd.json", clock)
    clock.now += 60
    known.see(header(70))
    following = Lineage(tmp_path / "etcd.json", TTL_S, clock)
    assert following.revision == 70
    with pytest.raises(EtcdReplacedError):
        following.verify(header(69), ORIGIN, following.revision)


def test_file_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    """As on a host that is new."""
    (tmp_path / "etcd.json").write_text('{"origin": 7')
    assert Lineage(tmp_path / "etcd.json", TTL_S).known is None
