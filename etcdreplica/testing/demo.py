"""The demo: a small server under each style, its primary killed, then a whole host, shown as it happens."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from etcdreplica.clock import boottime
from etcdreplica.errors import EtcdReplicaError
from etcdreplica.testing.cluster import LocalCluster
from etcdreplica.testing.probe import Failover, Probe
from etcdreplica.testing.processes import descendants

DEGREE = 2
Say = Callable[[str], None]


def run_demo(styles: Sequence[str], lease_ttl_s: float, say: Say) -> dict[str, Any]:
    """Run it and return `{"ok": True, "styles": {style: {"process": phases, "host": phases}}}`, milliseconds throughout.

    Raises EtcdReplicaError, naming it, if anything that should happen did not.
    """
    started = time.monotonic()
    shown: dict[str, Any] = {}
    with LocalCluster(3, lease_ttl_s=lease_ttl_s, cluster="demo") as cluster:
        say(
            f"etcd on {cluster.etcd.endpoint} and hosts {', '.join(cluster.hosts)}: up after {time.monotonic() - started:.1f} s"
        )
        for style in styles:
            with Probe(cluster, f"demo-{style}", style, DEGREE) as probe:
                shown[style] = _show(cluster, probe, style, say)
        processes = [host.process.pid for host in cluster.hosts.values() if host.process]
    left = [pid for pid in [*processes, *descendants(os.getpid())] if _exists(pid)]
    if left or cluster.directory.exists():
        raise EtcdReplicaError(f"left behind: processes {left}, directory {cluster.directory}")
    return {"ok": True, "styles": shown}


def _show(cluster: LocalCluster, probe: Probe, style: str, say: Say) -> dict[str, Any]:
    say(f"\n{style}: python sample.py --style {style} --degree {DEGREE}, run by hand on host-a")
    probe.start()
    say(f"  {_seats(cluster, probe)}")
    probe.wait_settled(1.1)
    for _ in range(3):
        count = probe.ask()["answered"]
    say(f"  {count} clients were answered")

    say(f"  kill -9 of the primary on {probe.host}")
    process = _tell(cluster, probe, probe.crash(), style, count, say)
    probe.wait_settled(1.1)

    say(f"  kill -9 of everything on {probe.host}, as when a host loses power")
    lost = probe.lose_host()
    host = _tell(cluster, probe, lost, style, count + 1, say)
    say(f"  {lost.failed_host} comes back")
    cluster.restart(lost.failed_host)
    return {"process": process, "host": host}


def _tell(cluster: LocalCluster, probe: Probe, done: Failover, style: str, count: int, say: Say) -> dict[str, float]:
    detected, *rest = done.phases.items()
    steps = ", ".join(f"{name} +{value:.1f}" for name, value in rest)
    say(f"    {done.cause}")
    say(f"    {done.new_primary} took over after {done.total_ms:.1f} ms (epoch {done.epoch})")
    say(f"    detected after {detected[1]:.1f} ms, {steps}")
    answer = probe.ask()
    counted = "" if style == "hot" else f": number {answer['answered']}"
    say(f"    a client is answered by {answer['host']}, {answer['role']} of epoch {answer['epoch']}{counted}")
    if counted and answer["answered"] <= count:
        raise EtcdReplicaError(f"{probe.name} has lost its state: it counted {count} answers before\n{cluster.describe()}")
    cluster.wait_ready(probe.name)
    restored_ms = 1000 * (boottime() - probe.body_at) + done.total_ms
    say(f"    degree restored {restored_ms:.0f} ms after the kill: {_seats(cluster, probe)}")
    phases = {**done.phases, "total": done.total_ms, "degree_restored": restored_ms}
    return {name: round(value, 3) for name, value in phases.items()}


def _seats(cluster: LocalCluster, probe: Probe) -> str:
    assignment = cluster.view.apps[probe.name].assignment
    if assignment is None or assignment.primary is None:
        raise EtcdReplicaError(f"{probe.name} has no primary\n{cluster.describe()}")
    backups = ", ".join(seat.host for seat in assignment.backups)
    return f"primary on {assignment.primary.host} (epoch {assignment.epoch}), backup on {backups}"


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
