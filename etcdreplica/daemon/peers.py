"""How WatchDogs of different hosts talk: each answers pings, pings another one for whoever asks it to, and vouches.

An answer names the host and its session, so that neither another host at the same address nor a later stay of the same
host can speak for the one that was asked. Without TLS `NodeSettings` refuses to listen beyond this machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import grpc
from attrs import frozen

from etcdreplica.daemon import peer_pb2 as pb
from etcdreplica.daemon import peer_pb2_grpc as stubs
from etcdreplica.daemon.addresses import advertised
from etcdreplica.daemon.settings import NodeSettings
from etcdreplica.daemon.tls import PeerTls

MAX_VIA_S = 10.0
CHANNELS_KEPT = 512
_SERVER_OPTIONS = (("grpc.so_reuseport", 0),)  # a second daemon on the same port is an error
# A host that was away is reached again soon after it is back; the second is how long one attempt to connect may take.
_CLIENT_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
)


@frozen
class Answer:
    """Who answered."""

    host: str
    session: int


class PeerServer:
    """Answers other hosts. `session` says which stay of this host it is, 0 for none; `vouch` whether it vouches for a primary.

    `client` asks them.
    """

    def __init__(self, settings: NodeSettings, session: Callable[[], int], vouch: Callable[[str, int], bool]) -> None:
        self.address = ""  # what other hosts are told, once started
        self._settings = settings
        self._session = session
        self._vouch = vouch
        self._server: Any = None
        self.client = PeerClient(settings.peer_tls)

    async def start(self) -> None:
        """Listen. Raises ConfigurationError when the address cannot be had."""
        listen = self._settings.peer_listen
        self._server = grpc.aio.server(options=_SERVER_OPTIONS)
        stubs.add_PeerServicer_to_server(self, self._server)
        port = self._settings.peer_tls.bind(self._server, listen, "peer")
        await self._server.start()
        self.address = advertised(listen, port, self._settings.address)

    async def stop(self) -> None:
        """Answer no longer."""
        await self.client.close()
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def Ping(self, request: Any, context: Any) -> Any:  # noqa: N802  (the name in the .proto)
        """Say who is here."""
        return pb.PingReply(host=self._settings.host, session=self._session())

    async def PingVia(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Try to reach another host for the one that asks."""
        answer = await self.client.ping(request.address, min(request.within_ms / 1000, MAX_VIA_S))
        return pb.PingViaReply(reached=pb.PingReply(host=answer.host, session=answer.session) if answer else None)

    async def Vouch(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Promise, for primaries of other hosts, that no copy here begins to lead for a while."""
        return pb.VouchReply(host=self._settings.host, promised=[a for a, e in request.epochs.items() if self._vouch(a, e)])


class PeerClient:
    """Pings other hosts. Connections are kept; close it in the loop that used it."""

    def __init__(self, tls: PeerTls | None = None) -> None:
        self._tls = tls or PeerTls()
        self._channels: dict[str, Any] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Close all connections; pings under way fail."""
        channels, self._channels = list(self._channels.values()), {}
        for channel in channels:
            await channel.close()

    async def ping(self, address: str, within_s: float) -> Answer | None:
        """Return who answered at an address, or None."""
        reply = await self._call(address, "Ping", pb.PingRequest(), within_s)
        return Answer(reply.host, reply.session) if reply is not None else None

    async def ping_via(self, helper: str, address: str, within_s: float, patience_s: float) -> tuple[bool, Answer | None]:
        """Have a helper ping an address; return whether the helper answered, and whom it reached."""
        request = pb.PingViaRequest(address=address, within_ms=int(within_s * 1000))
        reply = await self._call(helper, "PingVia", request, patience_s)
        if reply is None or not reply.HasField("reached"):
            return reply is not None, None
        return True, Answer(reply.reached.host, reply.reached.session)

    async def vouch(self, host: str, address: str, epochs: Mapping[str, int], within_s: float) -> frozenset[str]:
        """Ask a host to vouch for primaries, given with their epochs; return those for which it does."""
        reply = await self._call(address, "Vouch", pb.VouchRequest(epochs=epochs), within_s) if address else None
        return frozenset(reply.promised) if reply is not None and reply.host == host else frozenset()

    async def is_refused(self, address: str, within_s: float) -> bool:
        """Whether nobody listens there, on a machine that can be reached."""
        host, _, port = address.rpartition(":")
        try:
            async with asyncio.timeout(within_s):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            writer.transport.abort()
        except ConnectionRefusedError:
            return True
        except (OSError, ValueError):
            pass  # it says nothing, or cannot be reached
        return False

    def forget(self, address: str) -> None:
        """Connect anew before the next ping: an old connection to a host that is back can stay silent for long."""
        channel = self._channels.pop(address, None)
        if channel is not None:
            closing = asyncio.create_task(channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _call(self, address: str, method: str, request: Any, timeout_s: float) -> Any:
        channel = self._channels.get(address)
        if channel is None:
            if len(self._channels) >= CHANNELS_KEPT:
                self.forget(next(iter(self._channels)))
            channel = self._channels[address] = self._tls.channel(address, _CLIENT_OPTIONS)
        try:
            return await getattr(stubs.PeerStub(channel), method)(request, timeout=timeout_s, wait_for_ready=True)
        except grpc.aio.AioRpcError:
            return None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return None  # its connection was closed
