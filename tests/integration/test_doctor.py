"""`doctor` on an etcd that is well, and on what is broken on purpose."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aetcd.rpc import rpc_pb2 as rpc
from click.testing import CliRunner

from etcdreplica.cli import cli
from etcdreplica.cli.checks import Finding, Subject, Verdict, ok
from etcdreplica.cli.checks_etcd import judged
from etcdreplica.cli.doctor import examine
from etcdreplica.daemon.settings import NodeSettings
from etcdreplica.store import EtcdOptions, Store
from etcdreplica.testing import EmbeddedEtcd
from tests.integration.apps_cli.cli_harness import unique

pytestmark = pytest.mark.integration
CLEAN: dict[str, str | None] = {"ETCDREPLICA_ETCD": None, "ETCDREPLICA_CLUSTER": None, "ETCDREPLICA_CONFIG": None}


def doctor(directory: Path, *words: str) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """Return the exit code and what was found, by check."""
    own = ["--state-dir", str(directory), "--socket", str(directory / "s"), "--cluster", unique("doctor")]
    outcome = CliRunner().invoke(cli, ["doctor", "-o", "json", *own, *words], env=CLEAN)
    assert outcome.exit_code in (0, 1), outcome.output
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(outcome.stdout):
        found.setdefault(finding["check"], []).append(finding)
    return outcome.exit_code, found


def worst(findings: list[dict[str, Any]]) -> str:
    """Return the text of what has failed, and see that it says what to do."""
    (found,) = (finding for finding in findings if finding["verdict"] == "failed")
    assert found["advice"]
    return str(found["what"])


def test_all_is_well(etcd_server: EmbeddedEtcd, tmp_path: Path) -> None:
    """Nothing fails, every check has something to say, and each says it in the table too."""
    code, found = doctor(tmp_path, "--etcd", etcd_server.endpoint)
    assert code == 0
    verdicts = {check: {finding["verdict"] for finding in findings} for check, findings in found.items()}
    assert {"etcd endpoints", "etcd latency", "etcd alarms", "kernel", "disk", "ports", "versions of nodes"} <= set(verdicts)
    assert not [check for check, said in verdicts.items() if "failed" in said]
    assert {"ok"} == verdicts["etcd alarms"] == verdicts["kernel"] == verdicts["versions of nodes"] == verdicts["python"]
    words = ["doctor", "--etcd", etcd_server.endpoint, "--state-dir", str(tmp_path), "--socket", str(tmp_path / "s")]
    printed = CliRunner().invoke(cli, words, env=CLEAN)
    assert printed.exit_code == 0
    assert all(check in printed.stdout for check in found)


def test_etcd_cannot_be_reached(etcd_server: EmbeddedEtcd, tmp_path: Path) -> None:
    """Which endpoint; the rest is looked at with the other one, or not at all if there is none."""
    code, found = doctor(tmp_path, "--etcd", f"127.0.0.1:1,{etcd_server.endpoint}")
    assert code == 1
    assert "127.0.0.1:1 does not answer" in worst(found["etcd endpoints"])
    assert {finding["verdict"] for finding in found["etcd latency"]} <= {"ok", "warning"}
    code, found = doctor(tmp_path, "--etcd", "127.0.0.1:1")
    assert code == 1
    for check in ("etcd version", "etcd latency", "etcd alarms", "etcd space", "etcd compaction", "versions of nodes"):
        assert [finding["verdict"] for finding in found[check]] == ["not checked"]


def test_etcd_has_no_space(tmp_path: Path) -> None:
    """The alarm fails, and what cannot be measured then is said not to be."""

    async def alarm(endpoint: str) -> None:
        async with Store(EtcdOptions((endpoint,), timeout_s=10.0), "default") as store:
            await store.channel.call("Maintenance.Alarm", rpc.AlarmRequest(action=1, alarm=rpc.NOSPACE))

    with EmbeddedEtcd() as etcd:
        asyncio.run(alarm(etcd.endpoint))
        code, found = doctor(tmp_path, "--etcd", etcd.endpoint)
    assert code == 1
    assert worst(found["etcd alarms"]) == "NOSPACE is raised"
    assert [finding["verdict"] for finding in found["etcd latency"]] == ["not checked"]


def test_host_is_not_fit(etcd_server: EmbeddedEtcd, tmp_path: Path) -> None:
    """A directory in which nobody can write, and a port that somebody else has."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        code, found = doctor(tmp_path, "--etcd", etcd_server.endpoint, "--state-dir", "/proc/none", "--peer-listen", listen)
    assert code == 1
    assert "cannot write to the state directory /proc/none" in worst(found["directories"])
    assert f"peer-listen {listen} cannot be had" in worst(found["ports"])


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[str]]:
    """Make a certificate that is valid for so many days from now."""
    directory = tmp_path_factory.mktemp("certificates")
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")

    def make(days: int) -> list[str]:
        cert, key = directory / f"{days}.pem", directory / f"{days}.key"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        command += ["-subj", "/CN=x", "-days", str(max(1, days)), "-keyout", str(key), "-out", str(cert)]
        subprocess.run(command, check=True, capture_output=True)
        if days < 0:  # no openssl makes one that has expired, and nobody looks at the signature of a CA
            der = ssl.PEM_cert_to_DER_cert(cert.read_text())
            *_, last = re.finditer(rb"\x17\x0d\d{12}Z", der)
            cert.write_text(ssl.DER_cert_to_PEM_cert(der.replace(last.group(), b"\x17\x0d200101000000Z")))
        return ["--peer-ca", str(cert), "--peer-cert", str(cert), "--peer-key", str(key)]

    return make


@pytest.mark.parametrize(
    ("days", "verdict", "text"),
    [(-2, "failed", "expired"), (5, "warning", "valid for 5 days"), (90, "ok", "valid for 90 days")],
)
def test_certificates(tmp_path: Path, pem: Callable[[int], list[str]], days: int, verdict: str, text: str) -> None:
    """How long they last."""
    _, found = doctor(tmp_path, "--etcd", "127.0.0.1:1", *pem(days))
    assert {finding["verdict"] for finding in found["certificates"]} == {verdict}
    assert all(text in finding["what"] for finding in found["certificates"])


@pytest.mark.parametrize(
    ("version", "verdict"),
    [
        ("3.3.27", "failed"),
        *((bad, "warning") for bad in ("3.4.23", "3.5.1", "3.5.14")),
        ("3.5.15", "ok"),
        ("3.6.0-rc.1", "ok"),
    ],
)
def test_versions_of_etcd(version: str, verdict: str) -> None:
    """Which are known to be bad."""
    assert judged(version).verdict == verdict


async def test_one_check_that_hangs_or_breaks_does_not_keep_the_others(tmp_path: Path) -> None:
    """It is told of under its name; those that are well say so."""
    held = threading.Event()

    def hangs(_: Subject) -> list[Finding]:
        held.wait()
        return []

    async def hangs_too(_: Subject) -> list[Finding]:
        await asyncio.Event().wait()
        return []

    def breaks(_: Subject) -> list[Finding]:
        raise RuntimeError("a bug")

    def works(_: Subject) -> list[Finding]:
        return [ok("fine")]

    subject = Subject(NodeSettings(host="a", socket_path=tmp_path / "s"))
    try:
        found = await examine((hangs, hangs_too, breaks, works), subject, 0.5)
    finally:
        held.set()
    assert [(finding.check, finding.verdict) for finding in found] == [
        ("hangs", Verdict.FAILED),
        ("hangs too", Verdict.FAILED),
        ("breaks", Verdict.NOT_CHECKED),
        ("works", Verdict.OK),
    ]
