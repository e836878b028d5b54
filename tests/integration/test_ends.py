"""Ends that are not failures, and what is carried to the other hosts."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from etcdreplica.model import AssignmentState, FailureKind
from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from tests.integration.conftest import PATIENCE_S, WORKER, Worker, wait_dead

pytestmark = pytest.mark.integration
STYLES = ["cold", "warm", "hot"]
MakeWorker = Callable[..., Worker]


def _pids(cluster: LocalCluster, name: str) -> list[int]:
    return [replica.pid for replica in cluster.view.apps[name].replicas.values() if replica.pid is not None]


@pytest.mark.parametrize("style", STYLES)
def test_body_returns(shared_cluster: LocalCluster, make_worker: MakeWorker, tmp_path: Path, style: str) -> None:
    """A body that returns completes the application everywhere: its caller goes on, the other copies end."""
    flag = tmp_path / "flag"
    worker = make_worker(shared_cluster, "--style", style, "--return-when", str(flag))
    program = worker.start()
    shared_cluster.wait_ready(worker.name)
    pids = _pids(shared_cluster, worker.name)
    flag.touch()
    shared_cluster.wait_until(
        lambda view: (
            (a := view.apps[worker.name].assignment) is not None
            and a.state is AssignmentState.COMPLETED
            and not view.apps[worker.name].replicas
        ),
        "completion",
    )
    assert program.wait(PATIENCE_S) == 0
    for pid in pids:
        wait_dead(pid)
    done = [e for (app, _), e in shared_cluster.events.items() if app == worker.name]
    assert FailureKind.EXIT not in {event.failure.kind for event in done}


def test_run_again_after_completion(shared_cluster: LocalCluster, make_worker: MakeWorker, tmp_path: Path) -> None:
    """A completed application can be started again, also differently, and its epochs go on growing."""
    flag = tmp_path / "flag"
    worker = make_worker(shared_cluster, "--return-when", str(flag))
    worker.start()
    first = shared_cluster.wait_ready(worker.name)
    flag.touch()
    shared_cluster.wait_until(
        lambda view: (a := view.apps[worker.name].assignment) is not None and a.state is AssignmentState.COMPLETED, "completion"
    )
    flag.unlink()
    worker.arguments += ("--degree", "3")
    worker.start("host-b")
    second = shared_cluster.wait_ready(worker.name)
    assert second > first
    assert worker.hosts()[0] == "host-b"
    assert len(worker.hosts()) == 3


def test_keep_always(shared_cluster: LocalCluster, make_worker: MakeWorker, tmp_path: Path) -> None:
    """With keep="always" a body that returns is run again, on the successor."""
    flag = tmp_path / "flag"
    worker = make_worker(shared_cluster, "--keep", "always", "--return-when", str(flag))
    worker.start()
    epoch = worker.wait_acting()
    host = worker.hosts()[0]
    flag.touch()
    worker.wait_lines(lambda lines: any(line["epoch"] > epoch for line in lines), "another body")
    flag.unlink()
    shared_cluster.wait_ready(worker.name, after_epoch=epoch)
    kinds = {e.failure.kind for (app, _), e in shared_cluster.events.items() if app == worker.name}
    assert FailureKind.RETURNED in kinds
    assert worker.lines("begin")[1]["host"] != host


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("style", STYLES)
def test_handover(shared_cluster: LocalCluster, make_worker: MakeWorker, style: str, number: signal.Signals) -> None:
    """SIGTERM or Ctrl-C to the primary lets its body end; then the backup takes over, and no failure is counted."""
    worker = make_worker(shared_cluster, "--style", style)
    program = worker.start()
    epoch = shared_cluster.wait_ready(worker.name)
    host, successor = worker.hosts()
    program.send_signal(number)
    after = worker.wait_acting(after_epoch=epoch)
    assert program.wait(PATIENCE_S) == 0
    assert after == epoch + 1
    assert worker.hosts()[0] == successor
    ended = next(line for line in worker.lines("end") if line["host"] == host)
    took_over = next(line for line in worker.lines("begin", "role") if line["epoch"] == after and line["role"] == "primary")
    assert ended["at"] < took_over["at"]
    assert {e.failure.kind for (app, _), e in shared_cluster.events.items() if app == worker.name} == {FailureKind.HANDOVER}
    assignment = shared_cluster.view.apps[worker.name].assignment
    assert assignment is not None
    assert assignment.strikes == 0


def test_deaf_body_is_killed(shared_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """A body that does not end when asked to is killed after its stop timeout, and handed over all the same."""
    worker = make_worker(shared_cluster, "--deaf", "--stop-timeout", "0.3")
    program = worker.start()
    epoch = shared_cluster.wait_ready(worker.name)
    program.terminate()
    shared_cluster.wait_ready(worker.name, after_epoch=epoch)
    assert program.wait(PATIENCE_S) == -signal.SIGKILL


def test_backup_told_to_end(shared_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """SIGTERM to a waiting backup ends that copy; the primary does not notice, and the degree is restored."""
    worker = make_worker(shared_cluster)
    worker.start()
    epoch = shared_cluster.wait_ready(worker.name)
    backup = worker.hosts()[1]
    pid = shared_cluster.view.apps[worker.name].replicas[backup].pid
    assert pid is not None
    subprocess.run(["kill", "-TERM", str(pid)], check=True)
    wait_dead(pid)
    shared_cluster.wait_until(
        lambda view: backup not in view.apps[worker.name].replicas or view.apps[worker.name].replicas[backup].pid != pid,
        "another backup",
    )
    assert shared_cluster.wait_ready(worker.name) == epoch


@pytest.mark.parametrize("style", STYLES)
def test_remove(shared_cluster: LocalCluster, make_worker: MakeWorker, style: str) -> None:
    """Removing an application ends every copy, also the one started by hand."""
    worker = make_worker(shared_cluster, "--style", style, "--degree", "3")
    program = worker.start()
    shared_cluster.wait_ready(worker.name)
    pids = _pids(shared_cluster, worker.name)
    shared_cluster.remove(worker.name)
    assert program.wait(PATIENCE_S) == 0
    for pid in pids:
        wait_dead(pid)


def test_epochs_survive_removal(shared_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """An application registered anew under an old name begins above every epoch of the old one."""
    worker = make_worker(shared_cluster)
    worker.start()
    epoch = shared_cluster.wait_ready(worker.name)
    for _ in range(2):
        shared_cluster.kill_replica(worker.name)
        epoch = shared_cluster.wait_ready(worker.name, after_epoch=epoch)
    shared_cluster.remove(worker.name)
    worker.start()
    assert shared_cluster.wait_ready(worker.name) > epoch


def test_coroutine(shared_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """An `async def` body is protected in the same way, and its caller's loop is used."""
    worker = make_worker(shared_cluster, "--async")
    program = worker.start()
    epoch = shared_cluster.wait_ready(worker.name)
    program.terminate()
    epoch = shared_cluster.wait_ready(worker.name, after_epoch=epoch)
    assert program.wait(PATIENCE_S) == 0
    shared_cluster.kill_replica(worker.name)
    shared_cluster.wait_ready(worker.name, after_epoch=epoch)


