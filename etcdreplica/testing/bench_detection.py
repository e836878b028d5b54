"""`etcdreplica bench detection`: how soon a fault is seen, how punctual a deadline is, and how calm all stays under load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from etcdreplica.clock import boottime
from etcdreplica.errors import EtcdReplicaError
from etcdreplica.model import FailureKind, Program, Registration, ReplicaState
from etcdreplica.store import EtcdOptions, Key, Kind, Put, Store, Txn
from etcdreplica.testing.bench import SETTLE_S, environment, pidfd_notice, summary
from etcdreplica.testing.cluster import LocalCluster
from etcdreplica.testing.etcd import EmbeddedEtcd
from etcdreplica.testing.probe import Probe
from etcdreplica.testing.processes import cpu_s, resident_mib
from etcdreplica.words import Style

IDLE = Path(__file__).with_name("idle.py")
HANG_TIMEOUT_S = 1.0
CPU_S = 20.0
_LATE = re.compile(r"killed, ([0-9.]+) ms after its deadline")
_DEADLINE = """
import ctypes, os, sys
from etcdreplica.app.kernel import Deadline
from etcdreplica.clock import boottime
deadline, at = Deadline(), boottime() + 0.3
deadline.arm(at)
print(at, flush=True)
if sys.argv[1] == "gil":
    ctypes.PyDLL(None).sleep(60)
