"""An etcd cluster of several members, each on a host of its own."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from etcdreplica.app.kernel import set_precedence
from etcdreplica.errors import EtcdReplicaError
from etcdreplica.guardian.wards import URGENT_NICE
from etcdreplica.testing.etcd import find_etcd
from etcdreplica.testing.processes import spawn_bound
from tests.lab.network import Network

PATIENCE_S = 60.0


class EtcdCluster:
    """Members on these hosts of a network. `endpoint` names all of them."""

    process: subprocess.Popen[bytes] | None = None  # there are several

    def __init__(self, network: Network, hosts: tuple[str, ...], directory: Path) -> None:
        programs = find_etcd()
        self.program = programs.get("path") or programs["wheel"]
        self.members = hosts
        self.directory = directory
        self._network = network
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def endpoint(self) -> str:
        """HOST:PORT,..."""
        return ",".join(f"{self._network.address_of(member)}:2379" for member in self.members)

    def start(self) -> None:
        """Start all members that do not run, and return when they answer."""
        self.revive()
        self.wait_healthy()

    def revive(self) -> None:
        """Start all members that do not run."""
        for member in self.members:
            if not self.is_running(member):
                self._spawn(member)

    def stop(self) -> None:
        """Kill all of them and remove their data."""
        self.kill(*self.members)
        shutil.rmtree(self.directory, ignore_errors=True)

    def is_running(self, member: str) -> bool:
        """Whether it runs."""
        process = self._processes.get(member)
        return process is not None and process.poll() is None

    def kill(self, *members: str) -> None:
        """SIGKILL members, leaving their data."""
        for member in members:
            if process := self._processes.get(member):
                process.kill()
                process.wait()

    def signal(self, member: str, number: signal.Signals) -> None:
        """Send a signal to a member that runs."""
        if self.is_running(member):
            os.kill(self._processes[member].pid, number)

    def put_aside(self) -> Path:
        """Have all of them, dead as they are, begin with empty disks; return where their data are."""
        kept = self.directory / "kept"
        kept.mkdir()
        for member in self.members:
            self.data(member).rename(kept / member)
        return kept

    def bring_back(self, kept: Path) -> None:
        """Have all of them, dead as they are, begin with what was put aside."""
        for member in self.members:
            shutil.rmtree(self.data(member), ignore_errors=True)
            (kept / member).rename(self.data(member))
        kept.rmdir()

    def data(self, member: str) -> Path:
        """Where a member has its data."""
        return self.directory / f"{member}.data"

    def leader(self) -> str:
        """Return who leads. Raises EtcdReplicaError when nobody does."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for member in self.members:
                if (status := self._status(member)) and status["leader"] == status["header"]["member_id"]:
                    return member
            time.sleep(0.05)  # etcd does not tell
        raise EtcdReplicaError("no member of etcd leads")

    def wait_healthy(self) -> None:
        """Wait until every member that runs knows a leader."""
        deadline = time.monotonic() + PATIENCE_S
        for member in filter(self.is_running, self.members):
            while int((self._status(member) or {}).get("leader", 0)) == 0:
                if time.monotonic() > deadline:
                    log = (self.directory / f"{member}.log").read_text(errors="replace")[-1000:]
                    raise EtcdReplicaError(f"{member} does not come up:\n{log}")
                time.sleep(0.02)  # etcd does not tell

    def all_keys(self) -> list[str]:
        """Return every key."""
        everything = base64.b64encode(b"\0").decode()
        answer = self._ask(self.leader(), "kv/range", {"key": everything, "range_end": everything, "keys_only": True})
        return [base64.b64decode(entry["key"]).decode() for entry in answer.get("kvs", [])]

    def all_leases(self) -> list[str]:
        """Return every lease."""
        return [lease["ID"] for lease in self._ask(self.leader(), "lease/leases", {}).get("leases", [])]

    def _status(self, member: str) -> dict[str, Any] | None:
        try:
            return self._ask(member, "maintenance/status", {})
        except (OSError, ValueError):
            return None

    def _ask(self, member: str, what: str, request: dict[str, Any]) -> dict[str, Any]:
        url = f"http://{self._network.address_of(member)}:2379/v3/{what}"
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(request).encode()), timeout=1) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def _spawn(self, member: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        peers = {each: f"http://{self._network.address_of(each)}:2380" for each in self.members}
        client = f"http://{self._network.address_of(member)}:2379"
        command = [self.program, "--name", member, "--data-dir", str(self.data(member)), "--logger", "zap"]
        command += ["--listen-client-urls", client, "--advertise-client-urls", client, "--log-level", "warn"]
        command += ["--listen-peer-urls", peers[member], "--initial-advertise-peer-urls", peers[member]]
        command += ["--initial-cluster", ",".join(f"{each}={url}" for each, url in peers.items())]
        command += ["--initial-cluster-token", self._network.tag]
        command += ["--pre-vote"]  # else a member that was cut off deposes the leader when it is back
        log = self.directory / f"{member}.log"
        self._processes[member] = spawn_bound([*self._network.prefix(member), *command], log=log)
        set_precedence(URGENT_NICE, self._processes[member].pid)  # real ones have machines of their own
