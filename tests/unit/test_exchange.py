"""What a CheckpointServer answers to an offer; no network, the request is handed to it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from attrs import define

from etcdreplica.checkpoint import exchange_pb2 as pb
from etcdreplica.checkpoint.bandwidth import Bandwidth
from etcdreplica.checkpoint.exchange import ExchangeServer
from etcdreplica.checkpoint.format import Manifest, digests
from etcdreplica.checkpoint.peers import to_message
from etcdreplica.daemon.tls import PeerTls
from etcdreplica.errors import StaleEpochError, StorageError
from etcdreplica.model import Stamp


@define
class Holding:
    """Stores nothing, but knows epochs. `newer`: the epoch that asks what is here while an offer is written."""

    epoch: int = 0
    newer: int = 0
    full: bool = False
    taken: bytes | None = None
    placement: object = "a seat"

    def fence(self, epoch: int) -> None:
        """Refuse older ones."""
        if epoch < self.epoch:
            raise StaleEpochError(f"epoch {epoch} is over")
        self.epoch = epoch

    async def take(self, manifest: Manifest, data: bytes) -> None:
        """Write, during which anything may happen."""
        if self.full:
            raise StorageError("the disk is full")
        self.taken = data
        self.epoch = max(self.epoch, self.newer)


def server_of(holding: Holding) -> ExchangeServer:
    """Return the server of host-b."""
    context: Any = SimpleNamespace(host="host-b")
    found: Any = holding
    return ExchangeServer(context, lambda _: found, Bandwidth(0, lambda: 0.0), PeerTls(), Path)


def offer(data: bytes = b"state", *, to: str = "host-b", epoch: int = 5, **changes: Any) -> Any:
    """Return an offer of host-a."""
    message = to_message(Manifest("shop", Stamp(5, 1), "bytes", len(data), digests(data)))
    for name, value in changes.items():
        setattr(message, name, value)
    return pb.OfferRequest(host="host-a", to=to, epoch=epoch, manifest=message, data=data)


async def test_offer_is_held() -> None:
    """It is answered when it is stored."""
    holding = Holding()
    reply = await server_of(holding).Offer(offer(), None)
    assert reply.status == pb.OfferReply.HELD
    assert (holding.taken, holding.epoch) == (b"state", 5)


async def test_offer_of_an_older_epoch() -> None:
    """It is not even looked at."""
    holding = Holding(epoch=6)
    reply = await server_of(holding).Offer(offer(), None)
    assert (reply.status, reply.reason) == (pb.OfferReply.STALE, "epoch 5 is over")
    assert holding.taken is None


async def test_offer_during_which_a_newer_primary_asks() -> None:
    """That one was not told of this checkpoint, so it must not be acknowledged by the old one."""
    reply = await server_of(Holding(newer=6)).Offer(offer(), None)
    assert reply.status == pb.OfferReply.STALE


@pytest.mark.parametrize("to", ["", "host-c"])
async def test_offer_that_was_meant_for_another_host(to: str) -> None:
    """Its address belongs to this one by now: it may not count as held there."""
    holding = Holding()
    reply = await server_of(holding).Offer(offer(to=to), None)
    assert reply.status == pb.OfferReply.FAILED
    assert "this is host-b" in reply.reason
    assert holding.taken is None


@pytest.mark.parametrize(
    "changes", [{"size": -1}, {"size": 1 << 50}, {"size": 1 << 20}, {"digests": b"x"}, {"app": "../x"}, {"app": ""}]
)
async def test_offer_that_does_not_fit_together(changes: dict[str, Any]) -> None:
    """It comes from the network."""
    holding = Holding()
    reply = await server_of(holding).Offer(offer(**changes), None)
    assert reply.status == pb.OfferReply.FAILED
    assert holding.taken is None


async def test_full_disk_is_told() -> None:
    """Whoever offers can say why not enough hosts hold it."""
    reply = await server_of(Holding(full=True)).Offer(offer(), None)
    assert (reply.status, reply.reason) == (pb.OfferReply.FAILED, "the disk is full")
