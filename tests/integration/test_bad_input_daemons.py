"""Daemons that must not start beside others, with bad settings, or before etcd; and how they end."""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from etcdreplica.store import Kind, Store
from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from tests.integration.apps_cli.cli_harness import (
    PATIENCE_S,
    STEADY,
    background,
    cli,
    command,
    eventually,
    fails_over,
    forget,
    in_store,
    marked,
    standing,
    start_steady,
    the_error,
    unique,
)
from tests.integration.conftest import LASTING_TTL_S

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster(etcd_server: EmbeddedEtcd) -> Iterator[LocalCluster]:
    """Two hosts with one application on both."""
    with LocalCluster(2, etcd=etcd_server, cluster=unique("daemons"), lease_ttl_s=LASTING_TTL_S) as running:
        start_steady(running, "load")
        yield running


@pytest.fixture(autouse=True)
def undisturbed(cluster: LocalCluster) -> Iterator[None]:
    """Whatever is refused, the hosts and the application that run go on."""
    hosts = {name: view.session for name, view in cluster.view.hosts.items() if name in cluster.hosts}
    before = standing(cluster, "load")
    yield
    assert standing(cluster, "load") == before, cluster.describe()
    assert {name: view.session for name, view in cluster.view.hosts.items() if name in cluster.hosts} == hosts


def own(directory: Path) -> list[str]:
    """Return options that keep a daemon to a directory."""
    return ["--state-dir", str(directory / "state"), "--socket", str(directory / "s")]


@pytest.mark.parametrize("daemon", ["node", "watchdog"])
def test_a_second_node_of_the_same_name(cluster: LocalCluster, daemon: str, tmp_path: Path) -> None:
    """The second one exits 1, says who has the name, and leaves nothing behind."""
    mark = unique("taken")
    done = cli(daemon, "--host", "host-a", *cluster.connection, *own(tmp_path), env={"CLI_TEST_MARK": mark})
    error = the_error(done, 1)
    assert "host name host-a is taken" in error
    assert f"process {cluster.view.hosts['host-a'].host.pid}" in error
    assert "--host" in error
    assert marked(mark) == []
    assert not (tmp_path / "s").exists()


def test_two_watchdogs_on_one_socket(cluster: LocalCluster, tmp_path: Path) -> None:
    """The second one exits 2 and leaves the socket to the first."""
    taken = cluster.hosts["host-a"].socket_path
    words = ["--host", "other", *cluster.connection, "--state-dir", str(tmp_path), "--socket", str(taken)]
    error = the_error(cli("watchdog", *words), 2)
    assert str(taken) in error
    assert "--socket" in error
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(taken))


def test_two_watchdogs_in_one_state_directory(cluster: LocalCluster, tmp_path: Path) -> None:
    """The second one exits 2 before it touches what the first one runs."""
    taken = cluster.hosts["host-a"].directory
    words = ["--host", "other", *cluster.connection, "--state-dir", str(taken), "--socket", str(tmp_path / "s")]
    error = the_error(cli("watchdog", *words), 2)
    assert str(taken) in error
    assert "--state-dir" in error


@pytest.mark.parametrize("daemon", ["watchdog", "manager"])
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--host", "a/b"), "host name 'a/b'"),
        (("--host", "-"), "host name '-'"),
        (("--host", "x" * 64), "host name"),
        (("--lease-ttl", "1.9"), "1.9"),
        (("--lease-ttl", "nan"), "nan"),
        (("--lease-ttl", "inf"), "inf"),
        (("--lease-ttl", "soon"), "soon"),
        (("--cluster", "a/b"), "cluster name 'a/b'"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, tuple) else None,
)
def test_bad_settings_of_a_daemon_exit_2(
    etcd_server: EmbeddedEtcd, daemon: str, words: tuple[str, str], named: str, tmp_path: Path
) -> None:
    """They are named, before anything is done."""
    directories = [] if daemon == "manager" else own(tmp_path)
    done = cli(daemon, "--etcd", etcd_server.endpoint, "--cluster", unique("bad"), *directories, *words)
    assert named in the_error(done, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--capacity", "0"), "capacity 0"),
        (("--label", "zone"), "zone"),
        (("--label", "=a"), "KEY=VALUE"),
        (("--peer-listen", "nowhere"), "peer address 'nowhere'"),
        (("--peer-listen", "0.0.0.0:0"), "--insecure"),
        (("--socket", "/tmp/" + "x" * 110), "107 bytes"),
        (("--socket", "/proc/nowhere/s"), "/proc/nowhere/s"),
        (("--state-dir", "/etc/passwd"), "/etc/passwd"),
        (("--state-dir", "/proc/nowhere"), "/proc/nowhere"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, tuple) else None,
)
def test_bad_settings_of_a_host_exit_2(etcd_server: EmbeddedEtcd, words: tuple[str, str], named: str, tmp_path: Path) -> None:
    """They are named."""
    words = (*own(tmp_path), *words)  # type: ignore[assignment]
    done = cli("watchdog", "--host", "x", "--etcd", etcd_server.endpoint, "--cluster", unique("bad"), *words)
    assert named in the_error(done, 2)


BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.mark.parametrize(
    "left",
    [
        b"",
        b"\xff\x00garbage",
        b"[]",
        json.dumps({"boot": BOOT, "replicas": [1]}).encode(),
        json.dumps({"boot": BOOT, "replicas": {"a": 5}, "lease": "x"}).encode(),
        json.dumps({"boot": BOOT, "replicas": {"a": ["x", None]}, "lease": -1}).encode(),
        b"[" * 100_000,
    ],
    ids=["empty", "bytes", "array", "replicas are a list", "replica is a number", "replica is words", "deep"],
)
def test_a_damaged_state_file(etcd_server: EmbeddedEtcd, left: bytes, tmp_path: Path) -> None:
    """The WatchDog starts all the same; a crash loop at each start would be worse than any lease."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "watchdog.json").write_bytes(left)
    arguments = command("watchdog", "--host", "x", "--etcd", etcd_server.endpoint, "--cluster", unique("state"), *own(tmp_path))
    with background(arguments, tmp_path / "log") as daemon:
        eventually(lambda: (tmp_path / "s").exists() or daemon.poll() is not None, "the socket")
        assert daemon.poll() is None, (tmp_path / "log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("daemon", ["node", "watchdog", "manager"])
def test_an_orderly_end(etcd_server: EmbeddedEtcd, daemon: str, number: signal.Signals, tmp_path: Path) -> None:
    """Exit code 0, no traceback, nothing left: neither a process nor a key nor the socket."""
    where, mark = unique("end"), unique("end")
    names = ["--host", "x", "--etcd", etcd_server.endpoint, "--cluster", where]
    arguments = command(daemon, *names, *([] if daemon == "manager" else own(tmp_path)))

    async def look(store: Store) -> bool:
        kind = (Kind.HOSTS,) if daemon == "watchdog" else (Kind.LEADERS, "superwatchdog")
        return bool((await store.list(*kind)).entries)

    def is_up() -> bool:
        return in_store(etcd_server, where, look)

    with background(arguments, tmp_path / "log", mark=mark) as process:
        eventually(is_up, "the daemon to be up")
        process.send_signal(number)
        code = process.wait(PATIENCE_S)
        text = (tmp_path / "log").read_text()
        assert (code, "Traceback" in text) == (0, False), text
        assert marked(mark) == []
    shown = json.loads(cli("status", "--etcd", etcd_server.endpoint, "--cluster", where, "-o", "json").stdout)
    assert (shown["hosts"], set(shown["leaders"].values())) == ([], {""})
    assert not (tmp_path / "s").exists()


def test_a_node_started_before_etcd(tmp_path: Path) -> None:
    """It waits, says so in its log, and works once etcd comes."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    etcd = EmbeddedEtcd(port=port)
    arguments = ["--host", "early", "--lease-ttl", "2", "--etcd", etcd.endpoint, "--cluster", "late"]
    try:
        with background(command("node", *arguments, *own(tmp_path)), tmp_path / "log", mark=unique("early")) as node:
            eventually(lambda: (tmp_path / "log").read_text().count("waiting for etcd") >= 2, "the log message")
            assert etcd.endpoint in (tmp_path / "log").read_text()
            assert node.poll() is None
            etcd.start()
            with LocalCluster(["host-a"], etcd=etcd, cluster="late") as late:
                late.wait_until(lambda view: "early" in view.hosts, "the early host")
                start_steady(late, "app")
                fails_over(late, "app")
                assert late.primary("app")[0] == "early"
                forget(late, "app")
    finally:
        etcd.stop()


def test_a_program_started_before_etcd(tmp_path: Path) -> None:
    """Its WatchDog has no etcd yet: the program is refused with a clear message, or waits; it never runs unprotected."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    arguments = command("watchdog", "--host", "early", "--etcd", endpoint, *own(tmp_path))
    with background(arguments, tmp_path / "log"):
        eventually((tmp_path / "s").exists, "the socket")
        at = {"ETCDREPLICA_SOCKET": str(tmp_path / "s")}
        with background(
            [sys.executable, str(STEADY), "--name", "app", "--body", "return"], tmp_path / "app.log", env=at
        ) as app:
            assert app.wait(PATIENCE_S) == 1
        assert endpoint in (tmp_path / "app.log").read_text()
