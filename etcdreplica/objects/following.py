"""What a copy does while it is backup: it takes over the log of whoever is primary, and knows how far it is behind."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from etcdreplica.errors import CheckpointError, DivergedError, EtcdReplicaError, ProtocolError, UsageError
from etcdreplica.objects.backup import BackupLog
from etcdreplica.objects.connection import Connection
from etcdreplica.objects.leading import Me
from etcdreplica.objects.wire import Ack, Digest, Follow, Message, Part, Ping, Pong, Records, Refuse

PINGS = 100  # that may be without an answer


class Following:
    """One copy. `fail(error)` is called when it cannot go on as a copy of this object."""

    def __init__(self, me: Me, backup: BackupLog, fail: Callable[[EtcdReplicaError], None]) -> None:
        self.backup = backup
        self.fresh_at: float | None = None  # the state is no older than this
        self._me = me
        self._fail = fail
        self._primary: Connection | None = None
        self._applying = False
        self._asked = 0
        self._pings: deque[tuple[int, float]] = deque(maxlen=PINGS)

    def take(self, connection: Connection, message: Follow) -> None:
        """Another copy says that it is primary."""
        if not self.backup.fence(message.epoch):
            connection.send(Refuse(f"epoch {message.epoch} is over: this copy knows of {self.backup.epoch}"))
            connection.close("an older epoch")
            return
        self.stop("another primary")
        self._primary = connection
        connection.on_message = lambda message, _: self._on_message(connection, message)
        connection.on_lost = lambda _: self._lost(connection)
        connection.send(self.backup.position(self._me.incarnation))

    def stop(self, why: str) -> None:
        """Follow nobody."""
        if self._primary is not None:
            self._primary.close(why)
            self._primary = None

    def ping(self) -> None:
        """Ask how far the primary is."""
        if self._primary is not None:
            self._asked += 1
            self._pings.append((self._asked, self._me.clock()))
            self._primary.send(Ping(self._asked))

    def _lost(self, connection: Connection) -> None:
        if self._primary is connection:
            self._primary = None

    def _on_message(self, connection: Connection, message: Message) -> None:
        if self._primary is not connection:
            return
        backup = self.backup
        try:
            if isinstance(message, Records):
                if backup.take(message):
                    if message.records or message.until >= 0:
                        connection.send(Ack(backup.epoch, backup.log.last))
                    if not self._applying:
                        self._applying = True
                        asyncio.get_running_loop().call_soon(self._apply, connection)  # after what was just said is sent
            elif isinstance(message, Part):
                if backup.take_part(message):
                    connection.send(Ack(backup.epoch, backup.log.last))
            elif isinstance(message, Pong):
                self._on_pong(message)
            elif isinstance(message, Refuse) and message.diverged:
                raise DivergedError(
                    f"{message.reason}: an update does not depend on its arguments and the state alone (a clock, random "
                    "numbers, the order of a set?)"
                )
            else:
                raise ProtocolError(f"a primary sent {message!r:.200}")
        except (DivergedError, CheckpointError, UsageError) as error:
            connection.close(str(error))
            self._fail(error)

    def _apply(self, connection: Connection) -> None:
        self._applying = False
        if self._primary is not connection:
            return
        try:
            for index in self.backup.apply_committed():
                connection.send(Digest(index, self.backup.machine.digest()))
        except DivergedError as error:
            connection.close(str(error))
            self._fail(error)

    def _on_pong(self, message: Pong) -> None:
        while self._pings and self._pings[0][0] <= message.number:
            number, asked_at = self._pings.popleft()
            if number == message.number and self.backup.machine.index >= message.commit:
                self.fresh_at = asked_at
