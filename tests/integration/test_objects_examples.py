"""The programs of docs/examples on a cluster, with their primaries killed under them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from etcdreplica import connect
from etcdreplica.app.protocol import SOCKET_ENV
from etcdreplica.errors import EtcdReplicaError
from etcdreplica.testing import LocalCluster

pytestmark = pytest.mark.integration
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
BOUND_S = 60.0


@pytest.fixture
def serve(shared_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Serve an example, and return what stands for its object; this process is a client on the first host."""
    monkeypatch.setenv(SOCKET_ENV, str(shared_cluster.hosts["host-a"].socket_path))
    served = []

    def start(script: str, name: str, *arguments: str) -> Any:
        served.append(name)
        shared_cluster.start(EXAMPLES / script, *arguments)
        shared_cluster.wait_ready(name)
        proxies.append(connect(name, timeout=BOUND_S))
        return proxies[-1]

    proxies: list[Any] = []
    yield start
    for proxy in proxies:
        proxy.__exit__()
    for name in served:
        shared_cluster.remove(name)


def wait_in_sync(cluster: LocalCluster, app: str, count: int) -> None:
    """Wait until etcd says that so many copies hold what is acknowledged."""

    def is_so(view: Any) -> bool:
        found = view.apps[app].in_sync
        assignment = view.apps[app].assignment
        seats = {seat.incarnation for seat in assignment.seats}
        return found is not None and len({m.incarnation for m in found.members} & seats) == count

    cluster.wait_until(is_so, f"{app} to have {count} copies in sync", BOUND_S)


def wait_for(look: Callable[[], bool], what: str, cluster: LocalCluster) -> None:
    """Wait until an object says what it should."""
    deadline = time.monotonic() + BOUND_S
    while not look():
        if time.monotonic() > deadline:
            raise EtcdReplicaError(f"waited in vain for {what}\n{cluster.describe()}")
        time.sleep(0.02)  # an object tells nobody that it has changed


def test_ledger(serve: Callable[..., Any], shared_cluster: LocalCluster) -> None:
    """Three primaries are killed while deposits are under way: each of them counts once."""
    ledger = serve("ledger.py", "ledger")
    with pytest.raises(ValueError, match="ann has only 0, not 2"):
        ledger.transfer("ann", "bob", 2)
    deposits = []
    for _ in range(3):
        wait_in_sync(shared_cluster, "ledger", 3)
        epoch = shared_cluster.wait_ready("ledger")
        deposits += [ledger.deposit.submit("ann", 1) for _ in range(100)]
        shared_cluster.kill_replica("ledger")
        deposits += [ledger.deposit.submit("ann", 1) for _ in range(100)]
        ledger.transfer("ann", "bob", 50)
        shared_cluster.wait_ready("ledger", after_epoch=epoch, timeout=BOUND_S)
    for deposit in deposits:
        deposit.result(BOUND_S)
    assert (ledger.balance("ann"), ledger.balance("bob"), ledger.total()) == (450, 150, 600)
    assert ledger.total.stale(BOUND_S)() == 600


def test_job_queue(serve: Callable[..., Any], shared_cluster: LocalCluster) -> None:
    """A worker and the primary are killed: every job is done, and one result of each is taken."""
    jobs = serve("job_queue.py", "jobs", "--lease", "2")
    wait_in_sync(shared_cluster, "jobs", 3)
    victim = shared_cluster.run([sys.executable, str(EXAMPLES / "worker.py"), "victim"], host="host-b")
    jobs.put("long", {"seconds": 3600})
    wait_for(lambda: jobs.counts()["taken"] == 1, "the victim to take its job", shared_cluster)
    kill_worker(victim)
    for number in range(20):
        assert jobs.put(f"job {number}", {"seconds": 0.01})
    shared_cluster.kill_replica("jobs")
    assert not jobs.put("job 0", {"seconds": 0.01})
    again = jobs.take("this test")
    while again is None or again["key"] != "long":  # its lease has not ended yet
        if again is not None:
            assert jobs.finish(again["key"], again["ticket"], "by this test")
        again = jobs.take("this test")
    assert not jobs.finish("long", again["ticket"] - 1, "by nobody")
    assert jobs.finish("long", again["ticket"], "at last")
    shared_cluster.run([sys.executable, str(EXAMPLES / "worker.py"), "another"], host="host-c")
    jobs.put("last", {"seconds": 0})
    wait_for(lambda: jobs.result("last") == 0, "another worker to do a job", shared_cluster)
    assert jobs.counts() == {"waiting": 0, "taken": 0, "done": 22}


def kill_worker(worker: subprocess.Popen[bytes]) -> None:
    """Kill it."""
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
