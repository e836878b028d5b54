"""What the integration tests share: clusters, and the journal of the worker application."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from etcdreplica.errors import EtcdReplicaError
from etcdreplica.testing import EmbeddedEtcd, LocalCluster, find_etcd
from etcdreplica.testing.journal import written_lines
from etcdreplica.testing.processes import halt
from tests.integration.stage import NO_CHECKPOINTS, Stage

WORKER = Path(__file__).parent / "apps" / "worker.py"
PATIENCE_S = 60.0  # after which something counts as never happening
LASTING_TTL_S = 10.0  # where hardly a test waits for a lease to end: it outlasts what a busy disk makes etcd wait
_numbers = itertools.count()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell; what we start would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Worker:
    """The worker application under one name, started by hand on a cluster."""

    def __init__(self, cluster: LocalCluster, directory: Path, *arguments: str, name: str = "worker") -> None:
        self.cluster = cluster
        self.name = name
        self.journal = directory / f"{name}.journal"
        self.arguments = ("--name", name, "--journal", str(self.journal), *arguments)

    def start(self, host: str | None = None, **environment: str) -> subprocess.Popen[bytes]:
        """Run it by hand on a host."""
        return self.cluster.start(WORKER, *self.arguments, host=host, env=environment)

    def lines(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the journal's lines of these kinds."""
        lines = [json.loads(line) for line in written_lines(self.journal)]
        return [line for line in lines if not kinds or line["what"] in kinds]

    def wait_lines(self, condition: Callable[[list[dict[str, Any]]], bool], what: str) -> list[dict[str, Any]]:
        """Wait until the journal looks as wanted, and return it."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition(lines := self.lines()):
            if time.monotonic() > deadline:
                raise EtcdReplicaError(f"waited in vain for {what} in {lines}\n{self.cluster.describe()}")
            time.sleep(0.005)  # a file raises no event here
        return lines

    def wait_acting(self, *, after_epoch: int = 0) -> int:
        """Wait until it is ready and the body of its primary has begun, a moment after it is shown to run; return its epoch."""
        epoch = self.cluster.wait_ready(self.name, after_epoch=after_epoch)
        self.wait_lines(
            lambda lines: any(line["epoch"] == epoch and line["role"] == "primary" for line in lines), f"epoch {epoch} to act"
        )
        return epoch

    def hosts(self) -> list[str]:
        """Return the hosts of its seats, the primary first."""
        assignment = self.cluster.view.apps[self.name].assignment
        assert assignment is not None
        return [seat.host for seat in assignment.seats]


@pytest.fixture(params=["path", "wheel"])
def any_etcd(request: pytest.FixtureRequest) -> Iterator[EmbeddedEtcd]:
    """Each etcd that this machine has."""
    programs = find_etcd()
    if request.param not in programs:
        pytest.skip(f"no etcd of the {request.param}")
    with EmbeddedEtcd(programs[request.param]) as server:
        yield server


@pytest.fixture(scope="module")
def shared_cluster(etcd_server: EmbeddedEtcd) -> Iterator[LocalCluster]:
    """Three hosts that the tests of a module share; each uses an application name of its own and removes nothing else."""
    with LocalCluster(3, etcd=etcd_server, cluster=f"shared-{next(_numbers)}", lease_ttl_s=LASTING_TTL_S) as cluster:
        yield cluster


def repair(cluster: LocalCluster) -> None:
    """Have every host run that a test has stopped or killed, and leave no application."""
    for name, host in cluster.hosts.items():
        if host.process is None or host.process.poll() is not None:
            cluster.restart(name)
    cluster.wait_until(lambda view: set(cluster.hosts) <= set(view.hosts), "every host to be up")
    for app in list(cluster.view.apps):
        cluster.remove(app)


@pytest.fixture(scope="module")
def hosts() -> Iterator[LocalCluster]:
    """Three hosts with a TTL of 2 s, on an etcd of their own: some tests stop it."""
    with LocalCluster(3, node_arguments=NO_CHECKPOINTS) as cluster:
        yield cluster


@pytest.fixture
def stage(hosts: LocalCluster, tmp_path: Path) -> Iterator[Stage]:
    """The application of one test on them."""
    stage = Stage(hosts, tmp_path)
    yield stage
    stage.leave()


@pytest.fixture
def make_worker(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Make a worker with a name of its own; it is removed from its cluster afterwards."""
    made: list[Worker] = []

    def make(cluster: LocalCluster, *arguments: str) -> Worker:
        made.append(Worker(cluster, tmp_path, *arguments, name=f"worker-{next(_numbers)}"))
        return made[-1]

    yield make
    for worker in made:
        if worker.cluster.is_open and worker.name in worker.cluster.view.apps:
            worker.cluster.remove(worker.name)


def wait_dead(pid: int) -> None:
    """Wait until a process is dead."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state in "ZX":
            return
        time.sleep(0.005)
    raise EtcdReplicaError(f"process {pid} is still there")


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal; after SIGSTOP nothing of the process runs any more."""
    halt(pid) if number is signal.SIGSTOP else os.kill(pid, number)
