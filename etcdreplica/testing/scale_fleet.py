"""The second part of `bench scale`: what a fleet of hundreds of hosts costs etcd and the manager."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from aetcd.rpc import rpc_pb2 as rpc

from etcdreplica.clock import boottime
from etcdreplica.errors import EtcdReplicaError
from etcdreplica.model import Program, Registration
from etcdreplica.store import EtcdOptions, Key, Kind, Put, Store, Txn
from etcdreplica.testing.bench import summary
from etcdreplica.testing.etcd import EmbeddedEtcd
from etcdreplica.testing.processes import resident_mib, spawn_bound, stop
from etcdreplica.testing.scale_meter import POLL_S, Meter, Say, etcd_pid, one, steady
from etcdreplica.words import Style

FLEET = [sys.executable, "-m", "etcdreplica.testing.fleet"]
LEASE_TTL_S = 60.0  # so that one process can renew the leases of hundreds of hosts
ROOM = 1.5  # the capacity of a fleet, in terms of what is placed on it
AT_ONCE = 64  # writes under way
ENVIRONMENT = {f"VARIABLE_{number}": "x" * 40 for number in range(20)}  # a registration carries its program's environment


def fleet(etcd: EmbeddedEtcd, count: int, size: int, steady_s: float, say: Say) -> dict[str, Any]:
    """Register many applications, bring all hosts up at once, lose one, and let it rest."""
    say(f"{count} registrations on {size} hosts")
    cluster, capacity = "fleet", math.ceil(ROOM * 2 * count / size)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="etcdreplica-")))
        etcd_options = ["--etcd", etcd.endpoint, "--cluster", cluster]
        manager = spawn_bound(
            [sys.executable, "-m", "etcdreplica", "manager", "--host", "manager", *etcd_options], log=directory / "manager.log"
        )
        stack.callback(stop, manager, 5.0)
        hosts = stack.enter_context(Hosts(etcd, cluster, size, capacity, directory / "fleet.log"))
        asyncio.run(_wait_for_manager(etcd.endpoint, cluster))
        pids = {"manager": manager.pid, "etcd": etcd_pid(etcd)}
        empty_mib = {name: resident_mib(pid) for name, pid in pids.items()}
        meter = Meter(pids)
        asyncio.run(_register(etcd.endpoint, cluster, count))
        at = hosts.tell("join")["at"]
        took = {"placed": hosts.tell("await", count)["at"] - at, "settled": hosts.tell("settle")["at"] - at}
        metrics: dict[str, Any] = {name: one("s", seconds) for name, seconds in took.items()}
        metrics |= {f"{name}_per_app": one("ms", 1000 * seconds / count) for name, seconds in took.items()}
        metrics |= {f"{name}_cpu_per_app": one("ms", 1000 * cpu / count) for name, cpu in meter.taken().items()}
        for name, pid in pids.items():
            metrics[f"{name}_memory"] = one("MiB", resident_mib(pid))
            metrics[f"{name}_memory_per_app"] = one("KiB", 1024 * (resident_mib(pid) - empty_mib[name]) / count)
        time.sleep(min(2.0, steady_s))  # what has just happened has to be heard of
        resting = steady({**{name: [pid] for name, pid in pids.items()}, "fleet": [hosts.pid]}, steady_s)
        metrics |= resting
        metrics |= {f"{name}_per_host": one("us/s", 1e4 * metric["max"] / size) for name, metric in resting.items()}
        metrics |= _lose(hosts, Meter(pids), {name: resting[f"steady_{name}_cpu"]["max"] / 100 for name in pids})
    return {f"{name}@{count}": value for name, value in metrics.items()}


def _lose(hosts: Hosts, meter: Meter, resting: dict[str, float]) -> dict[str, Any]:
    """Lose a host; what the fleet costs meanwhile anyway, in cores, is left out."""
    began = boottime()
    lost = hosts.tell("lose")
    hosts.tell("settle")
    took = boottime() - began
    used = {name: max(0.0, cpu - resting[name] * took) for name, cpu in meter.taken().items()}
    metrics = {f"lost_{name}_cpu_per_app": one("ms", 1000 * cpu / lost["apps"]) for name, cpu in used.items()}
    metrics["lost"] = summary([1000 * (at - lost["at"]) for at in lost["again"]] or [0.0])
    metrics["lost_restored"] = one("ms", 1000 * (lost["restored"] - lost["at"]))
    metrics["lost_restored_per_app"] = one("ms", 1000 * (lost["restored"] - lost["at"]) / lost["apps"])
    return metrics


class Hosts:
    """The process that stands in for the hosts."""

    def __init__(self, etcd: EmbeddedEtcd, cluster: str, size: int, capacity: int, log: Path) -> None:
        self._command = [*FLEET, etcd.endpoint, cluster, str(size), str(capacity), str(LEASE_TTL_S)]
        self._log = log

    def __enter__(self) -> Hosts:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        self.pid = self._process.pid
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def tell(self, command: str, *arguments: object) -> dict[str, Any]:
        """Give a command, and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join((command, *map(str, arguments), "\n")).encode())
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise EtcdReplicaError(f"the stand-in for the hosts has failed:\n{self._log.read_text()[-2000:]}")
        return dict(json.loads(answer))


async def write_floor(endpoint: str, count: int) -> float:
    """How long a plain client takes for one transaction when it has many under way, in ms: the floor of every plan."""
    async with Store(EtcdOptions((endpoint,), timeout_s=10.0), "floor") as store:
        at = boottime()
        await _write(store, count)
        return 1000 * (boottime() - at) / count


async def _wait_for_manager(endpoint: str, cluster: str) -> None:
    async with Store(EtcdOptions((endpoint,)), cluster) as store, contextlib.aclosing(store.follow(Kind.LEADERS)) as batches:
        async for batch in batches:
            if any(entry.key.names[0] == "superwatchdog" for entry in batch.entries):
                return


async def _register(endpoint: str, cluster: str, count: int) -> None:
    """Register applications, and wait until the manager has taken note of all."""
    async with Store(EtcdOptions((endpoint,), timeout_s=10.0), cluster) as store:
        await _write(store, count)
        prefix = store.keys.prefix(Kind.ASSIGNMENTS)
        request = rpc.RangeRequest(key=prefix, range_end=prefix[:-1] + b"0", count_only=True)
        while (await store.channel.call("KV.Range", request)).count < count:  # noqa: ASYNC110  (to watch would cost etcd more)
            await asyncio.sleep(POLL_S)


async def _write(store: Store, count: int) -> None:
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        name = f"app-{number:05}"
        registration = Registration(name, Style.WARM, 2, Program(("service", name), "/", ENVIRONMENT))
        async with slots:
            await store.commit(Txn((), (Put(Key(Kind.REGISTRATIONS, (name,)), registration),)))

    await asyncio.gather(*map(one, range(count)))
