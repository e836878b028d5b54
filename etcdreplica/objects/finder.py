"""Finds the copies of an object through the local node, and keeps a connection to each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from etcdreplica.app.protocol import VERSION as LOCAL_VERSION
from etcdreplica.app.protocol import Decoder, encode
from etcdreplica.errors import ProtocolError
from etcdreplica.objects.connection import Connection, dial
from etcdreplica.objects.copies import Copy, copies_of
from etcdreplica.objects.wire import VERSION, Hello, Message

DIAL_S = 2.0
REDIAL_S = (0.01, 0.5)


class Finder:
    """Searches from its making on, in the running loop.

    `on_message(connection, message)` and `on_lost(connection)` are its owner's; the latter returns whether the connection was
    of any use. `on_trouble(why)` is told why none can be reached.
    """

    def __init__(
        self,
        app: str,
        socket_path: str,
        on_message: Callable[[Connection, Message], None],
        on_lost: Callable[[Connection], bool],
        on_trouble: Callable[[str], None],
    ) -> None:
        self._app = app
        self._socket = socket_path
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_trouble = on_trouble
        self._connections: dict[str, Connection] = {}  # by address
        self._dialing: dict[str, asyncio.Task[None]] = {}
        self._locating = asyncio.get_running_loop().create_task(self._locate())

    def close(self) -> None:
        """Search no longer, and hang up."""
        for task in (self._locating, *self._dialing.values()):
            task.cancel()
        for connection in list(self._connections.values()):
            connection.close()

    async def _locate(self) -> None:
        """Learn from the local node which copies there are."""
        delay = REDIAL_S[0]
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(self._socket)
            except OSError as error:
                self._on_trouble(f"no WatchDog listens on {self._socket} ({error.strerror or error})")
            else:
                try:
                    writer.write(encode("hello", version=LOCAL_VERSION, client=self._app))
                    decoder = Decoder()
                    while data := await reader.read(65536):
                        for message in decoder.feed(data):
                            delay = REDIAL_S[0]
                            if message["type"] == "replicas":
                                self._see(copies_of(message))
                            elif message["type"] == "error":
                                self._on_trouble(str(message.get("message")))
                except (OSError, ProtocolError) as error:
                    self._on_trouble(f"the WatchDog of this host went away ({error})")
                finally:
                    writer.close()
            await asyncio.sleep(delay)
            delay = min(REDIAL_S[1], 2 * delay)

    def _see(self, copies: list[Copy]) -> None:
        there = {copy.serves for copy in copies if copy.serves}
        if not there:
            self._on_trouble(f"{self._app} has no copy that answers")
        for address in self._dialing.keys() - there:
            self._dialing.pop(address).cancel()
        for address in there - self._dialing.keys():
            self._dialing[address] = asyncio.get_running_loop().create_task(self._keep(address))

    async def _keep(self, address: str) -> None:
        """Keep a connection to a copy, for as long as it is there."""
        delay = REDIAL_S[0]
        while True:
            lost = asyncio.get_running_loop().create_future()
            try:
                connection = await dial(address, DIAL_S)
            except (OSError, TimeoutError) as error:
                self._on_trouble(f"{address} does not answer ({error})")
            else:
                connection.on_message = lambda message, _, c=connection: self._on_message(c, message)  # type: ignore[misc]
                connection.on_lost = lambda why, f=lost: None if f.done() else f.set_result(why)  # type: ignore[misc]
                self._connections[address] = connection
                connection.send(Hello(VERSION, self._app))
                try:
                    await lost
                finally:
                    self._connections.pop(address, None)
                    connection.close()
                    if self._on_lost(connection):
                        delay = REDIAL_S[0]
            await asyncio.sleep(delay)
            delay = min(REDIAL_S[1], 2 * delay)
