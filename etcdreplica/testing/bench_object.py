"""`etcdreplica bench object`: what a replicated object costs and survives, beside a gRPC round trip and PySyncObj."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etcdreplica.app.protocol import SOCKET_ENV
from etcdreplica.clock import boottime
from etcdreplica.errors import EtcdReplicaError
from etcdreplica.objects.proxy import connect, connect_async
from etcdreplica.testing import counter, pysyncobj_node
from etcdreplica.testing.bench import environment, summary
from etcdreplica.testing.cluster import LocalCluster
from etcdreplica.testing.etcd import EmbeddedEtcd
from etcdreplica.testing.grpc_floor import GrpcFloor

COPIES = 3
IN_FLIGHT = (100, 1000, 5000)
SECONDS = 2.0
WORKERS = 20  # updates under way when the primary is killed
WARM_UP = 50
PAUSE_S = 0.002
PYSYNCOBJ: dict[str, dict[str, Any]] = {
    "default": {},
    "batching_off": {"appendEntriesUseBatch": False},
    "stable": {"raftMinTimeout": 0.2, "raftMaxTimeout": 0.4, "appendEntriesPeriod": 0.05, "autoTickPeriod": 0.01},
}

Say = Callable[[str], None]


def object_(trials: int, kills: int, etcd_program: str | None, say: Say) -> dict[str, Any]:
    """Measure all of it. `trials`: single updates; `kills`: of the primary under load."""
    metrics: dict[str, Any] = {}
    floors: dict[str, Any] = {}
    with EmbeddedEtcd(etcd_program) as etcd, LocalCluster(COPIES, etcd=etcd, lease_ttl_s=5.0) as cluster:
        copies = Counters(cluster)
        with GrpcFloor(cluster.directory) as floor:
            say(f"{trials} updates, one at a time")
            floors["grpc_stream_round_trip"] = summary(floor.stream_round_trips(trials, PAUSE_S))
            copies.ask("latency", rounds=WARM_UP)
            metrics["in_primary"] = summary(copies.ask("latency", rounds=trials)["ms"])
            metrics["connect"] = summary(_latency(copies.name, trials))
            floors["grpc_stream_round_trip_again"] = summary(floor.stream_round_trips(trials, PAUSE_S))
        for in_flight in IN_FLIGHT:
            say(f"{in_flight} updates under way")
            rates = [copies.ask("throughput", in_flight=in_flight, seconds=SECONDS)["per_s"] for _ in range(3)]
            metrics[f"throughput_{in_flight}"] = _rates(rates)
        say(f"{kills} kills of the primary under load")
        found, wrong, done = asyncio.run(gaps(copies, kills))
        metrics["gap"] = summary(found)
        metrics["lost_or_doubled"] = {"unit": "updates", "n": done, "max": wrong}
        program = etcd.program
    peers = _pysyncobj(trials, say)
    floor_ms = (floors["grpc_stream_round_trip"]["p50"] + floors["grpc_stream_round_trip_again"]["p50"]) / 2
    ratios = {"connect_vs_floor": round(metrics["connect"]["p50"] / floor_ms, 3)}
    if peers:
        best = min(figure["p50"] for name, figure in peers.items() if name.endswith("_update"))
        ratios["in_primary_vs_pysyncobj"] = round(metrics["in_primary"]["p50"] / best, 3)
        for in_flight in IN_FLIGHT:
            best = max(figure["p50"] for name, figure in peers.items() if name.endswith(f"_throughput_{in_flight}"))
            ratios[f"throughput_{in_flight}_vs_pysyncobj"] = round(metrics[f"throughput_{in_flight}"]["p50"] / best, 3)
        ratios["throughput_vs_pysyncobj"] = min(ratios[f"throughput_{n}_vs_pysyncobj"] for n in IN_FLIGHT)
    return {
        "bench": "object",
        "parameters": {"trials": trials, "kills": kills, "copies": COPIES, "workers": WORKERS},
        "environment": environment(program),
        "metrics": metrics,
        "floors": floors,
        "peers": peers,
        "ratios": ratios,
        "ok": wrong == 0 and bool(peers),
    }


class Counters:
    """The application of `testing.counter` on a cluster."""

    def __init__(self, cluster: LocalCluster, name: str = "counter", *arguments: str) -> None:
        self.cluster = cluster
        self.name = name
        self.directory = Path(tempfile.mkdtemp(prefix="er-", dir=cluster.sockets))
        host = next(iter(cluster.hosts.values()))
        os.environ[SOCKET_ENV] = str(host.socket_path)  # whose node our own clients ask
        cluster.start(Path(counter.__file__), "--name", name, "--directory", str(self.directory), *arguments, host=host.name)
        self.wait_in_sync(COPIES)

    def wait_in_sync(self, count: int) -> None:
        """Wait until the primary runs and so many copies are in sync."""
        self.cluster.wait_ready(self.name)
        self.cluster.wait_until(lambda _: self.cluster.in_sync(self.name) == count, f"{count} copies in sync", 60)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have the primary's process do something."""
        assignment = self.cluster.view.apps[self.name].assignment
        assert assignment is not None
        assert assignment.primary is not None
        named = self.directory / f"{assignment.primary.incarnation}.sock"
        path = named if named.exists() else self.directory / "hand.sock"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            with client.makefile("rwb") as stream:
                stream.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
                stream.flush()
                answer: dict[str, Any] = json.loads(stream.readline() or "{}")
                return answer

    def kill_primary(self) -> float:
        """SIGKILL it; return when."""
        _, pid = self.cluster.primary(self.name)
        at = boottime()
        os.kill(pid, signal.SIGKILL)
        return at


