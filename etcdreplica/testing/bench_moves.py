"""`etcdreplica bench switchover`: planned changes of primary, one after the other, and a host that is drained of many."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from etcdreplica.clock import boottime
from etcdreplica.core.view import ClusterView
from etcdreplica.daemon.registry import register
from etcdreplica.model import Ask, Event, Program, Registration, Request
from etcdreplica.store import EtcdOptions, Key, Kind, Put, Store, Txn
from etcdreplica.testing.bench import FLOOR_ROUNDS, SETTLE_S, environment, put_to_event, summary
from etcdreplica.testing.cluster import LocalCluster
from etcdreplica.testing.etcd import EmbeddedEtcd
from etcdreplica.testing.journal import written_lines
from etcdreplica.testing.scale_mass import is_whole
from etcdreplica.testing.scale_meter import Say, one, poll
from etcdreplica.words import Style

ACTING = Path(__file__).parent / "acting.py"
LEASE_TTL_S = 5.0
AT_ONCE = 20  # registrations under way
PHASES = ("total", "stop", "beyond_stop", "gap")


def moves(trials: int, apps: int, etcd_program: str | None, say: Say) -> dict[str, Any]:
    """Measure `trials` switchovers of one warm application, and the drain of a host with `apps`."""
    with EmbeddedEtcd(etcd_program) as etcd:
        floor = summary(asyncio.run(put_to_event(etcd.endpoint, min(trials, FLOOR_ROUNDS))))
        roomy = {f"host-{letter}": ("--capacity", str(2 * apps)) for letter in "abc"}
        with LocalCluster(3, etcd=etcd, lease_ttl_s=LEASE_TTL_S, node_arguments=roomy) as cluster:
            metrics, faults = asyncio.run(_Moves(cluster, say).measure(trials, apps))
        program = etcd.program
    return {
        "bench": "switchover",
        "parameters": {"trials": trials, "apps": apps, "style": "warm", "lease_ttl_s": LEASE_TTL_S},
        "environment": environment(program),
        "metrics": metrics,
        "floors": {"put_to_event": floor},
        "peers": {},
        "ratios": {"beyond_stop_vs_put_to_event": round(metrics["beyond_stop"]["p50"] / floor["p50"], 3)},
        "ok": not faults,
    }


class _Moves:
    """The cluster, and what its applications have noted."""

    def __init__(self, cluster: LocalCluster, say: Say) -> None:
        self._cluster = cluster
        self._say = say
        self._path = next(iter(cluster.hosts.values())).directory / "acting.jsonl"

    async def measure(self, trials: int, apps: int) -> tuple[dict[str, Any], int]:
        """Return the metrics, and how many applications were not as they should be after the drain."""
        async with Store(EtcdOptions((self._cluster.etcd.endpoint,)), self._cluster.cluster) as store:
            await self._register(store, 1)
            self._say(f"{trials} switchovers")
            taken = [await self._switchover(store) for _ in range(trials)]
            metrics = {name: summary([sample[name] for sample in taken]) for name in PHASES}
            self._say(f"{apps} applications with a copy on host-a")
            await asyncio.to_thread(self._cluster.drain, "host-c")  # so that the other two get them all
            await self._register(store, apps)
            await asyncio.to_thread(self._cluster.undrain, "host-c")
            self._say("host-a is drained")
            drained, faults = await self._drain(apps)
        return {**metrics, **drained}, faults

    async def _register(self, store: Store, count: int) -> None:
        slots = asyncio.Semaphore(AT_ONCE)

        async def one_of_them(name: str) -> None:
            program = Program((sys.executable, str(ACTING), name, str(self._path)), "/")
            async with slots:
                await register(store, Registration(name, Style.WARM, 2, program, max_restarts=0), "host-a")

        names = (f"app-{number}" for number in range(count) if f"app-{number}" not in self._cluster.view.apps)
        await asyncio.gather(*map(one_of_them, names))
        await asyncio.to_thread(poll, lambda: self._is_whole(count), f"{count} applications to be whole")

    def _is_whole(self, count: int) -> bool:
        return self._cluster.look(lambda view: len(view.apps) == count and all(map(is_whole, view.apps.values())))

    async def _switchover(self, store: Store) -> dict[str, float]:
        """Return the phases of one, in milliseconds."""
        cluster, name = self._cluster, "app-0"
        await asyncio.to_thread(cluster.wait_ready, name)
        await asyncio.sleep(SETTLE_S)
        assignment = cluster.look(lambda view: view.apps[name].assignment)
        primary = assignment.primary if assignment else None
        assert primary is not None
        began = boottime()
        request = Request(Ask.SWITCHOVER, "bench", primary.incarnation)
        await store.commit(Txn((), (Put(Key(Kind.REQUESTS, (name,)), request),)))
        await asyncio.to_thread(cluster.wait_until, lambda _: (name, primary.incarnation) in cluster.events, "the handover")
        event: Event = cluster.events[name, primary.incarnation]
        await asyncio.to_thread(poll, lambda: self._began(name, event.epoch) is not None, "the next body to begin")
        ended, begun = self._noted(name, "end", primary.host, began), self._began(name, event.epoch)
        assert begun is not None
        stop = event.failure.detected_at - ended
        found = {"total": begun - began, "stop": stop, "beyond_stop": begun - began - stop, "gap": begun - ended}
        return {name: 1000 * seconds for name, seconds in found.items()}

    async def _drain(self, apps: int) -> tuple[dict[str, Any], int]:
        cluster, before = self._cluster, self._cluster.look(_primaries)
        leaving = {name: seat for name, seat in before.items() if seat == "host-a"}
        began, wall = boottime(), time.monotonic()
        await asyncio.to_thread(cluster.drain, "host-a")
        await asyncio.to_thread(cluster.wait_until, _is_empty, "host-a to be empty", 600.0)
        metrics = {"drain": one("s", time.monotonic() - wall), "drained_primaries": one("applications", len(leaving))}
        await asyncio.to_thread(poll, lambda: self._is_whole(apps), f"{apps} applications to be whole")
        after = cluster.look(_primaries)
        gaps = []
        for name in leaving:
            begun = [line["at"] for line in self._lines(name, "begin") if line["at"] > began]
            gaps += [1000 * (begun[-1] - self._noted(name, "end", "host-a", began))] if begun else []
        metrics["drain_gap"] = summary(gaps)
        moved = [name for name in before if before[name] != after[name]]
        faults = (
            len(set(moved) ^ set(leaving)) + sum(host in (None, "host-a") for host in after.values()) + len(leaving) - len(gaps)
        )
        return metrics, faults

    def _lines(self, app: str, what: str) -> list[dict[str, Any]]:
        lines = (json.loads(line) for line in written_lines(self._path))
        return [line for line in lines if (line["app"], line["what"]) == (app, what)]

    def _noted(self, app: str, what: str, host: str, after: float) -> float:
        found: float = next(line["at"] for line in self._lines(app, what) if line["host"] == host and line["at"] > after)
        return found

    def _began(self, app: str, epoch: int) -> float | None:
        return next((line["at"] for line in self._lines(app, "begin") if line["epoch"] == epoch), None)


def _primaries(view: ClusterView) -> dict[str, str | None]:
    found = {name: app.assignment.primary if app.assignment else None for name, app in view.apps.items()}
    return {name: seat.host if seat else None for name, seat in found.items()}


def _is_empty(view: ClusterView) -> bool:
    return not any("host-a" in app.seated_on or "host-a" in app.replicas for app in view.apps.values())
