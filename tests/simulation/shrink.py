"""Delta debugging: the fewest faults, and the simplest ones, with which a scenario still goes wrong."""

from __future__ import annotations

from collections.abc import Callable

from attrs import evolve

from tests.simulation.run import Result, run
from tests.simulation.scenario import Fault, Scenario


def shrink(result: Result, play: Callable[[Scenario], Result] = run) -> Result:
    """Return the result of a smaller scenario that fails in the same way: its first violation is of the same kind."""
    kind = _kind(result)

    def fails(scenario: Scenario) -> Result | None:
        tried = play(scenario)
        return tried if tried.violations and _kind(tried) == kind else None

    best = result
    for smaller in (_fewer_faults, _fewer_apps, _shorter_faults):
        best = smaller(best, fails)
    return best


def _kind(result: Result) -> str:
    """Tell what a violation is about, without names and numbers."""
    words = result.violations[0].split(":")[0] if ":" in result.violations[0] else result.violations[0]
    return " ".join(word for word in words.split() if word.isalpha())


Fails = Callable[[Scenario], Result | None]


def _fewer_faults(best: Result, fails: Fails) -> Result:
    """Leave out ever smaller parts of the list of faults while it still fails."""
    size = max(1, len(best.scenario.faults) // 2)
    while size:
        faults, at, found = best.scenario.faults, 0, False
        while at < len(faults):
            tried = fails(evolve(best.scenario, faults=faults[:at] + faults[at + size :]))
            if tried is not None:
                best, faults, found = tried, tried.scenario.faults, True
            else:
                at += size
        if not found:
            size //= 2
    return best


def _fewer_apps(best: Result, fails: Fails) -> Result:
    for app in best.scenario.apps:
        apps = tuple(other for other in best.scenario.apps if other != app)
        faults = tuple(fault for fault in best.scenario.faults if fault.target != app.registration.name)
        tried = fails(evolve(best.scenario, apps=apps, faults=faults)) if apps else None
        best = tried or best
    return best


def _shorter_faults(best: Result, fails: Fails) -> Result:
    for number, fault in enumerate(best.scenario.faults):
        if fault.lasts:
            tried = fails(_with(best.scenario, number, evolve(fault, lasts=round(fault.lasts / 2, 3))))
            best = tried or best
    return best


def _with(scenario: Scenario, number: int, fault: Fault) -> Scenario:
    faults = scenario.faults
    return evolve(scenario, faults=(*faults[:number], fault, *faults[number + 1 :]))


def report(result: Result) -> str:
    """Say what went wrong, with which faults, and what happened, for people."""
    faults = "\n".join(f"  {fault}" for fault in result.scenario.faults) or "  none"
    violations = "\n".join(f"  {violation}" for violation in result.violations)
    return (
        f"{result.scenario}\nfaults (at, what, where, how long, variant):\n{faults}\nwhat happened:\n{result.timeline()}\n"
        f"violations:\n{violations}\nplay it again: make simulation FIRST_SEED={result.scenario.seed} SEEDS=1"
    )
