"""`etcdreplica bench scale`: a thousand applications that lose their host at once, and what a large fleet costs.

Replicas, and in the fleet whole hosts, are stood in for by a few processes (`stand_in`, `fleet`); etcd, the manager and, in
the first part, the nodes are real.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

from etcdreplica.testing.bench import environment
from etcdreplica.testing.etcd import EmbeddedEtcd
from etcdreplica.testing.scale_fleet import fleet, write_floor
from etcdreplica.testing.scale_mass import mass
from etcdreplica.testing.scale_meter import Say, one

SHARES = (10, 3, 1)  # the fleet is also measured at these fractions of its size
BAR = 40
_SIZED = re.compile(r"(.+)@(\d+)")


def scale(apps: int, registrations: int, hosts: int, steady_s: float, etcd_program: str | None, say: Say) -> dict[str, Any]:
    """Measure both. `apps` lose their host; `registrations` on `hosts` are the fleet, also measured at fractions of that."""
    with EmbeddedEtcd(etcd_program) as etcd:
        metrics = mass(etcd, apps, steady_s, say)
        program = etcd.program
    sizes = [(max(1, registrations // share), max(3, hosts // share)) for share in SHARES]
    for count, size in sizes:
        with EmbeddedEtcd(etcd_program) as etcd:
            metrics |= fleet(etcd, count, size, steady_s, say)
    with EmbeddedEtcd(etcd_program) as etcd:
        floor = asyncio.run(write_floor(etcd.endpoint, min(2000, registrations)))
    ratios = {f"growth_{name}": _ratio(sized) for name, sized in by_size(metrics).items() if "_per_" in name}
    ratios["placed_vs_write"] = round(metrics[f"placed_per_app@{registrations}"]["max"] / floor, 3)
    return {
        "bench": "scale",
        "parameters": {"apps": apps, "registrations": registrations, "hosts": hosts, "steady_s": steady_s},
        "environment": environment(program),
        "metrics": metrics,
        "floors": {"write": one("ms", floor)},
        "peers": {},
        "ratios": ratios,
        "ok": metrics["not_one_primary"]["max"] == 0,
    }


def by_size(metrics: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    """Return the metrics that were taken at several sizes, by name and number of applications, the smallest first."""
    found: dict[str, dict[int, Any]] = {}
    for name, metric in metrics.items():
        if match := _SIZED.fullmatch(name):
            found.setdefault(match[1], {})[int(match[2])] = metric
    return {name: dict(sorted(sized.items())) for name, sized in found.items()}


def plot(metrics: Mapping[str, Any]) -> list[str]:
    """Draw what an application, or a host, costs at each size, as lines of text: equal bars are linear growth."""
    lines = []
    for name, sized in by_size(metrics).items():
        if "_per_" in name:
            longest = max(metric["max"] for metric in sized.values()) or 1.0
            lines.append(f"{name}, {next(iter(sized.values()))['unit']}")
            for count, metric in sized.items():
                bar = "#" * max(0, round(BAR * metric["max"] / longest))
                lines.append(f"{count:>8} {metric['max']:>10.3f} {bar}")
    return lines


def _ratio(sized: Mapping[int, Any]) -> float:
    """Largest against smallest; 0 when the smallest cost nothing that can be measured."""
    values = [metric["max"] for metric in sized.values()]
    return round(values[-1] / values[0], 3) if values[0] > 0 else 0.0
