"""`list`, `status` and `describe` of a cluster with three applications, and of an etcd that is not there."""

from __future__ import annotations

import itertools
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from tests.integration.apps_cli.cli_harness import (
    PATIENCE_S,
    STEADY,
    clean_environment,
    cli,
    command,
    fails_over,
    pids,
    read,
    read_json,
    start_steady,
    the_error,
    unique,
)
from tests.integration.conftest import LASTING_TTL_S

pytestmark = pytest.mark.integration

ETCDREPLICA = Path(sys.executable).parent / "etcdreplica"
HOSTS = ["host-a", "host-b", "host-c"]
READING = [("list",), ("status",), ("status", "shop"), ("describe", "shop")]


@pytest.fixture(scope="module")
def cluster(etcd_server: EmbeddedEtcd) -> Iterator[LocalCluster]:
    """Three hosts with a warm and a cold application, and one that wants more hosts than there are."""
    arguments = {"host-b": ("--label", "zone=b", "--capacity", "7")}
    with LocalCluster(
        3, etcd=etcd_server, cluster=unique("show"), node_arguments=arguments, lease_ttl_s=LASTING_TTL_S
    ) as running:
        start_steady(running, "shop")
        start_steady(running, "books", "--style", "cold", host="host-b")
        running.start(STEADY, "--name", "wide", "--degree", "4", "--style", "hot", host="host-c")
        running.wait_until(
            lambda view: "wide" in view.apps and sum(r.state == "running" for r in view.apps["wide"].replicas.values()) == 3,
            "wide to run on all hosts",
        )
        yield running


def test_list_json(cluster: LocalCluster) -> None:
    """One object for each application, by name."""
    shown = {app["name"]: app for app in read_json(cluster, "list")}
    assert list(shown) == ["books", "shop", "wide"]
    assert {(app["name"], app["style"], app["degree"], app["state"], app["degraded"]) for app in shown.values()} == {
        ("shop", "warm", 2, "active", False),
        ("books", "cold", 2, "active", False),
        ("wide", "hot", 4, "active", True),
    }
    assert {name: app["primary"] for name, app in shown.items()} == {"shop": "host-a", "books": "host-b", "wide": "host-c"}


def test_list_table(cluster: LocalCluster) -> None:
    """One line for each application under a line of heads."""
    heads, *rows = read(cluster, "list").splitlines()
    assert heads.split() == ["NAME", "STYLE", "DEGREE", "STATE", "PRIMARY"]
    assert [row.split()[0] for row in rows] == ["books", "shop", "wide"]
    assert "active, degraded" in rows[2]


def test_status_json(cluster: LocalCluster) -> None:
    """Applications with their replicas, hosts with what they are, leaders."""
    shown = read_json(cluster, "status")
    assert set(shown) == {"applications", "hosts", "leaders", "pause"}
    assert [host["name"] for host in shown["hosts"]] == HOSTS
    by_name = {host["name"]: host for host in shown["hosts"]}
    assert (by_name["host-b"]["labels"], by_name["host-b"]["capacity"]) == ({"zone": "b"}, 7)
    assert sum(host["replicas"] for host in shown["hosts"]) == 7
    assert set(shown["leaders"]) == {"manager", "superwatchdog"}
    assert set(shown["leaders"].values()) <= set(HOSTS)
    shop = next(app for app in shown["applications"] if app["name"] == "shop")
    primary, backup = shop["replicas"]
    assert (primary["host"], primary["role"], primary["state"]) == ("host-a", "primary", "running")
    assert primary["endpoint"] == "demo://host-a"
    assert (backup["role"], backup["state"]) == ("backup", "ready")
    assert {replica["host"]: replica["pid"] for replica in shop["replicas"]} == pids(cluster, "shop")
    assert primary["epoch"] == shop["epoch"]


def test_status_table(cluster: LocalCluster) -> None:
    """Every host, every replica's process and both leaders appear, and why an application is degraded."""
    shown = read(cluster, "status")
    assert all(word in shown for word in (*HOSTS, "leader of manager: host-", "leader of superwatchdog: host-", "zone=b"))
    for app in ("shop", "books", "wide"):
        assert all(str(pid) in shown for pid in pids(cluster, app).values())
    assert "wide: 3 of 4 copies" in shown


