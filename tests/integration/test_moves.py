"""What operators do on purpose: switchover, failover, drain, stop, with real processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from etcdreplica.model import Assignment, AssignmentState, FailureKind, ReplicaState
from etcdreplica.testing import LocalCluster
from tests.integration.apps_cli.cli_harness import cli, keys_of, read_json, the_error
from tests.integration.apps_cli.cli_keeper import Keeper
from tests.integration.conftest import Worker

pytestmark = pytest.mark.integration
MakeWorker = Callable[..., Worker]


def do(cluster: LocalCluster, verb: str, *words: str) -> dict[str, Any]:
    """Run a verb, which must succeed, and return what it says as JSON."""
    done = cli(verb, *cluster.connection, *words, "-o", "json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def assigned(cluster: LocalCluster, worker: Worker) -> Assignment:
    """Return the assignment of an application."""
    found = cluster.look(lambda view: view.apps[worker.name].assignment)
    assert found is not None
    return found


def refused(cluster: LocalCluster, verb: str, *words: str) -> str:
    """Run a verb, which must fail, and return its error."""
    return the_error(cli(verb, *cluster.connection, *words), 1)


@pytest.mark.parametrize("style", ["cold", "warm", "hot"])
def test_switchover(shared_cluster: LocalCluster, make_worker: MakeWorker, style: str) -> None:
    """The old body ends in order before the new one acts; the old host gets a backup again, and nothing is left behind."""
    cluster, worker = shared_cluster, make_worker(shared_cluster, "--style", style)
    worker.start()
    epoch = worker.wait_acting()
    before, to = worker.hosts()
    third = next(iter(set(cluster.hosts) - {before, to}))

    assert f"{third} is no backup" in refused(cluster, "switchover", worker.name, "--to", third)
    told = do(cluster, "switchover", worker.name, "--dry-run")
    assert (told["from"], told["to"], told["changed"], told["dry_run"]) == (before, to, False, True)
    assert assigned(cluster, worker).epoch == epoch

    told = do(cluster, "switchover", worker.name, "--to", to)
    assert (told["from"], told["to"], told["changed"]) == (before, to, True)
    assert told["epoch"] > epoch
    worker.wait_acting(after_epoch=epoch)
    assert worker.hosts() == [to, before]
    lines = worker.lines()
    ended = next(line for line in lines if line["what"] == "end")
    acts = next(line for line in lines if line["epoch"] == told["epoch"] and line["role"] == "primary")
    assert (ended["host"], acts["host"]) == (before, to)
    assert ended["at"] <= acts["at"]

    event = next(event for (app, _), event in cluster.events.items() if app == worker.name)
    assert event.failure.kind is FailureKind.HANDOVER
    assert f"switchover to {to}, asked for by " in event.failure.reason
    assert do(cluster, "switchover", worker.name, "--to", to)["changed"] is False  # it is primary already
    assert assigned(cluster, worker).epoch == told["epoch"]
    assert not [key for key in keys_of(cluster, worker.name) if key.startswith("requests/")]


def test_failover_asks_nobody(shared_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """A primary that would take an hour to end is killed, also when it has been asked in order before."""
    cluster, worker = shared_cluster, make_worker(shared_cluster, "--slow-stop", "3600", "--stop-timeout", "3600")
    worker.start()
    epoch = worker.wait_acting()
    before, to = worker.hosts()
    late = refused(cluster, "switchover", worker.name, "--timeout", "1")
    assert "has not ended yet; it goes on" in late
    assert "is ending already" in refused(cluster, "switchover", worker.name, "--to", before)
    told = do(cluster, "failover", worker.name)
    assert (told["from"], told["to"]) == (before, to)
    worker.wait_acting(after_epoch=epoch)
    assert not worker.lines("end")
    assert assigned(cluster, worker).strikes == 0  # it was no failure
    assert cli("remove", *cluster.connection, worker.name, "--no-wait").returncode == 0
    cluster.kill_replica(worker.name)  # this one would take an hour, too


def test_drain(shared_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """Everything leaves that can, no copy ends before another one has taken its place, and what cannot leave is named."""
    cluster = shared_cluster
    workers = [make_worker(cluster, *words) for words in (["--style", "warm"], ["--style", "cold", "--degree", "1"])]
    everywhere = make_worker(cluster, "--degree", "3")
    for worker in (*workers, everywhere):
        worker.start("host-a")
        worker.wait_acting()
    whole = {worker.name: len(worker.hosts()) for worker in (*workers, everywhere)}
    fewer = []

    def is_left(view: Any) -> bool:
        for name, least in whole.items():
            fewer.extend([name] if len(view.apps[name].assignment.seats) < least else [])
        return all("host-a" not in view.apps[worker.name].seated_on for worker in workers)

    def stays_as_backup(view: Any) -> bool:
        assignment = view.apps[everywhere.name].assignment
        return "host-a" in {seat.host for seat in assignment.backups} and not assignment.degraded

    def finds_two_hosts(view: Any) -> bool:
        known = view.apps.get(late.name)
        return known is not None and known.assignment is not None and known.assignment.degraded

    try:
        plan = {row["name"]: row["what"] for row in do(cluster, "drain", "host-a", "--dry-run")["applications"]}
        assert "hands over to host-" in plan[everywhere.name]
        assert "a backup stays here" in plan[everywhere.name]
        assert all(plan[worker.name].startswith("hands over when host-") for worker in workers)
        assert not cluster.look(lambda view: view.drains)

        do(cluster, "drain", "host-a", "--no-wait", "--reason", "new disks")
        cluster.wait_until(is_left, "host-a to be left")
        assert fewer == []
        cluster.wait_until(stays_as_backup, "the primary that can leave to do so, and a backup to stay in its place")
        done = cli("drain", *cluster.connection, "host-a", "--timeout", "2")  # again, to wait
        assert done.returncode == 1
        assert f"{everywhere.name}: no other host is up, allowed and able" in done.stderr
        assert not any(worker.name in done.stderr.partition("Error:")[2] for worker in workers)
        for worker in workers:
            assert len(worker.lines("end")) == 1, "one handover, and nothing else has ended"

        state = next(host for host in read_json(cluster, "status")["hosts"] if host["name"] == "host-a")
        assert state["drained"]["reason"] == "new disks"
        late = make_worker(cluster, "--degree", "3")
        late.start("host-b")
        cluster.wait_until(finds_two_hosts, "a new application not to be placed there")
    finally:
        assert do(cluster, "undrain", "host-a")["changed"]
    late.wait_acting()
    assert len(late.hosts()) == 3
    assert do(cluster, "undrain", "host-a")["changed"] is False
    assert "no host host-x" in refused(cluster, "drain", "host-x")


def test_stop_and_resume(shared_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """Stopped, nothing of it runs and nobody starts it; resumed, it goes on with a later epoch."""
    cluster, worker = shared_cluster, make_worker(shared_cluster)
    worker.start()
    epoch = worker.wait_acting()
    assert do(cluster, "stop", worker.name)["applications"] == {worker.name: "stopped"}
    assert do(cluster, "stop", worker.name)["applications"] == {worker.name: "stopped"}
    assert len(worker.lines("end")) == 1
    assert not cluster.look(lambda view: view.apps[worker.name].replicas)
    assert "it is stopped" in refused(cluster, "switchover", worker.name)
    do(cluster, "resume", "--all")  # which starts nothing that a person has stopped
    assert assigned(cluster, worker).state is AssignmentState.STOPPED
    assert do(cluster, "resume", worker.name)["started"] == [worker.name]
    assert worker.wait_acting(after_epoch=epoch) > epoch


def test_scale_and_stop_keep_the_state(shared_cluster: LocalCluster, tmp_path: Path) -> None:
    """A primary knows of its degree while it runs, and no other style touches it; stopped and resumed it has its state."""
    cluster = shared_cluster
    with Keeper(cluster, tmp_path, "--style", "warm") as keeper:
        before = cluster.primary(keeper.name)
        do(cluster, "scale", keeper.name, "--degree", "1")
        keeper.store(2)  # which is on one host, and does not wait for two
        do(cluster, "scale", keeper.name, "--degree", "3")
        keeper.store(3)
        assert len(keeper.app.own_checkpoint.holders if keeper.app.own_checkpoint else ()) == 3

        for style, state in (("cold", ReplicaState.STANDBY), ("hot", ReplicaState.RUNNING), ("warm", ReplicaState.READY)):
            told = do(cluster, "scale", keeper.name, "--style", style)
            assert told == {"application": keeper.name, "changed": True, "degree": 3, "style": style}
            shown = cluster.look(lambda view: list(view.apps[keeper.name].replicas.values()))
            assert sorted(replica.state for replica in shown) == sorted([ReplicaState.RUNNING, state, state])
        assert do(cluster, "scale", keeper.name, "--style", "warm")["changed"] is False
        assert cluster.primary(keeper.name) == before
        assert the_error(cli("scale", *cluster.connection, keeper.name, "--degree", "31"), 2)

        epoch = keeper.lines()[-1]["epoch"]
        do(cluster, "stop", keeper.name)
        do(cluster, "resume", keeper.name)
        keeper.wait_line("restored", 3, after=epoch)
