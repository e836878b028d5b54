"""Programs that cannot start, raise at once or never reach the decorated call."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from etcdreplica.model import Assignment, AssignmentState, Event, Failure
from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from tests.integration.apps_cli.cli_harness import (
    PATIENCE_S,
    STEADY,
    fails_over,
    forget,
    keys_of,
    read,
    read_json,
    standing,
    start_steady,
    unique,
)
from tests.integration.conftest import LASTING_TTL_S

pytestmark = pytest.mark.integration

MISSING = "/nowhere/at/all"
PAUSE_S, MANY = 1.2, 25  # proper backing off comes to such a pause within about ten failures


@pytest.fixture(scope="module")
def cluster(etcd_server: EmbeddedEtcd) -> Iterator[LocalCluster]:
    """Three hosts; host-b is chosen before host-c, because it has room for more."""
    arguments = {"host-b": ("--capacity", "1000"), "host-c": ("--capacity", "10")}
    with LocalCluster(
        3, etcd=etcd_server, cluster=unique("programs"), node_arguments=arguments, lease_ttl_s=LASTING_TTL_S
    ) as running:
        start_steady(running, "load", "--degree", "3")
        yield running


def known(cluster: LocalCluster, name: str) -> Assignment:
    """Return the assignment of an application, or an empty one."""
    app = cluster.view.apps.get(name)
    return (app.assignment if app else None) or Assignment(0, 0, 0, AssignmentState.PENDING)


def failures(cluster: LocalCluster, name: str) -> list[Event]:
    """Return the failures of an application in the order in which they happened."""
    return sorted((e for (app, _), e in list(cluster.events.items()) if app == name), key=lambda e: e.failure.detected_at)


def backs_off(cluster: LocalCluster, name: str) -> list[Failure]:
    """Wait until the starts of an application are visibly apart, which must come before many of them; return its failures."""

    def pauses() -> list[float]:
        times = [event.failure.detected_at for event in failures(cluster, name)]
        return [later - earlier for earlier, later in pairwise(times)]

    cluster.wait_until(
        lambda _: max(pauses(), default=0.0) >= PAUSE_S or len(pauses()) >= MANY, "a pause between two starts", 3 * PATIENCE_S
    )
    found = pauses()
    assert max(found) >= PAUSE_S, f"a hot restart loop, {found}"
    return [event.failure for event in failures(cluster, name)]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ({"cwd": MISSING}, f"no directory {MISSING}"),
        ({"python": MISSING}, f"no program {MISSING}"),
        ({"argv": ["no-such-command-anywhere", "x"]}, "no program no-such-command-anywhere"),
        ({"argv": [str(STEADY)]}, f"no program {STEADY}"),
        ({"argv": ["/etc/passwd"]}, "no program /etc/passwd"),
        ({"argv": ["/etc"]}, "/etc"),
    ],
    ids=["no directory", "no interpreter", "no command", "not executable", "not a program", "a directory"],
)
def test_a_host_that_cannot_run_it(cluster: LocalCluster, override: dict[str, object], named: str) -> None:
    """Another host is tried; status shows that host's error; the primary does not notice."""
    name = unique("missing")
    overrides = json.dumps({"host-b": override})
    start_steady(cluster, name, "--style", "cold", "--overrides", overrides)
    assignment = known(cluster, name)
    assert assignment.primary is not None
    assert (assignment.primary.host, [seat.host for seat in assignment.backups]) == ("host-a", ["host-c"])
    (shown,) = read_json(cluster, "status", name)["applications"]
    assert set(shown["refusals"]) == {"host-b"}
    assert named in shown["refusals"]["host-b"]
    assert f"{name}: host-b cannot run it: " in read(cluster, "status", name)
    fails_over(cluster, name)
    assert cluster.primary(name)[0] == "host-c"
    forget(cluster, name)
    assert keys_of(cluster, name) == []


