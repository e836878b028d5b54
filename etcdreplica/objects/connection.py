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
KEEPALIVE_S = 2  # the kernel asks whether the other host is there when nothing was said for so long
SILENCE_S = 6  # after which a host that acknowledges nothing counts as gone: else TCP waits twice as long each time
HIGH_WATER = 8 << 20  # bytes that wait to be sent, from which on nothing more is taken or sent


class Connection(asyncio.Protocol):
    """Messages of one turn of the loop, and all answers to what was read at once, are sent together.

    `on_message(message, its bytes)` and `on_lost(why)` belong to its owner.

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
        self._queued = 0  # bytes in it
        self._flush_comes = False
        self._why = "the other side hung up"

    @property
    def is_open(self) -> bool:
        """Whether messages can still be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, message: Message) -> None:
        """Send a message in the next turn of the loop, or by `flush`; it is lost if the connection is. Raises ProtocolError."""
        if not self.is_open:
            return
        data = frame(message)
        self._out.append(data)
        self._queued += len(data)
        if self._queued > HIGH_WATER or isinstance(self._transport, Pipe):
            self.flush()
        elif not self._flush_comes:
            self._flush_comes = True
            asyncio.get_running_loop().call_soon(self._flush_now)

    def close(self, why: str = "closed") -> None:
        """Send what is left, and hang up."""
        if self._transport is not None and self.is_open:
            self._why = why
            self.flush()
            self._transport.close()
            asyncio.get_running_loop().call_later(CLOSE_S, self._transport.abort)

    def _flush_now(self) -> None:
        self._flush_comes = False
        self.flush()

    def flush(self) -> None:
        """Send what was to be sent in the next turn."""
        out, self._out, self._queued = self._out, [], 0
        if out and self._transport is not None and self.is_open:
            self._transport.write(b"".join(out) if len(out) > 1 else out[0])

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=HIGH_WATER)
        if (sock := transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENCE_S)

    def data_received(self, data: bytes) -> None:
        """Take bytes. What a client has sent waits while it does not read its answers."""
        comes, self._flush_comes = self._flush_comes, True
        try:
            self._decoder.feed(data)
            while self.is_open and not (self._polite and self.paused) and (found := self._decoder.next()) is not None:
                self.on_message(*found)
        except ProtocolError as error:
            log.warning("a connection sent what is not the protocol: %s", error)
            self.close(str(error))
        finally:
            self._flush_comes = comes
            self.flush()

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


class Pipe(asyncio.Transport):
    """One end of a connection whose other end is in the same loop: what is written here is read there at once.

    What is written while one of the two reads, as an answer is, comes one turn later: neither is called within the other.
    """

    def __init__(self, protocol: Connection) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._protocol = protocol
        self._other = self  # until `connect`
        self._inbox: list[bytes] = []
        self._queued = 0  # bytes in it
        self._reading = True
        self._busy = False  # while its owner reads
        self._closing = False

    @classmethod
    def connect(cls, one: Connection, other: Connection) -> None:
        """Connect two."""
        ends = cls(one), cls(other)
        ends[0]._other, ends[1]._other = ends[1], ends[0]
        one.connection_made(ends[0])
        other.connection_made(ends[1])

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Hand it over."""
        other = self._other
        if self._closing or other._closing:
            return
        is_next = not other._inbox
        other._inbox.append(bytes(data))
        other._queued += len(data)
        if is_next and not self._busy and not other._busy:
            other._deliver()
        elif is_next:
            self._loop.call_soon(other._deliver)
        if other._queued > HIGH_WATER and not self._protocol.paused:
            self._protocol.pause_writing()

    def _deliver(self) -> None:
        if not self._reading or not self._inbox:
            return
        data, self._inbox, self._queued = b"".join(self._inbox), [], 0
        if self._other._protocol.paused and not self._other._closing:
            self._loop.call_soon(self._other._protocol.resume_writing)
        if not self._closing:
            self._busy = True
            try:
                self._protocol.data_received(data)
            finally:
                self._busy = False

    def pause_reading(self) -> None:
        """Take nothing for now."""
        self._reading = False

    def resume_reading(self) -> None:
        """Go on."""
        self._reading = True
        self._loop.call_soon(self._deliver)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Leave them: HIGH_WATER it is."""

    def is_closing(self) -> bool:
        """Whether this end was closed, or the other one."""
        return self._closing

    def close(self) -> None:
        """Hang up; what was written still arrives."""
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self._protocol.connection_lost, None)
            self._loop.call_soon(self._other.close)

    abort = close


here: dict[str, tuple[asyncio.AbstractEventLoop, Callable[[], Connection]]] = {}  # by address what this process serves itself


async def dial(address: str, timeout_s: float) -> Connection:
    """Connect to HOST:PORT; without the network if it is served in this loop. Raises OSError, TimeoutError."""
    loop, accept = here.get(address, (None, Connection))
    if loop is asyncio.get_running_loop():
        Pipe.connect(connection := Connection(), accept())
        return connection
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
