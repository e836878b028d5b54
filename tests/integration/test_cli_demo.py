"""`demo` and `bench failover`: the agreed JSON, and nothing left behind, also when interrupted."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.apps_cli.cli_harness import (
    MARK,
    PATIENCE_S,
    background,
    cli,
    command,
    eventually,
    has_child,
    marked,
    unique,
)

pytestmark = pytest.mark.integration

PHASES = {"detected", "decided", "promoted", "body", "total", "degree_restored"}


def test_demo_json(tmp_path: Path) -> None:
    """One JSON object alone on standard output; afterwards no process and no file."""
    mark = unique("demo")
    done = cli("demo", "--json", "--style", "warm", env={"TMPDIR": str(tmp_path), MARK: mark}, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    shown = json.loads(done.stdout)
    assert shown["ok"] is True
    assert set(shown["styles"]) == {"warm"}
    assert set(shown["styles"]["warm"]) == {"process", "host"}
    for phases in shown["styles"]["warm"].values():
        assert set(phases) == PHASES
        assert all(0 <= value <= phases["total"] for key, value in phases.items() if key not in ("total", "degree_restored"))
        assert phases["degree_restored"] >= phases["total"] > 0
    assert marked(mark) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, "starting"),
        (signal.SIGTERM, "running"),
        (signal.SIGINT, "a host is dead"),
        (signal.SIGTERM, "a host is dead"),
    ],
    ids=str,
)
def test_demo_interrupted(number: signal.Signals, moment: str, tmp_path: Path) -> None:
    """In the middle: exit code 130, no traceback, no process, no file."""
    directory, log, mark = tmp_path / "tmp", tmp_path / "log", unique("demo")
    directory.mkdir()
    arguments = command("demo", "--style", "warm", "--json")
    with background(arguments, log, env={"TMPDIR": str(directory)}, mark=mark) as demo:
        reached: dict[str, Callable[[], bool]] = {
            "starting": lambda: has_child(demo.pid, "node"),
            "running": lambda: "primary on" in log.read_text(),
            "a host is dead": lambda: "kill -9 of everything" in log.read_text(),
        }
        eventually(reached[moment], f"the moment {moment}")
        assert demo.poll() is None
        demo.send_signal(number)
        assert demo.wait(PATIENCE_S) == 130
        assert "Traceback" not in log.read_text()
        eventually(lambda: not marked(mark), "its processes to be gone")
        assert list(directory.iterdir()) == []


def test_bench_failover() -> None:
    """The form that all benches share."""
    mark = unique("bench")
    done = cli("bench", "failover", "--trials", "2", "-o", "json", env={MARK: mark}, timeout=110)
    assert (done.returncode, done.stderr) == (0, "")
    shown = json.loads(done.stdout)
    assert set(shown) == {"bench", "parameters", "environment", "metrics", "floors", "peers", "ratios", "ok"}
    assert (shown["bench"], shown["ok"]) == ("failover", True)
    agreed = {"style": "warm", "trials": 2, "fault": "process", "failover": "safe", "degree": 2, "lease_ttl_s": 2.0}
    assert shown["parameters"] == agreed
    assert {"python", "kernel", "cpus", "etcd"} <= set(shown["environment"])
    assert set(shown["metrics"]) == {"total", "detected", "decided", "promoted", "body"}
    assert shown["floors"]
    assert set(shown["ratios"]) == {"total_vs_put_to_event"}
    assert all(value > 0 for value in shown["ratios"].values())
    for group in ("metrics", "floors"):
        for figures in shown[group].values():
            assert set(figures) == {"unit", "n", "p50", "p95", "p99", "max"}
            assert figures["unit"] == "ms"
            assert 0 <= figures["p50"] <= figures["p95"] <= figures["p99"] <= figures["max"]
    assert {figures["n"] for figures in shown["metrics"].values()} == {2}
    assert marked(mark) == []


def test_bench_scale() -> None:
    """All of it with a few applications and hosts: every application has one primary after each loss."""
    mark = unique("bench")
    sizes = ("--apps", "9", "--registrations", "60", "--hosts", "6", "--steady-seconds", "0.2")
    done = cli("bench", "scale", *sizes, "-o", "json", env={MARK: mark}, timeout=110)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert set(shown) == {"bench", "parameters", "environment", "metrics", "floors", "peers", "ratios", "ok"}
    assert (shown["bench"], shown["ok"]) == ("scale", True)
    assert shown["parameters"] == {"apps": 9, "registrations": 60, "hosts": 6, "steady_s": 0.2}
    metrics = shown["metrics"]
    assert metrics["not_one_primary"]["max"] == 0
    assert metrics["mass_crash"]["n"] == 3
    assert metrics["mass_host_lost"]["n"] >= 3
    assert {f"manager_cpu_per_app@{count}" for count in (6, 20, 60)} <= set(metrics)
    assert metrics["lost@60"]["n"] >= 1
    assert marked(mark) == []
