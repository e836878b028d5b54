"""What follows when an application fails again and again: restarts on its own host, then elsewhere, then it is parked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from etcdreplica.model import Assignment, AssignmentState
from etcdreplica.testing import LocalCluster
from tests.integration.apps_cli.cli_harness import cli, keys_of, leading_process, read, read_json, the_error
from tests.integration.conftest import PATIENCE_S, Worker, kill

pytestmark = pytest.mark.integration
MakeWorker = Callable[..., Worker]


def assigned(cluster: LocalCluster, worker: Worker) -> Assignment | None:
    """Return what is known of its assignment."""
    app = cluster.view.apps.get(worker.name)
    return app.assignment if app else None


def wait_parked(cluster: LocalCluster, worker: Worker) -> Assignment:
    """Wait until it is parked, and its last copy has ended."""
    cluster.wait_until(
        lambda view: (
            (a := assigned(cluster, worker)) is not None
            and a.state is AssignmentState.FAILED
            and not view.apps[worker.name].replicas
        ),
        f"{worker.name} to be parked",
    )
    found = assigned(cluster, worker)
    assert found is not None
    return found


@pytest.mark.parametrize("style", ["cold", "warm", "hot"])
def test_crash_loop_is_parked(shared_cluster: LocalCluster, make_worker: MakeWorker, tmp_path: Path, style: str) -> None:
    """A body that always raises is given up, which the commands say with the reason; `resume` brings it back."""
    cluster, trouble = shared_cluster, tmp_path / "trouble"
    trouble.touch()
    worker = make_worker(cluster, "--style", style, "--max-restarts", "3", "--raise-while", str(trouble))
    assert worker.start().wait(PATIENCE_S) == 1
    parked = wait_parked(cluster, worker)
    assert parked.seats == ()
    assert "failed 4 times within 600 s" in parked.reason
    assert "RuntimeError: trouble" in parked.reason
    for words in (("status", worker.name), ("list",), ("describe", worker.name)):
        shown = read(cluster, *words)
        assert "failed" in shown
        assert parked.reason in shown
    (shown_json,) = read_json(cluster, "status", worker.name)["applications"]
    assert (shown_json["state"], shown_json["reason"], shown_json["replicas"]) == ("failed", parked.reason, [])
    trouble.unlink()
    done = cli("resume", *cluster.connection, worker.name)
    assert (done.returncode, done.stdout) == (0, f"{worker.name} was parked and is started again\n")
    assert cluster.wait_ready(worker.name) > parked.epoch
    again = cli("resume", *cluster.connection, worker.name)
    assert (again.returncode, again.stdout) == (0, f"{worker.name} was neither paused nor parked nor stopped\n")


def test_parked_is_not_started_by_anybody_else(etcd_cluster: LocalCluster, make_worker: MakeWorker, tmp_path: Path) -> None:
    """Neither by another manager nor by running the program once more; it can be removed."""
    cluster, trouble = etcd_cluster, tmp_path / "trouble"
    trouble.touch()
    worker = make_worker(cluster, "--max-restarts", "1", "--raise-while", str(trouble))
    worker.start()
    parked = wait_parked(cluster, worker)
    leader, pid = leading_process(cluster)
    kill(pid)
    cluster.wait_until(lambda _: cluster.leaders.get("manager", leader) != leader, "another leader")
    trouble.unlink()
    assert worker.start().wait(PATIENCE_S) != 0
    assert f"resume {worker.name}" in (cluster.hosts["host-a"].directory / "programs.log").read_text()
    other = make_worker(cluster)
    other.start("host-b")
    cluster.wait_ready(other.name)  # so the new manager has looked at everything
    assert assigned(cluster, worker) == parked
    assert worker.lines("begin") == []
    cluster.remove(worker.name)
    assert keys_of(cluster, worker.name) == []


@pytest.mark.parametrize("style", ["cold", "warm", "hot"])
def test_restarts_here_then_elsewhere(shared_cluster: LocalCluster, make_worker: MakeWorker, style: str) -> None:
    """The primary is started again where it was as often as asked for, with a larger epoch each time; then it moves."""
    cluster = shared_cluster
    worker = make_worker(cluster, "--style", style, "--restarts-here", "2")
    worker.start("host-b")
    epochs = [cluster.wait_ready(worker.name)]
    for _ in range(2):
        assert cluster.kill_replica(worker.name)[0] == "host-b"
        epochs.append(cluster.wait_ready(worker.name, after_epoch=epochs[-1]))
        assert cluster.primary(worker.name)[0] == "host-b"
    cluster.kill_replica(worker.name)
    epochs.append(cluster.wait_ready(worker.name, after_epoch=epochs[-1]))
    assert cluster.primary(worker.name)[0] != "host-b"
    assert epochs == sorted(set(epochs))
    actions = [e.action for (app, _), e in sorted(cluster.events.items()) if app == worker.name and e.failure.role == "primary"]
    assert actions[0] == "started again on host-b"


def test_resume_of_what_is_not_there(shared_cluster: LocalCluster) -> None:
    """It is named, with exit code 1."""
    for word in ("pause", "resume"):
        error = the_error(cli(word, *shared_cluster.connection, "nothing"), 1)
        assert "nothing" in error
        assert "not registered" in error
