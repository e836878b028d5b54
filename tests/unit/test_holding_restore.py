"""Restoring on a host: nothing here, another host holds the newest; the files are real, etcd and the peer are not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from attrs import define

from etcdreplica.checkpoint.files import Files
from etcdreplica.checkpoint.format import Manifest, digests
from etcdreplica.checkpoint.holding import Context, Holding
from etcdreplica.checkpoint.peers import Holds
from etcdreplica.checkpoint.wire import Piece
from etcdreplica.clock import boottime
from etcdreplica.core.holders import NOTHING
from etcdreplica.errors import StaleEpochError
from etcdreplica.model import Checkpoint, Placement, Server, Stamp
from etcdreplica.store import Entry, Key
from etcdreplica.words import Role

DATA = b"state"
STORED = Manifest("shop", Stamp(1, 1), "bytes", len(DATA), digests(DATA))


class Etcd:
    """Says that host-a is the only holder."""

    async def get(self, key: Key) -> Entry:
        """Return the record."""
        return Entry(key, Checkpoint(1, 1, "", len(DATA), ("host-a",)), 1)


@define
class HostA:
    """Holds it. While the state is on its way, host-b may learn of another placement (`placed`)."""

    asking: Holding | None = None
    placed: Placement | None = None

    async def have(self, host: str, address: str, app: str, epoch: int, timeout_s: float) -> Holds:
        """Say so."""
        return Holds((STORED,))

    async def fetch(self, address: str, manifest: Manifest, missing: list[int]) -> AsyncIterator[Piece]:
        """Send it."""
        if self.asking is not None and self.placed is not None:
            self.asking.placement = self.placed
        yield 0, DATA


@pytest.fixture
def peer() -> HostA:
    """Return host-a."""
    return HostA()


@pytest.fixture
def holding(tmp_path: Path, peer: HostA) -> Iterator[Holding]:
    """Return the part of host-b, which is primary of epoch 2."""
    files = Files(tmp_path / "checkpoints", 3)
    files.scan()
    etcd: Any = Etcd()
    peers: Any = peer
    with ThreadPoolExecutor(1) as threads:
        context = Context("host-b", etcd, files, peers, boottime, threads, threads, {"host-a": Server("a:1", 1)})
        peer.asking = holding = Holding(context, "shop")
        holding.placement = Placement(Role.PRIMARY, 2, 1, 1)
        yield holding


async def test_newest_is_fetched(holding: Holding) -> None:
    """From the host that holds it; it is here then."""
    found = await holding.restore(2, NOTHING, boottime() + 30)
    assert found is not None
    assert found.manifest.stamp == holding.stamp == Stamp(1, 1)


async def test_primary_that_was_replaced_meanwhile(holding: Holding, peer: HostA) -> None:
    """It is not given what its successor may have replaced by now; a copy that only reads is."""
    peer.placed = Placement(Role.BACKUP, 3, 2, 1)
    with pytest.raises(StaleEpochError, match="epoch 2 is over: host-b knows of 3"):
        await holding.restore(2, NOTHING, boottime() + 30)
    assert await holding.restore(0, NOTHING, boottime() + 30) is not None
