"""When a process counts as hung, and when rather its judge was asleep.

Signs of life are read now and then, and only whether they change counts. The time between two looks counts only as far as
the judge was awake: if it was itself stopped, starved of CPU or on a host that stood still, so may have been the replica.
"""

from __future__ import annotations

from attrs import define


@define
class Awake:
    """A clock that runs while its owner looks at it every `period_s`, and stands still while its owner does.

    Of a longer gap at most two periods count. `lateness_s` is what did not count in the last look.
    """

    period_s: float
    time: float = 0.0
    lateness_s: float = 0.0
    _seen: float | None = None

    def tick(self, now: float) -> float:
        """Look at the clock, and return its time."""
        gap = 0.0 if self._seen is None else max(0.0, now - self._seen)
        counted = min(gap, 2 * self.period_s)
        self._seen, self.lateness_s = now, gap - counted
        self.time += counted
        return self.time


@define
class Silence:
    """How long a sign of life has not changed. A value of 0 says that there is none of this kind."""

    _value: float = 0.0
    _since: float | None = None

    def observe(self, value: float, at: float) -> float:
        """Return for how long it has been as it is, in the time of `at`."""
        if value == 0:
            self._since = None
        elif self._since is None or value != self._value:
            self._since = at
        self._value = value
        return 0.0 if self._since is None else at - self._since


def look_interval_s(hang_timeout_s: float) -> float:
    """Return how often to look for signs of life: a hang is then seen at most a fiftieth of its timeout late."""
    return min(0.2, hang_timeout_s / 50) if hang_timeout_s else 0.2


def pulse_interval_s(hang_timeout_s: float) -> float:
    """Return how often a replica should give a sign of life, so that several are due within the timeout."""
    return min(1.0, hang_timeout_s / 4) if hang_timeout_s else 1.0
