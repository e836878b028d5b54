"""What the answers to a probe mean: counts, the grace, stalls of our own, and when to ask next."""

from __future__ import annotations

from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcdreplica.core.probing import Answer, Asking, after, begin, call_verdict, in_words, is_disturbed, silence_limit_s
from etcdreplica.model import Probe

PROBE = Probe("tcp:6379", interval_s=2.0, timeout_s=1.0, failures=3, grace_s=0.0)
GRACE = Probe("tcp:6379", interval_s=2.0, timeout_s=1.0, failures=3, grace_s=10.0)
answers = st.builds(
    Answer,
    asked_at=st.floats(0, 100),
    at=st.floats(0, 100),
    late_s=st.floats(0, 5),
    reason=st.sampled_from(["", "refused"]),
    asked=st.booleans(),
)


def play(probe: Probe, letters: str, late_s: float = 0.0) -> Asking:
    """Answer once in each interval: g(ood), b(ad), l(ate and bad), n(ot asked)."""
    asking = begin(probe, 0.0)
    for letter in letters:
        at, late = asking.due_at, late_s or 5.0 if letter == "l" else 0.0
        asking = after(asking, Answer(at, at, late, "" if letter in "gn" else "refused", asked=letter != "n"))
    return asking


@pytest.mark.parametrize(
    ("letters", "bad"),
    [
        ("", 0),
        ("g", 0),
        ("b", 1),
        ("bb", 2),
        ("bbg", 0),
        ("bbgb", 1),
        ("bbb", 3),
        ("l", 0),
        ("llll", 0),
        ("blb", 2),  # a stall is neither bad nor good
        ("bnb", 2),
        ("nnnn", 0),
        ("gggbb", 2),
    ],
)
def test_bad_answers_in_a_row(letters: str, bad: int) -> None:
    """They are counted; a good one begins anew, and what says nothing changes nothing."""
    asking = play(PROBE, letters)
    assert asking.bad == bad
    assert bool(asking.hung) == (bad >= 3)


@pytest.mark.parametrize(
    ("letters", "bad"),
    [
        ("bbbb", 0),  # asked at 2, 4, 6, 8
        ("bbbbb", 1),  # and at 10, when the grace is over
        ("bbbbbbb", 3),
        ("gb", 1),  # a good answer ends it
        ("gbbb", 3),
        ("bbgb", 1),
        ("lbbbb", 0),  # a stall of ours makes it longer
        ("lbbbbbb", 0),
        ("lbbbbbbb", 1),
    ],
)
def test_grace(letters: str, bad: int) -> None:
    """Bad answers at the start do not count, until the first good one."""
    assert play(GRACE, letters).bad == bad


def test_a_good_answer_counts_although_it_was_late() -> None:
    """Whoever answers lives."""
    asking = after(play(PROBE, "bb"), Answer(6.0, 9.0, 3.0))
    assert asking.bad == 0


@pytest.mark.parametrize(
    ("asked_at", "at", "due_at"),
    [
        (2.0, 2.0, 4.0),
        (2.0, 3.0, 4.0),
        (2.0, 4.0, 4.0),
        (2.0, 9.0, 9.0),  # at once, and only once
        (100.0, 100.5, 102.0),  # a late loop makes up for nothing
    ],
)
def test_next_question(asked_at: float, at: float, due_at: float) -> None:
    """One interval after the last one was asked, or at once if that has passed."""
    assert after(begin(PROBE, 0.0), Answer(asked_at, at)).due_at == due_at


def test_first_question() -> None:
    """It comes after one interval."""
    assert begin(PROBE, 5.0).due_at == 7.0


@pytest.mark.parametrize(
    ("timeout_s", "late_s", "disturbed"),
    [(1.0, 0.0, False), (1.0, 0.25, False), (1.0, 0.26, True), (0.05, 0.019, False), (0.05, 0.021, True), (10.0, 2.0, False)],
)
def test_what_disturbs_a_question(timeout_s: float, late_s: float, disturbed: bool) -> None:
    """A stall of more than a quarter of the time that the answer may take, and no mere jitter."""
    assert is_disturbed(Probe("tcp:1", timeout_s=timeout_s), late_s) == disturbed


@pytest.mark.parametrize(
    ("bad", "words"),
    [(1, "probe tcp:6379 failed: connection refused"), (3, "probe tcp:6379 failed 3 times in a row: connection refused")],
)
def test_words(bad: int, words: str) -> None:
    """The reason names the probe, how often, and the last error."""
    assert in_words(PROBE, bad, "connection refused") == words


def test_the_last_reason_is_told() -> None:
    """Of several different ones."""
    asking = play(PROBE, "bb")
    asking = after(asking, Answer(6.0, 6.0, reason="HTTP status 500"))
    assert asking.hung == "probe tcp:6379 failed 3 times in a row: HTTP status 500"


@given(st.lists(answers, max_size=20))
def test_hung_needs_that_many_undisturbed_bad_answers_after_the_last_good_one(given_answers: list[Answer]) -> None:
    """Whatever comes, nobody is called hung on less evidence."""
    asking = reduce(after, given_answers, begin(GRACE, 0.0))
    goods = [i for i, answer in enumerate(given_answers) if answer.asked and not answer.reason]
    since = given_answers[goods[-1] + 1 if goods else 0 :]
    evidence = [answer for answer in since if answer.asked and answer.reason and not is_disturbed(GRACE, answer.late_s)]
    assert asking.bad <= len(evidence)


@given(st.lists(answers, max_size=20))
def test_questions_never_pile_up(given_answers: list[Answer]) -> None:
    """The next one is never due before the last answer."""
    for count in range(1, len(given_answers) + 1):
        asking = reduce(after, given_answers[:count], begin(PROBE, 0.0))
        assert asking.due_at >= given_answers[count - 1].at


@pytest.mark.parametrize(
    ("interval_s", "timeout_s", "failures", "limit_s"), [(2.0, 1.0, 3, 7.0), (2.0, 1.0, 1, 3.0), (1.0, 5.0, 2, 11.0)]
)
def test_silence_of_a_call(interval_s: float, timeout_s: float, failures: int, limit_s: float) -> None:
    """As long as a silent server would have, for the same probe."""
    assert silence_limit_s(Probe("call", interval_s, timeout_s, failures)) == limit_s


@pytest.mark.parametrize(
    ("bad", "reason", "silent_s", "verdict"),
    [
        (0, "", 0.0, ""),
        (2, "ValueError: x", 6.9, ""),
        (3, "ValueError: x", 0.0, "probe call failed 3 times in a row: ValueError: x"),
        (0, "", 7.5, "probe call failed: the health function has not returned for 7.5 s"),
        (0, "", -3.0, ""),
    ],
)
def test_verdict_of_a_call(bad: int, reason: str, silent_s: float, verdict: str) -> None:
    """By what the application told, or by its silence."""
    assert call_verdict(Probe("call"), bad=bad, reason=reason, silent_s=silent_s) == verdict
