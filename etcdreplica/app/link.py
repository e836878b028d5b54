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
from etcdreplica.clock import boottime
from etcdreplica.errors import NoWatchDogError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from etcdreplica.app.protocol import Message


ASKING = frozenset({signal.SIGTERM, signal.SIGINT})  # signals that ask a copy to end


class Link:
    """Sends from any thread; one thread receives. `wake` is safe in a signal handler.

    While a thread receives, it calls `on_pulse` at least every `pulse_s` seconds.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket = _connect(path)
        self.pulse_s: float | None = None
        self.on_pulse: Callable[[], None] = lambda: None
        self._decoder = Decoder()
        self._messages: deque[Message] = deque()
        self._sending = threading.Lock()
        self._wake, self.wake_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.signalled = False  # one of ASKING has come, or `wake` was called
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)

    def reconnect(self, kind: str, **fields: Any) -> None:
        """Connect once more, when the connection is lost, with this as the first message. Raises NoWatchDogError."""
        new = _connect(self._path)
        try:
            new.sendall(encode(kind, **fields))
        except OSError as error:
            new.close()
            raise NoWatchDogError("the WatchDog of this host went away") from error
        with self._sending:  # from here on other threads send to it too
            old, self._socket = self._socket, new
            self._poll.unregister(old)
            self._poll.register(new, select.POLLIN)
            old.close()
            self._decoder = Decoder()
            self._messages.clear()

    def pause(self, seconds: float) -> None:
        """Sleep, but no longer than until woken."""
        if select.select([self._wake], [], [], seconds)[0]:
            self._take_signals()

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
        until = None if timeout is None else boottime() + timeout
        while not self._messages:
            ready = self._poll.poll(self._patience_ms(until))
            self.on_pulse()
            if not ready:
                if until is not None and boottime() >= until:
                    return None
                continue
            if any(fd == self._wake for fd, _ in ready):
                if self._take_signals():
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

    def _patience_ms(self, until: float | None) -> float | None:
        left = [until - boottime()] if until is not None else []
        waits = left + ([self.pulse_s] if self.pulse_s is not None else [])
        return max(0.0, 1000 * min(waits)) if waits else None

    def _take_signals(self) -> bool:
        asked = not ASKING.isdisjoint(os.read(self._wake, 256))
        self.signalled = self.signalled or asked
        return asked


def _connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        raise NoWatchDogError(
            f"no WatchDog listens on {path} ({error.strerror or error}): start one with 'etcdreplica node' "
            f"(or 'etcdreplica dev' on a laptop), or set {STANDALONE_ENV}=1 to run unprotected"
        ) from None
    return connection