def _latency(name: str, trials: int) -> list[float]:
    found = []
    with connect(name) as proxy:
        for number in range(trials + WARM_UP):
            time.sleep(PAUSE_S)
            started = time.perf_counter()
            proxy.add("connect")
            if number >= WARM_UP:
                found.append(1000 * (time.perf_counter() - started))
    return found


def _rates(rates: list[float]) -> dict[str, Any]:
    return {"unit": "1/s", "n": len(rates), "p50": round(sorted(rates)[len(rates) // 2]), "max": round(max(rates))}


async def gaps(copies: Counters, kills: int) -> tuple[list[float], int, int]:
    """Return for how long no update was acknowledged at each kill, how many went wrong, and how many there were."""
    acknowledged: list[float] = []
    found_gaps, wrong, done, stopping = [], 0, 0, False
    async with await connect_async(copies.name) as proxy:

        async def work(number: int) -> None:
            nonlocal wrong, done
            count = 0
            while not stopping:
                found = await proxy.add(f"worker {number}")
                acknowledged.append(boottime())
                count += 1
                done += 1
                wrong += found != count
                count = found

        workers = [asyncio.create_task(work(number)) for number in range(WORKERS)]
        for _ in range(kills):
            await asyncio.to_thread(copies.wait_in_sync, COPIES)
            await asyncio.sleep(0.3)
            acknowledged.clear()
            epoch = copies.cluster.view.apps[copies.name].assignment
            assert epoch is not None
            await asyncio.sleep(0.1)
            at = copies.kill_primary()
            await asyncio.to_thread(copies.cluster.wait_ready, copies.name, after_epoch=epoch.epoch)
            while acknowledged[-1] < at + 0.2:  # noqa: ASYNC110  (the workers raise no event)
                await asyncio.sleep(0.01)
            times = [time for time in acknowledged if time > at - 0.1]
            found_gaps.append(1000 * max(after - before for before, after in itertools.pairwise(times)))
        stopping = True
        await asyncio.gather(*workers)
    return found_gaps, wrong, done


# --- PySyncObj -----------------------------------------------------------------------------------------------------


def _pysyncobj(trials: int, say: Say) -> dict[str, Any]:
    if importlib.util.find_spec("pysyncobj") is None:
        say("PySyncObj is not installed: not compared")
        return {}
    found: dict[str, Any] = {}
    for name, settings in PYSYNCOBJ.items():
        say(f"PySyncObj, {name}")
        with _nodes(settings) as leader:
            leader("latency", rounds=WARM_UP if name != "default" else 5)
            rounds = trials if name != "default" else min(trials, 50)  # each takes a tenth of a second
            found[f"pysyncobj_{name}_update"] = summary(leader("latency", rounds=rounds)["ms"])
            for in_flight in IN_FLIGHT:
                rates = [leader("throughput", in_flight=in_flight, seconds=SECONDS)["per_s"] for _ in range(3)]
                found[f"pysyncobj_{name}_throughput_{in_flight}"] = _rates(rates)
    return found


@contextmanager
def _nodes(settings: dict[str, Any]) -> Iterator[Callable[..., dict[str, Any]]]:
    """Three nodes; give a way to ask the one that leads."""
    addresses = [f"127.0.0.1:{_free_port()}" for _ in range(COPIES)]
    nodes: list[subprocess.Popen[str]] = []
    try:
        for address in addresses:
            partners = [other for other in addresses if other != address]
            given = json.dumps({"address": address, "partners": partners, "settings": settings})
            command = [sys.executable, "-m", pysyncobj_node.__name__, given]
            nodes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1))

        def ask(node: subprocess.Popen[str], do: str, **arguments: Any) -> dict[str, Any]:
            assert node.stdin is not None
            assert node.stdout is not None
            node.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            node.stdin.flush()
            answer: dict[str, Any] = json.loads(node.stdout.readline())
            return answer

        deadline = time.monotonic() + 30
        while True:
            states = [ask(node, "status") for node in nodes]
            leaders = {state["leader"] for state in states}
            if all(state["ready"] for state in states) and len(leaders) == 1 and None not in leaders:
                break
            if time.monotonic() > deadline:
                raise EtcdReplicaError(f"PySyncObj found no leader: {states}")
            time.sleep(0.05)
        leader = nodes[addresses.index(leaders.pop())]
        time.sleep(1.0)
        yield lambda do, **arguments: ask(leader, do, **arguments)
    finally:
        for node in nodes:
            node.kill()
            node.wait()
            assert node.stdin is not None
            assert node.stdout is not None
            node.stdin.close()
            node.stdout.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
