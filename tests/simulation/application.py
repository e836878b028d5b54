"""An application process as its WatchDog sees it: what `etcdreplica.app` does in threads, as one small state machine.

It can exit, hang (live without a pulse), and be slow to end. From the moment it learns that it is primary until its death it
may act as one: that is what the checks look at.
"""

from __future__ import annotations

import asyncio
from typing import Any

from etcdreplica.app.protocol import VERSION, Decoder, Message, encode
from etcdreplica.testing.simulated_loop import Handle
from etcdreplica.words import Role, Style
from tests.simulation.machine import Host, Process

RECONNECT_S = 0.05
PULSE_S = 1.0


class Application(Process):
    """One copy of an application. Without an incarnation it was started by hand, and registers itself."""

    def __init__(
        self,
        host: Host,
        app: str,
        style: Style,
        incarnation: int | None,
        parent: Process | None,
        registration: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(host, "app", parent)
        self.name = f"{app} on {host.name} ({incarnation or 'by hand'})"
        self.app = app
        self.style = style
        self.incarnation = incarnation
        self.registration = registration
        self.role = Role.BACKUP
        self.epoch = 0
        self.is_hung = False
        self.body_at: float | None = None
        self.stopping = False
        self.end_s = host.random.uniform(0.0, 6.0 if host.random.random() < 0.2 else 0.3)  # how long it takes to end in order
        self._connection: _Connection | None = None
        self._hung_at = 0.0
        self._deadline: Handle | None = None  # of a copy that was started by hand, kept by its kernel
        self.loop.call_later(host.random.uniform(0.02, 0.3), self._connect)

    @property
    def acts(self) -> bool:
        """Whether it may do what only a primary may do."""
        return self.is_alive and self.role is Role.PRIMARY

    def pulse(self) -> float:
        """Return the time of its last sign of life."""
        now = self.loop.time()
        if self.is_stopped or self.is_hung:
            return self._hung_at
        return now - now % PULSE_S + 1

    def hang(self) -> None:
        """Give no sign of life any more."""
        self._hung_at = self.pulse()
        self.is_hung = True

    def stop(self) -> None:
        """SIGSTOP."""
        if not self.is_hung:
            self._hung_at = self.pulse()
        super().stop()

    def terminate(self) -> None:
        """SIGTERM: leave."""
        self.loop.call_soon(self._leave)

    def ended(self, code: int) -> None:
        """It is dead."""
        if self._deadline is not None:
            self._deadline.cancel()

    # --- the protocol ----------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        listener = self.host.listener
        if self.is_hung:
            return
        if listener is None or not listener.is_there:
            if self.incarnation is None:
                self.exit(4)  # nobody to register with
            else:
                self.loop.call_later(RECONNECT_S, self._connect)
            return
        self._connection = _Connection(self)
        listener.accept(self, self._connection)

    def connected(self) -> None:
        """Say hello."""
        if self.incarnation is None:
            self.say("hello", version=VERSION, adopt=True, registration=self.registration)
        else:
            self.say("hello", version=VERSION, app=self.app, incarnation=self.incarnation)

    def say(self, kind: str, **fields: Any) -> None:
        """Send one message, unless it is hung."""
        if self._connection is not None and not self.is_hung:
            self._connection.send(kind, **fields)

    def disconnected(self, connection: _Connection) -> None:
        """The WatchDog is gone: there will be another one."""
        if connection is self._connection:
            self._connection = None
            if self.incarnation is None:
                self.exit(4)
            else:
                self.loop.call_later(RECONNECT_S, self._connect)

    def hear(self, message: Message) -> None:
        """Take one message."""
        if self.is_hung:
            return
        kind = message["type"]
        if kind == "welcome":
            self.incarnation = message["incarnation"]
            self.style = Style(message["style"])  # it may have been changed since this was started
            self.say("page", fd=0)
            self._arm(message)
            self._become(message)
            if self.body_at is not None:
                self.say("running", at=self.body_at)
            if self.stopping:
                self.say("leaving")
        elif kind == "role":
            self._become(message)
        elif kind == "renew":
            self._arm(message)
        elif kind == "stop":
            self._stop()
        elif kind == "error":
            self.exit(1)

    def _become(self, message: Message) -> None:
        role, epoch = Role(message["role"]), message["epoch"]
        if role is Role.PRIMARY and self.role is not Role.PRIMARY and not self.stopping:
            self.role = role
            self.epoch = epoch
            self.host.network.promoted(self)
        elif epoch > self.epoch:
            self.epoch = epoch
        if self.body_at is None and (self.style is Style.HOT or self.role is Role.PRIMARY) and not self.stopping:
            self.body_at = self.loop.time()
            self.say("running", at=self.body_at)

    def _arm(self, message: Message) -> None:
        if "until" in message:
            if self._deadline is not None:
                self._deadline.cancel()
            self._deadline = self.host.world.at(self.loop.global_(message["until"]), self.vanish)

    def _leave(self) -> None:
        if not self.stopping:
            self.say("leaving")
            self._stop()

    def _stop(self) -> None:
        if not self.stopping:
            self.stopping = True
            self.loop.call_later(self.end_s, self._end)

    def _end(self) -> None:
        if not self.is_hung:
            self.exit(0)


class _Connection(asyncio.Protocol):
    """One connection to the WatchDog."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self._decoder = Decoder()
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say hello."""
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        self._application.connected()

    def data_received(self, data: bytes) -> None:
        """Take what it says."""
        for message in self._decoder.feed(data):
            self._application.hear(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._transport = None
        self._application.disconnected(self)

    def send(self, kind: str, **fields: Any) -> None:
        """Say something."""
        if self._transport is not None:
            self._transport.write(encode(kind, **fields))
