"""What is still there after everything was removed and stopped in order: there should be nothing."""

from __future__ import annotations

import os
from pathlib import Path

from etcdreplica.store import Kind
from tests.lab.world import HOSTS, OBJECT, World

KEPT = (Kind.HOSTS, Kind.SERVERS, Kind.LEADERS, Kind.HISTORY)  # of what is no application's, or is kept for people


def leftovers(world: World) -> list[str]:
    """Remove every application, and return what is left of them: processes, leases and keys."""
    pids = _processes(world)
    for app in world.apps:
        world.cluster.remove(app)
    world.cluster.wait_until(lambda view: not view.apps, f"no application, not even {OBJECT}, to be there")
    found = []
    for pid, words in pids.items():
        if (Path("/proc") / str(pid)).exists() and _words(pid) == words:
            found.append(f"process {pid} is left: {words}")
    for host in HOSTS:
        world.cluster.hosts[host].stop()
    world.cluster.wait_until(lambda view: not view.hosts and not world.cluster.leaders, "no host and no leader to be left")
    return found


def _processes(world: World) -> dict[int, str]:
    """Every process of an application."""
    replicas = [replica for app in world.cluster.view.apps.values() for replica in app.replicas.values()]
    return {replica.pid: _words(replica.pid) for replica in replicas if replica.pid}


def _words(pid: int) -> str:
    try:
        return os.fsdecode((Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" "))
    except OSError:
        return ""
