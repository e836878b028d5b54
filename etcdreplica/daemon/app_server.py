"""The WatchDog's Unix socket, where the application processes of this host report.

Only processes of this WatchDog's user (or root) are admitted. A connection that sends anything but the protocol, or says
nothing, is closed; that harms no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etcdreplica.app.protocol import VERSION, Decoder, Message, encode
from etcdreplica.daemon.state_file import take_lock
from etcdreplica.errors import ConfigurationError, ProtocolError

log = logging.getLogger(__name__)

HELLO_S = 5.0
MAX_CONNECTIONS = 2048
_UCRED = struct.Struct("iII")


class AppConnection(asyncio.Protocol):
    """One process. `on_message` and `on_closed` belong to whoever took charge of it after hello."""

    def __init__(self, server: AppServer) -> None:
        self._server = server
        self._decoder = Decoder()
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self.pid = 0
        self.uid = -1
        self.on_message: Callable[[Message], None] | None = None
        self.on_closed: Callable[[], None] = lambda: None

    @property
    def is_open(self) -> bool:
        """Whether messages can still be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, kind: str, **fields: Any) -> None:
        """Send one message; lost if the process is gone, which its pidfd tells."""
        if self._transport is not None and self.is_open:
            self._transport.write(encode(kind, **fields))

    def refuse(self, message: str) -> None:
        """Say why, and hang up."""
        self.send("error", message=message)
        if self._transport:
            self._transport.close()

    def drop(self) -> None:
        """Hang up, without a word."""
        self.on_message = _nothing_yet
        if self._transport:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Check who it is."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        peer = transport.get_extra_info("socket")
        self.pid, self.uid, _ = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if self.uid not in (0, os.geteuid()):
            self.refuse(f"user {self.uid} may not use this WatchDog, which runs as user {os.geteuid()}")
        elif len(self._server.connections) >= MAX_CONNECTIONS:
            self.refuse(f"this WatchDog has {MAX_CONNECTIONS} connections already")
        else:
            self._server.connections.add(self)
            self._deadline = asyncio.get_running_loop().call_later(HELLO_S, self.refuse, "no hello in time")

    def data_received(self, data: bytes) -> None:
        """Take bytes."""
        try:
            for message in self._decoder.feed(data):
                self._take(message)
        except (ProtocolError, KeyError, TypeError, ValueError) as error:
            log.warning("process %d sent what is not the protocol: %s", self.pid, error)
            self.refuse(f"not the protocol: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever is in charge."""
        if self._deadline:
            self._deadline.cancel()
        self._server.connections.discard(self)
        self.on_closed()

    def _take(self, message: Message) -> None:
        if self.on_message is not None:
            self.on_message(message)
            return
        if self._deadline is None or message["type"] != "hello":
            raise ProtocolError("the first message must be hello")
        if message.get("version") != VERSION:
            raise ProtocolError(f"this WatchDog speaks version {VERSION}, not {message.get('version')!r}")
        self._deadline.cancel()
        self.on_message = _nothing_yet
        self._server.on_hello(self, message)


_SAID_AGAIN = frozenset(
    {"leaving", "done", "failed", "advertise", "health", "running", "page", "notice", "serves", "members", "change"}
)


def _nothing_yet(message: Message) -> None:
    """Before its welcome a process may say what it says again after it; nothing else."""
    if message["type"] not in _SAID_AGAIN:
        raise ProtocolError(f"unexpected {message['type']} before welcome")


OnHello = Callable[[AppConnection, Message], None]


class AppServer:
    """Listens on the socket. `on_hello(connection, message)` takes charge of each process."""

    def __init__(self, path: Path, on_hello: OnHello) -> None:
        self._path = path
        self.on_hello = on_hello
        self.connections: set[AppConnection] = set()
        self._server: asyncio.Server | None = None
        self._lock: int | None = None

    async def start(self) -> None:
        """Listen. Raises ConfigurationError when the place is not ours or another WatchDog listens there."""
        directory = self._path.parent
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = directory.stat()
            if found.st_uid not in (0, os.geteuid()) or (found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX):
                raise ConfigurationError(f"the socket directory {directory} can be written by others: choose another --socket")
            self._lock = take_lock(Path(f"{self._path}.lock"))
            self._path.unlink(missing_ok=True)
            loop = asyncio.get_running_loop()
            self._server = await loop.create_unix_server(lambda: AppConnection(self), str(self._path), backlog=512)
            self._path.chmod(0o600)
        except BlockingIOError:
            raise ConfigurationError(f"another WatchDog listens on {self._path}: give this one another --socket") from None
        except OSError as error:
            raise ConfigurationError(f"cannot listen on {self._path}: {error.strerror or error}") from None

    async def close(self) -> None:
        """Hang up on everybody and take the socket away."""
        if self._server:
            self._server.close()
        for connection in list(self.connections):
            if connection._transport:
                connection._transport.close()
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)  # the lock file stays: removing it would let two hold "the" lock
            os.close(self._lock)
