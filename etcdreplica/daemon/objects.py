"""What a WatchDog does for replicated objects: keep their in-sync sets in etcd, and tell who serves where.

`InSyncSet` belongs to one run. Its process asks for the set and, as primary, has it changed. A change is one transaction that
fails once anything is otherwise than the primary believes: the set, this host's placement, or that no successor was called.
For the last, the WatchDog remembers the set: it calls a successor only while that is in sync, by a transaction that fails
once the set has changed. So of a change and a succession at most one happens, in whatever order etcd takes them, and the
successor is called without reading anything first. It is called with the set, and need not read that either.

`Copies` belongs to the WatchDog. It follows the copies of every object that has a process, or a client, on this host, and
tells them: the one to reach each other, the other to reach them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from attrs import Factory, define, evolve

from etcdreplica.app.protocol import Message
from etcdreplica.daemon.addresses import is_loopback, split
from etcdreplica.daemon.app_server import AppConnection
from etcdreplica.daemon.settings import NodeSettings
from etcdreplica.errors import ProtocolError, StoreDeniedError, StoreError
from etcdreplica.model import InSync, Member, Placement, Registration, Replica, Succession
from etcdreplica.store import Changes, Corrupt, Key, Kind, Put, Snapshot, Store, Txn, Unchanged
from etcdreplica.words import MAX_DEGREE, Role, check_count, check_name

log = logging.getLogger(__name__)

ATTEMPTS = 3  # at a change, when only the placement was in the way
PLACED_S = 0.5  # within this a newer placement is known here
DENIED_S = 2.0

Row = tuple[str, int, Role, int, str | None]  # host, incarnation, role, epoch and where it serves


def welcome_fields(settings: NodeSettings, registration: Registration, placement: Placement) -> dict[str, Any]:
    """What the process of an object is told with its welcome. It listens where this node does, but knows no TLS yet."""
    r, (host, _) = registration, split(settings.peer_listen)
    return {
        "listen": host if settings.insecure or is_loopback(host) else "",
        "object": {"min_in_sync": r.min_in_sync, "durable": r.durable, "degree": r.degree},
        "state_dir": str(settings.state_dir / "objects" / settings.cluster / r.name),
        "address": settings.address,
        "born": placement.born,
    }


# --- the in-sync set -------------------------------------------------------------------------------------------------


Record = tuple[InSync, int]  # as it has stood in etcd, and its mod revision
NO_RECORD = InSync(0, 0, ()), 0


class InSyncSet:
    """The in-sync set of one object as one run knows it. `standing` returns the run's placement and its mod revision."""

    def __init__(self, store: Store, app: str, host: str, standing: Callable[[], tuple[Placement, int]]) -> None:
        self._store = store
        self._app = app
        self._host = host
        self._standing = standing
        self._key = Key(Kind.IN_SYNC, (app,))
        self._known: Record = NO_RECORD  # the newest one, unless it may be changing
        self._changing = False
        self._foreign = 0  # mod revision of what an earlier application of this name has left
        self._placed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def placed(self) -> None:
        """The run has a newer placement."""
        self._placed.set()

    def succession(self, placement: Placement) -> tuple[Placement, Record | None]:
        """Return whom a dying primary may call, as a placement, and with which set."""
        record, _ = self._known
        if placement.successor not in [member.host for member in record.members]:
            return evolve(placement, successor=None), None
        return placement, self._known

    def called(self, succession: Succession, connection: AppConnection | None) -> None:
        """Tell the process what the set is for which it is called. From then on only this WatchDog changes it."""
        if succession.in_sync is not None:
            record = succession.in_sync, succession.in_sync_revision
            self._learn(*record)
            if connection is not None:
                _tell(connection, 0, *record)

    def take(self, message: Message, connection: AppConnection) -> bool:
        """Deal with a message of the process, if it is about the set. Raises ProtocolError, ValueError, KeyError."""
        if message["type"] == "members":
            self._spawn(self._tell(check_count("question", message["question"]), connection))
        elif message["type"] == "change":
            question, revision = (check_count(name, message[name], most=2**63) for name in ("question", "revision"))
            members = _members(message["members"])
            if self._changing:
                connection.send("changed", question=question, error="another change is under way", unknown=True)
                return True
            self._changing, self._known = True, NO_RECORD
            self._spawn(self._change(question, revision, members, connection))
        else:
            return False
        return True

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self, question: int, connection: AppConnection) -> None:
        try:
            record = await self._read()
        except StoreError as error:
            connection.send("members", question=question, error=str(error))
        else:
            _tell(connection, question, *record)

    async def _read(self) -> Record:
        """Read the record of this application, and remember it."""
        entry = await self._store.get(self._key)
        record, revision = (entry.value, entry.mod_revision) if entry is not None else NO_RECORD
        self._foreign = 0
        if entry is not None and record.epoch < self._standing()[0].born:
            self._foreign, (record, revision) = revision, NO_RECORD
        if not self._changing:
            self._learn(record, revision)
        return record, revision

    def _learn(self, record: InSync, revision: int) -> None:
        if self._known[1] < revision:
            self._known = record, revision

    async def _change(self, question: int, revision: int, members: tuple[Member, ...], connection: AppConnection) -> None:
        error, unknown, written = "", False, NO_RECORD
        try:
            written, error = await self._write(revision, members)
        except StoreError as lost:
            error, unknown = str(lost), not isinstance(lost, StoreDeniedError)
        finally:
            self._changing = False
        if not error and not unknown:
            self._learn(*written)
            connection.send("changed", question=question, revision=written[1])
            return
        if not unknown:
            with contextlib.suppress(StoreError):  # then nothing is remembered until the process asks
                await self._read()
        connection.send("changed", question=question, error=error, unknown=unknown)

    async def _write(self, expected: int, members: tuple[Member, ...]) -> tuple[Record, str]:
        """Write the set over the record of revision `expected`; return what stands now, or why nothing was written.

        A manager writes placements anew for reasons of its own, above all just after a promotion, so the placement may be
        in the way although nothing has changed for this primary. Raises StoreError when it is unknown what happened.
        """
        for _ in range(ATTEMPTS):
            self._placed.clear()
            placement, placed = self._standing()
            over = expected or self._foreign
            if placement.role is not Role.PRIMARY:
                return NO_RECORD, f"{self._host} is not the primary"
            conditions = [
                Unchanged(self._key, over),
                Unchanged(Key(Kind.PLACEMENTS, (self._host, self._app)), placed),
            ]
            if placement.successor is not None:
                conditions.append(Unchanged(Key(Kind.SUCCESSIONS, (placement.successor, self._app)), 0))
            record = InSync(placement.epoch, placement.incarnation, members)
            result = await self._store.commit(Txn(tuple(conditions), (Put(self._key, record),)))
            if result.succeeded:
                return (record, result.revision), ""
            try:
                _, found = await self._read()
            except StoreError as error:
                return NO_RECORD, f"a condition of the write failed, and which one cannot be read: {error}"
            if found != expected:
                return NO_RECORD, "the in-sync set has changed meanwhile: a condition of the write failed"
            if over != (expected or self._foreign):
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PLACED_S):
                    while self._standing()[1] == placed:
                        await self._placed.wait()
                        self._placed.clear()
            if self._standing()[1] == placed:
                break
        return NO_RECORD, "the placement of this primary has changed: a condition of the write failed"


