"""Telling the application of `testing.stateful` what to do."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from etcdreplica.clock import boottime
from etcdreplica.errors import EtcdReplicaError
from etcdreplica.testing.cluster import LocalCluster

PROGRAM = Path(__file__).with_name("stateful.py")
_numbers = itertools.count()


class Stateful:
    """The application of `testing.stateful` on a cluster."""

    def __init__(
        self, cluster: LocalCluster, degree: int, style: str = "warm", *arguments: str, host: str | None = None
    ) -> None:
        self.name = f"stateful-{next(_numbers)}"
        self._cluster = cluster
        self._directory = Path(tempfile.mkdtemp(prefix="er-", dir=cluster.sockets))
        named = ("--name", self.name, "--degree", str(degree), "--style", style, "--directory", str(self._directory))
        cluster.start(PROGRAM, *named, *arguments, host=host)
        self.epoch = cluster.wait_ready(self.name)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have the primary of this epoch do something."""
        path, deadline = str(self._directory / f"{self.epoch}.sock"), time.monotonic() + 60
        while True:
            with socket.socket(socket.AF_UNIX) as client:
                try:
                    client.connect(path)
                except OSError:
                    if time.monotonic() > deadline:
                        raise EtcdReplicaError(f"{self.name}: nobody listens\n{self._cluster.describe()}") from None
                    time.sleep(0.005)  # the body is about to begin
                    continue
                with client.makefile("rwb") as stream:
                    stream.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
                    stream.flush()
                    answer: dict[str, Any] = json.loads(stream.readline() or "{}")
                    return answer

    def crash(self) -> float:
        """SIGKILL the primary, and wait for the next one; return when it was."""
        _, pid = self._cluster.primary(self.name)
        at = boottime()
        os.kill(pid, signal.SIGKILL)
        self.wait_replaced()
        return at

    def wait_replaced(self) -> None:
        """Wait until there is a whole new reign."""
        self.epoch = self._cluster.wait_ready(self.name, after_epoch=self.epoch, timeout=120)
