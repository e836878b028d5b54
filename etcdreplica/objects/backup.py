"""A backup's side of the log: records that it holds, applied as far as they are known to be committed; no I/O.

What is not known to be committed is not applied, since another primary may have another order for it; so nothing that was
applied is ever taken back. A new primary replaces everything beyond that: until all of its records are there, the old ones are,
so that this copy always holds whatever was acknowledged while it was in sync.

A snapshot is the exception: it is of what its primary had applied, committed or not. So before that is known to be committed,
this copy may become primary with it, but must not follow another one with it: it asks for a new snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator

from etcdreplica.errors import ProtocolError
from etcdreplica.objects.disk import Recovered
from etcdreplica.objects.log import Log
from etcdreplica.objects.machine import Machine, asks_for_digest
from etcdreplica.objects.wire import Part, Position, Records


class BackupLog:
    """One copy. `epoch` is the newest it knows of; it takes nothing of an older one."""

    def __init__(self, machine: Machine, epoch: int = 0) -> None:
        self.machine = machine
        self.log = Log(machine.index + 1)
        self.epoch = epoch
        self.commit = 0
        self.changed_from = 1  # the first record that was new in what was taken last
        self.following = False  # whether our records are those of the primary of this epoch
        self._staged: list[bytes] = []  # of a new primary, until all are there
        self._parts = bytearray()

    def recover(self, found: Recovered) -> None:
        """Be what a disk says. Raises CheckpointError."""
        self.machine.load(found.snapshot)
        self.log.clear(found.index + 1)
        self.log.extend(found.records)
        self.commit = found.commit

    def fence(self, epoch: int) -> bool:
        """Learn of an epoch; return whether it is not over."""
        if epoch > self.epoch:
            self.epoch, self.following = epoch, False
            self._staged.clear()
            self._parts.clear()
        return epoch == self.epoch

    def position(self, incarnation: int) -> Position:
        """Say where this copy is, as a new primary must know it."""
        certain = self.machine.instance is not None and self.commit >= self.machine.index
        return Position(incarnation, self.machine.history if certain else b"", self.machine.index if certain else 0)

    def take(self, message: Records) -> bool:
        """Take records; return whether they are held now, so that this may be told. Raises ProtocolError for a gap."""
        if not self.fence(message.epoch):
            return False
        first, applied = message.first, self.machine.index
        if message.until >= 0:
            if first == applied + 1:
                self._staged.clear()
            if first != applied + 1 + len(self._staged):
                raise ProtocolError(f"record {first} came for a copy that has {applied + len(self._staged)}")
            self._staged += message.records
            if applied + len(self._staged) < message.until:
                return False
            same, most = applied, min(self.log.last, applied + len(self._staged))
            while same < most and self.log[same + 1] == self._staged[same - applied]:
                same += 1
            self.log.cut(same)
            self.log.extend(self._staged[same - applied :])
            self._staged.clear()
            self.changed_from = same + 1
            self.following = True
        elif not self.following or first != self.log.last + 1:
            raise ProtocolError(f"record {first} came for a copy that has {self.log.last}")
        else:
            self.log.extend(message.records)
            self.changed_from = first
        self.commit = max(self.commit, min(message.commit, self.log.last))
        return True

    def take_part(self, message: Part) -> bool:
        """Take a part of a snapshot; return whether it is complete, and this copy is where its primary was.

        Raises ProtocolError, CheckpointError.
        """
        if not self.fence(message.epoch):
            return False
        if message.at == 0:
            self._parts.clear()
        if message.at != len(self._parts) or message.at + len(message.data) > message.size:
            raise ProtocolError("a part of a snapshot is out of order")
        self._parts += message.data
        if len(self._parts) < message.size:
            return False
        data = bytes(self._parts)
        self._parts.clear()
        self.machine.load(data)
        self.log.clear(self.machine.index + 1)
        self.commit = 0
        self.following = True
        return True

    def apply_committed(self) -> Iterator[int]:
        """Apply what is committed; yield after each record that asks for a digest of just that state. Raises DivergedError."""
        return self._apply(self.commit)

    def apply_all(self) -> None:
        """Apply everything: this copy is primary now, and whatever was acknowledged is among it. Raises DivergedError."""
        for _ in self._apply(self.log.last):
            pass

    def _apply(self, until: int) -> Iterator[int]:
        while self.machine.index < until:
            record = self.log[self.machine.index + 1]
            self.machine.apply(record)
            if asks_for_digest(record):
                yield self.machine.index
        self.log.trim(min(self.commit, self.machine.index))
