"""When a failed application may start again. The idea: a first failure is free, quick repetition is not.

A failure soon after a start is a strike; one after the body has run for a while begins the count anew. The first strikes
cost nothing, so that an ordinary crash fails over at once; then the wait doubles up to a cap.
"""

from __future__ import annotations

from zlib import crc32

from attrs import frozen


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
