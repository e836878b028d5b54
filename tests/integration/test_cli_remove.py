"""`remove`: nothing of an application is left, neither a process nor a key."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from etcdreplica.model import Assignment, AssignmentState, Program, Registration
from etcdreplica.store import Key, Kind, Put, Store, Txn
from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from etcdreplica.words import Style
from tests.integration.apps_cli.cli_harness import (
    PATIENCE_S,
    STEADY,
    cli,
    eventually,
    fails_over,
    in_store,
    keys_of,
    pids,
    raw_keys,
    standing,
    start_steady,
    still_running,
    the_error,
    unique,
)
from tests.integration.conftest import LASTING_TTL_S

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster(etcd_server: EmbeddedEtcd) -> Iterator[LocalCluster]:
    """Three hosts."""
    with LocalCluster(3, etcd=etcd_server, cluster=unique("remove"), lease_ttl_s=LASTING_TTL_S) as running:
        yield running


@pytest.mark.parametrize("style", list(Style))
def test_remove_ends_all(cluster: LocalCluster, style: str) -> None:
    """After a fail-over, so that there is history too: when the command returns, processes and keys are gone."""
    name = unique(style)
    by_hand = start_steady(cluster, name, "--style", style)
    before = pids(cluster, name)
    fails_over(cluster, name)
    everywhere = {*before.values(), *pids(cluster, name).values(), by_hand.pid}
    assert any(key.startswith("history/") for key in keys_of(cluster, name))
    done = cli("remove", *cluster.connection, name)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{name} has been removed\n", "")
    assert still_running(everywhere) == []
    assert keys_of(cluster, name) == []
    cluster.wait_until(lambda view: name not in view.apps, "the view to forget it")


def test_the_program_run_by_hand_ends_well(cluster: LocalCluster) -> None:
    """To its user the first primary ends like a program that was asked to stop."""
    name = unique("by-hand")
    by_hand = start_steady(cluster, name)
    assert cli("remove", *cluster.connection, name).returncode == 0
    assert by_hand.wait(PATIENCE_S) == 0


def test_a_body_that_does_not_listen_is_killed(cluster: LocalCluster) -> None:
    """After its stop_timeout."""
    name = unique("stubborn")
    start_steady(cluster, name, "--body", "stubborn", "--stop-timeout", "0.5")
    everywhere = pids(cluster, name).values()
    assert cli("remove", *cluster.connection, name).returncode == 0
    assert still_running(everywhere) == []
    assert keys_of(cluster, name) == []


def test_a_body_that_does_not_listen_outlasts_the_patience(cluster: LocalCluster) -> None:
    """With a shorter --timeout the command says so with exit code 1, and the removal goes on."""
    name = unique("patience")
    start_steady(cluster, name, "--body", "stubborn", "--stop-timeout", "3")
    error = the_error(cli("remove", *cluster.connection, "--timeout", "0.2", name), 1)
    assert name in error
    assert "0.2 s" in error
    eventually(lambda: keys_of(cluster, name) == [], "the removal to be finished")


def test_remove_twice(cluster: LocalCluster) -> None:
    """The second time there is nothing to remove: exit code 1, unless that is what the user wants."""
    name = unique("twice")
    start_steady(cluster, name)
    assert cli("remove", *cluster.connection, name).returncode == 0
    assert name in the_error(cli("remove", *cluster.connection, name), 1)
    done = cli("remove", *cluster.connection, "--missing-ok", name)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_remove_several_of_which_one_is_missing(cluster: LocalCluster) -> None:
    """Those that exist are removed, another one goes on, and the missing one is named."""
    one, two, other = unique("one"), unique("two"), unique("other")
    for name in (one, two, other):
        start_steady(cluster, name)
    before = standing(cluster, other)
    done = cli("remove", *cluster.connection, one, "nothing", two)
    error = the_error(done, 1)
    assert "nothing" in error
    assert one not in error
    assert done.stdout.splitlines() == [f"{one} has been removed", f"{two} has been removed"]
    assert keys_of(cluster, one) == keys_of(cluster, two) == []
    assert standing(cluster, other) == before
    cli("remove", *cluster.connection, other)


def test_the_name_is_free_at_once(cluster: LocalCluster) -> None:
    """The same name can be registered again, differently; its epoch goes on growing."""
    name = unique("again")
    start_steady(cluster, name)
    epoch = cluster.wait_ready(name)
    assert cli("remove", *cluster.connection, name).returncode == 0
    start_steady(cluster, name, "--style", "cold", host="host-b")
    assert cluster.wait_ready(name) > epoch
    cli("remove", *cluster.connection, name)


def test_remove_without_waiting(cluster: LocalCluster) -> None:
    """The command returns, and all ends soon."""
    name = unique("no-wait")
    start_steady(cluster, name)
    everywhere = pids(cluster, name).values()
    done = cli("remove", *cluster.connection, "--no-wait", name)
    assert (done.returncode, done.stdout) == (0, f"{name} is being removed\n")
    eventually(lambda: not keys_of(cluster, name), "its keys to go")
    assert still_running(everywhere) == []


def test_remove_a_completed_application(cluster: LocalCluster) -> None:
    """Its body has returned; what is left of it are keys."""
    name = unique("completed")
    assert cluster.start(STEADY, "--name", name, "--body", "return").wait(PATIENCE_S) == 0
    cluster.wait_until(lambda view: is_completed(view.apps[name].assignment), "its completion")
    assert cli("remove", *cluster.connection, name).returncode == 0
    assert keys_of(cluster, name) == []


def is_completed(assignment: Assignment | None) -> bool:
    """Whether it says that the body has returned."""
    return assignment is not None and assignment.state is AssignmentState.COMPLETED


def test_without_a_manager_it_says_what_is_missing(etcd_server: EmbeddedEtcd) -> None:
    """Nobody carries the removal out: exit code 1 after the timeout."""
    name, where = "orphan", unique("no-manager")

    async def write(store: Store) -> None:
        registration = Registration(name, Style.WARM, 2, Program(("/bin/true",), "/"))
        assignment = Assignment(1, 1, 1, AssignmentState.PENDING)
        puts = (Put(Key(Kind.REGISTRATIONS, (name,)), registration), Put(Key(Kind.ASSIGNMENTS, (name,)), assignment))
        await store.commit(Txn((), puts))

    in_store(etcd_server, where, write)
    done = cli("remove", "--etcd", etcd_server.endpoint, "--cluster", where, "--timeout", "0.5", name)
    error = the_error(done, 1)
    assert name in error
    assert "manager" in error


def test_nothing_is_left_in_the_cluster(cluster: LocalCluster) -> None:
    """After all of the above only hosts, their CheckpointServers, leaders and etcd's origin have keys."""
    assert {key.partition("/")[0] for key in raw_keys(cluster)} == {"hosts", "leaders", "origin", "servers"}