os.kill(os.getpid(), 19)
"""

Say = Callable[[str], None]


def detection(trials: int, resident_gib: int, idle: int, load_s: float, etcd_program: str | None, say: Say) -> dict[str, Any]:
    """Measure all of it. `idle`: how many applications one WatchDog has; `load_s`: how long all cores are kept busy."""
    metrics: dict[str, Any] = {}
    with EmbeddedEtcd(etcd_program) as etcd:
        say("crashes")
        metrics["crash"] = summary(_crashes(etcd, trials, 0))
        if resident_gib:
            say(f"crashes with {resident_gib} GiB resident")
            metrics[f"crash_{resident_gib}gib"] = summary(_crashes(etcd, max(3, trials // 4), resident_gib))
        say("hangs")
        metrics["hang_over_timeout"] = summary(_hangs(etcd, max(3, trials // 4)))
        say("deadlines")
        metrics["deadline_late_gil_held"] = summary([_deadline("gil") for _ in range(trials)])
        metrics["deadline_late_stopped"] = summary([_deadline("stop") for _ in range(trials)])
        metrics["deadline_late_watchdog_stopped"] = summary(_guardian_deadlines(etcd, max(3, trials // 6)))
        say(f"{idle} idle applications")
        metrics |= _idle_cost(etcd, idle)
        say(f"all cores busy for {load_s:g} s")
        false = _under_load(etcd, load_s)
        floors = {"pidfd_notice": summary([pidfd_notice() for _ in range(trials)])}
        program = etcd.program
    crash, floor = metrics["crash"]["p50"], floors["pidfd_notice"]["p50"]
    metrics["false_failovers"] = {"unit": "failovers", "n": int(load_s), "max": false}
    return {
        "bench": "detection",
        "parameters": {"trials": trials, "resident_gib": resident_gib, "idle": idle, "load_s": load_s},
        "environment": environment(program),
        "metrics": metrics,
        "floors": floors,
        "peers": {},
        "ratios": {"crash_vs_pidfd": round(crash / floor, 3)},
        "ok": false == 0,
    }


def _crashes(etcd: EmbeddedEtcd, trials: int, resident_gib: int) -> list[float]:
    found = []
    with (
        LocalCluster(3, etcd=etcd, cluster=f"crash{resident_gib}") as cluster,
        Probe(cluster, "bench", "warm", 2, "--resident-mib", str(resident_gib << 10)) as probe,
    ):
        probe.start()
        for _ in range(trials):
            probe.wait_settled(SETTLE_S)
            found.append(probe.crash().phases["detected"])
    return found


def _hangs(etcd: EmbeddedEtcd, trials: int) -> list[float]:
    """How long after the hang timeout a stopped process is found hung: less than 0 when its last pulse was before the stop."""
    found = []
    with (
        LocalCluster(3, etcd=etcd, cluster="hang") as cluster,
        Probe(cluster, "bench", "warm", 2, "--hang-timeout", str(HANG_TIMEOUT_S)) as probe,
    ):
        probe.start()
        for _ in range(trials):
            probe.wait_settled(SETTLE_S)
            at = boottime()
            detected = probe.fail(lambda pid: os.kill(pid, signal.SIGSTOP))
            if detected.kind is not FailureKind.HANG:
                raise EtcdReplicaError(f"not found hung: {detected}")
            found.append(1000 * (detected.detected_at - at - HANG_TIMEOUT_S))
    return found


def _deadline(how: str) -> float:
    with subprocess.Popen([sys.executable, "-c", _DEADLINE, how], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        at = float(child.stdout.readline())
        fd = os.pidfd_open(child.pid)
        select.select([fd], [], [])
        died = boottime()
        os.close(fd)
    return 1000 * (died - at)


def _guardian_deadlines(etcd: EmbeddedEtcd, trials: int) -> list[float]:
    """How late a guardian kills a replica whose WatchDog is stopped."""
    found: list[float] = []
    for trial in range(trials):
        with LocalCluster(1, etcd=etcd, cluster=f"deadline{trial}") as cluster:
            _register(cluster, ["idle"], 1)
            cluster.wait_ready("idle")
            (host,) = cluster.hosts.values()
            watchdog = cluster.view.hosts[host.name].host.pid
            os.kill(watchdog, signal.SIGSTOP)
            fd = os.pidfd_open(cluster.primary("idle")[1])
            select.select([fd], [], [], 30)
            os.close(fd)
            os.kill(watchdog, signal.SIGCONT)
            found += [float(late) for late in _LATE.findall(host.log_path.read_text())]
    return found


def _idle_cost(etcd: EmbeddedEtcd, count: int) -> dict[str, Any]:
    """What a WatchDog and its guardian use while nothing happens."""
    with LocalCluster(1, etcd=etcd, cluster="idle", lease_ttl_s=5.0, node_arguments=_roomy(count)) as cluster:
        names = [f"idle-{number}" for number in range(count)]
        _register(cluster, names, 1)
        _wait_running(cluster, names)
        (host,) = cluster.hosts.values()
        assert host.process is not None
        pids = {"watchdog": cluster.view.hosts[host.name].host.pid, "guardian": host.process.pid}
        time.sleep(2.0)
        before = {name: cpu_s(pid) for name, pid in pids.items()}
        started = boottime()
        time.sleep(CPU_S)
        took = boottime() - started
        cost = {name: 100 * (cpu_s(pid) - before[name]) / took for name, pid in pids.items()}
        return {
            **{f"{name}_cpu": {"unit": "% of a core", "n": 1, "max": round(share, 2)} for name, share in cost.items()},
            **{f"{name}_memory": {"unit": "MiB", "n": 1, "max": resident_mib(pid)} for name, pid in pids.items()},
        }


def _under_load(etcd: EmbeddedEtcd, seconds: float) -> int:
    """Count what failed over while twice as many processes spin as there are cores."""
    with LocalCluster(3, etcd=etcd, cluster="load", lease_ttl_s=5.0) as cluster:
        names = [f"app-{number}" for number in range(30)]
        _register(cluster, names, 2)  # 60 replicas: 20 on each host
        _wait_running(cluster, names)
        epochs = {name: _epoch(cluster, name) for name in names}
        with _spinning(2 * (os.cpu_count() or 1)):
            time.sleep(seconds)
        return sum(_epoch(cluster, name) != epoch for name, epoch in epochs.items()) + len(cluster.events)


@contextlib.contextmanager
def _spinning(count: int) -> Iterator[None]:
    spinners = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def _register(cluster: LocalCluster, names: Sequence[str], degree: int) -> None:
    """Register idle applications, as `etcdreplica start --detach` would."""

    async def write() -> None:
        async with Store(EtcdOptions((cluster.etcd.endpoint,)), cluster.cluster) as store:
            for name in names:
                program = Program((sys.executable, str(IDLE), name, str(degree), "warm"), "/", dict(os.environ))
                registration = Registration(name, Style.WARM, degree, program)
                await store.commit(Txn((), (Put(Key(Kind.REGISTRATIONS, (name,)), registration),)))

    asyncio.run(write())


def _wait_running(cluster: LocalCluster, names: Sequence[str]) -> None:
    def are_running(_: object) -> bool:
        known = [cluster.view.apps.get(name) for name in names]
        return all(
            app is not None
            and app.assignment is not None
            and not app.assignment.degraded
            and len(app.replicas) == len(app.assignment.seats)
            and all(replica.state in (ReplicaState.RUNNING, ReplicaState.READY) for replica in app.replicas.values())
            for app in known
        )

    cluster.wait_until(are_running, f"{len(names)} applications to run", 300)


def _epoch(cluster: LocalCluster, name: str) -> int:
    assignment = cluster.view.apps[name].assignment
    return assignment.epoch if assignment else -1


def _roomy(count: int) -> dict[str, Sequence[str]]:
    return {"host-a": ("--capacity", str(count))}