def _tell(connection: AppConnection, question: int, record: InSync, revision: int) -> None:
    rows = [[member.host, member.incarnation] for member in record.members]
    connection.send("members", question=question, revision=revision, epoch=record.epoch, primary=record.primary, members=rows)


def _members(value: object) -> tuple[Member, ...]:
    if not isinstance(value, list) or len(value) > MAX_DEGREE:
        raise ProtocolError(f"members must be a list of at most {MAX_DEGREE}")
    return tuple(Member(check_name("host name", host), check_count("incarnation", i, most=2**63)) for host, i in value)


# --- who serves where ------------------------------------------------------------------------------------------------


@define
class _Audience:
    """Who wants to know of one object, and what they were told; None before anything is known."""

    listeners: set[AppConnection] = Factory(set)
    shown: dict[str, Replica] = Factory(dict)
    told: list[Row] | None = None
    task: asyncio.Task[None] | None = None

    def take(self, batch: Snapshot | Changes) -> None:
        """Learn of changes, and pass them on."""
        if isinstance(batch, Snapshot):
            self.shown = {}
        for entry in batch.entries:
            if isinstance(entry.value, Replica):
                self.shown[entry.key.names[1]] = entry.value
            elif not isinstance(entry.value, Corrupt):  # that one is there, and was logged where it was read
                self.shown.pop(entry.key.names[1], None)
        rows = [(host, r.incarnation, r.role, r.epoch, r.serves) for host, r in sorted(self.shown.items())]
        if rows != self.told:
            self.told = rows
            for listener in self.listeners:
                self.tell(listener)

    def tell(self, listener: AppConnection) -> None:
        """Tell one of them, once there is something to tell."""
        if self.told is not None:
            listener.send("replicas", replicas=self.told)


class Copies:
    """Tells processes of this host where the copies of their objects are, one watch for each object."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._audiences: dict[str, _Audience] = {}

    def admit(self, connection: AppConnection, message: Message) -> None:
        """Take charge of a client. Raises UsageError for what is no name."""
        connection.on_message = lambda said: _on_client(connection, said)
        self.tell(check_name("application name", message["client"]), connection)

    def tell(self, app: str, connection: AppConnection) -> None:
        """Tell a connection of the copies of an object, now and at every change, until it is closed."""
        audience = self._audiences.setdefault(app, _Audience())
        audience.listeners.add(connection)
        connection.on_closed = lambda: self._forget(app, connection)
        audience.tell(connection)
        if audience.task is None:
            audience.task = asyncio.create_task(self._follow(app, audience))

    def stop(self) -> None:
        """Tell nobody any more."""
        for audience in self._audiences.values():
            if audience.task is not None:
                audience.task.cancel()
        self._audiences.clear()

    def _forget(self, app: str, connection: AppConnection) -> None:
        audience = self._audiences.get(app)
        if audience is None:
            return
        audience.listeners.discard(connection)
        if not audience.listeners and audience.task is not None:
            audience.task.cancel()
            del self._audiences[app]

    async def _follow(self, app: str, audience: _Audience) -> None:
        while True:
            try:
                async with contextlib.aclosing(self._store.follow(Kind.REPLICAS, app)) as batches:
                    async for batch in batches:
                        audience.take(batch)
            except StoreDeniedError as error:
                log.error("%s: nobody can be told who serves it: %s", app, error)
                await asyncio.sleep(DENIED_S)


def _on_client(connection: AppConnection, message: Message) -> None:
    if message["type"] != "leaving":
        raise ProtocolError(f"unexpected {message['type']} of a client")
    connection.drop()
