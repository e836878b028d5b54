"""When a copy counts as silent, and that a judge that was asleep never finds silence."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcdreplica.core.hang import Awake, Silence, look_interval_s, pulse_interval_s

PERIOD_S = 0.05
gaps = st.floats(0.0, 1e6)


@pytest.mark.parametrize(
    ("looks", "time", "lateness"),
    [
        ([7.0], 0.0, 0.0),
        ([7.0, 7.05], 0.05, 0.0),
        ([7.0, 7.1], 0.1, 0.0),
        ([7.0, 8.0], 0.1, 0.9),
        ([7.0, 8.0, 8.05], 0.15, 0.0),
        ([7.0, 7.0], 0.0, 0.0),
        ([7.0, 6.0], 0.0, 0.0),
        ([7.0, 6.0, 6.05], 0.05, 0.0),
        ([7.0, 1e9], 0.1, 1e9 - 7.1),
    ],
)
def test_awake(looks: list[float], time: float, lateness: float) -> None:
    """Of a gap at most two periods count, the rest is lateness; a clock that goes back counts nothing."""
    awake = Awake(PERIOD_S)
    for now in looks:
        found = awake.tick(now)
    assert found == awake.time == pytest.approx(time)
    assert awake.lateness_s == pytest.approx(lateness)


def test_awake_survives_a_clock_that_fails() -> None:
    """One look that is no number counts nothing, and spoils none of those after the next."""
    awake = Awake(PERIOD_S)
    for now in (1.0, math.nan, 2.0):
        assert awake.tick(now) == 0.0
    assert awake.tick(2.0 + PERIOD_S) == pytest.approx(PERIOD_S)


@given(st.lists(gaps, min_size=1, max_size=30))
def test_awake_never_runs_faster_than_the_clock(found: list[float]) -> None:
    """It never goes back, and gains at most the gap and at most two periods in each look."""
    awake, now = Awake(PERIOD_S), 5.0
    before = awake.tick(now)
    for gap in found:
        now += gap
        at = awake.tick(now)
        assert 0.0 <= at - before <= min(gap, 2 * PERIOD_S) + 1e-9
        before = at


@pytest.mark.parametrize(
    ("observed", "silent"),
    [
        ([(1.0, 10.0)], 0.0),
        ([(1.0, 10.0), (1.0, 12.0)], 2.0),
        ([(1.0, 10.0), (2.0, 12.0)], 0.0),
        ([(1.0, 10.0), (2.0, 12.0), (2.0, 15.0)], 3.0),
        ([(2.0, 10.0), (1.0, 12.0)], 0.0),
        ([(0.0, 10.0), (0.0, 99.0)], 0.0),
        ([(0.0, 10.0), (1.0, 99.0)], 0.0),
        ([(1.0, 10.0), (0.0, 12.0), (0.0, 99.0)], 0.0),
        ([(1.0, 10.0), (0.0, 12.0), (1.0, 99.0)], 0.0),
        ([(1.0, 10.0), (0.0, 12.0), (1.0, 99.0), (1.0, 100.0)], 1.0),
        ([(-0.0, 10.0), (-0.0, 99.0)], 0.0),
        ([(-1.0, 10.0), (-1.0, 12.0)], 2.0),
        ([(math.inf, 10.0), (math.inf, 12.0)], 2.0),
        ([(math.nan, 10.0), (math.nan, 12.0)], 0.0),
        ([(math.nan, 10.0), (1.0, 12.0), (1.0, 13.0)], 1.0),
    ],
)
def test_silence(observed: list[tuple[float, float]], silent: float) -> None:
    """Only a change counts, in either direction. 0 says that there is no such sign; what is no number never stays the same."""
    silence = Silence()
    for value, at in observed:
        found = silence.observe(value, at)
    assert found == pytest.approx(silent)


@given(st.lists(gaps, max_size=40), st.floats(0.0, 5.0))
def test_a_judge_that_slept_never_finds_silence(found: list[float], limit: float) -> None:
    """However long it slept: it takes many looks at an unchanged value to find it silent for long."""
    awake, silence, now = Awake(PERIOD_S), Silence(), 0.0
    silent = silence.observe(1.0, awake.tick(now))
    for gap in found:
        now += gap
        silent = silence.observe(1.0, awake.tick(now))
    assert silent <= now + 1e-6
    if silent > limit:
        assert len(found) >= math.floor(limit / (2 * PERIOD_S))


@given(st.lists(st.tuples(gaps, st.booleans()), max_size=60), st.integers(1, 5))
def test_whoever_changes_every_few_looks_is_never_silent_for_longer(found: list[tuple[float, bool]], most: int) -> None:
    """Whatever the gaps between the looks of the judge."""
    awake, silence, now, value, unchanged = Awake(PERIOD_S), Silence(), 0.0, 1.0, 0
    silence.observe(value, awake.tick(now))
    for gap, beats in found:
        now += gap
        unchanged = 0 if beats or unchanged == most else unchanged + 1
        value += unchanged == 0
        assert silence.observe(value, awake.tick(now)) <= unchanged * 2 * PERIOD_S + 1e-9


def test_a_silence_is_found_by_a_judge_that_is_awake() -> None:
    """Neither clock is so careful that nothing is found any more."""
    awake, silence, looks = Awake(PERIOD_S), Silence(), 0
    while silence.observe(1.0, awake.tick(looks * PERIOD_S)) <= 1.0:
        looks += 1
        assert looks < 30


@pytest.mark.parametrize(
    ("timeout", "interval"), [(0.0, 1.0), (0.4, 0.1), (1.0, 0.25), (4.0, 1.0), (10.0, 1.0), (1e9, 1.0), (math.nan, 1.0)]
)
def test_pulse_interval(timeout: float, interval: float) -> None:
    """Several are due within the timeout, and one a second is enough; 0 means never."""
    assert pulse_interval_s(timeout) == pytest.approx(interval)


@given(st.floats(0.001, 1e6))
def test_several_pulses_are_due_within_every_timeout(timeout: float) -> None:
    """At least four, at least one a second."""
    assert 0 < 4 * pulse_interval_s(timeout) <= max(timeout, 4.0)
    assert pulse_interval_s(timeout) <= min(1.0, timeout / 4)


@given(st.floats(0.001, 1e6))
def test_looks_are_frequent_for_every_timeout(timeout: float) -> None:
    """Fifty within a timeout, and at least five a second, also when nothing is ever hung."""
    assert 0 < look_interval_s(timeout) <= timeout / 50
    assert look_interval_s(timeout) <= look_interval_s(0) == pytest.approx(0.2)
