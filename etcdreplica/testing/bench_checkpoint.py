"""`etcdreplica bench checkpoint`: how long a state takes to be durable on all hosts, and what it costs the body."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etcdreplica.clock import boottime
from etcdreplica.errors import EtcdReplicaError
from etcdreplica.testing import grpc_floor
from etcdreplica.testing.bench import SETTLE_S, environment, summary
from etcdreplica.testing.cluster import LocalCluster
from etcdreplica.testing.etcd import EmbeddedEtcd
from etcdreplica.testing.grpc_floor import GrpcFloor
from etcdreplica.testing.probe import Probe
from etcdreplica.testing.stateful_client import Stateful

KIB, MIB = 1 << 10, 1 << 20
SMALL = KIB
SMALL_HOSTS, LARGE_HOSTS = 3, 2
PAUSE_S = 0.02
TTL_S = 5.0

Say = Callable[[str], None]


def checkpoint(trials: int, large_mib: int, changed_mib: int, etcd_program: str | None, say: Say) -> dict[str, Any]:
    """Measure all of it. `large_mib` and `changed_mib`: sizes of the states that are moved whole, and in part."""
    metrics: dict[str, Any] = {}
    floors: dict[str, Any] = {}
    rounds = max(3, trials // 40)
    with EmbeddedEtcd(etcd_program) as etcd, LocalCluster(SMALL_HOSTS, etcd=etcd, lease_ttl_s=TTL_S) as cluster:
        with GrpcFloor(cluster.directory) as floor:
            say(f"{trials} small states")
            floors["fsync_1kib"] = summary(_fsyncs(cluster.directory, trials))
            floors["grpc_round_trip"] = summary(floor.round_trips(trials, PAUSE_S))
            small = Stateful(cluster, SMALL_HOSTS)
            small.ask("save", size=SMALL, rounds=5, wait=True)
            metrics["small_wait"] = summary(small.ask("save", size=SMALL, rounds=trials, wait=True)["ms"])
            say(f"{rounds} states of {large_mib} MiB")
            floors["grpc_stream_with_fsync"] = summary(floor.stream(large_mib * MIB, rounds))
            large = Stateful(cluster, LARGE_HOSTS)
            saved = large.ask("save", size=large_mib * MIB, rounds=rounds, wait=True, pause=grpc_floor.PAUSE_S)
            metrics["large_wait"] = summary(saved["ms"])
            floors["grpc_stream_with_fsync_again"] = summary(floor.stream(large_mib * MIB, rounds))
        say("without waiting")
        metrics["large_async_call"] = summary(_asynchronous(large, large_mib, rounds))
        say(f"warm promotions with {large_mib} MiB")
        metrics["warm_promotion"] = summary([_promotion(large, large_mib) for _ in range(rounds)])
        say(f"1 % of {changed_mib} MiB changed")
        moved = _moved_share(large, changed_mib)
        say("crashes while a checkpoint moves")
        quiet, busy = _crashes(cluster, large, trials)
        metrics |= {"crash_quiet": summary(quiet), "crash_while_moving": summary(busy)}
        program = etcd.program
    floor_ms = floors["fsync_1kib"]["p50"] + floors["grpc_round_trip"]["p50"]
    stream_ms = (floors["grpc_stream_with_fsync"]["p50"] + floors["grpc_stream_with_fsync_again"]["p50"]) / 2
    metrics["moved_of_changed_state"] = {"unit": "share", "n": 1, "max": round(moved, 4)}
    return {
        "bench": "checkpoint",
        "parameters": {"trials": trials, "large_mib": large_mib, "changed_mib": changed_mib},
        "environment": environment(program),
        "metrics": metrics,
        "floors": floors,
        "peers": {},
        "ratios": {
            "small_wait_vs_floor": round(metrics["small_wait"]["p50"] / floor_ms, 3),
            "large_vs_floor": round(stream_ms / metrics["large_wait"]["p50"], 3),
            "async_call_vs_transfer": round(metrics["large_async_call"]["p50"] / metrics["large_wait"]["p50"], 4),
            "crash_while_moving_vs_quiet_p99": round(metrics["crash_while_moving"]["p99"] / metrics["crash_quiet"]["p99"], 3),
        },
        "ok": True,
    }


def _fsyncs(directory: Path, rounds: int) -> list[float]:
    found = []
    fd = os.open(directory / "fsync", os.O_WRONLY | os.O_CREAT)
    try:
        for _ in range(rounds):
            time.sleep(PAUSE_S)
            started = boottime()
            os.pwrite(fd, os.urandom(KIB), 0)
            os.fsync(fd)
            found.append(1000 * (boottime() - started))
    finally:
        os.close(fd)
    return found


def _asynchronous(large: Stateful, mib: int, rounds: int) -> list[float]:
    """How long a call takes that does not wait; each state is durable before the next one is made."""
    found: list[float] = []
    for _ in range(rounds):
        found += large.ask("save", size=mib * MIB, rounds=1, wait=False)["ms"]
        large.ask("save", size=KIB, rounds=1, wait=True)
    return found


def _promotion(large: Stateful, mib: int) -> float:
    """From SIGKILL until the next body has the state of a large checkpoint, which its copy was given time to load."""
    large.ask("save", size=mib * MIB, rounds=1, wait=True)
    before = large.ask("about")
    time.sleep(SETTLE_S + 1.0)  # the backup decodes it meanwhile
    at = large.crash()
    after = large.ask("about")
    if after["digest"] != before["digest"] or after["epoch"] <= before["epoch"]:
        raise EtcdReplicaError(f"restored something else: {after} instead of {before}")
    return float(1000 * (after["restored_at"] - at))


def _moved_share(large: Stateful, mib: int) -> float:
    """Which share of a state goes over the network when a hundredth of it has changed."""
    large.ask("save", size=mib * MIB, rounds=1, wait=True)
    before = _loopback_bytes()
    large.ask("change", share=0.01, wait=True)
    return (_loopback_bytes() - before) / (mib * MIB)


def _loopback_bytes() -> int:
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def _crashes(cluster: LocalCluster, large: Stateful, trials: int) -> tuple[list[float], list[float]]:
    """How soon crashes of another application are detected, while nothing moves and while a large state does."""
    found: tuple[list[float], list[float]] = ([], [])
    with Probe(cluster, "victim", "warm", 2) as probe:
        probe.start()
        for moving, list_ in enumerate(found):
            ended = threading.Event()

            def keep_moving(ended: threading.Event = ended) -> None:
                while not ended.is_set():
                    large.ask("save", size=1 << 30, rounds=1, wait=True)

            mover = threading.Thread(target=keep_moving)
            if moving:
                mover.start()
            try:
                for _ in range(max(5, trials // 5)):
                    probe.wait_settled(SETTLE_S)
                    list_.append(probe.crash().phases["detected"])
            finally:
                ended.set()
                if moving:
                    mover.join()
    return found
