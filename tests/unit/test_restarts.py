"""When a failed application may start again: the formula, in tables and in general."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcdreplica.core.restarts import RestartPolicy, carried_over, restart_delay_s, strikes_after, with_failure, within_window

POLICY = RestartPolicy(settle_s=1.0, free_strikes=2, base_s=0.5, cap_s=30.0)
strikes = st.integers(0, 10_000)
seeds = st.text(max_size=20)


@pytest.mark.parametrize(
    ("before", "uptime_s", "after"),
    [
        (0, None, 1),  # it never began
        (0, 0.0, 1),
        (0, 0.99, 1),
        (0, 1.0, 1),
        (3, None, 4),
        (3, 0.99, 4),
        (3, 1.0, 1),  # healthy: the count begins anew
        (3, 1e9, 1),
    ],
)
def test_strikes(before: int, uptime_s: float | None, after: int) -> None:
    """A failure soon after the start adds a strike, a later one is the first."""
    assert strikes_after(before, uptime_s, POLICY) == after


@pytest.mark.parametrize("count", [0, 1, 2])
def test_free_strikes_cost_nothing(count: int) -> None:
    """An ordinary crash fails over at once."""
    assert restart_delay_s(count, "shop", POLICY) == 0.0


@pytest.mark.parametrize(("count", "longest"), [(3, 0.5), (4, 1.0), (5, 2.0), (6, 4.0), (8, 16.0), (9, 30.0), (50, 30.0)])
def test_delay_doubles_up_to_the_cap(count: int, longest: float) -> None:
    """Each further strike doubles the wait, shortened by at most a quarter."""
    assert 0.75 * longest < restart_delay_s(count, "shop", POLICY) <= longest


@given(strikes, seeds)
def test_delay_is_bounded(count: int, seed: str) -> None:
    """However many strikes, the wait is finite, not negative and at most the cap."""
    assert 0.0 <= restart_delay_s(count, seed, POLICY) <= POLICY.cap_s


@given(st.integers(3, 8), seeds)
def test_delay_grows_before_the_cap(count: int, seed: str) -> None:
    """The jitter never makes a later wait shorter than an earlier one."""
    assert restart_delay_s(count, seed, POLICY) < restart_delay_s(count + 1, seed, POLICY)


def test_applications_are_spread() -> None:
    """Those that failed together do not all start together."""
    assert len({restart_delay_s(5, f"app-{number}", POLICY) for number in range(50)}) > 25


@given(strikes, seeds)
def test_delay_is_not_left_to_chance(count: int, seed: str) -> None:
    """Two managers come to the same wait."""
    assert restart_delay_s(count, seed, POLICY) == restart_delay_s(count, seed, POLICY)


# --- the window --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "left"),
    [(100.0, {1, 2, 3}), (109.9, {1, 2, 3}), (110.0, {2, 3}), (114.9, {2, 3}), (115.0, {3}), (120.0, set())],
)
def test_failures_leave_the_window(now: float, left: set[int]) -> None:
    """Each counts for as long as the window is, and no longer."""
    assert set(within_window({1: 100.0, 2: 105.0, 3: 110.0}, now, 10.0)) == left


def test_a_failure_is_counted_once() -> None:
    """And at the time at which it was first seen."""
    assert with_failure({7: 100.0}, 7, 105.0, 5) == {7: 100.0}
    assert with_failure({7: 100.0}, 8, 105.0, 5) == {7: 100.0, 8: 105.0}


def test_only_the_newest_failures_are_kept() -> None:
    """More than would park it need not be remembered."""
    times: dict[int, float] = {}
    for number in range(100):
        times = with_failure(times, number, float(number), 3)
    assert times == {97: 97.0, 98: 98.0, 99: 99.0}


@given(st.integers(0, 50), st.integers(1, 10_000))
def test_carried_over_failures_are_no_incarnations(count: int, incarnation: int) -> None:
    """What an earlier manager counted cannot be mistaken for a failure of today."""
    carried = carried_over(count, 5.0)
    assert len(carried) == count
    assert len(with_failure(carried, incarnation, 6.0, 100)) == count + 1
