"""The way to other CheckpointServers: offer a checkpoint, ask what they hold, fetch one.

Every call is bounded. That of a large offer is long: its other side is watched by pings as well, so that a host that is stopped
or cut off fails it within `PING_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import grpc
from attrs import frozen

from etcdreplica.checkpoint import exchange_pb2 as pb
from etcdreplica.checkpoint import exchange_pb2_grpc as stubs
from etcdreplica.checkpoint.format import CHUNK, Manifest
from etcdreplica.checkpoint.wire import Piece, decode_piece
from etcdreplica.core.holders import NOTHING
from etcdreplica.daemon.tls import PeerTls
from etcdreplica.errors import CheckpointError, ConfigurationError, RefusedError, StaleEpochError
from etcdreplica.model import Stamp

SERVICE = "etcdreplica.checkpoint.v1.Exchange"
FETCH = f"/{SERVICE}/Fetch"
INLINE = 256 << 10  # bytes: a state up to this size travels with its offer
PIECE = 16  # chunks in one message: 1 MiB
SMALL_S = 2.0  # for an offer with its state
LARGE_S, SLOWEST = 30.0, 1 << 20  # for another one: so long, and for each byte; a disk that hangs answers pings
PING_S = 5.0
SILENCE_S = 15.0  # a transfer of which nothing has come for so long has failed; the bandwidth may be limited
OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
)
_CLIENT_OPTIONS = (
    *OPTIONS,
    ("grpc.keepalive_time_ms", int(1000 * PING_S / 2)),
    ("grpc.keepalive_timeout_ms", int(1000 * PING_S / 2)),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
)


def to_message(manifest: Manifest, *, whole: bool = True) -> Any:
    """Return a manifest as it travels; without its digests if not `whole`."""
    return pb.Manifest(
        app=manifest.app,
        epoch=manifest.stamp.epoch,
        sequence=manifest.stamp.sequence,
        codec=manifest.codec,
        size=manifest.size,
        digests=manifest.digests if whole else b"",
        wall=manifest.wall,
    )


def from_message(message: Any) -> Manifest:
    """Return the manifest that has come."""
    stamp = Stamp(message.epoch, message.sequence)
    return Manifest(message.app, stamp, message.codec, message.size, message.digests, message.wall)


@frozen
class Holds:
    """What a host holds of an application, the newest first, and whether it has lost a newer one."""

    manifests: tuple[Manifest, ...] = ()
    lost: bool = False

    @property
    def stamp(self) -> Stamp:
        """Which its newest one is."""
        return self.manifests[0].stamp if self.manifests else NOTHING


class Peers:
    """Connections to other hosts' CheckpointServers, by address. Close it in the loop that used it."""

    def __init__(self, tls: PeerTls) -> None:
        self._tls = tls
        self._channels: dict[str, Any] = {}

    async def close(self) -> None:
        """Close all connections; calls under way fail."""
        channels, self._channels = list(self._channels.values()), {}
        for channel in channels:
            await channel.close()

    async def forget(self, address: str) -> None:
        """A server has left this address."""
        channel = self._channels.pop(address, None)
        if channel is not None:
            await channel.close()

    async def offer(self, host: str, address: str, me: str, epoch: int, manifest: Manifest, data: bytes | None) -> None:
        """Have a peer hold a checkpoint; return when it does durably. Raises StaleEpochError, CheckpointError."""
        request = pb.OfferRequest(host=me, epoch=epoch, manifest=to_message(manifest), data=data or b"", to=host)
        with _translated(address):
            limit_s = SMALL_S if data is not None else LARGE_S + manifest.size / SLOWEST
            reply = await self._stub(address).Offer(request, timeout=limit_s)
        _check(reply)

    async def put(self, host: str, address: str, epoch: int, manifest: Manifest, data: AsyncIterator[Piece]) -> None:
        """Send a peer a checkpoint to hold, in order; return when it does durably. Raises StaleEpochError, CheckpointError."""
        with _translated(address):
            call = self._stub(address).Put()
            try:
                await call.write(pb.PutRequest(manifest=to_message(manifest), epoch=epoch, to=host))
                async for first, piece in data:
                    async with asyncio.timeout(SILENCE_S):
                        await call.write(pb.PutRequest(piece=pb.Piece(first=first, data=piece)))
                await call.done_writing()
            except asyncio.InvalidStateError:
                pass  # it has answered already
            except TimeoutError:
                raise CheckpointError(f"{address} stopped receiving") from None
            except BaseException:
                call.cancel()
                raise
            _check(await call)

    async def have(self, host: str, address: str, app: str, epoch: int, timeout_s: float, *, whole: bool = False) -> Holds:
        """Return what a peer holds of an application, and have it refuse older epochs from now on. Raises CheckpointError.

        Only the newest manifest has its digests, unless those of all are wanted (`whole`).
        """
        with _translated(address):
            request = pb.HaveRequest(app=app, epoch=epoch, whole=whole, to=host)
            reply = await self._stub(address).Have(request, timeout=timeout_s)
        return Holds(tuple(from_message(message) for message in reply.manifests), reply.lost)

    async def fetch(self, address: str, manifest: Manifest, chunks: Sequence[int]) -> AsyncGenerator[Piece, None]:
        """Yield chunks of a checkpoint as (number of the first, their bytes). Raises CheckpointError."""
        stamp = manifest.stamp
        ranges = [pb.Range(first=first, count=count) for first, count in spans(chunks)]
        request = pb.FetchRequest(app=manifest.app, epoch=stamp.epoch, sequence=stamp.sequence, ranges=ranges)
        with _translated(address):
            fetch = self._channel(address).unary_stream(
                FETCH, request_serializer=pb.FetchRequest.SerializeToString, response_deserializer=decode_piece
            )
            call = fetch(request)
            try:
                while True:
                    async with asyncio.timeout(SILENCE_S):
                        piece = await call.read()
                    if piece is grpc.aio.EOF:
                        return
                    yield piece
            except TimeoutError:
                raise CheckpointError(f"{address} stopped sending") from None
            finally:
                call.cancel()

    async def verify(self, address: str, app: str) -> AsyncIterator[tuple[Manifest, str]]:
        """Yield each checkpoint that a peer holds, and what is wrong with it. Raises CheckpointError."""
        with _translated(address):
            async for finding in self._stub(address).Verify(pb.VerifyRequest(app=app)):
                yield from_message(finding.manifest), finding.damage

    async def log(self, host: str, address: str, app: str, lines: int, *, follow: bool) -> AsyncGenerator[bytes, None]:
        """Yield what copies have printed on a host. Raises RefusedError when there is nothing, CheckpointError."""
        with _translated(address):
            call = self._stub(address).Log(pb.LogRequest(app=app, lines=lines, follow=follow, to=host))
            try:
                while True:
                    async with asyncio.timeout(None if follow else SILENCE_S):
                        part = await call.read()
                    if part is grpc.aio.EOF:
                        return
                    yield part.data
            except TimeoutError:
                raise CheckpointError(f"{address} stopped sending") from None
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    raise RefusedError(error.details()) from None
                raise
            finally:
                call.cancel()

    def _stub(self, address: str) -> Any:
        return stubs.ExchangeStub(self._channel(address))

    def _channel(self, address: str) -> Any:
        if address not in self._channels:
            self._channels[address] = self._tls.channel(address, _CLIENT_OPTIONS)
        return self._channels[address]