def test_no_other_host_can_run_it(cluster: LocalCluster) -> None:
    """It is degraded, and says why for each host; the primary goes on."""
    name = unique("alone")
    overrides = {host: {"cwd": f"{MISSING}/{host}"} for host in ("host-b", "host-c")}
    process = cluster.start(STEADY, "--name", name, "--degree", "3", "--overrides", json.dumps(overrides))
    cluster.wait_until(lambda _: set(known(cluster, name).refusals) == {"host-b", "host-c"}, "both refusals")
    cluster.wait_until(lambda _: known(cluster, name).degraded, "the degree to be reported as not met")
    (shown,) = read_json(cluster, "status", name)["applications"]
    assert (shown["state"], shown["degraded"]) == ("active", True)
    assert all(f"no directory {MISSING}/{host}" in shown["reason"] for host in ("host-b", "host-c"))
    assert cluster.primary(name) == ("host-a", process.pid)
    forget(cluster, name)


@pytest.mark.parametrize(("style", "degree"), [("warm", 2), ("warm", 1), ("cold", 2), ("hot", 3)])
def test_a_body_that_raises_at_once(cluster: LocalCluster, style: str, degree: int) -> None:
    """It backs off, longer each time, says why, and disturbs nobody else."""
    name = unique("raises")
    before = standing(cluster, "load")
    first = cluster.start(STEADY, "--name", name, "--style", style, "--degree", str(degree), "--body", "raise")
    assert first.wait(PATIENCE_S) == 1
    cluster.wait_until(lambda _: known(cluster, name).state is AssignmentState.BACKING_OFF, "backing off", 3 * PATIENCE_S)
    (shown,) = read_json(cluster, "status", name)["applications"]
    if shown["state"] == "backing-off":  # it may just be trying again
        assert "ValueError: no luck today" in shown["reason"]
    happened = backs_off(cluster, name)
    assert all("ValueError: no luck today" in failure.reason for failure in happened if failure.kind == "exit")
    assert standing(cluster, "load") == before
    forget(cluster, name)
    assert keys_of(cluster, name) == []


@pytest.mark.parametrize(("style", "code"), [("warm", 3), ("hot", 0)])
def test_copies_that_never_reach_the_call(cluster: LocalCluster, style: str, code: int) -> None:
    """Their hosts say so, they are not restarted without pause, and the healthy primary goes on."""
    name = unique("never")
    process = cluster.start(STEADY, "--name", name, "--style", style, "--copies-exit", str(code))
    cluster.wait_until(lambda _: bool(failures(cluster, name)), "a backup to fail")
    happened = backs_off(cluster, name)
    assert {failure.role for failure in happened} == {"backup"}
    assert {failure.reason for failure in happened} == {f"exited with code {code} before it was a replica"}
    assert cluster.primary(name) == ("host-a", process.pid)
    assert process.poll() is None
    history = read_json(cluster, "describe", name)["history"]
    assert any(f"exited with code {code}" in event["failure"]["reason"] for event in history)
    forget(cluster, name)


def test_a_program_that_cannot_be_parsed_on_a_host(cluster: LocalCluster, tmp_path: Path) -> None:
    """The interpreter's own failure counts as one of the copy, and another host is tried."""
    broken = tmp_path / "broken.py"
    broken.write_text("def main(:\n")
    name = unique("broken")
    overrides = {"host-b": {"argv": [sys.executable, str(broken)]}}
    start_steady(cluster, name, "--overrides", json.dumps(overrides))
    assert [seat.host for seat in known(cluster, name).backups] == ["host-c"]
    assert failures(cluster, name)[0].failure.reason == "exited with code 1 before it was a replica"
    assert "SyntaxError" in (cluster.hosts["host-b"].directory / "logs" / f"{name}.log").read_text()
    forget(cluster, name)


def test_a_script_that_never_calls_registers_nothing(cluster: LocalCluster, tmp_path: Path) -> None:
    """Decorating does nothing by itself."""
    name = unique("silent")
    script = tmp_path / "silent.py"
    script.write_text(f"from etcdreplica import protected\n@protected(name={name!r})\ndef main(replica):\n    pass\n")
    assert cluster.start(script).wait(PATIENCE_S) == 0
    assert keys_of(cluster, name) == []
