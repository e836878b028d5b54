"""Registrations that are refused change nothing: neither etcd nor what runs already."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from tests.integration.apps_cli.cli_harness import (
    PATIENCE_S,
    STEADY,
    eventually,
    forget,
    keys_of,
    program,
    raw_keys,
    standing,
    start_steady,
    unique,
)
from tests.integration.conftest import LASTING_TTL_S

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster(etcd_server: EmbeddedEtcd) -> Iterator[LocalCluster]:
    """Three hosts."""
    with LocalCluster(3, etcd=etcd_server, cluster=unique("registration"), lease_ttl_s=LASTING_TTL_S) as running:
        yield running


@pytest.fixture
def running(cluster: LocalCluster) -> Iterator[str]:
    """Protect an application whose primary is on host-a; it must not be disturbed."""
    name = unique("first")
    start_steady(cluster, name)
    before, keys = standing(cluster, name), raw_keys(cluster)
    yield name
    assert standing(cluster, name) == before
    assert {key for key in raw_keys(cluster) if "/" + name in key} == {key for key in keys if "/" + name in key}
    forget(cluster, name)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """Check that a program ended with a RefusedError, and return its line."""
    assert done.returncode == 1, done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("etcdreplica.errors.RefusedError:"))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (("--style", "hot"), "style warm -> hot"),
        (("--degree", "3"), "degree 2 -> 3"),
        (("--hosts", "host-a,host-b,host-c"), "hosts"),
        (("--stop-timeout", "7"), "stop_timeout"),
        (("--body", "return"), "program"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_the_same_name_registered_differently(cluster: LocalCluster, running: str, other: tuple[str, ...], named: str) -> None:
    """On another host: what differs is said, and what can be done."""
    error = refusal(program(cluster, "host-b", str(STEADY), "--name", running, *other))
    assert named in error
    assert f"etcdreplica remove {running}" in error


@pytest.mark.parametrize("host", ["host-a", "host-b"])
def test_the_same_program_twice(cluster: LocalCluster, running: str, host: str) -> None:
    """On this host or another: the user learns where it runs."""
    error = refusal(program(cluster, host, str(STEADY), "--name", running))
    assert "host-a" in error
    assert "running already" in error


@pytest.mark.parametrize("style", ["warm"])
def test_hosts_that_do_not_exist(cluster: LocalCluster, style: str) -> None:
    """They are named, and which hosts there are; no key is written."""
    name = unique("nowhere")
    words = ("--name", name, "--style", style, "--hosts", "host-a,host-x,host-y")
    error = refusal(program(cluster, "host-a", str(STEADY), *words))
    assert "host-x, host-y" in error
    assert "host-a, host-b, host-c" in error
    assert keys_of(cluster, name) == []


def test_hosts_without_this_one(cluster: LocalCluster) -> None:
    """The program cannot become primary here, so it must not begin."""
    name = unique("elsewhere")
    error = refusal(program(cluster, "host-a", str(STEADY), "--name", name, "--hosts", "host-b,host-c"))
    assert "this host, host-a," in error
    assert keys_of(cluster, name) == []


@pytest.mark.parametrize(
    "words", [("--degree", "3", "--hosts", "host-a,host-b"), ("--hosts", "host-a, host-b"), ("--degree", "31")]
)
def test_what_the_decorator_refuses_is_not_registered(cluster: LocalCluster, words: tuple[str, ...]) -> None:
    """It fails before anything is sent."""
    name = unique("decorated")
    done = program(cluster, "host-a", str(STEADY), "--name", name, *words)
    assert done.returncode == 1
    assert "UsageError" in done.stderr
    assert keys_of(cluster, name) == []


def test_a_race_for_one_name(cluster: LocalCluster) -> None:
    """Of programs that register one name at the same time on all hosts, exactly one becomes primary."""
    name = unique("race")
    racing = [cluster.start(STEADY, "--name", name, host=host) for host in [*cluster.hosts, *cluster.hosts]]
    cluster.wait_ready(name)
    eventually(lambda: sum(each.poll() is None for each in racing) == 1, "all but one to be refused")
    assert {each.wait(PATIENCE_S) for each in racing if each.poll() is not None} == {1}
    winner = next(each for each in racing if each.poll() is None)
    assert cluster.primary(name)[1] == winner.pid
    forget(cluster, name)


def test_a_program_typed_in_is_refused(cluster: LocalCluster) -> None:
    """There is no file that the other hosts could start."""
    code = "from etcdreplica import protected\n@protected(name='typed-in')\ndef main(replica):\n    pass\nmain()\n"
    done = subprocess.run(
        [sys.executable, "-"],
        input=code,
        env=cluster.hosts["host-a"].environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 1
    assert "use a file" in done.stderr
    assert keys_of(cluster, "typed-in") == []