def test_status_of_some(cluster: LocalCluster) -> None:
    """Only the named ones, in that order."""
    assert [app["name"] for app in read_json(cluster, "status", "shop", "books")["applications"]] == ["shop", "books"]
    shown = read(cluster, "status", "shop")
    assert "shop" in shown
    assert "books" not in shown


def test_describe_json(cluster: LocalCluster) -> None:
    """All of one application, its program and history included, but not its environment, which may hold secrets."""
    shown = read_json(cluster, "describe", "books")
    assert (shown["name"], shown["style"], shown["primary"]) == ("books", "cold", "host-b")
    assert shown["program"]["argv"][1:4] == [str(STEADY), "--name", "books"]
    assert "env" not in shown["program"]
    assert shown["history"] == []
    assert [(replica["role"], replica["state"]) for replica in shown["replicas"]] == [
        ("primary", "running"),
        ("backup", "standby"),
    ]


def test_describe_table(cluster: LocalCluster) -> None:
    """A line for each setting and replica."""
    shown = read(cluster, "describe", "books")
    assert {"name:       books", "style:      cold", "primary:    host-b"} <= set(shown.splitlines())
    assert str(STEADY) in shown
    assert "standby" in shown


def test_describe_tells_what_failed(cluster: LocalCluster) -> None:
    """After a crash the history says who, how and what followed."""
    epoch = cluster.wait_ready("shop")
    host, _ = cluster.kill_replica("shop")
    cluster.wait_ready("shop", after_epoch=epoch)
    (event,) = read_json(cluster, "describe", "shop")["history"]
    assert (event["failure"]["host"], event["failure"]["kind"], event["failure"]["role"]) == (host, "exit", "primary")
    assert event["primary"] in set(HOSTS) - {host}
    assert f"{event['primary']} promoted" in read(cluster, "describe", "shop")


def test_history_tells_how_long_a_promotion_took(cluster: LocalCluster) -> None:
    """Who, what and then, and the phases as the next primary shows them; also once that one has ended."""
    fails_over(cluster, "shop")
    *_, event = read_json(cluster, "history", "shop")
    assert (event["name"], event["failure"]["kind"]) == ("shop", "exit")
    assert all(event[phase] > 0 for phase in ("told_s", "body_s", "gap_s"))
    fails_over(cluster, "shop")
    *_, first, last = read_json(cluster, "history")
    assert first == event
    assert last["failure"]["host"] == event["primary"]
    assert read_json(cluster, "history", "--limit", "1") == [last]
    assert read(cluster, "history", "shop").splitlines()[-1].endswith("killed by SIGKILL")
    assert "no application sho " in the_error(cli("history", *cluster.connection, "sho"), 1)


def still(value: Any) -> Any:
    """Return what was printed without what changes from one moment to the next."""
    if isinstance(value, dict):
        return {key: still(inner) for key, inner in value.items() if key != "progress_at"}
    return [still(inner) for inner in value] if isinstance(value, list) else value


def test_yaml_says_what_json_says(cluster: LocalCluster) -> None:
    """For every command that reads."""
    for words in (*READING, ("hosts",), ("leaders",), ("history",)):
        assert still(yaml.safe_load(read(cluster, *words, "-o", "yaml"))) == still(read_json(cluster, *words)), words


def test_hosts_and_leaders(cluster: LocalCluster) -> None:
    """Each host with its labels and what it was given, and who leads."""
    hosts = {host["name"]: host for host in read_json(cluster, "hosts")}
    assert list(hosts) == HOSTS
    assert (hosts["host-b"]["labels"], hosts["host-b"]["capacity"]) == ({"zone": "b"}, 7)
    assert sum(host["replicas"] for host in hosts.values()) == 7
    assert read_json(cluster, "leaders") == cluster.leaders
    assert [line.split()[0] for line in read(cluster, "leaders").splitlines()[1:]] == ["manager", "superwatchdog"]


def test_explain(cluster: LocalCluster) -> None:
    """Which part each host has, and why not more."""
    told = read_json(cluster, "explain", "wide")
    assert {each["host"] for each in told["hosts"]} == set(HOSTS)
    assert any(text.startswith("it is degraded: 3 of 4 copies") for text in told["reasons"])
    shown = read(cluster, "explain", "shop")
    primary, _ = cluster.primary("shop")
    assert [line.split()[:2] for line in shown.splitlines() if line.startswith(primary)] == [[primary, "primary"]]
    assert "no application sho " in the_error(cli("explain", *cluster.connection, "sho"), 1)


