"""Whatever is killed while states are stored: what was acknowledged is there afterwards, and only whole states come back.

A short series here; CHECKPOINT_ROUNDS=200 for a long one, CHECKPOINT_SEED to repeat one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from etcdreplica.errors import EtcdReplicaError
from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from etcdreplica.testing.journal import written_lines

pytestmark = [pytest.mark.integration, pytest.mark.timeout(3600)]
KEEPER = Path(__file__).parent / "apps" / "keeper.py"
ROUNDS = int(os.environ.get("CHECKPOINT_ROUNDS", "12"))
SEED = int(os.environ.get("CHECKPOINT_SEED", str(random.SystemRandom().randrange(1 << 32))))
NODES_EVERY = 6  # a killed host costs the TTL


class Journal:
    """What the application has told."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def lines(self, what: str | None = None) -> list[dict[str, Any]]:
        """Return its lines of one kind, in order."""
        lines = [json.loads(line) for line in written_lines(self._path)]
        return [line for line in lines if what in (None, line["what"])]

    def wait(self, what: str, more_than: int, cluster: LocalCluster) -> None:
        """Wait for one more line of a kind."""
        deadline = time.monotonic() + 90
        while len(self.lines(what)) <= more_than:
            if time.monotonic() > deadline:
                raise EtcdReplicaError(f"no more than {more_than} lines of {what}: {self.lines()[-5:]}\n{cluster.describe()}")
            time.sleep(0.005)  # a file raises no event here

    def check(self) -> None:
        """Nothing acknowledged is lost, everything that came back is whole and was really made."""
        acknowledged, made, epoch = 0, {0}, 0
        for line in self.lines():
            number = line["number"]
            if line["what"] == "restored":
                assert line["epoch"] > epoch, line
                assert line["whole"], line
                assert number in made, line
                assert number >= acknowledged, f"acknowledged {acknowledged}, restored {line}"
                epoch = line["epoch"]
            elif line["what"] == "trying":
                made.add(number)
            elif line["what"] == "acknowledged":
                assert line["epoch"] == epoch, line
                acknowledged = max(acknowledged, number)


@pytest.fixture
def cluster(etcd_server: EmbeddedEtcd) -> Iterator[LocalCluster]:
    """Three hosts of a test alone: whole hosts are killed."""
    with LocalCluster(3, etcd=etcd_server, cluster=f"faults-{time.monotonic_ns()}") as cluster:
        yield cluster


@pytest.mark.parametrize("style", ["warm", "cold"])
def test_kills_at_random_moments(cluster: LocalCluster, tmp_path: Path, style: str) -> None:
    """The application, the CheckpointServer beside it or that of another host, or the whole host of the primary."""
    print(f"CHECKPOINT_SEED={SEED}")
    chance, journal = random.Random(SEED), Journal(tmp_path / "journal")
    name = f"keeper-{style}"
    cluster.start(KEEPER, "--name", name, "--style", style, "--journal", str(tmp_path / "journal"))
    cluster.wait_ready(name)
    for number in range(ROUNDS):
        journal.wait("acknowledged", len(journal.lines("acknowledged")), cluster)
        time.sleep(chance.random() * 0.05)  # the moment of the kill
        restored = len(journal.lines("restored"))
        host = cluster.primary(name)[0]
        if number % NODES_EVERY == NODES_EVERY - 1:
            cluster.hosts[host].kill()
            journal.wait("restored", restored, cluster)
            cluster.restart(host)
        elif chance.random() < 0.5:
            cluster.kill_replica(name)
            journal.wait("restored", restored, cluster)
        else:
            victim = chance.choice(sorted(cluster.servers))
            with contextlib.suppress(ProcessLookupError):
                os.kill(cluster.servers[victim].pid, signal.SIGKILL)
        journal.check()
    journal.wait("acknowledged", len(journal.lines("acknowledged")), cluster)
    cluster.wait_ready(name)
    restored = len(journal.lines("restored"))
    cluster.kill_replica(name)
    journal.wait("restored", restored, cluster)
    journal.check()
    assert len(journal.lines("acknowledged")) > ROUNDS // 2
    cluster.remove(name)
