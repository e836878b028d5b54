"""The classes of docs/examples, without any cluster: a replicated object is an ordinary class."""

from __future__ import annotations

import job_queue
import pytest
from job_queue import JobQueue
from ledger import Ledger


class Clock:
    """Stands for `etcdreplica.replica`, of which the queue uses only the clock."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        """Return the time."""
        return self.time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock for the queue that this test moves."""
    clock = Clock()
    monkeypatch.setattr(job_queue, "replica", clock)
    return clock


def test_ledger() -> None:
    """Deposits and transfers add up."""
    ledger = Ledger()
    assert ledger.deposit("ann", 5) == 5
    assert ledger.deposit("ann", 2) == 7
    ledger.transfer("ann", "bob", 3)
    assert (ledger.balance("ann"), ledger.balance("bob"), ledger.total()) == (4, 3, 7)


@pytest.mark.parametrize("amount", [-1, 0, 6])
def test_refused_transfers_change_nothing(amount: int) -> None:
    """An update that raises has changed nothing before."""
    ledger = Ledger()
    ledger.deposit("ann", 5)
    with pytest.raises(ValueError, match=str(amount)):
        ledger.transfer("ann", "bob", amount)
    assert ledger.accounts == {"ann": 5}


def test_jobs_are_handed_out_in_order_and_once(clock: Clock) -> None:
    """While no lease has ended."""
    jobs = JobQueue()
    assert [jobs.put(key, key.upper()) for key in "abca"] == [True, True, True, False]
    taken = [jobs.take("w") for _ in range(4)]
    assert [job and (job["key"], job["ticket"], job["payload"]) for job in taken] == [
        ("a", 1, "A"),
        ("b", 2, "B"),
        ("c", 3, "C"),
        None,
    ]
    assert jobs.finish("b", 2, "result")
    assert jobs.result("b") == "result"
    assert not jobs.put("b", "again")
    assert jobs.counts() == {"waiting": 0, "taken": 2, "done": 1}


def test_a_job_is_handed_out_again_when_its_lease_has_ended(clock: Clock) -> None:
    """Whoever had it before can do nothing with it any more."""
    jobs = JobQueue(30.0)
    jobs.put("a", None)
    assert jobs.take("first") == {"key": "a", "ticket": 1, "payload": None}
    clock.time += 29.9
    assert jobs.take("second") is None
    clock.time += 0.1
    assert jobs.take("second") == {"key": "a", "ticket": 2, "payload": None}
    assert not jobs.finish("a", 1, "late")
    assert not jobs.extend("a", 1)
    assert jobs.finish("a", 2, "in time")
    assert not jobs.finish("a", 2, "twice")
    assert jobs.result("a") == "in time"


def test_a_lease_can_be_extended(clock: Clock) -> None:
    """Then others' leases end first."""
    jobs = JobQueue(30.0)
    jobs.put("a", None)
    jobs.put("b", None)
    jobs.take("w")
    jobs.take("w")
    clock.time += 20
    assert jobs.extend("a", 1)
    clock.time += 20
    again = jobs.take("v")
    assert again is not None
    assert again["key"] == "b"
    assert jobs.take("v") is None


def test_a_lease_that_has_ended_counts_until_the_job_is_taken_anew(clock: Clock) -> None:
    """A late worker is not refused for nothing."""
    jobs = JobQueue(30.0)
    jobs.put("a", None)
    jobs.take("w")
    clock.time += 60
    assert jobs.finish("a", 1, "late, but first")


def test_only_so_many_results_are_kept(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go first."""
    monkeypatch.setattr(job_queue, "RESULTS", 2)
    jobs = JobQueue()
    for ticket, key in enumerate("abc", 1):
        jobs.put(key, None)
        jobs.take("w")
        jobs.finish(key, ticket, key)
    assert [jobs.result(key) for key in "abc"] == [None, "b", "c"]