def spans(chunks: Iterable[int]) -> list[tuple[int, int]]:
    """Return runs of numbers as (first, how many)."""
    ordered = sorted(chunks)
    if not ordered:
        return []
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(ordered)) if b != a + 1), len(ordered)]
    return [(ordered[a], b - a) for a, b in pairwise(starts)]


def pieces(ranges: Iterable[tuple[int, int]], count: int) -> Iterable[tuple[int, int]]:
    """Cut runs of chunks into what one message carries; whatever is not among `count` chunks is left out."""
    for first, many in ranges:
        end = min(first + many, count)
        for at in range(max(0, first), end, PIECE):
            yield at, min(PIECE, end - at)


def span_bytes(manifest: Manifest, first: int, count: int) -> tuple[int, int]:
    """Return where a run of chunks begins in the state, and its length in bytes."""
    begin = CHUNK * first
    return begin, min(CHUNK * count, manifest.size - begin)


def _check(reply: Any) -> None:
    """Raise what a peer has answered instead of holding a checkpoint."""
    if reply.status == pb.OfferReply.STALE:
        raise StaleEpochError(reply.reason)
    if reply.status != pb.OfferReply.HELD:
        raise CheckpointError(reply.reason)


@contextlib.contextmanager
def _translated(address: str) -> Iterator[None]:
    """Turn gRPC's errors into ours."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise CheckpointError(f"{address}: {error.code().name.lower()}: {error.details()}") from None
    except ConfigurationError as error:  # a certificate that is just being replaced
        raise CheckpointError(str(error)) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or not task.cancelling():
            raise CheckpointError(f"{address}: the connection was closed") from None
        raise
