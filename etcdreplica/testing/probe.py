"""Makes the sample application fail and measures, phase by phase, how it is taken over.

All hosts of a `LocalCluster` are one machine and share CLOCK_BOOTTIME, which is why stamps of several of them may be
subtracted here, and nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

from attrs import frozen

import etcdreplica
from etcdreplica.clock import boottime
from etcdreplica.errors import EtcdReplicaError
from etcdreplica.model import Event, Failure
from etcdreplica.testing.cluster import LocalCluster

SAMPLE = Path(etcdreplica.__file__).parent / "testing" / "sample.py"
PHASES = ("detected", "decided", "promoted", "body")


@frozen
class Failover:
    """One measured fail-over. Phases are milliseconds, each counted from the end of the one before."""

    cause: str
    failed_host: str
    new_primary: str
    epoch: int
    phases: Mapping[str, float]
    total_ms: float


class Probe:
    """The sample application under one style on a cluster."""

    def __init__(self, cluster: LocalCluster, name: str, style: str, degree: int, *arguments: str) -> None:
        self.cluster = cluster
        self.name = name
        self.epoch = 0
        self.host = ""
        self.body_at = 0.0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        path = cluster.sockets / f"{name}.report"
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self.arguments = ("--name", name, "--style", style, "--degree", str(degree), "--report", str(path), *arguments)

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()

    def start(self) -> None:
        """Run the application by hand on the first host, and wait until it is whole."""
        self.cluster.start(SAMPLE, *self.arguments)
        self._take_report()
        self.cluster.wait_ready(self.name)

    def crash(self) -> Failover:
        """SIGKILL the primary."""
        started = boottime()
        host, _ = self.cluster.kill_replica(self.name)
        return self._measure(started, host)

    def fail(self, how: Callable[[int], None]) -> Failure:
        """Do something to the primary's process, and return how its end was reported once another one is primary."""
        host, pid = self.cluster.primary(self.name)
        before = self.epoch
        how(pid)
        self._take_report()
        return self._event(host, before).failure

    def lose_host(self, *, silently: bool = False) -> Failover:
        """SIGKILL everything on the primary's host; `silently`: as when its cable is cut, so that it refuses nothing."""
        name, _ = self.cluster.primary(self.name)
        host, started = self.cluster.hosts[name], boottime()
        host.freeze() if silently else host.kill()
        try:
            return self._measure(started, name)
        finally:
            host.kill()

    def cut_off(self, cut: Callable[[str], None]) -> Failover:
        """Have the primary's host cut off, as `cut` does with its name."""
        name, _ = self.cluster.primary(self.name)
        started = boottime()
        cut(name)
        return self._measure(started, name)

    def wait_settled(self, seconds: float) -> None:
        """Wait until the application is whole again and its body has run for so long."""
        self.cluster.wait_ready(self.name)
        time.sleep(max(0.0, self.body_at + seconds - boottime()))

    def _measure(self, started: float, failed: str) -> Failover:
        before = self.epoch
        self._take_report()
        event = self._event(failed, before)
        known = self.cluster.view.apps[self.name]
        self.cluster.wait_until(
            lambda _: (replica := known.replicas.get(self.host)) is not None and replica.epoch == self.epoch,
            f"{self.host} to show itself as primary",
        )
        replica = known.replicas[self.host]
        stamps = [started, event.failure.detected_at, replica.decided_at, replica.promoted_at, self.body_at]
        if None in stamps:
            raise EtcdReplicaError(f"{self.name}: {self.host} was started anew instead of promoted: {replica}")
        times = [stamp for stamp in stamps if stamp is not None]
        phases = {name: 1000 * (b - a) for name, (a, b) in zip(PHASES, pairwise(times), strict=True)}
        return Failover(event.failure.reason, failed, self.host, self.epoch, phases, 1000 * (times[-1] - started))

    def _event(self, failed: str, epoch: int) -> Event:
        def find() -> Event | None:
            return next(
                (
                    event
                    for (app, _), event in list(self.cluster.events.items())
                    if app == self.name and event.failure.host == failed and event.failure.epoch == epoch
                ),
                None,
            )

        self.cluster.wait_until(lambda _: find() is not None, f"the failure of {self.name} in the history")
        found = find()
        assert found is not None
        return found

    def _take_report(self, timeout: float = 60.0) -> None:
        """Wait until a body of a newer epoch says that it runs as primary."""
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                raise EtcdReplicaError(
                    f"{self.name}: no body began within {timeout:g} s after epoch {self.epoch}\n{self.cluster.describe()}"
                )
            message: dict[str, Any] = json.loads(self._socket.recv(4096))
            if message["epoch"] > self.epoch:
                self.epoch, self.host, self.body_at = message["epoch"], message["host"], message["at"]
                return

    def ask(self, timeout: float = 10.0) -> dict[str, Any]:
        """Ask the application, where it says it can be reached, who serves."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            replica = self.cluster.view.apps[self.name].replicas.get(self.host)
            with contextlib.suppress(OSError, ValueError, AttributeError):
                host, _, port = (replica.endpoint or "").rpartition(":") if replica else ("", "", "")
                with socket.create_connection((host, int(port)), timeout=1) as client:
                    answer: dict[str, Any] = json.loads(client.recv(4096))
                    if answer["role"] == "primary" and answer["epoch"] == self.epoch:
                        return answer
            time.sleep(0.005)
        raise EtcdReplicaError(f"{self.name}: nobody answers as primary of epoch {self.epoch}")
