"""What a copy does while it is backup: it takes over the log of whoever is primary, and knows how far it is behind."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from etcdreplica.errors import CheckpointError, DivergedError, EtcdReplicaError, ProtocolError, UsageError
from etcdreplica.objects.backup import BackupLog
from etcdreplica.objects.connection import Connection
from etcdreplica.objects.disk import DiskLog
from etcdreplica.objects.leading import Me
from etcdreplica.objects.wire import Ack, Digest, Follow, Message, Part, Ping, Pong, Records, Refuse

PINGS = 100  # that may be without an answer


class Following:
    """One copy. `fail(error)` is called when it cannot go on as a copy of this object."""

    def __init__(self, me: Me, backup: BackupLog, fail: Callable[[EtcdReplicaError], None]) -> None:
        self.backup = backup
        self.disk: DiskLog | None = None
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
        try:
            if isinstance(message, Records):
                self._on_records(connection, message)
            elif isinstance(message, Part):
                self._on_part(connection, message)
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

    def _on_records(self, connection: Connection, message: Records) -> None:
        backup = self.backup
        if not backup.take(message):
            return
        if message.until >= 0 or message.records:
            self._hold(connection, backup.changed_from)
        if not self._applying:
            self._applying = True
            asyncio.get_running_loop().call_soon(self._apply, connection)  # after what was just said is sent

    def _on_part(self, connection: Connection, message: Part) -> None:
        backup = self.backup
        if backup.take_part(message):
            self.fresh_at = None
            if self.disk is not None:
                self.disk.compact(backup.machine.index, backup.commit, backup.machine.snapshot(), ())
            self._hold(connection, backup.log.last + 1)

    def _hold(self, connection: Connection, first: int) -> None:
        """Tell the primary what this copy holds, once the records from `first` on are on the disk, if it has one."""
        ack, log = Ack(self.backup.epoch, self.backup.log.last), self.backup.log
        if self.disk is None:
            connection.send(ack)
        else:
            self.disk.append(first, [log[index] for index in range(first, log.last + 1)], lambda: connection.send(ack))

    def _apply(self, connection: Connection) -> None:
        self._applying = False
        if self._primary is not connection:
            return
        try:
            for index in self.backup.apply_committed():
                connection.send(Digest(index, self.backup.machine.digest()))
        except Exception as error:  # the record counts as applied, so there is no other way
            connection.close(str(error))
            self._fail(error if isinstance(error, DivergedError) else DivergedError(f"a record cannot be applied: {error!r}"))

    def _on_pong(self, message: Pong) -> None:
        while self._pings and self._pings[0][0] <= message.number:
            number, asked_at = self._pings.popleft()
            backup = self.backup  # a snapshot may have what is never committed: until it is, nobody may see it
            if number == message.number and backup.commit >= backup.machine.index >= message.commit:
                self.fresh_at = asked_at
