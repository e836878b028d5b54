"""SIGHUP to a node: it reads its configuration file again, and no file takes it or what it runs down."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from tests.integration.apps_cli.cli_harness import eventually, standing, start_steady, unique
from tests.integration.conftest import kill

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="a certificate is made with openssl"),
]
HOST = "host-a"
TTL_S = 60.0  # it outlasts WatchDogs that are killed one after the other, each before it has renewed


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of the node."""
    path = tmp_path_factory.mktemp("configuration") / "node.toml"
    path.write_text("capacity = 7\n")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=x"]
    command += ["-keyout", str(path.with_name("key.pem")), "-out", str(path.with_name("ca.pem"))]
    subprocess.run(command, check=True, capture_output=True)  # with it etcd is asked for TLS, which it does not speak
    return path


@pytest.fixture(scope="module")
def cluster(etcd_server: EmbeddedEtcd, file: Path) -> Iterator[LocalCluster]:
    """One host that runs an application, started by the guardian."""
    arguments = {HOST: ("--config", str(file))}
    with LocalCluster(1, etcd=etcd_server, cluster=unique("reload"), node_arguments=arguments, lease_ttl_s=TTL_S) as running:
        start_steady(running, "shop", "--degree", "1")
        epoch = running.wait_ready("shop")
        running.kill_replica("shop")
        running.wait_ready("shop", after_epoch=epoch)
        yield running


def hang_up(cluster: LocalCluster, *words: str) -> str:
    """Send SIGHUP to the node, wait for the next WatchDog and for words in the log; return what it has logged since."""
    node, before = cluster.hosts[HOST], cluster.view.hosts[HOST].host.pid
    assert node.process is not None
    at = node.log_path.stat().st_size
    os.kill(node.process.pid, signal.SIGHUP)
    cluster.wait_until(lambda view: HOST in view.hosts and view.hosts[HOST].host.pid != before, "the next WatchDog")
    eventually(lambda: all(word in node.log_path.read_text()[at:] for word in words), f"{words} in the log")
    assert node.process.poll() is None
    return node.log_path.read_text()[at:]


def test_what_may_change_is_taken(cluster: LocalCluster, file: Path) -> None:
    """The host record says so, children that are concerned are replaced, others and the application go on."""
    held, manager = standing(cluster, "shop"), cluster.leaders["manager"]
    server = cluster.servers[HOST].pid
    file.write_text('capacity = 9\ncheckpoint-keep = 2\nlabel = { zone = "b" }\ntiming = "calm"\n')
    said = hang_up(cluster, "timing stays safe", "replacing the checkpoint-server process")
    assert "replacing the manager" not in said
    host = cluster.view.hosts[HOST].host
    assert (host.capacity, dict(host.labels)) == (9, {"zone": "b"})
    cluster.wait_until(lambda _: HOST in cluster.servers and cluster.servers[HOST].pid != server, "the next CheckpointServer")
    assert (standing(cluster, "shop"), cluster.leaders["manager"]) == (held, manager)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("capasity = 3", ("the nearest one there is is 'capacity'", "going on with the settings of before")),
        ("capacity = 0", ("bad capacity 0", "going on with the settings of before")),
        ('capacity = 3\netcd-ca = "ca.pem"', ("the etcd of the new configuration", "going on with that of before")),
    ],
)
def test_bad_file_changes_nothing(cluster: LocalCluster, file: Path, text: str, words: tuple[str, ...]) -> None:
    """The log says what is wrong; the node, its session and its application go on, also when the WatchDog then crashes."""
    held, session = standing(cluster, "shop"), cluster.view.hosts[HOST].session
    file.write_text(text)
    hang_up(cluster, *words)
    pid = cluster.view.hosts[HOST].host.pid
    kill(pid)
    cluster.wait_until(lambda view: HOST in view.hosts and view.hosts[HOST].host.pid != pid, "one more WatchDog")
    assert cluster.view.hosts[HOST].session == session
    assert standing(cluster, "shop") == held
    assert cluster.view.hosts[HOST].host.capacity == (3 if "etcd-ca" in text else 9)
