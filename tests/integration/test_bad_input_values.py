"""Values and keys in etcd that are not what they should be: named, left alone, and harmless to everybody else."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from tests.integration.apps_cli.cli_harness import (
    STEADY,
    cli,
    delete_raw,
    eventually,
    fails_over,
    forget,
    is_running,
    keys_of,
    leading_process,
    pids,
    program,
    put_raw,
    raw_keys,
    read,
    read_json,
    standing,
    start_steady,
    still_running,
    unique,
)
from tests.integration.conftest import LASTING_TTL_S

pytestmark = pytest.mark.integration

GARBAGE = b'\xff{"not": json'
BYSTANDER = "bystander"


@pytest.fixture(scope="module")
def cluster(etcd_server: EmbeddedEtcd) -> Iterator[LocalCluster]:
    """Three hosts with an application that nothing here is about."""
    with LocalCluster(3, etcd=etcd_server, cluster=unique("values"), lease_ttl_s=LASTING_TTL_S) as running:
        start_steady(running, BYSTANDER)
        yield running


@pytest.fixture(autouse=True)
def same_manager(cluster: LocalCluster) -> Iterator[None]:
    """Whatever is found in etcd, no daemon restarts and the same process leads."""
    before = leading_process(cluster)
    hosts = {name: view.session for name, view in cluster.view.hosts.items() if name in cluster.hosts}
    marks = {host.name: host.log_path.stat().st_size for host in cluster.hosts.values()}
    yield
    assert leading_process(cluster) == before
    assert is_running(before[1])
    assert {name: view.session for name, view in cluster.view.hosts.items() if name in cluster.hosts} == hosts
    logs = b"".join(host.log_path.read_bytes()[marks[host.name] :] for host in cluster.hosts.values())
    assert b"the manager process ended" not in logs
    assert b"a bug in" not in logs


@pytest.fixture
def victim(cluster: LocalCluster) -> Iterator[str]:
    """Protect an application whose keys may be spoilt; primary on host-a."""
    name = unique("victim")
    start_steady(cluster, name)
    yield name
    for key in keys_of(cluster, name):
        if not key.startswith(("registrations/", "assignments/", "placements/", "replicas/")):
            delete_raw(cluster, key)
    forget(cluster, name)


@pytest.mark.parametrize("kind", ["registrations", "assignments", "failures", "successions"])
def test_a_corrupt_value(cluster: LocalCluster, victim: str, kind: str) -> None:
    """Status names it, the application goes on as it is, others fail over; after mending, this one does too."""
    before = standing(cluster, victim)
    backup = next(host for host in pids(cluster, victim) if host != "host-a")
    key = {
        "registrations": f"registrations/{victim}",
        "assignments": f"assignments/{victim}",
        "failures": f"failures/{victim}/1",
        "successions": f"successions/{backup}/{victim}",
    }[kind]
    good = raw_keys(cluster).get(key)
    put_raw(cluster, key, GARBAGE)
    try:
        fails_over(cluster, BYSTANDER)
        assert (*cluster.primary(victim), pids(cluster, victim)) == before[1:]
        text = read(cluster, "status", victim)
        (shown,) = read_json(cluster, "status", victim)["applications"]
    finally:
        delete_raw(cluster, key) if good is None else put_raw(cluster, key, good)
    assert key in text
    assert any(key in error for error in shown["corrupt"])
    fails_over(cluster, victim)


def test_a_corrupt_placement(cluster: LocalCluster, victim: str) -> None:
    """What the manager derives from the assignment it writes anew by itself; nothing fails over."""
    before = standing(cluster, victim)
    backup = next(host for host in pids(cluster, victim) if host != "host-a")
    key = f"placements/{backup}/{victim}"
    put_raw(cluster, key, GARBAGE)
    eventually(lambda: raw_keys(cluster)[key] != GARBAGE, "the placement to be written anew")
    assert (*cluster.primary(victim), pids(cluster, victim)) == before[1:]
    fails_over(cluster, victim)


@pytest.mark.parametrize(
    "change",
    [
        {"degree": 0},
        {"degree": "two"},
        {"style": "lukewarm"},
        {"name": "../../x"},
        {"program": None},
        {"hosts": ["a/b"]},
        {"stop_timeout_s": -1},
        {"overrides": {"host-b": 5}},
    ],
    ids=str,
)
def test_json_that_is_no_registration(cluster: LocalCluster, change: dict[str, object]) -> None:
    """Well-formed JSON that breaks a rule of the record is as corrupt as garbage."""
    name = unique("rules")
    registration = {"name": name, "style": "warm", "degree": 2, "program": {"argv": ["/bin/true"], "cwd": "/"}}
    key = f"registrations/{name}"
    put_raw(cluster, key, json.dumps({**registration, **change}).encode())
    try:
        (shown,) = read_json(cluster, "status", name)["applications"]
        assert shown["state"] == "corrupt"
        assert key in shown["corrupt"][0]
    finally:
        delete_raw(cluster, key)
    eventually(lambda: keys_of(cluster, name) == [], "its keys to go")


def test_a_corrupt_registration_can_be_removed(cluster: LocalCluster, victim: str) -> None:
    """`remove` is the remedy at hand: it ends what runs and frees the name."""
    everywhere = pids(cluster, victim).values()
    put_raw(cluster, f"registrations/{victim}", GARBAGE)
    done = cli("remove", *cluster.connection, "--timeout", "20", victim)
    assert (done.returncode, done.stderr) == (0, "")
    assert still_running(everywhere) == []
    assert keys_of(cluster, victim) == []
    start_steady(cluster, victim)


def test_registering_over_a_corrupt_value(cluster: LocalCluster, victim: str) -> None:
    """Refused, naming the key: nobody can tell what stood there."""
    key = f"registrations/{victim}"
    good = raw_keys(cluster)[key]
    put_raw(cluster, key, GARBAGE)
    try:
        done = program(cluster, "host-b", str(STEADY), "--name", victim)
        assert raw_keys(cluster)[key] == GARBAGE
    finally:
        put_raw(cluster, key, good)
    assert done.returncode == 1
    assert f"RefusedError: the value of {key} in etcd is corrupt" in done.stderr


@pytest.mark.parametrize("key", ["hosts/ghost", "replicas/{victim}/host-a", "history/{victim}/1"])
def test_other_corrupt_values_harm_nobody(cluster: LocalCluster, victim: str, key: str) -> None:
    """Hosts, replicas and history: reading commands and managers pass over them."""
    spoilt = key.format(victim=victim)
    good = raw_keys(cluster).get(spoilt)
    put_raw(cluster, spoilt, GARBAGE)
    try:
        fails_over(cluster, BYSTANDER)
        for words in (("list",), ("status",), ("describe", BYSTANDER), ("describe", victim)):
            done = cli(words[0], *cluster.connection, *words[1:])
            assert done.returncode == 0, done.stderr
            assert "Traceback" not in done.stderr
    finally:
        delete_raw(cluster, spoilt) if good is None else put_raw(cluster, spoilt, good)
    fails_over(cluster, BYSTANDER)


@pytest.mark.parametrize(
    "key",
    [
        "frobnications/x",
        "registrations/{victim}/deeper",
        "assignments/{victim}/deeper/still",
        "hosts/host-a/deeper",
        "placements/host-a",
        "placements/host-a/",
        "placements/host-a/{victim}/deeper",
        "successions/host-a",
        "replicas/{victim}",
        "replicas/{victim}/host-a/deeper",
        "failures/{victim}",
        "failures/{victim}/x",
        "history/{victim}/x",
        "leaders/manager",
    ],
)
def test_keys_that_are_none(cluster: LocalCluster, victim: str, key: str) -> None:
    """With a good value of their kind under them, they are passed over by commands and daemons."""
    bad = key.format(victim=victim)
    like = {
        "registrations": f"registrations/{victim}",
        "assignments": f"assignments/{victim}",
        "hosts": "hosts/host-b",
        "placements": f"placements/host-a/{victim}",
        "replicas": f"replicas/{victim}/host-a",
    }
    values = {
        "successions": {"epoch": 1, "incarnation": 1},
        "failures": FAILURE,
        "history": {"failure": FAILURE, "epoch": 1, "primary": None, "action": "x", "wall": 1.0},
        "leaders": {"host": "host-z", "pid": 1},
    }
    kind = bad.partition("/")[0]
    value = raw_keys(cluster)[like[kind]] if kind in like else json.dumps(values.get(kind, {})).encode()
    put_raw(cluster, bad, value)
    try:
        done = cli("status", *cluster.connection)
        epoch = cluster.wait_ready(BYSTANDER)
        cluster.kill_replica(BYSTANDER)
        cluster.wait_ready(BYSTANDER, after_epoch=epoch)
    finally:
        delete_raw(cluster, bad)
    assert done.returncode == 0, done.stderr
    fails_over(cluster, victim)


FAILURE = {
    "host": "host-a",
    "incarnation": 1,
    "epoch": 1,
    "role": "primary",
    "kind": "exit",
    "reason": "made up",
    "by": "nobody",
}


def test_a_corrupt_leader_stops_no_election(etcd_server: EmbeddedEtcd) -> None:
    """Garbage older than every other candidate's key must not lead."""
    with LocalCluster(2, etcd=etcd_server, cluster=unique("leaders"), lease_ttl_s=LASTING_TTL_S) as small:
        put_raw(small, "leaders/manager/garbage", GARBAGE)
        for host in ("host-a", "host-b"):  # so that no candidate is older
            small.hosts[host].stop()
            small.wait_until(lambda view, host=host: host not in view.hosts, f"{host} to go")  # type: ignore[misc]
            small.restart(host)
        start_steady(small, "app")
        fails_over(small, "app")
