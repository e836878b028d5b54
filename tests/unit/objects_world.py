"""What the model of the log of replicated objects consists of: copies, connections, clients, changes of the in-sync set."""

from __future__ import annotations

from collections import deque

from attrs import Factory, define, frozen

from etcdreplica import query, update
from etcdreplica.objects.backup import BackupLog
from etcdreplica.objects.copies import Members
from etcdreplica.objects.machine import Machine
from etcdreplica.objects.primary import PrimaryLog
from etcdreplica.objects.wire import Ack, Part, Position, Records, Result

ToCopy = Records | Part
ToPrimary = Position | Ack


class Journal:
    """Remembers every update, in order."""

    def __init__(self) -> None:
        self.entries: list[str] = []

    @update
    def add(self, entry: str) -> int:
        """Add an entry; return how many there are."""
        self.entries.append(entry)
        return len(self.entries)

    @query
    def size(self) -> int:
        """Count."""
        return len(self.entries)


@define(eq=False)
class Link:
    """A primary's connection to a copy. `sent`: the last record under way, None while the copy takes over."""

    to_copy: deque[ToCopy] = Factory(deque)
    to_primary: deque[ToPrimary] = Factory(deque)
    asked: bool = False  # whether the copy has heard of it
    sent: int | None = None


@frozen
class Write:
    """A change of the in-sync set on its way to etcd."""

    revision: int
    primary: int
    members: frozenset[int]


@define(eq=False)
class Reign:
    """What `leading.Leading` keeps. `writing` is waited for; `unsure` are older ones of which nothing was heard."""

    epoch: int
    log: PrimaryLog
    recorded: Members
    links: dict[int, Link] = Factory(dict)
    writing: Write | None = None
    unsure: list[Write] = Factory(list)
    waiting: deque[tuple[int, int, list[Result]]] = Factory(deque)  # record, client, what to answer


@define(eq=False)
class Copy:
    """One process."""

    number: int
    machine: Machine
    backup: BackupLog
    reign: Reign | None = None
    led: tuple[int, Link] | None = None  # by whom, over what


@define(eq=False)
class Client:
    """A session of `objects.client`. `open`: updates that are not answered, in order."""

    session: bytes
    open: dict[int, str] = Factory(dict)
    number: int = 0
    new: bool = True
    late: list[tuple[int, bytes]] = Factory(list)  # messages, each to one copy, that may still come
