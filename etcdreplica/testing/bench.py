"""What `etcdreplica bench` measures, in the one form that all benches share.

Every figure stands beside floors measured in the same run: machines are shared and noisy, ratios travel.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from etcdreplica.app.protocol import STANDALONE_ENV
from etcdreplica.clock import boottime
from etcdreplica.model import Leader
from etcdreplica.store import EtcdOptions, Key, Kind, Put, Snapshot, Store, Txn
from etcdreplica.testing.cluster import LocalCluster
from etcdreplica.testing.etcd import EmbeddedEtcd
from etcdreplica.testing.probe import PHASES, SAMPLE, Probe

SETTLE_S = 1.1  # longer than the time after which a body counts as healthy
FLOOR_ROUNDS = 15  # at most; no more than trials
PAUSE_S = 1.0  # before each floor too: after a quiet second everything is slower, for us and for the floor

Progress = Callable[[int, int], None]


def failover(
    style: str,
    trials: int,
    fault: str,
    mode: str,
    degree: int,
    lease_ttl_s: float,
    etcd_program: str | None,
    progress: Progress,
) -> dict[str, Any]:
    """Measure kill to first line of the body, `trials` times.

    `fault`: "process" (SIGKILL) or "host" (all of it); `mode`: the application's failover, "safe" or "fast".
    """
    samples: dict[str, list[float]] = {name: [] for name in ("total", *PHASES)}
    floors: dict[str, list[float]] = {}
    rounds = min(trials, FLOOR_ROUNDS)
    with EmbeddedEtcd(etcd_program) as etcd:
        floors["pidfd_notice"] = [pidfd_notice() for _ in range(rounds)]
        floors["put_to_event"] = asyncio.run(put_to_event(etcd.endpoint, rounds))
        if style == "cold":
            floors["by_hand"] = [_by_hand() for _ in range(rounds)]
        with (
            LocalCluster(3, etcd=etcd, lease_ttl_s=lease_ttl_s) as cluster,
            Probe(cluster, "bench", style, degree, "--failover", mode) as probe,
        ):
            probe.start()
            for trial in range(trials):
                probe.wait_settled(SETTLE_S + random.random() * 0.05)
                done = probe.crash() if fault == "process" else probe.lose_host(silently=mode == "fast")
                samples["total"].append(done.total_ms)
                for name, value in done.phases.items():
                    samples[name].append(value)
                if fault == "host":
                    cluster.restart(done.failed_host)
                progress(trial + 1, trials)
        program = etcd.program
    metrics = {name: summary(values) for name, values in samples.items()}
    total = metrics["total"]["p50"]
    ratios = {"total_vs_put_to_event": round(total / summary(floors["put_to_event"])["p50"], 3)}
    if style == "cold":
        ratios["cold_vs_by_hand"] = round(total / summary(floors["by_hand"])["p50"], 3)
    if fault == "host":
        ratios["total_vs_ttl"] = round(total / (1000 * lease_ttl_s), 3)
    return {
        "bench": "failover",
        "parameters": {
            "style": style,
            "trials": trials,
            "fault": fault,
            "failover": mode,
            "degree": degree,
            "lease_ttl_s": lease_ttl_s,
        },
        "environment": environment(program),
        "metrics": metrics,
        "floors": {name: summary(values) for name, values in floors.items()},
        "peers": {},
        "ratios": ratios,
        "ok": len(samples["total"]) == trials,
    }


def summary(milliseconds: Sequence[float]) -> dict[str, Any]:
    """Nearest-rank percentiles of samples in milliseconds."""
    ordered = sorted(milliseconds)

    def rank(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))], 3)

    return {
        "unit": "ms",
        "n": len(ordered),
        "p50": rank(0.50),
        "p95": rank(0.95),
        "p99": rank(0.99),
        "max": round(ordered[-1], 3),
    }


def environment(etcd_program: str) -> dict[str, Any]:
    """What figures depend on."""
    version = subprocess.run([etcd_program, "--version"], capture_output=True, text=True, check=False).stdout.partition("\n")[0]
    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "etcd": version,
        "load": [round(x, 2) for x in os.getloadavg()],
    }


def pidfd_notice() -> float:
    """How long until a plain process learns by pidfd that its small child was killed."""
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", "import time; print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(PAUSE_S)
    fd = os.pidfd_open(child.pid)
    started = boottime()
    child.send_signal(signal.SIGKILL)
    select.select([fd], [], [])
    noticed = boottime()
    os.close(fd)
    child.communicate()
    return 1000 * (noticed - started)


async def put_to_event(endpoint: str, rounds: int) -> list[float]:
    """How long from sending one transaction until its event arrives at a watch of the same process."""
    found: list[float] = []
    writing: asyncio.Task[object] | None = None
    key, started = Key(Kind.LEADERS, ("bench", "0")), 0.0
    async with Store(EtcdOptions((endpoint,)), "floor") as store, contextlib.aclosing(store.follow()) as batches:
        async for batch in batches:
            if not isinstance(batch, Snapshot):
                found.append(1000 * (boottime() - started))
            if writing is not None:
                await writing
            if len(found) > rounds:
                return found[1:]
            await asyncio.sleep(PAUSE_S)
            started = boottime()
            writing = asyncio.create_task(store.commit(Txn((), (Put(key, Leader("bench", len(found))),))))
    return found


def _by_hand() -> float:
    """How long the same program, started by hand without a WatchDog, takes to the first line of its body."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reports:
        path = str(Path(directory, "report"))
        reports.bind(path)
        reports.settimeout(30)
        time.sleep(PAUSE_S)
        started = boottime()
        program = subprocess.Popen([sys.executable, str(SAMPLE), "--report", path], env={**os.environ, STANDALONE_ENV: "1"})
        try:
            at: float = json.loads(reports.recv(4096))["at"]
        finally:
            program.kill()
            program.wait()
    return 1000 * (at - started)
