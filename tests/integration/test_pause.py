"""Paused, nothing moves; resumed, everything that happened is dealt with."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from etcdreplica.model import Assignment, AssignmentState, Program, Registration
from etcdreplica.store import Key, Kind, Put, Store, Txn
from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from etcdreplica.words import Style
from tests.integration.apps_cli.cli_harness import cli, delete_raw, in_store, keys_of, read, read_json, the_error, unique
from tests.integration.conftest import Worker, wait_dead

pytestmark = pytest.mark.integration
MakeWorker = Callable[..., Worker]


def pause(cluster: LocalCluster, *words: str) -> str:
    """Pause, which must succeed, and return what is said."""
    done = cli("pause", *cluster.connection, *words)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def resume(cluster: LocalCluster, *words: str) -> str:
    """Resume, which must succeed, and return what is said."""
    done = cli("resume", *cluster.connection, *words)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def assigned(cluster: LocalCluster, worker: Worker) -> Assignment:
    """Return the assignment of an application."""
    found = cluster.view.apps[worker.name].assignment
    assert found is not None
    return found


def kill_and_wait_reported(cluster: LocalCluster, worker: Worker) -> None:
    """Kill the primary and wait until its WatchDog has reported it."""
    _, pid = cluster.kill_replica(worker.name)
    cluster.wait_until(lambda view: bool(view.apps[worker.name].failures), "the failure")
    wait_dead(pid)


def fails_over(cluster: LocalCluster, worker: Worker) -> None:
    """Kill the primary and wait until all is well: by then the manager has seen whatever happened before."""
    epoch = cluster.wait_ready(worker.name)
    cluster.kill_replica(worker.name)
    cluster.wait_ready(worker.name, after_epoch=epoch)


@pytest.mark.parametrize("style", ["cold", "warm", "hot"])
def test_paused_application(shared_cluster: LocalCluster, make_worker: MakeWorker, style: str) -> None:
    """Its primary may die and nobody follows, while another application fails over; after `resume` the backup does."""
    cluster = shared_cluster
    worker, other = make_worker(cluster, "--style", style), make_worker(cluster)
    worker.start()
    other.start("host-b")
    epoch = worker.wait_acting()
    assert pause(cluster, worker.name, "--reason", "work on the roof") == f"{worker.name} is paused\n"
    before = assigned(cluster, worker)
    assert (before.paused, before.successor, before.epoch) == (True, None, epoch)
    begun = len(worker.lines("begin"))
    kill_and_wait_reported(cluster, worker)
    fails_over(cluster, other)
    assert assigned(cluster, worker) == before
    assert len(worker.lines("begin")) == begun
    assert resume(cluster, worker.name) == f"{worker.name} goes on\n"
    cluster.wait_ready(worker.name, after_epoch=epoch)
    assert cluster.primary(worker.name)[0] == before.backups[0].host
    assert not assigned(cluster, worker).paused


def test_it_is_shown(shared_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """Who, why and since when, in every reading command; pausing and resuming twice changes nothing."""
    cluster = shared_cluster
    worker = make_worker(cluster)
    worker.start()
    cluster.wait_ready(worker.name)
    told = json.loads(pause(cluster, worker.name, "--reason", "work on the roof", "-o", "json"))
    assert (told["applications"], told["reason"], told["taken"]) == ([worker.name], "work on the roof", True)
    assert pause(cluster, worker.name, "--reason", "work on the cellar", "--no-wait") == f"{worker.name} will be paused\n"
    for words in (("status", worker.name), ("list",), ("describe", worker.name)):
        shown = read(cluster, *words)
        assert "paused" in shown
        assert f"by {told['by']} since " in shown
        assert "work on the cellar" in shown
    (app,) = read_json(cluster, "status", worker.name)["applications"]
    assert (app["state"], app["paused"], app["pause"]["reason"]) == ("active", True, "work on the cellar")
    assert json.loads(resume(cluster, worker.name, "-o", "json"))["resumed"] == [worker.name]
    assert json.loads(resume(cluster, worker.name, "-o", "json"))["unchanged"] == [worker.name]
    cluster.wait_ready(worker.name)
    assert "paused" not in read(cluster, "status", worker.name)


def test_paused_application_can_be_removed(shared_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """Nothing is left of it, its pause included, and the name is free."""
    cluster = shared_cluster
    worker = make_worker(cluster)
    worker.start()
    epoch = cluster.wait_ready(worker.name)
    pause(cluster, worker.name)
    cluster.remove(worker.name)
    assert keys_of(cluster, worker.name) == []
    worker.start()
    assert cluster.wait_ready(worker.name) > epoch


def test_paused_cluster(etcd_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """Nothing is promoted, a new registration waits, a removal does not; afterwards everything happens."""
    cluster = etcd_cluster
    one, two, gone, late = (make_worker(cluster) for _ in range(4))
    for worker, host in ((one, "host-a"), (two, "host-b"), (gone, "host-c")):
        worker.start(host)
    epochs = {worker.name: cluster.wait_ready(worker.name) for worker in (one, two, gone)}
    assert pause(cluster, "--all", "--reason", "upgrade of etcd") == "the whole cluster is paused\n"
    assert "the whole cluster is paused by " in read(cluster, "status")
    assert read_json(cluster, "status")["pause"]["reason"] == "upgrade of etcd"
    late.start("host-c")
    cluster.wait_until(lambda view: late.name in view.apps and view.apps[late.name].registration is not None, "it to register")
    before = {worker.name: assigned(cluster, worker) for worker in (one, two)}
    for worker in (one, two):
        kill_and_wait_reported(cluster, worker)
    cluster.remove(gone.name)  # so the manager has seen what happened before
    assert {worker.name: assigned(cluster, worker) for worker in (one, two)} == before
    assert cluster.view.apps[late.name].assignment is None
    assert "paused still" in resume(cluster, one.name)
    assert "not paused" in resume(cluster, "--all")
    for worker in (one, two):
        cluster.wait_ready(worker.name, after_epoch=epochs[worker.name])
    cluster.wait_ready(late.name)


def test_pause_before_there_is_an_assignment(etcd_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """An application that is only registered is paused at once, and not placed before `resume`."""
    cluster = etcd_cluster
    worker, other = make_worker(cluster), make_worker(cluster)
    pause(cluster, "--all")
    worker.start()
    cluster.wait_until(lambda view: worker.name in view.apps, "it to register")
    assert pause(cluster, worker.name) == f"{worker.name} is paused\n"
    delete_raw(cluster, f"pauses/cluster/{cluster.cluster}")
    other.start("host-b")
    cluster.wait_ready(other.name)
    assert cluster.view.apps[worker.name].assignment is None
    assert "waiting for the end of a pause" in read(cluster, "status", worker.name)
    resume(cluster, worker.name)
    cluster.wait_ready(worker.name)


def test_without_a_manager_it_says_so(etcd_server: EmbeddedEtcd) -> None:
    """The pause is written, but nobody has taken it: exit code 1 after the timeout, also the second time."""
    name, where = "orphan", unique("no-manager")

    async def write(store: Store) -> None:
        registration = Registration(name, Style.WARM, 2, Program(("/bin/true",), "/"))
        assignment = Assignment(1, 1, 1, AssignmentState.PENDING)
        puts = (Put(Key(Kind.REGISTRATIONS, (name,)), registration), Put(Key(Kind.ASSIGNMENTS, (name,)), assignment))
        await store.commit(Txn((), puts))

    in_store(etcd_server, where, write)
    connection = ("--etcd", etcd_server.endpoint, "--cluster", where)
    for what in (name, "--all"):
        error = the_error(cli("pause", *connection, "--timeout", "0.5", what), 1)
        assert name in error
        assert "no manager has taken it within 0.5 s (none leads" in error
        assert f"etcdreplica resume {what}" in error
    assert cli("resume", *connection, "--all").stdout == f"the cluster is not paused\n{name} goes on\n"


@pytest.mark.parametrize("words", [("pause",), ("resume",), ("pause", "--all", "shop"), ("resume", "--all", "shop")])
def test_names_or_all(words: tuple[str, ...]) -> None:
    """One of them, and not both."""
    assert "--all" in the_error(cli(*words), 2)


def test_one_name_is_wrong(shared_cluster: LocalCluster, make_worker: MakeWorker) -> None:
    """The others are paused all the same, and the wrong one is named."""
    worker = make_worker(shared_cluster)
    worker.start()
    shared_cluster.wait_ready(worker.name)
    done = cli("pause", *shared_cluster.connection, "nothing", worker.name)
    assert "not registered: nothing" in the_error(done, 1)
    assert done.stdout == f"{worker.name} is paused\n"
    assert assigned(shared_cluster, worker).paused
    done = cli("resume", *shared_cluster.connection, "nothing", worker.name)
    assert "not registered: nothing" in the_error(done, 1)
    shared_cluster.wait_ready(worker.name)
