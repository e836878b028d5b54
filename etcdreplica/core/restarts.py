"""When a failed application may start again, and when it may not. The idea: a first failure is free, repetition is not.

A failure soon after a start is a strike; one after the body has run for a while begins the count anew. The first strikes
cost nothing, so that an ordinary crash fails over at once; then the wait doubles up to a cap.

Strikes slow a restart down; the window ends it: too many failures within it, however far apart, and the application is
parked. The times of failures are those at which one manager saw them, and live in its memory only.
"""

from __future__ import annotations

from collections.abc import Mapping
from zlib import crc32

from attrs import frozen

from etcdreplica.model import FailureKind

FAULTS = frozenset({FailureKind.EXIT, FailureKind.HOOK, FailureKind.HANG, FailureKind.RETURNED, FailureKind.LOST})
"""Failures that are put down to the application."""

RESTARTED_HERE = FAULTS - {FailureKind.LOST}
"""Those after which its host can be trusted to start it again."""


@frozen
class RestartPolicy:
    """Seconds throughout."""

    settle_s: float = 1.0  # a body that ran this long was healthy
    free_strikes: int = 2
    base_s: float = 0.5
    cap_s: float = 30.0


def strikes_after(strikes: int, uptime_s: float | None, policy: RestartPolicy) -> int:
    """Count one more failure of a body that had run for `uptime_s`, or never began."""
    return 1 if (uptime_s or 0.0) >= policy.settle_s else strikes + 1


def restart_delay_s(strikes: int, seed: str, policy: RestartPolicy) -> float:
    """Return how long to wait after this many strikes. `seed` spreads applications that failed together by up to 25 %."""
    if strikes <= policy.free_strikes:
        return 0.0
    wait: float = min(policy.cap_s, policy.base_s * 2 ** min(30, strikes - policy.free_strikes - 1))
    return wait * (1 - crc32(f"{seed}/{strikes}".encode()) % 1000 / 4000)


def carried_over(count: int, now: float) -> dict[int, float]:
    """Failures that an earlier manager counted, as if they had happened now. Their numbers are those of no incarnation."""
    return {-number: now for number in range(1, count + 1)}


def within_window(times: Mapping[int, float], now: float, window_s: float) -> dict[int, float]:
    """Return the failures, by incarnation, that happened less than `window_s` ago."""
    return {incarnation: at for incarnation, at in times.items() if now < at + window_s}


def with_failure(times: Mapping[int, float], incarnation: int, now: float, most: int) -> dict[int, float]:
    """Add a failure unless it is counted already. Only the newest `most` are kept: more would decide nothing."""
    added = {**times, incarnation: times.get(incarnation, now)}
    return dict(sorted(added.items(), key=lambda item: item[1])[-most:])
