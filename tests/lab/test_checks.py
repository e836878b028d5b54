"""The checkers of the lab find what is wrong: each is shown a story with one lie in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from etcdreplica.model import Event, Failure, FailureKind
from etcdreplica.words import Role
from tests.lab.checks import AFTERMATH_S, Hit, Journal, lost_checkpoints, lost_tokens, needless

TOLD = "try 1\ndone 1\ntry 2\nunknown 2\ntry 3\ndone 3\ntry 4\n"
STORED = "restored 5 0\nacknowledged 5 1\nacknowledged 5 2\nrefused 5 3\nrestored 6 2\nacknowledged 6 3\n"


@pytest.mark.parametrize("held", [[1, 3], [1, 2, 3], [1, 3, 2], [1, 3, 4]], ids=str)
def test_tokens_that_can_be(tmp_path: Path, held: list[int]) -> None:
    """What was acknowledged is there; what was not may be, also late."""
    (tmp_path / "journal").write_text(TOLD)
    assert lost_tokens("client", Journal(tmp_path / "journal"), held) == []


@pytest.mark.parametrize(
    ("held", "words"),
    [([1], "lost"), ([1, 2, 2, 3], "more than once"), ([1, 3, 9], "nobody made"), ([3, 1], "order")],
    ids=["lost", "twice", "strange", "order"],
)
def test_tokens_that_cannot_be(tmp_path: Path, held: list[int], words: str) -> None:
    """One lie, one finding."""
    (tmp_path / "journal").write_text(TOLD)
    (found,) = lost_tokens("client", Journal(tmp_path / "journal"), held)
    assert words in found


def test_checkpoints_that_can_be(tmp_path: Path) -> None:
    """Newer than what was acknowledged is right as well."""
    (tmp_path / "journal").write_text(STORED + "restored 7 4\nacknowledged 7 5\n")
    assert lost_checkpoints("writer", tmp_path / "journal") == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("restored 7 2", "was acknowledged"),
        ("acknowledged 6 3", "was acknowledged in epoch"),
        ("refused 5 9", "wrote after"),
    ],
    ids=["lost", "twice", "deposed"],
)
def test_checkpoints_that_cannot_be(tmp_path: Path, line: str, words: str) -> None:
    """One lie, one finding."""
    (tmp_path / "journal").write_text(STORED + line + "\n")
    (found,) = lost_checkpoints("writer", tmp_path / "journal")
    assert words in found


@pytest.mark.parametrize(
    ("host", "at", "kind", "is_needless"),
    [
        ("a", 12.0, FailureKind.EXIT, False),
        ("b", 12.0, FailureKind.EXIT, True),
        ("a", 9.0, FailureKind.EXIT, True),
        ("a", 21.0 + AFTERMATH_S, FailureKind.EXIT, True),
        ("b", 12.0, FailureKind.HANDOVER, False),
        ("b", 1.0, FailureKind.EXIT, False),
    ],
    ids=["hit", "another host", "before it", "long after it", "planned", "before the series"],
)
def test_ends_of_copies(host: str, at: float, kind: FailureKind, is_needless: bool) -> None:
    """Only a fault on that host, at that time, explains one."""
    failure = Failure(host, 7, 5, Role.PRIMARY, kind, "", host, detected_at=at)
    hits = [Hit("cable out", frozenset({"a"}), 10.0, 20.0), Hit("etcd leader killed", frozenset(), 1.0, 100.0)]
    assert bool(needless({("app", 7): Event(failure, 6, None, "", 0.0)}, hits, since=2.0)) == is_needless
