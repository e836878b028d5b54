"""What is shipped: the wheel and the sdist, the image of compose/ and its compose file."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from etcdreplica import __version__
from etcdreplica.cli.daemons import node_command
from etcdreplica.cli.options import node_settings
from etcdreplica.store import EtcdOptions

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "compose"
PATIENCE_S = 240.0
DATA = ("py.typed", "daemon/peer.proto", "checkpoint/exchange.proto", "systemd/etcdreplica.service")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed; return what it says."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_what_is_built_can_be_installed_from_the_files_that_the_image_gets(tmp_path: Path) -> None:
    """The steps of the Dockerfile in a clean environment; and a wheel and an sdist with all that belongs to the package."""
    source = tmp_path / "src"
    for sources, target in re.findall(r"^COPY (.+) (\S+)$", (COMPOSE / "Dockerfile").read_text(), re.MULTILINE):
        for name in sources.split():
            if target == "./":
                source.mkdir(exist_ok=True)
                shutil.copy(ROOT / name, source)
            else:
                shutil.copytree(ROOT / name, source / target, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "hatchling", "build", "-d", tmp_path, "-t", "wheel", cwd=source)
    run(sys.executable, "-m", "hatchling", "build", "-d", tmp_path, "-t", "sdist", cwd=ROOT)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    assert {f"etcdreplica/{name}" for name in DATA} <= set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {*(f"etcdreplica/{name}" for name in DATA), "docs/tutorial.md", "compose/compose.yaml", "Makefile"} <= packed
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    pip = (sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "--disable-pip-version-check")
    installed = subprocess.run(
        [*pip, "install", "--quiet", wheel], capture_output=True, text=True, timeout=PATIENCE_S, check=False, cwd=tmp_path
    )
    if "No matching distribution" in installed.stderr:
        pytest.skip(f"no package index can be reached: {installed.stderr.splitlines()[-1]}")
    assert installed.returncode == 0, installed.stderr
    assert run(venv / "bin" / "etcdreplica", "--version", cwd=tmp_path).strip().endswith(__version__)
    assert f"ExecStart={venv}/bin/etcdreplica node" in run(venv / "bin" / "etcdreplica", "systemd-unit", cwd=tmp_path)
    assert "demo" in run(venv / "bin" / "etcdreplica", "--help", cwd=tmp_path)


@pytest.fixture
def compose() -> dict[str, Any]:
    """The compose file, as YAML says it."""
    loaded = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def test_compose_file_is_one(compose: dict[str, Any]) -> None:
    """Docker's own check, where its compose plugin is; every volume and network that is used is declared."""
    for service in compose["services"].values():
        assert {volume.partition(":")[0] for volume in service["volumes"]} <= set(compose["volumes"])
        assert set(service["networks"]) <= set(compose["networks"])
        assert set(service.get("depends_on", ())) <= set(compose["services"])
        assert re.fullmatch(r".*:(v\d+\.\d+\.\d+|local)", service["image"]), "an image is pinned, or made here"
    if shutil.which("docker") is None or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        pytest.skip("no docker compose on this machine: the file was only parsed")
    run("docker", "compose", "-f", "compose/compose.yaml", "config", "--quiet", cwd=ROOT)


def test_compose_members_of_etcd_know_each_other(compose: dict[str, Any]) -> None:
    """Each is among the initial ones under its name, at where it says that it is."""
    members = {name: service for name, service in compose["services"].items() if name.startswith("etcd")}
    assert len(members) == 3
    for name, service in members.items():
        told = service["environment"]
        assert (told["ETCD_NAME"], told["ETCD_ADVERTISE_CLIENT_URLS"]) == (name, f"http://{name}:2379")
        assert told["ETCD_INITIAL_CLUSTER"] == ",".join(f"{each}=http://{each}:2380" for each in members)
        assert told["ETCD_INITIAL_ADVERTISE_PEER_URLS"] == f"http://{name}:2380"


def test_compose_nodes_are_told_what_they_understand(compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that come of their environment are those of three hosts that reach etcd and each other."""
    nodes = {name: service for name, service in compose["services"].items() if name.startswith("node")}
    assert len(nodes) == 3
    known = {option.envvar for option in node_command.params}
    for name, service in nodes.items():
        assert service["init"] is True, "a node refuses to be process 1"
        assert service["hostname"] == name
        assert set(service["environment"]) <= known
        for variable, value in service["environment"].items():
            monkeypatch.setenv(variable, value)
        with node_command.make_context("node", ["--host", name]) as context:
            settings = node_settings(**context.params)
        assert settings.insecure
        assert settings.etcd == EtcdOptions(("etcd-1:2379", "etcd-2:2379", "etcd-3:2379"), timeout_s=settings.etcd.timeout_s)
        assert {service["volumes"][0].partition(":")[2]} == {"/var/lib/etcdreplica"}
    assert service["build"] == {"context": "..", "dockerfile": "compose/Dockerfile"}
    base = re.search(r"^FROM (\S+)$", (COMPOSE / "Dockerfile").read_text(), re.MULTILINE)
    assert base is not None
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?", base[1]), "the base is pinned"
