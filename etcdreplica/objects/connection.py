"""One connection that carries messages of `wire`, and the loop that all connections of a process run in."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from etcdreplica.errors import ProtocolError, UsageError
from etcdreplica.objects.wire import Decoder, Message, frame

log = logging.getLogger(__name__)

THREAD = "etcdreplica objects"
CLOSE_S = 5.0  # for the other side to read what was sent last
HIGH_WATER = 8 << 20  # bytes that wait to be sent, from which on nothing more is taken or sent


class Connection(asyncio.Protocol):
    """Messages of one turn of the loop are sent together. `on_message(message, its bytes)`, `on_lost(why)` belong to its owner.

    While the other side does not read, `paused` is true, and nothing is read from it either if `polite`.
    """

    def __init__(self, *, polite: bool = False) -> None:
        self.on_message: Callable[[Message, bytes], None] = lambda *_: None
        self.on_lost: Callable[[str], None] = lambda _: None
        self.on_resumed: Callable[[], None] = lambda: None
        self.paused = False
        self._polite = polite
        self._resumed = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        self._decoder = Decoder()
        self._out: list[bytes] = []
        self._queued = 0
        self._why = "the other side hung up"

    @property
    def is_open(self) -> bool:
        """Whether messages can still be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, message: Message) -> None:
        """Send a message at the end of this turn of the loop; it is lost if the connection is. Raises ProtocolError."""
        if not self.is_open:
            return
        data = frame(message)
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out.append(data)
        self._queued += len(data)
        if self._queued > HIGH_WATER:
            self._flush()

    def close(self, why: str = "closed") -> None:
        """Send what is left, and hang up."""
        if self._transport is not None and self.is_open:
            self._why = why
            self._flush()
            self._transport.close()
            asyncio.get_running_loop().call_later(CLOSE_S, self._transport.abort)

    def _flush(self) -> None:
        out, self._out, self._queued = self._out, [], 0
        if out and self._transport is not None and self.is_open:
            self._transport.write(b"".join(out) if len(out) > 1 else out[0])

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=HIGH_WATER)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def data_received(self, data: bytes) -> None:
        """Take bytes. What a client has sent waits while it does not read its answers."""
        try:
            self._decoder.feed(data)
            while self.is_open and not (self._polite and self.paused) and (found := self._decoder.next()) is not None:
                self.on_message(*found)
        except ProtocolError as error:
            log.warning("a connection sent what is not the protocol: %s", error)
            self.close(str(error))

    async def drained(self) -> None:
        """Wait until the other side has read, or is gone."""
        while self.paused and self.is_open:
            self._resumed.clear()
            await self._resumed.wait()
        await asyncio.sleep(0)

    def pause_writing(self) -> None:
        """The other side does not read."""
        self.paused = True
        if self._polite and self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It has read."""
        self.paused = False
        if self._polite and self._transport is not None:
            self._transport.resume_reading()
            asyncio.get_running_loop().call_soon(self.data_received, b"")
        self._resumed.set()
        self.on_resumed()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the owner."""
        self._resumed.set()
        self.on_lost(str(exc) if exc is not None else self._why)


async def dial(address: str, timeout_s: float) -> Connection:
    """Connect to HOST:PORT. Raises OSError, TimeoutError."""
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(timeout_s):
        _, connection = await asyncio.get_running_loop().create_connection(Connection, host.strip("[]"), int(port))
    return connection


_starting = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def background_loop() -> asyncio.AbstractEventLoop:
    """Return the loop of this process in which objects live, in a thread of its own."""
    global _loop
    with _starting:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name=THREAD, daemon=True).start()
        return _loop


def refuse_to_wait_here() -> None:
    """See that this is not the thread of that loop. Raises UsageError."""
    if threading.current_thread().name == THREAD:
        raise UsageError("this would wait for itself: do not call a replicated object from a method of one")


def in_background(work: Coroutine[Any, Any, Any], timeout_s: float | None = None) -> Any:
    """Run something in that loop, and return what it returns."""
    try:
        refuse_to_wait_here()
    except UsageError:
        work.close()
        raise
    return asyncio.run_coroutine_threadsafe(work, background_loop()).result(timeout_s)
