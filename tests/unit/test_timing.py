"""Timings that fit together, and those that do not: each rule, and its name in the message."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from etcdreplica.core.timing import MAX_TTL_S, MIN_TTL_S, PRESETS, Timing, preset
from etcdreplica.errors import ConfigurationError

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("name", "ttl_s", "timeout_s"), [("safe", 5.0, 1.0), ("fast", 2.0, 0.5), ("calm", 15.0, 3.0)])
def test_presets(name: str, ttl_s: float, timeout_s: float) -> None:
    """The three that can be chosen by name."""
    chosen = preset(name)
    assert (chosen.lease_ttl_s, chosen.timeout_s) == (ttl_s, timeout_s)


def test_safe_is_the_default() -> None:
    """What nobody chose is the one that is called safe."""
    assert preset("safe") == Timing()


def test_unknown_preset() -> None:
    """The message tells which there are."""
    with pytest.raises(ConfigurationError, match="unknown timing 'quick': use one of safe, fast, calm"):
        preset("quick")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lease_ttl_s": 1.99}, r"bad lease TTL 1\.99 s: etcd grants no lease under 2 s"),
        ({"lease_ttl_s": 0.0}, "bad lease TTL 0 s"),
        ({"lease_ttl_s": -5.0}, "bad lease TTL -5 s"),
        ({"lease_ttl_s": NAN}, "bad lease TTL nan s"),
        ({"lease_ttl_s": INF}, "bad lease TTL inf s"),
        ({"lease_ttl_s": 600.1}, "one over 600 s would leave a lost host unnoticed"),
        ({"lease_ttl_s": 3.0, "timeout_s": 1.6}, r"1\.6 s, more than half the lease TTL of 3 s: a lease must"),
        ({"timeout_s": 0.0}, "may take 0 s"),
        ({"timeout_s": NAN}, "may take nan s"),
        ({"fence_margin_s": 0.3}, "fence_margin > kernel_margin > guardian_margin > 0"),
        ({"kernel_margin_s": 0.1}, "fence_margin > kernel_margin > guardian_margin > 0"),
        ({"guardian_margin_s": 0.0}, "fence_margin > kernel_margin > guardian_margin > 0"),
        ({"guardian_margin_s": NAN}, "fence_margin > kernel_margin > guardian_margin > 0"),
        ({"lease_ttl_s": 600.0, "guardian_margin_s": 0.06}, r"guardian_margin 0\.06 s > 0\.06 s .* clocks may drift"),
        ({"lease_ttl_s": 2.0, "timeout_s": 0.9}, r"ttl - ttl / 3 - timeout > fence_margin must hold: .* 0\.43"),
        ({"lease_ttl_s": 2.0, "timeout_s": 0.1, "fence_margin_s": 0.7}, r"ttl - 2 \* ttl / 3 > fence_margin must hold"),
        ({"fence_margin_s": INF}, "fence_margin must hold"),
    ],
)
def test_broken_rule_is_named(changes: dict[str, Any], message: str) -> None:
    """A set that does not fit is an error that says which rule it breaks; nothing is put in its place."""
    with pytest.raises(ConfigurationError, match=message):
        Timing(**changes)


@pytest.mark.parametrize(
    ("name", "ttl_s", "timeout_s"),
    [("safe", None, 1.0), ("safe", 2.0, 0.8), ("safe", 2.5, 1.0), ("safe", 600.0, 1.0), ("fast", 2.0, 0.5), ("calm", 5.0, 2.0)],
)
def test_another_ttl(name: str, ttl_s: float | None, timeout_s: float) -> None:
    """The TTL alone can be chosen; the timeout of calls follows it, and is never longer than the preset's."""
    chosen = preset(name, ttl_s)
    assert chosen.lease_ttl_s == (ttl_s or PRESETS[name].lease_ttl_s)
    assert chosen.timeout_s == pytest.approx(timeout_s)


def test_ttl_that_does_not_fit_the_preset() -> None:
    """Calm margins leave too little of the shortest lease."""
    with pytest.raises(ConfigurationError, match="fence_margin must hold"):
        preset("calm", 2.0)


@pytest.mark.parametrize("ttl_s", [1.9, -1.0, 0.0, NAN, INF])
def test_bad_ttl_is_named_as_it_was_given(ttl_s: float) -> None:
    """What is wrong is the TTL, not what would have followed from it."""
    with pytest.raises(ConfigurationError, match=f"bad lease TTL {ttl_s:g} s"):
        preset("safe", ttl_s)


@given(st.floats(MIN_TTL_S, MAX_TTL_S))
def test_safe_fits_every_ttl(ttl_s: float) -> None:
    """The default margins go with every TTL that may be chosen."""
    assert preset("safe", ttl_s).renewal_s < ttl_s


@given(st.sampled_from(sorted(PRESETS)), st.sampled_from(["timeout_s", "fence_margin_s"]), st.floats(0.0, 20.0))
def test_what_is_accepted_survives_a_lost_renewal(name: str, field: str, value: float) -> None:
    """Whatever set is accepted, a renewal that fails leaves time for another one before the WatchDog begins to kill."""
    try:
        timing = evolve(PRESETS[name], **{field: value})
    except ConfigurationError:
        return
    fence_at = timing.lease_ttl_s - timing.fence_margin_s
    assert timing.renewal_s + timing.timeout_s < fence_at
    assert 2 * timing.renewal_s < fence_at
