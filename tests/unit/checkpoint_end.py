"""The CheckpointServer's end of its socket, moved by hand; the application's end is in this process."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

from etcdreplica.app.checkpoints import Checkpoints
from etcdreplica.app.protocol import Message, checkpoint_socket
from etcdreplica.app.state import Codec
from tests.unit.watchdog_end import LIMIT_S, Connection

APP = "shop"


class ServerEnd:
    """Listens beside the socket of a WatchDog."""

    def __init__(self, directory: Path) -> None:
        self.watchdog = directory / "s"
        self.path = Path(checkpoint_socket(str(self.watchdog)))
        self.directory = directory
        self._connections: list[Connection] = []
        self.listen()

    def listen(self) -> None:
        """Be there."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._listener.settimeout(LIMIT_S)

    def vanish(self) -> None:
        """Leave no socket to connect to, and hang up on everybody."""
        self._listener.close()
        self.path.unlink()
        for connection in self._connections:
            connection.close()

    def accept(self) -> Connection:
        """Return the next connection, after its hello."""
        connection = Connection(self._listener.accept()[0])
        self._connections.append(connection)
        assert connection.expect("hello")["app"] == APP
        return connection

    def file(self, state: bytes, epoch: int = 1, sequence: int = 1, codec: str = "bytes") -> dict[str, Any]:
        """Write a checkpoint, and return what is told of it."""
        path = self.directory / f"{epoch}-{sequence}"
        path.write_bytes(b"prefix" + state)
        told = {"path": str(path), "begin": 6, "size": len(state), "codec": codec}
        return {**told, "epoch": epoch, "sequence": sequence}

    def close(self) -> None:
        """Go."""
        for connection in self._connections:
            connection.close()
        self._listener.close()


class Later:
    """A call in a thread of its own; `result` returns or raises what it did."""

    def __init__(self, call: Any, *arguments: Any, **named: Any) -> None:
        self._done: list[Any] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call, arguments, named), daemon=True)
        self._thread.start()

    def _run(self, call: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        try:
            self._done.append(call(*arguments, **named))
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        """Wait for it."""
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive(), "it does not return"
        if self._error is not None:
            raise self._error
        return self._done[0]


def handed(message: Message) -> bytes:
    """Return the state that a message hands over; the descriptor is of this very process."""
    return os.pread(int(message["fd"]), int(message["size"]) + 1, 0)


def open_memories() -> int:
    """Return how many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


def made(given: Any = "msgpack", copies: int = 2) -> Checkpoints:
    """Return the checkpoints of an application."""
    return Checkpoints(APP, Codec(given), copies)
