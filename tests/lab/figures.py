"""What fail-overs take over a network, with an etcd of three: `python -m tests.lab.figures [TRIALS]` prints JSON.

warm_killed                 from SIGKILL of a warm primary to the first line of the next body
cut_off_safe_over_ttl       from the cable of the primary's host being pulled to that, less the TTL
cut_off_fast                from the same to the next primary of a hot object with failover="fast"
cut_off_fast_acknowledged   from the same to the first update that the next primary has acknowledged to a client

Floor: put_to_event, from a write to etcd until a watch tells of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etcdreplica import connect
from etcdreplica.app.protocol import SOCKET_ENV
from etcdreplica.clock import boottime
from etcdreplica.errors import EtcdReplicaError
from etcdreplica.testing.bench import put_to_event, summary
from etcdreplica.testing.probe import Probe
from etcdreplica.words import Role
from tests.lab.world import APPS, HOSTS, OBJECT, TTL_S, World

SETTLE_S = 1.1
PAUSE_S = 0.005
CLIENT = HOSTS[-1]  # its host; the copies are elsewhere


def figures(world: World, kills: int, cuts: int) -> dict[str, dict[str, Any]]:
    """Measure, with so many primaries killed, and so many hosts cut off in each mode."""
    leader = f"{world.network.address_of(world.etcd.leader())}:2379"
    found = {"put_to_event": asyncio.run(put_to_event(leader, kills)), **_functions(world, kills, cuts)}
    pairs = _object(world, cuts)
    found["cut_off_fast"], found["cut_off_fast_acknowledged"] = [a for a, _ in pairs], [b for _, b in pairs]
    return {name: summary(values) for name, values in found.items()}


def _functions(world: World, kills: int, cuts: int) -> dict[str, list[float]]:
    with Probe(world.cluster, "figures", "warm", 2) as probe:
        probe.start()
        killed, cut = [], []
        for _ in range(kills):
            probe.wait_settled(SETTLE_S)
            killed.append(probe.crash().total_ms)
        for _ in range(cuts):
            probe.wait_settled(SETTLE_S)
            done = probe.cut_off(world.network.cut)
            cut.append(done.total_ms - 1000 * TTL_S)
            _return(world, done.failed_host)
    world.cluster.remove("figures")
    return {"warm_killed": killed, "cut_off_safe_over_ttl": cut}


def _object(world: World, cuts: int) -> list[tuple[float, float]]:
    words = ("--name", OBJECT, "--degree", "3", "--failover", "fast")
    world.cluster.start(APPS / "tokens.py", *words, host=HOSTS[0])
    world.cluster.wait_ready(OBJECT)
    found = []
    with _acknowledged(world) as stamps:
        for _ in range(cuts):
            world.cluster.wait_until(lambda _: world.cluster.in_sync(OBJECT) == 3, "three copies in sync")
            epoch = world.cluster.wait_ready(OBJECT)
            host, _ = world.cluster.primary(OBJECT)
            at = boottime()
            world.network.cut(host)
            body_at = _wait_primary(world, epoch)
            deadline = time.monotonic() + 60
            while not stamps or stamps[-1] < body_at:
                assert time.monotonic() < deadline, world.cluster.describe()
                time.sleep(PAUSE_S)  # a thread appends to a list
            first = min(stamp for stamp in stamps if stamp >= body_at)
            found.append((1000 * (body_at - at), 1000 * (first - at)))
            _return(world, host)
    world.cluster.remove(OBJECT)
    return found


def _wait_primary(world: World, after_epoch: int) -> float:
    world.cluster.wait_until(lambda _: _promoted_at(world, after_epoch) is not None, "another primary")
    at = _promoted_at(world, after_epoch)
    assert at is not None
    return at


def _promoted_at(world: World, after_epoch: int) -> float | None:
    """When a primary of a later epoch was told of its role."""
    replicas = list(world.app(OBJECT).replicas.values())
    return next((r.promoted_at for r in replicas if r.role is Role.PRIMARY and r.epoch > after_epoch), None)


def _return(world: World, host: str) -> None:
    """Put the cable in, and wait until the host takes part again."""
    session = world.cluster.view.hosts[host].session if host in world.cluster.view.hosts else 0
    world.cluster.wait_until(lambda view: host not in view.hosts, f"the lease of {host} to end")
    world.network.mend(host)
    world.cluster.wait_until(lambda view: host in view.hosts and view.hosts[host].session != session, f"{host} to be back")


@contextlib.contextmanager
def _acknowledged(world: World) -> Iterator[list[float]]:
    """Make updates all the time, and give when each was acknowledged."""
    stamps: list[float] = []
    over = threading.Event()

    def work() -> None:
        with connect(OBJECT, timeout=60) as tokens:
            number = 0
            while not over.is_set():
                number += 1
                with contextlib.suppress(EtcdReplicaError):
                    tokens.put("figures", number)
                    stamps.append(boottime())
                time.sleep(PAUSE_S)

    before = os.environ.get(SOCKET_ENV)
    os.environ[SOCKET_ENV] = str(world.cluster.hosts[CLIENT].socket_path)
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield stamps
    finally:
        over.set()
        thread.join()
        os.environ.pop(SOCKET_ENV)
        if before is not None:
            os.environ[SOCKET_ENV] = before


def main() -> None:
    """Print them."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    with tempfile.TemporaryDirectory() as out, World(Path(out)) as world:
        json.dump(figures(world, kills, max(1, kills // 5)), sys.stdout, indent=1)
        print()


if __name__ == "__main__":
    main()