def test_status_is_shown_again_and_again(cluster: LocalCluster) -> None:
    """Without a terminal, one after the other, until it is interrupted."""
    words = command("status", *cluster.connection, "--watch", "--interval", "0.1", "shop")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=clean_environment()) as process:
        try:
            assert process.stdout is not None
            heads = [line for line in itertools.islice(process.stdout, 6) if line.startswith("NAME")]
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130
    assert len(heads) >= 2
    assert "\x1b" not in "".join(heads)


def completed(shell: str, words: list[str], **environment: str) -> list[str]:
    """Ask as a shell does, at the end of these words, what may follow."""
    line, current = " ".join(words), str(len(words) - 1) if shell != "fish" else words[-1]
    asked = {"_ETCDREPLICA_COMPLETE": f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": current, **environment}
    done = subprocess.run([ETCDREPLICA], env=clean_environment(asked), capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, "")
    return [text for text in done.stdout.splitlines() if "shop" in text or "books" in text]


def test_names_are_completed(cluster: LocalCluster, closed: str, tmp_path: Path) -> None:
    """In each shell's way, from the cluster of the flags, the environment or the file; nothing if it cannot be asked."""
    file = tmp_path / "node.toml"
    file.write_text(f'etcd = "{cluster.etcd.endpoint}"\ncluster = "{cluster.cluster}"')
    asked = ["etcdreplica", "describe", *cluster.connection]
    assert completed("bash", [*asked, "sh"]) == ["plain,shop"]
    assert completed("zsh", [*asked, "sh"]) == ["shop"]
    assert completed("fish", [*asked, "sh"]) == ["plain,shop"]
    assert completed("bash", ["etcdreplica", "remove", *cluster.connection, "shop", ""]) == ["plain,books"]
    assert completed("bash", ["etcdreplica", "pause", ""], ETCDREPLICA_CONFIG=str(file)) == ["plain,books", "plain,shop"]
    assert completed("bash", ["etcdreplica", "pause", ""], ETCDREPLICA_ETCD=closed) == []
    file.write_text("nonsense")
    assert completed("bash", ["etcdreplica", "pause", ""], ETCDREPLICA_CONFIG=str(file)) == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes(cluster: LocalCluster) -> None:
    """The script in a real bash: its function, called as for TAB."""
    script = f"""
        set -e
        PATH={ETCDREPLICA.parent}:$PATH
        source <(etcdreplica completion bash)
        COMP_WORDS=(etcdreplica describe bo); COMP_CWORD=2
        _etcdreplica_completion etcdreplica
        echo "${{COMPREPLY[@]}}"
    """
    env = clean_environment({"ETCDREPLICA_ETCD": cluster.etcd.endpoint, "ETCDREPLICA_CLUSTER": cluster.cluster})
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.stdout, done.stderr) == ("books\n", "")


def test_logs_come_from_any_host(cluster: LocalCluster) -> None:
    """What the primary has printed there, whoever asks; with --follow also what it prints from then on."""
    fails_over(cluster, "shop")
    host, _ = cluster.primary("shop")
    (said,) = read(cluster, "logs", "shop", "--tail", "1").splitlines()
    assert said.startswith(f"primary on {host} since epoch ")
    words = command("logs", *cluster.connection, "shop", "--host", host, "--tail", "1", "--follow")
    log = cluster.hosts[host].directory / "logs" / "shop.log"
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=clean_environment()) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == said
            with log.open("a") as out:
                out.write("one more\n")
            assert process.stdout.readline() == "one more\n"
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130


def test_logs_that_are_not_there(cluster: LocalCluster) -> None:
    """The error says which of application, host and output is missing, and nothing but logs can be had."""
    assert "no host host-x is up (up are: host-a, host-b, host-c)" in the_error(
        cli("logs", *cluster.connection, "shop", "--host", "host-x"), 1
    )
    assert "no application sho " in the_error(cli("logs", *cluster.connection, "sho"), 1)
    host = cluster.primary("wide")[0]
    assert f"{host} has no output of wide" in the_error(cli("logs", *cluster.connection, "wide", "--host", host), 1)
    assert "bad application name" in the_error(cli("logs", *cluster.connection, "../node", "--host", host), 1)


