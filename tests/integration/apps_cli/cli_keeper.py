"""What the tests of `etcdreplica checkpoints` share: the keeper application, and looking at what is stored."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec

from etcdreplica.checkpoint.format import CHUNK, Manifest, digests
from etcdreplica.checkpoint.peers import Peers
from etcdreplica.core.view import AppView
from etcdreplica.daemon.tls import PeerTls
from etcdreplica.model import AssignmentState, Stamp
from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from etcdreplica.testing.journal import written_lines
from etcdreplica.words import Role
from tests.integration.apps_cli.cli_harness import (
    APPS,
    cli,
    eventually,
    forget,
    unique,
)

HOSTS = ["host-a", "host-b", "host-c"]
KEEPING_TTL_S = 5.0  # one test waits for its end
LARGE = 3 * (1 << 20) + 12_345  # bytes: more than travels in one message


class Keeper:
    """The keeper application under a name of its own, which stores what it is told to."""

    def __init__(self, cluster: LocalCluster, directory: Path, *arguments: str) -> None:
        self.cluster = cluster
        self.name = unique("keeper")
        self._orders, self._journal = directory / f"{self.name}.orders", directory / f"{self.name}.journal"
        self._arguments = ("--name", self.name, "--orders", str(self._orders), "--journal", str(self._journal), *arguments)

    def __enter__(self) -> Keeper:
        """Run it, and wait until it is whole and has stored a first state."""
        self._orders.write_text(json.dumps({"count": 1, "size": 10}))
        self.start()
        self.cluster.wait_ready(self.name)
        self.wait_line("stored", 1)
        return self

    def __exit__(self, *_: object) -> None:
        forget(self.cluster, self.name)

    def start(self) -> None:
        """Run it by hand on the first host."""
        self.cluster.start(APPS / "keeper.py", *self._arguments)

    def order(self, **order: Any) -> None:
        """Have it do something."""
        draft = self._orders.with_suffix(".draft")
        draft.write_text(json.dumps(order))
        draft.replace(self._orders)

    def store(self, count: int, size: int = 10) -> None:
        """Have it store a state, and wait until etcd says so."""
        self.order(count=count, size=size)
        self.wait_line("stored", count)
        size = len(msgspec.msgpack.encode({"count": count, "padding": bytes(size)}))
        self.cluster.wait_until(lambda _: self.recorded_size() == size, f"{self.name} to be recorded")

    def recorded_size(self) -> int:
        """Return how large what is recorded is."""
        checkpoint = self.app.checkpoint
        return checkpoint.size if checkpoint else 0

    @property
    def app(self) -> AppView:
        """What is known of it."""
        return self.cluster.view.apps[self.name]

    @property
    def state(self) -> AssignmentState | None:
        """What is being done with it."""
        return self.app.assignment.state if self.app.assignment else None

    def lines(self) -> list[dict[str, Any]]:
        """Return its journal."""
        return [json.loads(line) for line in written_lines(self._journal)]

    def wait_line(self, what: str, count: int, after: int = 0) -> dict[str, Any]:
        """Wait until it has noted this, in an epoch later than `after`."""

        def found() -> list[dict[str, Any]]:
            return [li for li in self.lines() if (li["what"], li["count"]) == (what, count) and li["epoch"] > after]

        eventually(found, f"{self.name} to have {what} {count}, after {self.lines()[-3:]}")
        return found()[0]

    def stop(self) -> None:
        """End its primary under a pause, and wait until that is known."""
        assert cli("pause", *self.cluster.connection, self.name).returncode == 0
        incarnation = self.app.assignment.primary.incarnation  # type: ignore[union-attr]
        self.cluster.kill_replica(self.name)
        self.cluster.wait_until(
            lambda _: incarnation in self.app.failures and all(r.role is not Role.PRIMARY for r in self.app.replicas.values()),
            f"the primary of {self.name} to be dead",
        )

    def resume(self) -> dict[str, Any]:
        """Let it go on, and return what its next primary notes first."""
        assignment = self.app.assignment
        assert assignment is not None
        assert cli("resume", *self.cluster.connection, self.name).returncode == 0
        eventually(lambda: any(line["epoch"] > assignment.epoch for line in self.lines()), f"{self.name} to restore something")
        return next(line for line in self.lines() if line["epoch"] > assignment.epoch)


@contextlib.contextmanager
def keeping(etcd: EmbeddedEtcd) -> Iterator[LocalCluster]:
    """Run three hosts with their CheckpointServers."""
    with LocalCluster(3, etcd=etcd, cluster=unique("checkpoints"), lease_ttl_s=KEEPING_TTL_S) as cluster:
        cluster.wait_until(lambda view: set(view.servers) == set(HOSTS), "the CheckpointServers")
        yield cluster


def checkpoints(cluster: LocalCluster, word: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `etcdreplica checkpoints WORD` on a cluster."""
    return cli("checkpoints", word, *cluster.connection, *arguments)


def answer(cluster: LocalCluster, word: str, *arguments: str) -> Any:
    """Run one that must succeed, and return its JSON."""
    done = checkpoints(cluster, word, *arguments, "-o", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def export_of(keeper: Keeper, file: Path) -> Path:
    """Export the newest checkpoint of an application, and return the file."""
    done = checkpoints(keeper.cluster, "export", keeper.name, str(file))
    assert done.returncode == 0, done.stderr
    return file


def listed(keeper: Keeper) -> Any:
    """Return what `list` says of an application."""
    return next(shown for shown in answer(keeper.cluster, "list") if shown["name"] == keeper.name)


def stored_on(keeper: Keeper, host: str) -> list[Path]:
    """Return the files of an application on a host, the oldest first."""
    return sorted(
        (keeper.cluster.hosts[host].directory / "checkpoints" / keeper.cluster.cluster / keeper.name).glob("*.checkpoint")
    )


def flip_a_byte(path: Path) -> None:
    """Change the last byte of a file."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def made(app: str, stamp: Stamp, data: bytes) -> tuple[Manifest, bytes]:
    """Return a checkpoint."""
    return Manifest(app, stamp, "msgpack", len(data), digests(data)), data


def put(cluster: LocalCluster, host: str, manifest: Manifest, data: bytes, *, at: int = 0, epoch: int = 0) -> None:
    """Send a host a checkpoint, in pieces of two chunks, the first of which says that it is chunk `at`."""

    async def pieces() -> AsyncIterator[tuple[int, bytes]]:
        for begin in range(0, len(data), 2 * CHUNK):
            yield at + begin // CHUNK, data[begin : begin + 2 * CHUNK]

    async def work() -> None:
        peers = Peers(PeerTls())
        try:
            await peers.put(host, cluster.view.servers[host].address, epoch or manifest.stamp.epoch, manifest, pieces())
        finally:
            await peers.close()

    asyncio.run(work())
