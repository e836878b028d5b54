"""What both parts of `bench scale` measure with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etcdreplica.clock import boottime
from etcdreplica.errors import EtcdReplicaError
from etcdreplica.testing.etcd import EmbeddedEtcd
from etcdreplica.testing.processes import cpu_s

PATIENCE_S = 600.0
POLL_S = 0.2

Say = Callable[[str], None]


class Meter:
    """CPU that processes have used since it was made."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self.pids = dict(pids)
        self._before = {name: cpu_s(pid) for name, pid in self.pids.items()}

    def taken(self) -> dict[str, float]:
        """Return the seconds of each."""
        return {name: cpu_s(pid) - self._before[name] for name, pid in self.pids.items()}


def one(unit: str, value: float) -> dict[str, Any]:
    """Return a metric of one sample."""
    return {"unit": unit, "n": 1, "max": round(value, 3)}


def total_cpu_s(pids: Sequence[int]) -> float:
    """Return the CPU that several processes have used together."""
    return sum(map(cpu_s, pids))


def steady(groups: Mapping[str, Sequence[int]], seconds: float) -> dict[str, Any]:
    """What processes use while nothing happens."""
    before, at = {name: total_cpu_s(pids) for name, pids in groups.items()}, boottime()
    time.sleep(seconds)
    took = boottime() - at
    return {
        f"steady_{name}_cpu": one("% of a core", 100 * (total_cpu_s(pids) - before[name]) / took)
        for name, pids in groups.items()
    }


def poll(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds that is not cheap to look at. Raises EtcdReplicaError."""
    until = boottime() + PATIENCE_S
    while not condition():
        if boottime() > until:
            raise EtcdReplicaError(f"waited {PATIENCE_S:g} s in vain for {what}")
        time.sleep(POLL_S)


def etcd_pid(etcd: EmbeddedEtcd) -> int:
    """Return its process id."""
    assert etcd.process is not None
    return etcd.process.pid
