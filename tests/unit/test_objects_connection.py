"""Connections of objects: over a socket and within one process they are the same to their owners."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from etcdreplica.objects.connection import Connection, dial, here
from etcdreplica.objects.wire import Ack, Message, Part


class End:
    """One side, and what it has seen."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.messages: list[Message] = []
        self.lost: list[str] = []
        self.changed = asyncio.Event()
        connection.on_message = lambda message, _: self._see(self.messages, message)
        connection.on_lost = lambda why: self._see(self.lost, why)

    def _see(self, seen: list[Any], what: Any) -> None:
        seen.append(what)
        self.changed.set()

    async def sees(self, messages: int = 0, lost: int = 0) -> None:
        """Wait for so many."""
        async with asyncio.timeout(30):
            while len(self.messages) < messages or len(self.lost) < lost:
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture(params=["socket", "process"])
async def ends(request: pytest.FixtureRequest) -> AsyncIterator[tuple[End, End]]:
    """The side that dialed, and the polite one that was dialed."""
    loop, accepted = asyncio.get_running_loop(), asyncio.Queue[End]()

    def accept() -> Connection:
        connection = Connection(polite=True)
        accepted.put_nowait(End(connection))
        return connection

    server = await loop.create_server(accept, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    if request.param == "process":
        here[address] = loop, accept
    client = End(await dial(address, 5))
    yield client, await accepted.get()
    here.clear()
    client.connection.close()
    server.close()
    await server.wait_closed()


async def test_messages_arrive_in_order(ends: tuple[End, End]) -> None:
    """In both directions at once."""
    for number in range(100):
        for end in ends:
            end.connection.send(Ack(1, number))
        if number % 7 == 0:
            await asyncio.sleep(0)
    for end in ends:
        await end.sees(100)
        assert end.messages == [Ack(1, number) for number in range(100)]


@pytest.mark.parametrize("closing", [0, 1])
async def test_what_was_sent_before_the_end_arrives(ends: tuple[End, End], closing: int) -> None:
    """Both sides learn of the end once, and send no more."""
    one, other = ends[closing], ends[1 - closing]
    for number in range(3):
        one.connection.send(Ack(1, number))
    one.connection.close("enough")
    one.connection.close("again")
    await other.sees(3, 1)
    await one.sees(0, 1)
    assert one.lost == ["enough"]
    assert len(other.lost) == 1
    for end in ends:
        assert not end.connection.is_open
        end.connection.send(Ack(1, 4))
    await asyncio.sleep(0)
    assert len(other.messages) == 3


async def test_bad_bytes_end_it(ends: tuple[End, End]) -> None:
    """Garbage is answered by the end of the connection."""
    client, server = ends
    assert client.connection._transport is not None
    client.connection._transport.write(b"\xff" * 100)
    await client.sees(lost=1)
    await server.sees(lost=1)
    assert not server.messages


async def test_a_side_that_does_not_read(ends: tuple[End, End]) -> None:
    """The other one is told to pause, takes nothing itself meanwhile, and goes on afterwards; nothing is lost."""
    client, server = ends
    transport = client.connection._transport
    assert transport is not None
    transport.pause_reading()
    count, data = 40, bytes(1 << 20)
    for number in range(count):
        server.connection.send(Part(1, number, 0, data))
    await asyncio.sleep(0.01)
    assert server.connection.paused
    client.connection.send(Ack(1, 1))
    await asyncio.sleep(0.01)
    assert not server.messages
    transport.resume_reading()
    await client.sees(count)
    await server.sees(1)
    assert [message.at for message in client.messages if isinstance(message, Part)] == list(range(count))
    async with asyncio.timeout(30):
        await server.connection.drained()


async def test_another_loop_takes_the_socket() -> None:
    """What is served in one loop is not handed over to another one."""
    here["127.0.0.1:1"] = asyncio.new_event_loop(), Connection
    with pytest.raises(ConnectionRefusedError):
        await dial("127.0.0.1:1", 5)
    here.pop("127.0.0.1:1")[0].close()
