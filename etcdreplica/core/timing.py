"""All timings of a host that must fit together, checked together.

A lease counts from the moment `t` at which its last confirmed renewal was sent. What happens when no other one is confirmed:

    t                                        nothing can take over before t + lease_ttl_s
    t + lease_ttl_s - fence_margin_s         the WatchDog begins to end the replicas
    t + lease_ttl_s - kernel_margin_s        the guardian, and the kernel in each replica, kill what is left
    t + lease_ttl_s - guardian_margin_s      the kernel kills the guardian itself
    t + lease_ttl_s                          etcd gives the lease up; another host may take over

The rules follow from it:

- etcd grants no lease under 2 s, and a lost host should not go unnoticed for over ten minutes.
- A call may take at most half a TTL, so that there is time to ask another endpoint.
- fence_margin > kernel_margin > guardian_margin > 0: each of these is there for when the one before it does not work.
- The last margin is longer than two clocks can drift apart in one TTL: etcd counts with its own clock. A clock that is
  being stepped or slewed hard is beyond any margin.
- A lease must survive one lost renewal. If the loss shows as a failed call, this takes a renewal interval and a call's
  timeout; if it shows as silence, it is noticed when the renewal after it is due. There must be time left before the
  fence either way, to find another endpoint. If it was the leader of etcd that was lost, its election has to fit in as well,
  which no rule here can know: docs/etcd-outage.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from attrs import evolve, frozen

from etcdreplica.errors import ConfigurationError

MIN_TTL_S = 2.0  # etcd grants no shorter lease with its default election timings
MAX_TTL_S = 600.0
CLOCK_DRIFT = 1e-4  # of ordinary machines, one against the other
LONGEST_CALL = 0.4  # of a TTL, when the TTL is given and the timeout follows from it


@frozen
class Timing:
    """Seconds throughout; the module says what each means. Raises ConfigurationError, which names the broken rule."""

    lease_ttl_s: float = 5.0
    timeout_s: float = 1.0  # of one attempt of one call to etcd
    fence_margin_s: float = 0.5
    kernel_margin_s: float = 0.3
    guardian_margin_s: float = 0.1

    renewals_per_ttl: ClassVar[int] = 3  # no setting: fewer survive no loss, more only load etcd

    def __attrs_post_init__(self) -> None:
        self._check_ttl()
        self._check_margins()
        self._check_renewals()

    @property
    def renewal_s(self) -> float:
        """How often a lease is renewed."""
        return self.lease_ttl_s / self.renewals_per_ttl

    def with_ttl(self, lease_ttl_s: float | None) -> Timing:
        """Return the same with another TTL, and a timeout of calls that fits it; None changes nothing."""
        if lease_ttl_s is None:
            return self
        longest_s = LONGEST_CALL * max(lease_ttl_s, MIN_TTL_S)  # a shorter TTL is refused for what it is
        return evolve(self, lease_ttl_s=lease_ttl_s, timeout_s=min(self.timeout_s, longest_s))

    def _check_ttl(self) -> None:
        if not MIN_TTL_S <= self.lease_ttl_s <= MAX_TTL_S:
            raise ConfigurationError(
                f"bad lease TTL {self.lease_ttl_s:g} s: etcd grants no lease under {MIN_TTL_S:g} s, and one over "
                f"{MAX_TTL_S:g} s would leave a lost host unnoticed for too long"
            )
        if not self.timeout_s > 0:
            raise ConfigurationError(f"an etcd call may take {self.timeout_s:g} s: it needs more than none")
        if self.timeout_s > self.lease_ttl_s / 2:
            raise ConfigurationError(
                f"an etcd call may take {self.timeout_s:g} s, more than half the lease TTL of {self.lease_ttl_s:g} s: "
                "a lease must outlive a failed call"
            )

    def _check_margins(self) -> None:
        fence, kernel, guardian = self.fence_margin_s, self.kernel_margin_s, self.guardian_margin_s
        if not fence > kernel > guardian > 0:
            raise ConfigurationError(
                f"the margins before a lease could end are {fence:g}, {kernel:g} and {guardian:g} s for the WatchDog, the "
                "guardian and the kernel: fence_margin > kernel_margin > guardian_margin > 0 must hold, as each is there "
                "for when the one before it fails"
            )
        drift_s = CLOCK_DRIFT * self.lease_ttl_s
        if not guardian > drift_s:
            raise ConfigurationError(
                f"guardian_margin {guardian:g} s > {drift_s:g} s must hold: clocks may drift apart that far in a lease TTL of "
                f"{self.lease_ttl_s:g} s"
            )

    def _check_renewals(self) -> None:
        ttl_s, fence_s, renewals = self.lease_ttl_s, self.fence_margin_s, self.renewals_per_ttl
        for rule, lost_s in (
            (f"ttl - ttl / {renewals} - timeout > fence_margin", self.renewal_s + self.timeout_s),
            (f"ttl - 2 * ttl / {renewals} > fence_margin", 2 * self.renewal_s),
        ):
            if not ttl_s - lost_s > fence_s:
                raise ConfigurationError(
                    f"{rule} must hold: when the loss of one renewal shows, {ttl_s - lost_s:g} s are left of a lease TTL of "
                    f"{ttl_s:g} s, and the WatchDog ends its replicas {fence_s:g} s before the end"
                )


PRESETS: Mapping[str, Timing] = {
    "safe": Timing(),
    "fast": Timing(lease_ttl_s=2.0, timeout_s=0.5, fence_margin_s=0.4, kernel_margin_s=0.25),
    "calm": Timing(lease_ttl_s=15.0, timeout_s=3.0, fence_margin_s=1.0, kernel_margin_s=0.6, guardian_margin_s=0.2),
}


def preset(name: str, lease_ttl_s: float | None = None) -> Timing:
    """Return the timings of this name, with another TTL if one is given."""
    try:
        chosen = PRESETS[name]
    except KeyError:
        raise ConfigurationError(f"unknown timing {name!r}: use one of {', '.join(PRESETS)}") from None
    return chosen.with_ttl(lease_ttl_s)
