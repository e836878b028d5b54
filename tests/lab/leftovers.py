"""What is still there after everything was removed and stopped in order: there should be nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.lab.world import HOSTS, TTL_S, World

KEPT = ("/origin/",)  # of all keys


def leftovers(world: World) -> list[str]:
    """Remove every application and stop every node, and return what is left of them: processes, keys and leases."""
    pids = _processes(world)
    for app in world.apps:
        world.cluster.remove(app)
    world.cluster.wait_until(lambda view: not view.apps, "no application to be there")
    found = [f"process {pid} is left: {words}" for pid, words in pids.items() if words and _words(pid) == words]
    for host in HOSTS:
        world.cluster.hosts[host].stop()
    world.cluster.catch_up()
    found += [f"key {key} is left" for key in world.etcd.all_keys() if not any(part in key for part in KEPT)]
    deadline = time.monotonic() + 3 * TTL_S  # one whose revocation was lost expires
    while (leases := world.etcd.all_leases()) and time.monotonic() < deadline:
        time.sleep(0.1)  # etcd does not tell
    return found + [f"lease {lease} is left" for lease in leases]


def _processes(world: World) -> dict[int, str]:
    """Every process of a copy, and what it runs."""
    replicas = [replica for app in world.cluster.view.apps.values() for replica in app.replicas.values()]
    return {replica.pid: _words(replica.pid) for replica in replicas if replica.pid}


def _words(pid: int) -> str:
    try:
        return os.fsdecode((Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" "))
    except OSError:
        return ""
