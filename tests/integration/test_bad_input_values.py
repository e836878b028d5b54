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
from tests.integration.stage import NO_CHECKPOINTS

pytestmark = pytest.mark.integration

GARBAGE = b'\xff{"not": json'
BYSTANDER = "bystander"


@pytest.fixture(scope="module")
def cluster(etcd_server: EmbeddedEtcd) -> Iterator[LocalCluster]:
    """Three hosts with an application that nothing here is about."""
    name = unique("values")
    with LocalCluster(3, etcd=etcd_server, cluster=name, lease_ttl_s=LASTING_TTL_S, node_arguments=NO_CHECKPOINTS) as running:
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


CHANGES: tuple[dict[str, object], ...] = (
    {"degree": 0},
    {"degree": "two"},
    {"style": "lukewarm"},
    {"name": "../../x"},
    {"program": None},
    {"hosts": ["a/b"]},
    {"stop_timeout_s": -1},
    {"overrides": {"host-b": 5}},
)


def test_json_that_is_no_registration(cluster: LocalCluster) -> None:
    """Well-formed JSON that breaks a rule of the record is as corrupt as garbage."""
    spoilt = {unique("rules"): change for change in CHANGES}
    for name, change in spoilt.items():
        registration = {"name": name, "style": "warm", "degree": 2, "program": {"argv": ["/bin/true"], "cwd": "/"}}
        put_raw(cluster, f"registrations/{name}", json.dumps({**registration, **change}).encode())
    try:
        shown = {app["name"]: app for app in read_json(cluster, "status")["applications"]}
        for name, change in spoilt.items():
            assert shown[name]["state"] == "corrupt", change
            assert f"registrations/{name}" in shown[name]["corrupt"][0], change
    finally:
        for name in spoilt:
            delete_raw(cluster, f"registrations/{name}")
    eventually(lambda: not any(set(key.split("/")) & set(spoilt) for key in raw_keys(cluster)), "their keys to go")


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


NO_KEYS = (
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
)


def test_keys_that_are_none(cluster: LocalCluster, victim: str) -> None:
    """With a good value of their kind under them, they are passed over by commands and daemons."""
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
    good = raw_keys(cluster)
    bad = [key.format(victim=victim) for key in NO_KEYS]
    for key in bad:
        kind = key.partition("/")[0]
        put_raw(cluster, key, good[like[kind]] if kind in like else json.dumps(values.get(kind, {})).encode())
    try:
        done = cli("status", *cluster.connection)
        fails_over(cluster, BYSTANDER)
        fails_over(cluster, victim)
    finally:
        for key in bad:
            delete_raw(cluster, key)
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
    name = unique("leaders")
    with LocalCluster(2, etcd=etcd_server, cluster=name, lease_ttl_s=LASTING_TTL_S, node_arguments=NO_CHECKPOINTS) as small:
        put_raw(small, "leaders/manager/garbage", GARBAGE)
        for host in ("host-a", "host-b"):  # so that no candidate is older
            small.hosts[host].stop()
            small.wait_until(lambda view, host=host: host not in view.hosts, f"{host} to go")  # type: ignore[misc]
            small.restart(host)
        start_steady(small, "app")
        fails_over(small, "app")