@pytest.mark.parametrize("words", [("status", "sho"), ("status", "shop", "sho"), ("describe", "sho")], ids=" ".join)
@pytest.mark.parametrize("form", ["table", "json"])
def test_an_unknown_name_is_answered_with_the_known_ones(cluster: LocalCluster, words: tuple[str, ...], form: str) -> None:
    """Exit code 1, and nothing on standard output that a script could take for an answer."""
    done = cli(words[0], *cluster.connection, "-o", form, *words[1:])
    error = the_error(done, 1)
    assert "no application sho " in error
    assert all(name in error for name in ("shop", "books", "wide"))
    assert done.stdout == ""


def test_an_empty_cluster(etcd_server: EmbeddedEtcd) -> None:
    """No application and no host is an answer, not an error."""
    where = ["--etcd", etcd_server.endpoint, "--cluster", unique("empty")]
    assert cli("list", *where).stdout == "no application is registered\n"
    assert cli("list", *where, "-o", "json").stdout == "[]\n"
    assert "no host is up" in cli("status", *where).stdout
    assert "none is registered" in the_error(cli("describe", *where, "shop"), 1)


@pytest.fixture(scope="module")
def silent() -> Iterator[str]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="module")
def closed() -> str:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("words", [*READING, ("remove", "shop")], ids=" ".join)
def test_etcd_that_is_not_there(closed: str, words: tuple[str, ...]) -> None:
    """One line that names the endpoint and what to do, soon, and nothing else."""
    done = cli(words[0], "--etcd", closed, *words[1:], timeout=30)
    error = the_error(done, 1)
    assert closed in error
    assert "--etcd" in error
    assert (done.stdout, done.stderr) == ("", error + "\n")


@pytest.mark.parametrize("words", [("list",), ("remove", "shop")], ids=" ".join)
def test_etcd_that_never_answers(silent: str, words: tuple[str, ...]) -> None:
    """The same as when nobody listens."""
    done = cli(words[0], "--etcd", silent, *words[1:], timeout=60)
    error = the_error(done, 1)
    assert silent in error
    assert "--etcd" in error
    assert done.stderr == error + "\n"


def test_several_endpoints_that_are_not_there(closed: str) -> None:
    """Still one line."""
    done = cli("list", "--etcd", f"{closed},127.0.0.1:1", timeout=60)
    assert done.stderr == the_error(done, 1) + "\n"


def test_one_endpoint_of_two_is_enough(cluster: LocalCluster, closed: str) -> None:
    """The answer is complete."""
    done = cli("list", "--etcd", f"{closed},{cluster.etcd.endpoint}", "--cluster", cluster.cluster)
    assert done.returncode == 0
    assert "shop" in done.stdout


@pytest.mark.parametrize("words", [*READING, ("remove", "shop"), ("node",), ("watchdog",), ("manager",)], ids=" ".join)
def test_an_endpoint_that_is_none_exits_2(words: tuple[str, ...], tmp_path: Path) -> None:
    """A URL is not HOST:PORT."""
    own = ["--state-dir", str(tmp_path), "--socket", str(tmp_path / "s")] if words[0] in ("node", "watchdog") else []
    assert "http://x" in the_error(cli(words[0], "--etcd", "http://x", *own, *words[1:]), 2)


@pytest.mark.parametrize("endpoints", ["", ",", "localhost", ":2379", "localhost:", "localhost:http"])
def test_endpoints_that_are_none_exit_2(endpoints: str) -> None:
    """What is missing is said."""
    assert "HOST:PORT" in the_error(cli("list", "--etcd", endpoints), 2)


def test_a_bad_cluster_name_exits_2(closed: str) -> None:
    """A cluster's name is part of every key."""
    assert "a/b" in the_error(cli("list", "--etcd", closed, "--cluster", "a/b"), 2)


def test_settings_by_environment(cluster: LocalCluster) -> None:
    """The connection can be given by environment instead."""
    done = cli("list", env={"ETCDREPLICA_ETCD": cluster.etcd.endpoint, "ETCDREPLICA_CLUSTER": cluster.cluster})
    assert done.returncode == 0
    assert "shop" in done.stdout


def test_tls_files_that_cannot_be_read_exit_2(closed: str, tmp_path: Path) -> None:
    """The file is named."""
    assert "nothing.pem" in the_error(cli("list", "--etcd", closed, "--etcd-ca", str(tmp_path / "nothing.pem")), 2)
    assert "key file" in the_error(cli("list", "--etcd", closed, "--etcd-cert", str(tmp_path / "cert.pem")), 2)
    assert "password" in the_error(cli("list", "--etcd", closed, "--etcd-user", "ann"), 2)
