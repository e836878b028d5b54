"""The unit file, and a real node that speaks to a socket in the place of systemd's."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from etcdreplica.cli.systemd_unit import systemd_unit_command
from etcdreplica.errors import UsageError
from etcdreplica.testing import EmbeddedEtcd
from etcdreplica.testing.processes import descendants
from tests.integration.apps_cli.cli_harness import (
    PATIENCE_S,
    STEADY,
    background,
    cli,
    command,
    eventually,
    the_error,
    unique,
)

pytestmark = pytest.mark.integration


class Heard:
    """What a socket in the abstract namespace has heard so far."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        line.settimeout(PATIENCE_S)
        self.lines: list[str] = []

    def wait(self, start: str, after: int = 0) -> int:
        """Wait for a line that starts so, not counting the first `after` ones; return how many there are up to it."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            for number, line in enumerate(self.lines[after:], after + 1):
                if line.startswith(start):
                    return number
            assert time.monotonic() < deadline, f"waited in vain for {start} after {self.lines[:after]} in {self.lines}"
            self.lines += self._line.recv(4096).decode().split("\n")


@pytest.fixture
def port() -> int:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_node_tells_systemd_what_it_does(port: int, tmp_path: Path) -> None:
    """Ready is it with its lease and not before; it gives signs of life, and says that it ends; no program can speak for it."""
    name, mark = unique("notify"), unique("systemd")
    at = {"ETCDREPLICA_SOCKET": str(tmp_path / "s"), "ETCDREPLICA_ETCD": f"127.0.0.1:{port}"}
    told = {**at, "NOTIFY_SOCKET": f"@{name}", "WATCHDOG_USEC": "600000"}
    arguments = command("node", "--host", name, "--state-dir", str(tmp_path / "state"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.bind(f"\0{name}")
        heard = Heard(line)
        with background(arguments, tmp_path / "log", env=told, mark=mark) as node:
            heard.wait("STATUS=waiting for etcd")
            heard.wait("WATCHDOG=1", heard.wait("WATCHDOG=1"))
            assert "READY=1" not in heard.lines
            with EmbeddedEtcd(port=port, data_dir=tmp_path / "etcd"):
                heard.wait("READY=1")
                heard.wait("STATUS=holding the host lease; replicas here: 0")
                application = [sys.executable, str(STEADY), "--degree", "1", "--name", name]
                with background(application, tmp_path / "app.log", env=at, mark=mark) as app:
                    heard.wait("STATUS=holding the host lease; replicas here: 1")
                    eventually(lambda: '"state": "running"' in cli("status", "-o", "json", env=at).stdout, "the body to run")
                    node.send_signal(signal.SIGHUP)
                    eventually(lambda: "took over" in (tmp_path / "log").read_text(), "the next WatchDog to take over")
                    heard.wait("WATCHDOG=1", len(heard.lines))
                    assert app.poll() is None
                    for process in (Path(f"/proc/{pid}") for pid in descendants(node.pid)):
                        if b"etcdreplica.guardian" not in (process / "cmdline").read_bytes():  # the undertaker is its fork
                            assert b"NOTIFY_SOCKET" not in (process / "environ").read_bytes()
                    node.send_signal(signal.SIGTERM)
                    heard.wait("STOPPING=1")
                    assert node.wait(PATIENCE_S) == 0
                    assert app.wait(PATIENCE_S) == 0
    assert heard.lines.count("READY=1") == 1


def test_the_unit_is_one_that_systemd_accepts(tmp_path: Path) -> None:
    """Options arrive as they were given, whatever systemd would make of their characters."""
    options = ("--etcd", "10.0.0.1:2379", "--label", 'note=50 % of $HOME "quoted" \\ done', "--insecure")
    done = cli("systemd-unit", *options)
    assert (done.returncode, done.stderr) == (0, "")
    settings = [line.split("=", 1) for line in done.stdout.splitlines() if "=" in line and not line.startswith("#")]
    assert "@" not in "".join(value for _, value in settings)
    executable, _, rest = dict(settings)["ExecStart"].partition(" ")
    assert os.access(executable, os.X_OK)
    assert rest == 'node --etcd 10.0.0.1:2379 --label "note=50 %% of $$HOME \\"quoted\\" \\\\ done" --insecure'
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine: the unit was only parsed")
    for name, words in (("root", ()), ("daemon", ("--user", "daemon"))):
        unit = tmp_path / name / "etcdreplica.service"
        unit.parent.mkdir()
        unit.write_text(cli("systemd-unit", *words, *options).stdout)
        assert ("User=daemon" in unit.read_text()) == (name == "daemon")
        checked = subprocess.run(
            ["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert (checked.returncode, checked.stderr) == (0, ""), checked.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--no-such-option",), "--no-such-option"),
        (("--capacity", "0"), "capacity"),
        (("--peer-listen", "0.0.0.0:7411"), "--insecure"),
        (("--state-dir", "here"), "the whole path"),
        (("--user", "no-such-user"), "useradd"),
        (("--label", "a=\n"), "cannot be printed"),
    ],
)
def test_a_unit_that_would_not_start_is_not_printed(words: tuple[str, ...], says: str) -> None:
    """What is wrong with the options is said now."""
    with pytest.raises((UsageError, click.UsageError)) as raised:
        systemd_unit_command.main(list(words), standalone_mode=False)
    assert says in str(raised.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="a pid namespace takes root")
def test_a_node_refuses_to_be_process_1_of_a_container() -> None:
    """There the timer of the kernel would not end it, and G1 would rest on less than is promised."""
    if subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True, timeout=PATIENCE_S, check=False).returncode:
        pytest.skip("this machine makes no pid namespaces")
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", *command("node")],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert "init" in the_error(done, 2)
