"""What the answers to a probe mean: which of them count, when to ask next, and when a copy is hung.

A bad answer counts only if it says something of the copy. It does not while the copy still starts (the grace, which ends
with the first good answer), and not when whoever asked was stalled around the question: then the answer may have been
there in time, and the copy may have been stalled with us. A good answer always counts.

Questions never pile up: the next one is due an interval after the last one was asked, or at once if that has passed.
"""

from __future__ import annotations

from attrs import evolve, frozen

from etcdreplica.model import Probe

STALL_SHARE = 0.25  # of a probe's timeout: a question that was disturbed for longer says nothing
LEAST_STALL_S = 0.02  # timers are never exact


@frozen
class Answer:
    """What came of one question. `late_s` is how late the asking loop was around it; a `reason` says why it was bad."""

    asked_at: float
    at: float
    late_s: float = 0.0
    reason: str = ""
    asked: bool = True  # False: we could not ask at all


@frozen
class Asking:
    """One probe of one copy. `counting_from` is the end of the grace."""

    probe: Probe
    due_at: float
    counting_from: float
    bad: int = 0
    reason: str = ""

    @property
    def hung(self) -> str:
        """Why the copy counts as hung, or ""."""
        return in_words(self.probe, self.bad, self.reason) if self.bad >= self.probe.failures else ""


def begin(probe: Probe, now: float) -> Asking:
    """Begin with a copy that starts now."""
    return Asking(probe, due_at=now + probe.interval_s, counting_from=now + probe.grace_s)


def after(asking: Asking, answer: Answer) -> Asking:
    """Return what is known after one more answer."""
    asking = evolve(asking, due_at=max(answer.at, answer.asked_at + asking.probe.interval_s))
    if answer.asked and not answer.reason:
        return evolve(asking, counting_from=answer.asked_at, bad=0, reason="")
    if not answer.asked:
        return asking
    if is_disturbed(asking.probe, answer.late_s):
        return evolve(asking, counting_from=asking.counting_from + answer.late_s)
    if answer.asked_at < asking.counting_from:
        return asking
    return evolve(asking, bad=asking.bad + 1, reason=answer.reason)


def is_disturbed(probe: Probe, late_s: float) -> bool:
    """Whether a loop that was this late around a question makes its answer worthless."""
    return late_s > max(LEAST_STALL_S, STALL_SHARE * probe.timeout_s)


def in_words(probe: Probe, bad: int, reason: str) -> str:
    """Say that a probe failed."""
    often = f" {bad} times in a row" if bad > 1 else ""
    return f"probe {probe.target} failed{often}: {reason}"


def silence_limit_s(probe: Probe) -> float:
    """How long after its last return a "call" probe that returns no more counts as failed `failures` times."""
    return probe.interval_s + probe.timeout_s + (probe.failures - 1) * max(probe.interval_s, probe.timeout_s)


def call_verdict(probe: Probe, *, bad: int, reason: str, silent_s: float) -> str:
    """Return why a copy is hung by what its own "call" probe told, or "".

    `bad` and `reason` are the last report. `silent_s` is for how long no call has returned, less any stall of ours and,
    before the first return, less the grace.
    """
    if bad >= probe.failures:
        return in_words(probe, bad, reason)
    if silent_s > silence_limit_s(probe):
        return in_words(probe, 1, f"the health function has not returned for {silent_s:.3g} s")
    return ""
