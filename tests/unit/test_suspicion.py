"""The detector of lost hosts: what it confirms, how soon, and above all what it does not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etcdreplica.core.suspicion import (
    TRANSITIONS,
    Ask,
    Confirmed,
    Detector,
    Peak,
    Probe,
    Refuted,
    Standing,
    Suspected,
    SuspicionSettings,
)
from etcdreplica.errors import ConfigurationError
from tests.unit.suspicion_net import ME, SESSION, Net, after

USUAL = SuspicionSettings()
QUIET_S = 0.4  # a dead host is confirmed lost within this on a quiet network


def test_quiet() -> None:
    """Hosts that answer are probed at the interval, suspected by nobody, and nobody is asked about them."""
    net = Net("a", "b", "c")
    net.run(10)
    probes = [action.host for _, action in net.of(Probe) if isinstance(action, Probe)]
    assert {host: round(probes.count(host) * USUAL.interval_s) for host in "abc"} == {"a": 10, "b": 10, "c": 10}
    assert {type(action) for _, action in net.actions} == {Probe}


def test_dead_host_is_confirmed_soon() -> None:
    """A host that answers nobody is suspected, helpers are asked, and it is lost; the evidence names them."""
    net = Net("a", "b", "c")
    net.run(2)
    net.kill("b")
    died = net.now
    net.run(2)
    ((at, lost),) = net.of(Confirmed)
    assert isinstance(lost, Confirmed)
    assert (lost.host, lost.session, lost.helpers) == ("b", SESSION, ("c",))
    assert lost.silence_s >= USUAL.confirm_s
    assert lost.probes >= USUAL.failures
    assert at - died <= QUIET_S
    assert net.detector.standing("b") is Standing.LOST


def test_lost_host_that_answers_again() -> None:
    """It is taken back at its first answer, and can be lost again."""
    net = Net("a", "b", "c")
    net.run(1)
    net.kill("b")
    net.run(1)
    net.direct["b"], net.helping["b"] = after(0.003), True
    net.run(1)
    assert [(a.host, a.by, a.was) for _, a in net.of(Refuted) if isinstance(a, Refuted)] == [("b", ME, Standing.LOST)]
    net.kill("b")
    net.run(3)
    assert net.lost() == ["b", "b"]


def test_helper_refutes() -> None:
    """A host that only we cannot reach is suspected again and again, and never lost."""
    net = Net("a", "b", "c")
    net.run(1)
    net.direct["b"] = after(None)
    net.run(20)
    refuted = [action for _, action in net.of(Refuted) if isinstance(action, Refuted)]
    assert net.lost() == []
    assert {(action.host, action.by, action.was) for action in refuted} == {("b", "c", Standing.SUSPECT)}


def test_late_answer_refutes() -> None:
    """An answer after the timeout still proves that the host lived when it was asked."""
    net = Net("a", "b", "c")
    net.run(1)
    net.direct["b"], net.via["b"] = after(0.2), after(None)
    net.run(20)
    assert net.lost() == []
    assert net.of(Refuted) != []


def test_an_old_answer_proves_nothing() -> None:
    """An answer to a probe older than the newest answered one does not end a suspicion."""
    net = Net("a", "b", "c")
    net.run(1)
    probes = [action for _, action in net.of(Probe) if isinstance(action, Probe) and action.host == "b"]
    net.kill("b")
    net.run(0.2)
    assert net.detector.standing("b") is Standing.SUSPECT
    assert net.detector.answered(net.now, "b", SESSION, probes[0].number) == []
    net.run(0.2)
    assert net.lost() == ["b"]


def test_never_answered_is_never_suspected() -> None:
    """Where a wrong address or a firewall is in the way, only the lease decides."""
    net = Net("a", "b", "c")
    net.kill("b")
    net.run(10)
    assert net.of(Suspected) == net.of(Ask) == []
    assert net.detector.standing("b") is Standing.UNKNOWN


def test_another_stay_does_not_answer_for_this_one() -> None:
    """Neither to us nor to a helper does a later session of the host refute the loss of the earlier one."""
    net = Net("a", "b", "c")
    net.run(1)
    net.session["b"] = SESSION + 1
    net.run(1)
    assert net.lost() == ["b"]
    net.watch("abc")
    net.run(1)
    assert net.detector.standing("b") is Standing.ALIVE


def test_silent_helper_says_nothing() -> None:
    """Without the word of a helper that lives nothing is confirmed: in three hosts with two silent, it is rather us."""
    net = Net("a", "b", "c", watched=["b"])
    net.run(1)
    net.kill("b", "c")
    net.run(20)
    assert net.of(Ask) != []
    assert net.lost() == []


def test_two_hosts() -> None:
    """With no third host the WatchDog of our own is the only helper; a single host is never lost."""
    net = Net("a", "b")
    net.run(1)
    net.kill("b")
    net.run(1)
    assert [a.helpers for _, a in net.of(Confirmed) if isinstance(a, Confirmed)] == [("a",)]
    alone = Net("a")
    alone.run(1)
    alone.kill("a")
    alone.run(5)
    assert alone.lost() == []


def test_watcher_without_a_host_of_its_own() -> None:
    """A manager on a machine without a WatchDog has nobody to ask about a single host."""
    net = Net("b")
    net.run(1)
    net.kill("b")
    net.run(5)
    assert net.lost() == []


@pytest.mark.parametrize(("hosts", "dead", "confirmed"), [(3, 1, 1), (3, 2, 0), (4, 2, 2), (5, 2, 2), (5, 3, 0), (8, 5, 0)])
def test_more_than_half(hosts: int, dead: int, confirmed: int) -> None:
    """When more than half of all hosts fall silent at once, it is rather our own link, and nothing is confirmed."""
    names = [chr(ord("a") + number) for number in range(hosts)]
    net = Net(*names)
    net.run(1)
    net.kill(*names[1 : dead + 1])
    net.run(5)
    assert len(net.lost()) == confirmed


def test_helpers_take_turns() -> None:
    """Neither the host in question nor a silent one is asked, and not always the same ones."""
    net = Net(*"abcdef", watched=["b"])
    net.run(1)
    net.direct["b"] = after(None)
    net.run(3)
    asked = {action.helper for _, action in net.of(Ask) if isinstance(action, Ask)}
    assert asked == set("cdef")


def test_many_hosts_are_probed_less_often() -> None:
    """The probes of all hosts together keep to a rate, and the patience grows with the interval."""
    names = [f"h{number}" for number in range(100)]
    net = Net(ME, *names, watched=names)
    net.run(5)
    assert len(net.of(Probe)) <= USUAL.probes_per_s * 5 + len(names)
    net.kill("h0")
    net.run(3)
    assert net.lost() == ["h0"]


def test_nobody_watched() -> None:
    """With nobody to watch there is nothing to do, and the time until then is no lateness."""
    net = Net("a", "b", "c", watched=[])
    before = net.detector.is_watching
    net.run(1)
    assert net.actions == []
    net.watch("bc")
    assert (before, net.detector.is_watching) == (False, True)
    assert net.detector.standing("a") is None


def test_own_stall_counts_against_nobody() -> None:
    """After a stall of the watcher, with every answer still unread, nothing is suspected."""
    net = Net("a", "b", "c")
    net.run(1)
    net.stall(5.0)
    net.run(1)
    assert net.of(Suspected) == []


def test_slowness_makes_patient() -> None:
    """The slower the answers were, the longer a silence must be; and that is forgotten."""
    times = []
    for delay_s, quiet_s in ((0.003, 0), (0.09, 0), (0.09, 90)):
        net = Net("a", "b", "c")
        net.direct["b"] = after(delay_s)
        net.run(2)
        net.direct["b"] = after(0.003)
        net.run(0.5 + quiet_s)
        net.kill("b")
        died = net.now
        net.run(5)
        times.append(net.of(Confirmed)[0][0] - died)
    quiet, slow, again = times
    assert slow > quiet + 3 * 0.08
    assert again < quiet + 0.05


# --- whatever happens ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(), bound_s=st.floats(0, USUAL.confirm_s - 0.01), helping=st.booleans())
def test_who_answers_within_bounds_is_never_lost(seed: int, bound_s: float, helping: bool) -> None:
    """However the answers jitter, in whatever order they come, and even when every helper denies."""
    chance = random.Random(seed)
    net = Net("a", "b", "c", "d")
    for host in "bcd":
        net.direct[host] = lambda: chance.uniform(0, bound_s)
        if not helping:
            net.via[host] = after(None)
    for _ in range(5):
        net.run(chance.uniform(0, 2))
        net.stall(chance.uniform(0, 1))
    assert net.lost() == []


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(), loss=st.floats(0, 0.3))
def test_lost_packets_are_no_lost_hosts(seed: int, loss: float) -> None:
    """Single answers that never come lose no host while helpers can reach it."""
    chance = random.Random(seed)
    net = Net("a", "b", "c", "d")
    for host in "bcd":
        net.direct[host] = lambda: None if chance.random() < loss else chance.uniform(0.001, 0.02)
    net.run(10)
    assert net.lost() == []


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(), hosts=st.integers(3, 9), slow_s=st.floats(0.001, 0.08))
def test_who_never_answers_is_lost_within_a_bound(seed: int, hosts: int, slow_s: float) -> None:
    """Silence, the time to the next probe, and what the slowest answer adds to the patience; nobody else is lost."""
    chance = random.Random(seed)
    names = [chr(ord("a") + number) for number in range(hosts)]
    net = Net(*names)
    for host in names:
        net.direct[host] = lambda: chance.uniform(0, slow_s)
    net.run(1 + chance.random())
    net.kill(names[-1])
    died = net.now
    bound_s = USUAL.confirm_s + USUAL.patience * slow_s + USUAL.interval_s + 2 * USUAL.tick_s
    net.run(bound_s)
    assert net.lost() == [names[-1]], net.now - died


@settings(max_examples=40, deadline=None)
@given(stalls=st.lists(st.tuples(st.floats(0, 0.3), st.floats(0, 3)), min_size=1, max_size=12))
def test_a_watcher_that_stalls_confirms_nothing(stalls: list[tuple[float, float]]) -> None:
    """However often and long the watcher does not run, hosts that answer are never suspected."""
    net = Net("a", "b", "c")
    net.run(0.5)
    for seconds, stall_s in stalls:
        net.run(seconds)
        net.stall(stall_s)
    assert net.of(Suspected) == []


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(), hosts=st.integers(1, 9))
def test_more_than_half_is_never_confirmed(seed: int, hosts: int) -> None:
    """Whoever of the hosts falls silent, when that is more than half of them at once."""
    chance = random.Random(seed)
    names = [chr(ord("a") + number) for number in range(hosts)]
    net = Net(*names)
    net.run(1)
    net.kill(*chance.sample(names, chance.randint(hosts // 2 + 1, hosts)))
    net.run(3)
    assert net.lost() == []


# --- small parts -----------------------------------------------------------------------------------------------------


def test_every_standing_has_its_transitions() -> None:
    """The table is whole, and only what was suspect can be lost."""
    assert set(TRANSITIONS) == set(Standing)
    assert [before for before, then in TRANSITIONS.items() if Standing.LOST in then] == [Standing.SUSPECT]


def test_peak_halves() -> None:
    """A peak counts half after its half-life, and a larger value replaces it."""
    peak = Peak().seen(0.4, 10.0, 5.0)
    assert peak.now(10.0, 5.0) == pytest.approx(0.4)
    assert peak.now(15.0, 5.0) == pytest.approx(0.2)
    assert peak.seen(0.3, 15.0, 5.0).now(15.0, 5.0) == pytest.approx(0.3)
    assert peak.seen(0.1, 15.0, 5.0).now(15.0, 5.0) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tick_s": 0.0},
        {"tick_s": 0.06},
        {"interval_s": 0.2},
        {"timeout_s": 0.2},
        {"confirm_s": 0.19},
        {"confirm_s": 3.0},
        {"failures": 0},
        {"helpers": 0},
        {"patience": 0.5},
        {"probes_per_s": 0.0},
    ],
)
def test_timings_must_fit(wrong: dict[str, float]) -> None:
    """A set that does not fit together is an error that names the rule."""
    with pytest.raises(ConfigurationError, match=r"probe timings must keep|probes need"):
        SuspicionSettings(**wrong)  # type: ignore[arg-type]


def test_answers_about_strangers_are_ignored() -> None:
    """Late answers about hosts that are watched no longer change nothing."""
    detector = Detector(ME)
    assert detector.answered(1.0, "b", SESSION, 1) == []
    assert detector.helped(1.0, "b", "c", 1, SESSION) == []
    assert detector.helped(1.0, "b", "c", 1, None) == []