def test_program_is_carried(shared_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """Arguments, directory and environment reach the other hosts, with what a host overrides."""
    worker = make_worker(shared_cluster, "--hosts", "host-a", "host-b")
    worker.start("host-a", FLAVOUR="plain")
    epoch = worker.wait_acting()
    shared_cluster.kill_replica(worker.name)
    worker.wait_acting(after_epoch=epoch)
    first, second = worker.lines("begin")
    assert (first["host"], second["host"]) == ("host-a", "host-b")
    assert first["argv"] == second["argv"]
    assert first["cwd"] == second["cwd"]
    assert (first["flavour"], second["flavour"]) == ("plain", "of host-b")


def test_started_as_module(shared_cluster: LocalCluster, make_worker: MakeWorker, tmp_path: Path) -> None:
    """`python -m package.module` is found out and started the same way elsewhere."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").touch()
    (tmp_path / "shop" / "till.py").write_text(WORKER.read_text())
    till = make_worker(shared_cluster)
    shared_cluster.run([sys.executable, "-m", "shop.till", *till.arguments], env={"PYTHONPATH": str(tmp_path)})
    epoch = till.wait_acting()
    shared_cluster.kill_replica(till.name)
    till.wait_acting(after_epoch=epoch)
    assert len({line["pid"] for line in till.lines()}) == 2


def test_labels_and_least_loaded(etcd_server: EmbeddedEtcd, make_worker: MakeWorker) -> None:
    """Only hosts with the wanted labels run it, and several applications spread over the hosts."""
    disks = {"host-a": ["--label", "disk=ssd"], "host-c": ["--label", "disk=ssd"]}
    with LocalCluster(3, etcd=etcd_server, cluster="labels", node_arguments=disks) as cluster:
        picky = make_worker(cluster, "--label", "disk=ssd")
        picky.start("host-a")
        cluster.wait_ready(picky.name)
        assert set(picky.hosts()) == {"host-a", "host-c"}
        others = [make_worker(cluster, "--degree", "1") for _ in range(3)]
        for other in others:
            other.start("host-a")
            epoch = cluster.wait_ready(other.name)
            cluster.kill_replica(other.name)
            cluster.wait_ready(other.name, after_epoch=epoch)
        assert cluster.view.seats["host-b"] >= 1
        assert max(cluster.view.seats.values()) - min(cluster.view.seats[host] for host in cluster.hosts) <= 1


def test_handle(shared_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """What the body tells by its handle, endpoint and progress, can be seen from outside."""
    worker = make_worker(shared_cluster)
    worker.start()
    shared_cluster.wait_ready(worker.name)
    host, pid = shared_cluster.primary(worker.name)
    shared_cluster.wait_until(
        lambda view: view.apps[worker.name].replicas[host].endpoint == f"worker://{host}/{pid}", "the advertised endpoint"
    )
    shared_cluster.wait_until(
        lambda view: view.apps[worker.name].replicas[host].progress_at is not None, "a heartbeat to be shown"
    )
