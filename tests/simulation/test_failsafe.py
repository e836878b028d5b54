"""failsafe: a primary outlives an outage of etcd while all its backups vouch for it, and never lives beside another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import pytest

from etcdreplica.core import planner
from etcdreplica.core.failsafe import Promises
from etcdreplica.core.timing import PRESETS
from etcdreplica.daemon.failsafe import Failsafe
from etcdreplica.store import Kind
from etcdreplica.words import Style
from tests.simulation.application import Application
from tests.simulation.cluster import Cluster
from tests.simulation.play import APP, Step, fault
from tests.simulation.play import play as played
from tests.simulation.run import run
from tests.simulation.scenario import STORM, scenario

OUTAGE_S = 40.0


def primaries(cluster: Cluster) -> Any:
    """Where it is led, and how often it was begun until then."""
    return [(copy.host.name, cluster.witness.promotions) for copy in cluster.copies(APP) if copy.acts]


def play(
    steps: Sequence[Step],
    until: float,
    look: Callable[[Cluster], Any] = primaries,
    *,
    failsafe: bool = True,
    preset: str = "safe",
    style: Style = Style.WARM,
) -> Any:
    """Run it with failsafe; return what is seen in the end. Its primary is on host-a at first."""
    return played(steps, until, look, PRESETS[preset], failsafe=failsafe, style=style)


def cut_from_etcd(*hosts: str) -> Callable[[Cluster], object]:
    """Return what has hosts reach each other, but etcd no longer."""

    def cut(cluster: Cluster) -> None:
        for host in hosts:
            cluster.hosts[host].link.out_cut = cluster.hosts[host].link.in_cut = True

    return cut


@pytest.mark.parametrize(("preset", "style"), [("safe", Style.WARM), ("fast", Style.COLD), ("calm", Style.HOT)])
def test_it_outlives_an_outage(preset: str, style: Style) -> None:
    """The same processes serve before, during and after an outage of many TTLs; without failsafe all of them end."""
    before: list[Application] = []

    def note(cluster: Cluster) -> None:
        before.extend(cluster.copies(APP))

    def same(cluster: Cluster) -> Any:
        return cluster.copies(APP) == before, primaries(cluster)

    down_s = 4 * PRESETS[preset].lease_ttl_s
    steps: list[Step] = [(9.0, note), (10.0, fault("etcd down", lasts=down_s))]
    assert play(steps, 20.0 + 1.5 * down_s, same, preset=preset, style=style) == (True, [("host-a", 1)])
    assert len(before) == (1 if style is Style.COLD else 2)
    assert play(steps, 9.0 + down_s, failsafe=False, preset=preset, style=style) == []


def test_one_silent_backup_is_enough_to_end_it() -> None:
    """A host that cannot be asked may have been told to lead."""
    cut = fault("cut peers", "host-b", OUTAGE_S, 0.5)
    assert play([(10.0, fault("etcd down", lasts=OUTAGE_S)), (10.0, cut)], 30.0) == []
    steps: list[Step] = [(10.0, fault("etcd down", lasts=OUTAGE_S)), (30.0, cut)]
    assert play(steps, 29.0) == [("host-a", 1)]
    assert play(steps, 36.0) == []


def test_nobody_else_leads_while_both_are_cut_off_together() -> None:
    """The side with etcd waits: its third host was never asked to vouch."""

    def look(cluster: Cluster) -> Any:
        (assignment,) = cluster.records(Kind.ASSIGNMENTS).values()
        return primaries(cluster), assignment.primary, "may still run (failsafe)" in assignment.reason

    assert play([(10.0, cut_from_etcd("host-a", "host-b"))], 60.0, look) == ([("host-a", 1)], None, True)


def test_a_backup_that_is_told_to_lead_waits_for_its_promise() -> None:
    """Only the primary is cut off: its backup vouches until it is told to lead, and begins when the other one is dead."""
    assert play([(10.0, cut_from_etcd("host-a"))], 40.0) == [("host-b", 2)]


@pytest.mark.parametrize("at", [14.0, 15.5, 16.5])
def test_a_restarted_watchdog_keeps_the_promises_of_the_one_before(at: float) -> None:
    """It does not know them, so it waits as if it had made them all at its start."""
    steps: list[Step] = [(10.0, cut_from_etcd("host-a")), (at, fault("kill WatchDog", "host-b"))]
    assert play(steps, 60.0) == [("host-b", 2)]


def test_a_lost_host_is_replaced_by_its_voucher_at_once() -> None:
    """While etcd is there no promise is asked for, so there is none to wait for."""
    assert play([(10.0, fault("lose power", "host-a", 100.0, 0.5))], 16.0) == [("host-b", 2)]


def test_with_primary_and_voucher_lost_either_of_them_is_waited_for() -> None:
    """Nobody can tell that both are dead until one of their hosts is back; then the application goes on."""
    steps: list[Step] = [(10.0, fault("lose power", host, 30.0, 0.5)) for host in ("host-a", "host-b")]
    assert play(steps, 39.0) == []
    assert len(play(steps, 60.0)) == 1


# --- what is broken on purpose ---------------------------------------------------------------------------------------


def _promises_are_not_kept() -> AbstractContextManager[Any]:
    return patch.object(Promises, "free_at", lambda self, app: 0.0)


def _anybody_may_follow() -> AbstractContextManager[Any]:
    return patch.object(planner, "in_doubt", lambda app, cluster: None)


def _forgotten_at_a_restart() -> AbstractContextManager[Any]:
    return patch.object(Promises, "free_at", lambda self, app: self._until.get(app, 0.0))


def _nobody_has_to_vouch() -> AbstractContextManager[Any]:
    ask = Failsafe._ask_for

    async def careless(self: Failsafe, runs: Any) -> None:
        runs = list(runs)
        await ask(self, runs)
        for each in runs:
            each.vouched(self._clock() + 5.0)

    return patch.object(Failsafe, "_ask_for", careless)


KINDS = ("cut off", "etcd down", "cut peers", "kill WatchDog", "lose power", "kill manager")
BROKEN = {  # and the first seed that is known to notice
    "promises are not kept": (_promises_are_not_kept, 36),
    "anybody may follow": (_anybody_may_follow, 36),
    "promises are forgotten at a restart": (_forgotten_at_a_restart, 55),
    "nobody has to vouch": (_nobody_has_to_vouch, 9),
}


def test_storms() -> None:
    """Whatever goes wrong, no two of them lead at a time, and all is well in the end."""
    assert set(KINDS) <= set(STORM)
    for seed in range(1, 31):
        result = run(scenario(seed, only=KINDS, failsafe=1.0))
        assert not result.violations, f"seed {seed}: {result.violations}"


@pytest.mark.parametrize("name", BROKEN)
def test_is_caught(name: str) -> None:
    """What is broken on purpose is found, by the outside witness of primaries."""
    breaking, known = BROKEN[name]
    seeds = (scenario(seed, only=KINDS, failsafe=1.0) for seed in range(known, known + 60))
    with breaking():
        caught = next((played for played in seeds if any("two primaries" in what for what in run(played).violations)), None)
    assert caught is not None
    assert not run(caught).violations
