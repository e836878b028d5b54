"""The first part of `bench scale`: many applications on three real hosts lose their primaries, and then a host, at once."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from etcdreplica.clock import boottime
from etcdreplica.core.view import AppView, ClusterView
from etcdreplica.model import ReplicaState
from etcdreplica.store import EtcdOptions, Kind, Store
from etcdreplica.testing.bench import summary
from etcdreplica.testing.cluster import LocalCluster
from etcdreplica.testing.etcd import EmbeddedEtcd
from etcdreplica.testing.scale_meter import POLL_S, Say, etcd_pid, one, poll, steady, total_cpu_s
from etcdreplica.words import Role

STAND_IN = [sys.executable, "-m", "etcdreplica.testing.stand_in"]
LEASE_TTL_S = 5.0
SETTLE_S = 60.0


def mass(etcd: EmbeddedEtcd, count: int, steady_s: float, say: Say) -> dict[str, Any]:
    """Lose every primary of a host, then a host."""
    roomy = {f"host-{letter}": ("--capacity", str(2 * count)) for letter in "abc"}
    with LocalCluster(3, etcd=etcd, cluster="mass", lease_ttl_s=LEASE_TTL_S, node_arguments=roomy) as cluster:
        say(f"{count} applications on 3 hosts")
        crowd = Crowd(cluster, etcd, count)
        crowd.start()
        metrics = {f"mass_{name}": value for name, value in steady(crowd.pids(), steady_s).items()}
        leader = cluster.leaders["manager"]
        standby = sorted(set(cluster.hosts) - {leader})
        say("all primaries of a host are killed")
        metrics |= crowd.crash(leader)
        say("a host is lost")
        metrics |= crowd.lose(standby[0])
        metrics["not_one_primary"] = one("applications", crowd.faults)
    return metrics


@frozen
class StandIn:
    """One of the processes that stand in, and where it tells of the roles of its copies."""

    host: str
    what: str
    report: Path
    process: subprocess.Popen[bytes]

    def reports(self) -> list[dict[str, Any]]:
        """Return what it has told so far; the last line may still be under way."""
        return [json.loads(line) for line in self.report.read_text().split("\n")[:-1]]


@define
class Crowd:
    """The applications of a cluster and the processes that stand in for them, two on each host."""

    cluster: LocalCluster
    etcd: EmbeddedEtcd
    count: int
    faults: int = 0
    stand_ins: list[StandIn] = field(factory=list)

    def start(self) -> None:
        """Bring all of them up, evenly spread."""
        for number, host in enumerate(self.cluster.hosts):
            self._run(host, "take")
            first = number * self.count // 3
            self._run(host, "register", first, (number + 1) * self.count // 3 - first)
        self._wait_whole()

    def pids(self) -> dict[str, list[int]]:
        """Return the processes whose cost is of interest."""
        view, cluster = self.cluster.look(lambda view: dict(view.hosts)), self.cluster
        nodes = [host.process.pid for host in cluster.hosts.values() if host.process is not None]
        return {
            "etcd": [etcd_pid(self.etcd)],
            "manager": [asyncio.run(_leader(cluster.etcd.endpoint, cluster.cluster))],
            "watchdogs": [host.host.pid for host in view.values()],
            "guardians": nodes,
        }

    def crash(self, host: str) -> dict[str, Any]:
        """Kill the process that is the primary of a third of them."""
        victims = self._led_by(host)
        at = boottime()
        for stand_in in self.stand_ins:
            if (stand_in.host, stand_in.what) == (host, "register"):
                stand_in.process.kill()
        taken = self._taken_over(victims, at)
        self._wait_whole()
        return _times("mass_crash", taken, at)

    def lose(self, host: str) -> dict[str, Any]:
        """Kill everything on a host."""
        victims = self._led_by(host)
        pids = self.pids()
        before = {name: total_cpu_s(pids[name]) for name in ("etcd", "manager")}
        at = boottime()
        self.cluster.hosts[host].kill()
        taken = self._taken_over(victims, at)
        found = _times("mass_host_lost", taken, at)
        found["mass_host_lost_over_ttl"] = one("ms", found["mass_host_lost"]["max"] - 1000 * LEASE_TTL_S)
        self._wait_whole()
        found["mass_restored"] = one("s", boottime() - at)
        for name, cpu in before.items():
            found[f"mass_host_lost_{name}_cpu"] = one("s", total_cpu_s(pids[name]) - cpu)
        return found

    def _run(self, host: str, what: str, *numbers: int) -> None:
        local = self.cluster.hosts[host]
        report = local.directory / f"{what}.jsonl"
        report.touch()
        process = self.cluster.run([*STAND_IN, str(local.socket_path), str(report), what, *map(str, numbers)], host=host)
        self.stand_ins.append(StandIn(host, what, report, process))

    def _led_by(self, host: str) -> set[str]:
        return {app for app, leading in self.cluster.look(_led).items() if leading == host}

    def _taken_over(self, victims: set[str], since: float) -> list[float]:
        """Wait until each has another primary; return the moments."""
        found: dict[str, float] = {}

        def look() -> bool:
            for stand_in in self.stand_ins:
                for line in stand_in.reports():
                    if line.get("role") == Role.PRIMARY and line["app"] in victims and line["at"] > since:
                        found.setdefault(line["app"], line["at"])
            return len(found) == len(victims)

        poll(look, f"{len(victims)} applications to be taken over")
        return list(found.values())

    def _wait_whole(self) -> None:
        """Wait until every application has both copies, a successor, and exactly one primary among the stand-ins.

        What those say comes a little later than what stands in etcd; what does not come right counts as a fault.
        """
        poll(lambda: self.cluster.look(self._is_whole), f"{self.count} applications to be whole")
        until = boottime() + SETTLE_S
        while (faults := self._faults()) and boottime() < until:
            time.sleep(POLL_S)
        self.faults += faults

    def _faults(self) -> int:
        """Count the applications of which not exactly the copy that is to be primary says that it is."""
        claims: dict[str, list[str]] = {}
        for stand_in in self.stand_ins:
            if stand_in.process.poll() is None:
                roles = {line["app"]: line["role"] for line in stand_in.reports() if "role" in line}
                for app in (app for app, role in roles.items() if role == Role.PRIMARY):
                    claims.setdefault(app, []).append(stand_in.host)
        return sum(claims.get(app) != [host] for app, host in self.cluster.look(_led).items())

    def _is_whole(self, view: ClusterView) -> bool:
        return len(view.apps) == self.count and all(map(is_whole, view.apps.values()))


def is_whole(app: AppView) -> bool:
    """Whether a warm application of two copies has both, and a successor."""
    assignment = app.assignment
    if assignment is None or assignment.degraded or assignment.successor is None or len(app.replicas) != 2:
        return False
    replicas = [app.replica(seat) for seat in assignment.seats]
    return [replica.state if replica else None for replica in replicas] == [ReplicaState.RUNNING, ReplicaState.READY]


def _led(view: ClusterView) -> dict[str, str | None]:
    """Return the host of each application's primary."""
    assigned = {name: app.assignment for name, app in view.apps.items()}
    return {
        name: assignment.primary.host if assignment and assignment.primary else None for name, assignment in assigned.items()
    }


def _times(name: str, moments: Sequence[float], since: float) -> dict[str, Any]:
    """The half of them is the median, the last one the maximum."""
    taken = sorted(1000 * (at - since) for at in moments)
    if not taken:
        return {name: one("ms", 0.0)}
    return {name: summary(taken), f"{name}_first": one("ms", taken[0]), f"{name}_spread": one("ms", taken[-1] - taken[0])}


async def _leader(endpoint: str, cluster: str) -> int:
    """Return the process that leads the ReplicaManager."""
    async with Store(EtcdOptions((endpoint,)), cluster) as store:
        line = await store.list(Kind.LEADERS, "manager")
    return int(min(line.entries, key=lambda entry: entry.create_revision).value.pid)
