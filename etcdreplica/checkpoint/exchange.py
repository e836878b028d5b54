"""What a CheckpointServer answers its peers (`exchange.proto`)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from etcdreplica.checkpoint import exchange_pb2 as pb
from etcdreplica.checkpoint import exchange_pb2_grpc as stubs
from etcdreplica.checkpoint.bandwidth import Bandwidth
from etcdreplica.checkpoint.format import DIGEST, Manifest, chunk_count
from etcdreplica.checkpoint.holding import Context, Holding, Source
from etcdreplica.checkpoint.logs import printed
from etcdreplica.checkpoint.peers import INLINE, OPTIONS, SERVICE, SILENCE_S, from_message, pieces, span_bytes, to_message
from etcdreplica.checkpoint.wire import Piece, encode_piece
from etcdreplica.daemon.tls import PeerTls
from etcdreplica.errors import CheckpointError, StaleEpochError, StorageError, UsageError
from etcdreplica.model import Stamp
from etcdreplica.words import check_name

MAX_SIZE = 1 << 40
LOGS_AT_ONCE = 16
HEAR_OUT_S = 2.0  # whoever is refused while still sending may miss why: gRPC tells them of a broken stream instead
_SERVER_OPTIONS = (
    *OPTIONS,
    ("grpc.so_reuseport", 0),  # a second server on the same port is an error
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
)


class ExchangeServer:
    """Answers other hosts. `holding` returns an application's part on this host, new if need be; `log_path` where it prints."""

    def __init__(
        self,
        context: Context,
        holding: Callable[[str], Holding],
        bandwidth: Bandwidth,
        tls: PeerTls,
        log_path: Callable[[str], Path],
    ) -> None:
        self._context = context
        self._holding = holding
        self._bandwidth = bandwidth
        self._tls = tls
        self._log_path = log_path
        self._logs = 0  # that are read just now
        self._server: Any = None

    async def start(self, listen: str) -> int:
        """Listen; return the port. Raises ConfigurationError when the address cannot be had."""
        self._server = grpc.aio.server(options=_SERVER_OPTIONS)
        fetch = grpc.unary_stream_rpc_method_handler(self.Fetch, pb.FetchRequest.FromString, encode_piece)
        stubs.add_ExchangeServicer_to_server(self, self._server)
        self._server.add_registered_method_handlers(SERVICE, {"Fetch": fetch})  # in the place of the generated one
        port = self._tls.bind(self._server, listen, "checkpoint")
        await self._server.start()
        return port

    async def stop(self) -> None:
        """Answer no longer."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def Offer(self, request: Any, context: Any) -> Any:  # noqa: N802  (the names in the .proto)
        """Hold a checkpoint, and answer when it is durable here."""

        async def hold(holding: Holding, manifest: Manifest) -> None:
            if holding.placement is None:  # else what was removed here would come back
                raise CheckpointError(f"{self._context.host} has no seat of {manifest.app}, or does not know of it yet")
            if manifest.size <= INLINE:
                await holding.take(manifest, request.data)
            else:
                await holding.pull(request.host, manifest)

        return await self._hold(request, hold)

    async def Put(self, requests: AsyncIterator[Any], context: Any) -> Any:  # noqa: N802
        """Hold a checkpoint that comes piece by piece, and answer when it is durable here."""
        messages = _in_time(requests)
        try:
            head = await anext(messages)
        except (StopAsyncIteration, CheckpointError):
            return pb.OfferReply(status=pb.OfferReply.FAILED, reason="nothing came")
        following = ((message.piece.first, message.piece.data) async for message in messages)
        reply = await self._hold(head, lambda holding, manifest: holding.receive(manifest, following))
        if reply.status != pb.OfferReply.HELD:
            with contextlib.suppress(TimeoutError, CheckpointError):
                async with asyncio.timeout(HEAR_OUT_S):
                    async for _ in messages:
                        pass
        return reply

    async def _hold(self, request: Any, hold: Callable[[Holding, Manifest], Awaitable[None]]) -> Any:
        manifest = from_message(request.manifest)
        try:
            check_name("application name", manifest.app)
            self._check_meant(request.to)
            if not 0 <= manifest.size <= MAX_SIZE or len(manifest.digests) != DIGEST * chunk_count(manifest.size):
                raise CheckpointError("the manifest does not fit together")
            holding = self._holding(manifest.app)
            holding.fence(request.epoch)
            await hold(holding, manifest)
            holding.fence(request.epoch)  # somebody may have begun meanwhile with what was here before
        except StaleEpochError as error:
            return pb.OfferReply(status=pb.OfferReply.STALE, reason=str(error))
        except (CheckpointError, UsageError) as error:
            return pb.OfferReply(status=pb.OfferReply.FAILED, reason=str(error))
        return pb.OfferReply(status=pb.OfferReply.HELD)

    async def Have(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Say what is here, and refuse older epochs from now on."""
        holding = await self._of(request.app, context)
        try:
            self._check_meant(request.to)
        except CheckpointError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        if request.epoch:
            try:
                holding.fence(request.epoch)
            except StaleEpochError as error:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        holds, whole = holding.holds(), request.whole
        told = [to_message(m, whole=whole or not i) for i, m in enumerate(holds.manifests)]
        return pb.HaveReply(manifests=told, lost=holds.lost)

    async def Fetch(self, request: Any, context: Any) -> AsyncIterator[Piece]:  # noqa: N802
        """Send chunks; the next piece is read while one is on its way."""
        holding = await self._of(request.app, context)
        source = self._source(holding, Stamp(request.epoch, request.sequence))
        if source is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{self._context.host} has no such checkpoint of {request.app}")
            raise AssertionError("unreachable")
        loop = asyncio.get_running_loop()
        reading: tuple[int, asyncio.Future[bytes | memoryview]] | None = None
        wanted = pieces(((r.first, r.count) for r in request.ranges), source.manifest.count)
        try:
            for first, count in wanted:
                at, length = span_bytes(source.manifest, first, count)
                before, reading = reading, (first, loop.run_in_executor(self._context.slow, source.read, at, length))
                if before is not None:
                    yield await self._piece(*before)
            if reading is not None:
                yield await self._piece(*reading)
        except OSError as error:
            await context.abort(grpc.StatusCode.DATA_LOSS, f"it cannot be read: {error.strerror}")

    async def _piece(self, first: int, reading: asyncio.Future[bytes | memoryview]) -> Piece:
        data = await reading
        await self._bandwidth.take(len(data))
        return first, data

    async def Verify(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Read everything, put aside what is damaged, and tell of each."""
        files, loop = self._context.files, asyncio.get_running_loop()
        for app in [request.app] if request.app else files.apps:
            for stored in files.all(app):
                try:
                    damage = await loop.run_in_executor(self._context.slow, files.damage, stored)
                except StorageError as error:
                    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
                    raise
                if damage and not files.put_aside(stored, damage):
                    continue  # it was deleted while it was read
                yield pb.Finding(manifest=to_message(stored.manifest, whole=False), damage=damage)

    async def Log(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Send what copies have printed here; no more is read than the other side takes."""
        if self._logs >= LOGS_AT_ONCE:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._logs} others read logs here already")
        self._logs += 1
        try:
            self._check_meant(request.to)
            path = self._log_path(check_name("application name", request.app))
            async for data in printed(path, request.lines, request.follow):
                yield pb.LogPart(data=data)
        except FileNotFoundError:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{self._context.host} has no output of {request.app}")
        except (OSError, UsageError, CheckpointError) as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{self._context.host}: {error}")
        finally:
            self._logs -= 1

    def _check_meant(self, host: str) -> None:
        """Nobody may take what is here for what another host holds."""
        if host != self._context.host:
            raise CheckpointError(f"this is {self._context.host}, and not {host}")

    async def _of(self, app: str, context: Any) -> Holding:
        try:
            return self._holding(check_name("application name", app))
        except UsageError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise

    def _source(self, holding: Holding, stamp: Stamp) -> Source | None:
        if holding.offered is not None and holding.offered.manifest.stamp == stamp:
            return holding.offered
        stored = next((s for s in self._context.files.all(holding.app) if s.manifest.stamp == stamp), None)
        try:
            return Source.of(stored) if stored is not None else None
        except OSError:
            return None


async def _in_time(messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Yield what comes. Raises CheckpointError when nothing does for too long: whoever sends holds up others."""
    while True:
        try:
            async with asyncio.timeout(SILENCE_S):
                message = await anext(messages)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise CheckpointError("nothing more came") from None
        yield message
