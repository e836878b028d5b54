"""Every command that README.md and docs/ show is run: here, by another test, or, for a reason that stands here, only parsed.

docs/tutorial.md has a test of its own. `tests/unit/test_docs.py` checks names, options and values of all of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from tests.integration.apps_cli.cli_harness import PATIENCE_S, clean_environment, eventually, unique
from tests.integration.conftest import LASTING_TTL_S
from tests.pages import PAGES, ROOT, blocks, commands

pytestmark = pytest.mark.integration

# What is run below, on three hosts with the application of the tutorial, whose name stands for NAME.
HERE = (
    r"etcdreplica (list|status|describe|pause|resume|remove)( NAME| counter| -o json| --etcd 10\S+)?",
    r"etcdreplica checkpoints (list|inspect|verify)",
    r"etcdreplica checkpoints export",
    r"etcdreplica checkpoints import",
    r"etcdreplica node --help",
    r"etcdctl --endpoints=10.0.0.11:2379 snapshot save etcd.snapshot",
    r"openssl (req|x509) .*",
    r"printf .* > host.ext",
    r"etcdreplica systemd-unit --user (NAME|shop .*)",
)
ELSEWHERE = {  # the files of the tests that run them
    r"pip install 'etcdreplica\[embedded\]'": "integration/test_tutorial.py",
    r"etcdreplica dev": "integration/test_cli_dev.py",
    r"etcdreplica node": "integration/test_systemd.py",
    r"python3? (app|ledger)\.py|python PROGRAM ARGUMENTS": "integration/test_objects_examples.py",
    r"etcdreplica start --detach (shop.worker:main|/opt/shop/app.py)": "integration/test_cli_start.py",
    r"etcdreplica bench (failover|scale)( --apps .*)?": "integration/test_cli_demo.py",
    r"make demo": "integration/test_cli_demo.py",
    r"etcdreplica accept-etcd( .*)?": "integration/test_etcd_replaced.py",
    r"make docs": "unit/test_docs.py",
    r"make proto": "unit/test_proto.py",
    r"make lab|.*make lab|LAB_OUT=.*|.* tests/lab/test_series.py": "lab/test_series.py",
    r"python -m tests.lab.figures 30": "lab/test_figures.py",
    r"make simulation.*|.venv/bin/pytest tests/simulation": "simulation/test_simulation.py",
    r"/opt/etcdreplica/bin/pip install etcdreplica|python3 -m venv /opt/etcdreplica": "integration/test_packaging.py",
    r"etcdreplica (history|hosts|leaders|status --watch|describe shop)( .*)?": "integration/test_cli_show.py",
    r"etcdreplica resume shop": "integration/test_pause.py",
    r"etcdreplica start app.py": "integration/test_cli_start.py",
    r"etcdreplica COMMAND --help": "integration/test_cli_help.py",
    r"etcdreplica protect .*": "integration/test_programs.py",
    r"etcdreplica (apply|diff|export)( .*)?": "integration/test_cli_applications.py",
    r"etcdreplica config .*": "unit/test_config.py",
    r"etcdreplica doctor( .*)?": "integration/test_doctor.py",
    r"etcdreplica explain .*": "unit/test_explain.py",
    r"etcdreplica logs .*": "unit/test_logs.py",
    r"etcdreplica (switchover|failover|drain|undrain|scale|stop)( .*)?": "integration/test_moves.py",
    r"etcdreplica checkpoints import other counter.checkpoint --force": "integration/test_cli_checkpoints_import.py",
}
NOT_RUN = {
    r"make (test|lint|integration)": "it runs this, or before this",
    r"make matrix": "it is the unit tests again, once for each Python",
    r"etcdreplica bench .*|python tests/benchmarks/\w+\.py": "measures for minutes; `make bench`",
    r"etcdreplica node --etcd 10\..*": "binds an address of a host that is not there",
    r"docker compose .*": "needs Docker; test_packaging.py checks file and image as far as that goes without",
    r"(nft|apt-get|useradd|install|ln) .*|/opt/etcdreplica/bin/pip install --upgrade etcdreplica": "changes the machine",
    r"systemctl .*": "needs systemd as process 1, and root",
    r"etcdctl .*endpoint status.*|etcdutl .*": "needs three hosts with etcd",
    r"export ETCDREPLICA_SOCKET=.*": "sets a variable",
}
OWN_TEST = ("docs/tutorial.md", "docs/cli.md")  # the latter: examples of `--help`, with hosts and files of nobody; parsed

READ = """
etcdreplica list
etcdreplica status
etcdreplica status -o json
etcdreplica status --etcd 10.0.0.11:2379,10.0.0.12:2379,10.0.0.13:2379
etcdreplica describe NAME
etcdreplica checkpoints list
etcdreplica checkpoints inspect NAME
etcdreplica checkpoints verify NAME
etcdreplica node --help
"""


def backup() -> list[str]:
    """Return the lines of docs/backup.md that are run here."""
    lines = [shown.text for shown in commands(ROOT / "docs/backup.md") if shown.whole]
    return [line for line in lines if not line.startswith(("etcdutl", "etcdreplica accept-etcd"))]


def installation() -> list[str]:
    """Return those of docs/install.md."""
    lines = [shown.text for shown in commands(ROOT / "docs/install.md") if shown.whole]
    return [line for line in lines if line.startswith(("openssl", "printf", "etcdreplica systemd-unit"))]


class Reader:
    """Somebody who does what the pages say, on a host of a cluster, in a directory of their own."""

    def __init__(self, cluster: LocalCluster, directory: Path) -> None:
        self.cluster = cluster
        self.directory = directory
        told = {"ETCDREPLICA_ETCD": cluster.etcd.endpoint, "ETCDREPLICA_CLUSTER": cluster.cluster}
        socket = cluster.hosts["host-a"].environment["ETCDREPLICA_SOCKET"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._environment = clean_environment({**told, "ETCDREPLICA_SOCKET": socket, "PATH": path})

    def type(self, line: str) -> str:
        """Type a line, with the hosts and names that are here; it must succeed."""
        line = re.sub(r"10\.0\.0\.11:2379(,10\.0\.0\.1\d:2379)*", self.cluster.etcd.endpoint, line).replace("NAME", "counter")
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.directory,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def reader(etcd_server: EmbeddedEtcd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """One on three hosts, with the program of the tutorial at work."""
    with LocalCluster(3, etcd=etcd_server, cluster=unique("docs"), lease_ttl_s=LASTING_TTL_S) as cluster:
        program = next(block for block in blocks(ROOT / "docs/tutorial.md") if block.title == "counter.py")
        directory = tmp_path_factory.mktemp("reader")
        (directory / "counter.py").write_text(program.text)
        reader = Reader(cluster, directory)
        reader.type("etcdreplica start --detach counter.py")
        cluster.wait_ready("counter")
        eventually((directory / "counter.txt").exists, "the first checkpoint")
        yield reader


def test_the_example_of_compose(reader: Reader) -> None:
    """It counts, and each number is durable on two hosts."""
    shutil.copy(ROOT / "compose/example.py", reader.directory)
    reader.type("etcdreplica start --detach example.py")
    reader.cluster.wait_ready("example")
    host, _ = reader.cluster.primary("example")
    log = reader.cluster.hosts[host].directory / "logs" / "example.log"
    eventually(lambda: f"3 by {host}" in log.read_text(), "it to count")
    assert f"{host} begins at 0, epoch " in log.read_text()


def count(reader: Reader) -> int:
    """Return how far the application is."""
    while not (line := (reader.directory / "counter.txt").read_text()).endswith("\n"):
        continue  # it is being written
    return int(line.partition(" ")[0])


def wait_count(reader: Reader, least: int) -> None:
    """Wait until it has come so far."""
    eventually(lambda: count(reader) >= least, f"the count to reach {least}")


def wait_ended(reader: Reader, host: str) -> None:
    """Wait until nothing of it runs on a host any more."""
    reader.cluster.wait_until(lambda view: host not in view.apps["counter"].replicas, "the primary to end")


def test_commands_that_look_and_the_backup(reader: Reader) -> None:
    """All that only look; then docs/backup.md, line by line: the state that was exported is the one that is gone on from."""
    for line in READ.strip().splitlines():
        assert reader.type(line)
    for line in backup():
        if line.startswith("etcdctl") and shutil.which("etcdctl") is None:
            continue
        host = reader.cluster.primary("counter")[0] if line.startswith("kill") else ""
        if line.startswith("etcdreplica checkpoints export"):
            exported_by = count(reader)
        elif line.startswith("etcdreplica resume"):
            imported = json.loads(reader.type("etcdreplica checkpoints export counter --json -"))["count"]
            assert exported_by <= imported < count(reader)
        reader.type(line)
        if line.startswith("etcdreplica checkpoints export"):
            wait_count(reader, count(reader) + 20)
        elif host:
            wait_ended(reader, host)
    reader.cluster.wait_ready("counter")
    reader.type("etcdreplica remove NAME")
    assert "counter" not in reader.type("etcdreplica list").split()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_certificates_and_the_unit_of_the_installation(tmp_path: Path) -> None:
    """What docs/install.md makes with openssl is what the unit that it prints takes."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for line in installation():
        line = line.replace("/etc/systemd/system", str(tmp_path)).replace("/etc/etcdreplica", str(tmp_path))
        line = line.replace("--user shop", "--user daemon")
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env=clean_environment({"PATH": path}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    subprocess.run(["openssl", "verify", "-CAfile", "ca.pem", "-verify_ip", "10.0.0.11", "host.pem"], cwd=tmp_path, check=True)
    assert "User=daemon" in (tmp_path / "etcdreplica.service").read_text()


def rule(text: str) -> str:
    """Return the rule that a command falls under; "" if there is none."""
    return next((rule for rule in (*ELSEWHERE, *NOT_RUN, *HERE) if re.fullmatch(rule, text)), "")


def test_every_command_is_accounted_for() -> None:
    """One that falls under no rule above is shown to readers, and run by nobody."""
    run = [*READ.strip().splitlines(), *backup(), *installation(), "etcdreplica remove NAME"]
    shown = [shown for page in PAGES for shown in commands(page) if shown.page not in OWN_TEST]
    assert [str(each) for each in shown if not rule(each.text) and each.text not in run] == []
    assert [each for each in HERE if not any(re.match(each, line) for line in run)] == [], "said to be run here, and is not"
    assert [test for test in ELSEWHERE.values() if not (ROOT / "tests" / test).exists()] == []
    used = {rule(each.text) for each in shown}
    assert [each for each in (*HERE, *ELSEWHERE, *NOT_RUN) if each not in used] == [], "rules for what no page shows"
