"""A blocking connection from an application process to the WatchDog of its host."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
from collections import deque
from typing import TYPE_CHECKING

from etcdreplica.app.protocol import STANDALONE_ENV, Decoder, encode
from etcdreplica.errors import NoWatchDogError

if TYPE_CHECKING:
    from typing import Any

    from etcdreplica.app.protocol import Message


ASKING = frozenset({signal.SIGTERM, signal.SIGINT})  # signals that ask a copy to end


class Link:
    """Sends from any thread; one thread receives. `wake` is safe in a signal handler."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise NoWatchDogError(
                f"no WatchDog listens on {path} ({error.strerror or error}): start one with 'etcdreplica node' "
                f"(or 'etcdreplica dev' on a laptop), or set {STANDALONE_ENV}=1 to run unprotected"
            ) from None
        self._decoder = Decoder()
        self._messages: deque[Message] = deque()
        self._sending = threading.Lock()
        self._wake, self.wake_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.signalled = False  # one of ASKING has come, or `wake` was called
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)

    def shut(self) -> None:
        """Hang up; the receiving thread then ends."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def send(self, kind: str, **fields: Any) -> None:
        """Send one message. A connection that is gone is noticed by the receiving side, not here."""
        frame = encode(kind, **fields)
        with self._sending:
            try:
                self._socket.sendall(frame)
            except OSError:
                return

    def close(self) -> None:
        """Give the descriptors back; nobody may be receiving any more."""
        self._socket.close()
        os.close(self._wake)
        os.close(self.wake_fd)

    def wake(self) -> None:
        """Make `receive` return None, as SIGTERM does when `wake_fd` is the process's wake-up descriptor."""
        with contextlib.suppress(OSError):
            os.write(self.wake_fd, bytes([signal.SIGTERM]))

    def receive(self, timeout: float | None = None) -> Message | None:
        """Return the next message, or None when woken or after `timeout` seconds.

        Raises NoWatchDogError when the WatchDog is gone, ProtocolError when it speaks something else.
        """
        while not self._messages:
            ready = self._poll.poll(None if timeout is None else timeout * 1000)
            if not ready:
                return None
            if any(fd == self._wake for fd, _ in ready):
                if not ASKING.isdisjoint(os.read(self._wake, 256)):
                    self.signalled = True
                    return None
                continue
            try:
                data = self._socket.recv(65536)
            except OSError:
                data = b""
            if not data:
                raise NoWatchDogError("the WatchDog of this host went away")
            self._messages.extend(self._decoder.feed(data))
        return self._messages.popleft()
