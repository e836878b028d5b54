"""One copy of an object: it answers clients, and is primary (`leading`) or backup (`following`).

All of it runs in one event loop. A copy that becomes primary reads the in-sync set from etcd, applies whatever it holds, and
serves; what it acknowledges from then on is on every in-sync copy.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from attrs import frozen

from etcdreplica.app.methods import UPDATE
from etcdreplica.clock import Clock, boottime
from etcdreplica.errors import EtcdReplicaError, ObjectError, ProtocolError, UsageError
from etcdreplica.objects.backup import BackupLog
from etcdreplica.objects.connection import Connection
from etcdreplica.objects.copies import Copy, Members, WatchDogLine
from etcdreplica.objects.disk import COMPACT_BYTES, DiskLog
from etcdreplica.objects.following import Following
from etcdreplica.objects.leading import Leading, Me, read_members, survivors
from etcdreplica.objects.machine import BARRIER, CALLS, CHECK, NOTHING, SESSIONS, TICK, Machine, error_value, record_of
from etcdreplica.objects.tasks import Tasks
from etcdreplica.objects.wire import (
    MAX_CALLS,
    NO_METHOD,
    NOT_PRIMARY,
    OVERLOADED,
    RAISED,
    SESSION,
    TOO_FEW,
    TOO_OLD,
    VERSION,
    Answers,
    Asks,
    Calls,
    Follow,
    Hello,
    Message,
    Refuse,
    Result,
    Results,
    Standing,
    encode_value,
)

log = logging.getLogger(__name__)

HELLO_S = 5.0
PING_S = 0.1
TICK_S = 10.0
FIRST_CHECK_S = 1.0
CHECK_SHARE = 100  # digests take at most one in so many seconds
MAX_CLIENTS = 1000
MAX_WAITING = 50_000  # calls that are not acknowledged yet, of all clients
MAX_WAITING_BYTES = 64 << 20
MAX_KEPT = 25_000  # answers that are kept for one session


@frozen
class Settings:
    """How the object is kept. `min_in_sync`: with fewer copies updates are refused. `fast`: a lease proves nothing."""

    app: str
    min_in_sync: int = 1
    fast: bool = False
    durable: Path | None = None  # the directory of its log on this host's disk


@frozen
class Waiting:
    """Answers that wait until record `index` is acknowledged, to so many calls in so many bytes of the log."""

    index: int
    connection: Connection
    message: Results | Answers
    calls: int
    size: int


class ObjectServer:
    """One copy. `fail(error)` is called when it cannot go on; the process is to end then."""

    def __init__(
        self,
        settings: Settings,
        machine: Machine,
        incarnation: int,
        host: str,
        line: WatchDogLine | None,
        fail: Callable[[EtcdReplicaError], None],
        clock: Clock = boottime,
    ) -> None:
        self.settings = settings
        self.leading: Leading | None = None  # while this copy is primary and serves
        self._machine = machine
        self._me = Me(settings.app, host, incarnation, clock)
        self._line = line
        self._fail = fail
        self._tasks = Tasks(settings.app, fail)
        self._following = Following(self._me, BackupLog(machine), fail)
        self._disk: DiskLog | None = None
        self._epoch = 0
        self._reigning = False
        self._copies: list[Copy] | None = None
        self._clients: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._waiting: deque[Waiting] = deque()
        self._waiting_calls = 0
        self._waiting_bytes = 0
        self._flushing = False
        self._complaint = ""

    async def start(self, host: str) -> int:
        """Recover what the disk has, and listen; return the port. Raises OSError, StorageError."""
        if self.settings.durable is not None:
            self._disk = self._following.disk = DiskLog(self.settings.durable, self._fail)
            if (found := self._disk.recover()) is not None:
                self._following.backup.recover(found)
        self._server = await asyncio.get_running_loop().create_server(self.accept, host, 0)
        self._tasks.spawn(self._tick())
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def stop(self) -> None:
        """Hang up on everybody."""
        if self._server is not None:
            self._server.close()
        self._tasks.cancel()
        if self.leading is not None:
            self.leading.stop()
        self._following.stop("this copy ends")
        for connection in list(self._clients):
            connection.close("this copy ends")
        await asyncio.sleep(0)
        if self._disk is not None:
            await asyncio.to_thread(self._disk.close)

    @property
    def is_alone(self) -> bool:
        """Whether this is the only copy in sync, although there are others."""
        others = any(copy.incarnation != self._me.incarnation for copy in self._copies or ())
        return others and self.leading is not None and len(self.leading.log.in_sync) == 1

    # --- what the WatchDog says ------------------------------------------------------------------------------------

    def become(self, epoch: int, *, primary: bool) -> None:
        """Take a role. A primary never becomes a backup again: its process ends."""
        self._epoch = max(self._epoch, epoch)
        if not primary or self._reigning:
            return
        self._reigning = True
        if self._following.backup.epoch >= epoch:
            self._fail(ObjectError(f"this copy is to lead epoch {epoch}, but knows of {self._following.backup.epoch} already"))
        else:
            self._following.backup.fence(epoch)
            self._tasks.spawn(self._reign(epoch))

    def see(self, copies: Iterable[Copy]) -> None:
        """Learn which copies there are."""
        self._copies = list(copies)
        if self.leading is not None:
            self.leading.see(self._copies)

    async def _reign(self, epoch: int) -> None:
        """Become primary: with the in-sync set that stands in etcd, less the primary that is dead."""
        me, machine, backup = self._me, self._machine, self._following.backup
        members = await read_members(me, self._line) if self._line is not None else Members(0, 0, 0, {})
        self._check_epoch(epoch, members.epoch)
        expected = me.incarnation in members.hosts or (self._disk is not None and me.host in members.hosts.values())
        if machine.instance is None and expected:
            raise ObjectError("this copy is in sync by what stands in etcd, but has no state")
        if members.hosts and not survivors(me, members) and not expected:
            self._begin_anew(members)
        self._following.stop("this copy is primary now")
        backup.apply_all()
        if machine.instance is None:
            machine.begin(self._now())
            if self._disk is not None:
                self._disk.compact(machine.index, machine.index, machine.snapshot(), ())
        if self._disk is not None:
            await self._disk.flushed()
            self._check_epoch(epoch)
        least = self.settings.min_in_sync
        self.leading = Leading(me, epoch, machine, backup, members, self._line, self._tasks, self._answer, self._disk, least)
        self.leading.start(self._copies)
        for client in self._clients:
            client.send(self._standing)

    def _check_epoch(self, epoch: int, recorded: int = 0) -> None:
        """See that nobody else has become primary meanwhile. Raises ObjectError."""
        newest = max(self._epoch, self._following.backup.epoch, recorded)
        if newest > epoch:
            raise ObjectError(f"epoch {epoch} was over before this copy could lead: there is {newest}")

    def _begin_anew(self, members: Members) -> None:
        """Go on although every in-sync copy is gone: what this one has, if anything, is another history from here on."""
        alive = [copy.host for copy in self._copies or () if copy.incarnation in members.hosts.keys() - {members.primary}]
        if alive:
            raise ObjectError(f"this copy is not in sync, and the ones on {', '.join(alive)} are: it must not lead")
        log.error("%s: every in-sync copy was lost; what they had acknowledged last may be missing", self._me.app)
        self._machine.history = os.urandom(16)

    # --- connections -----------------------------------------------------------------------------------------------

    def accept(self) -> Connection:
        """Return our side of a new connection."""
        connection = Connection(polite=True)
        hasty = asyncio.get_running_loop().call_later(HELLO_S, connection.close, "no hello in time")

        def first(message: Message, _: bytes) -> None:
            hasty.cancel()
            if not isinstance(message, Hello | Follow) or message.version != VERSION or message.app != self.settings.app:
                self._refuse(connection, f"this is {self.settings.app}, and it speaks version {VERSION}")
            elif isinstance(message, Hello):
                self._admit(connection)
            elif self.leading is not None:
                self._refuse(connection, f"this copy is primary, of epoch {self._epoch}")
                if message.epoch > self._epoch:
                    self._fail(ObjectError(f"epoch {self._epoch} is over: there is a primary of epoch {message.epoch}"))
            else:
                self._following.take(connection, message)

        connection.on_message = first
        return connection

    def _refuse(self, connection: Connection, reason: str) -> None:
        connection.send(Refuse(reason))
        connection.close(reason)

    def _admit(self, connection: Connection) -> None:
        if len(self._clients) >= MAX_CLIENTS:
            self._refuse(connection, f"{self.settings.app} has {MAX_CLIENTS} clients already")
            return
        self._clients.add(connection)
        connection.on_lost = lambda _: self._clients.discard(connection)
        connection.on_message = lambda message, body: self._on_client(connection, message, body)
        connection.send(self._standing)

    @property
    def _standing(self) -> Standing:
        methods = {name: method.kind for name, method in self._machine.methods.items()}
        return Standing(self._epoch, self.leading is not None, methods)

    def _on_client(self, connection: Connection, message: Message, body: bytes) -> None:
        if isinstance(message, Calls):
            self._on_calls(connection, message, body)
        elif isinstance(message, Asks):
            self._on_asks(connection, message, len(body))
        else:
            raise ProtocolError(f"a client sent {type(message).__name__}")

    # --- updates ---------------------------------------------------------------------------------------------------

    def _on_calls(self, connection: Connection, message: Calls, body: bytes) -> None:
        if len(message.session) != SESSION or len(body) > MAX_CALLS:
            raise ProtocolError(f"a session named by {len(message.session)} bytes, or updates of {len(body)} bytes")
        if code := self._refusal(message, len(body)):
            connection.send(Results([(number, code, NOTHING) for number, *_ in message.calls]))
            return
        accepted = [call for call in message.calls if self._machine.accepts(call, UPDATE)]
        if len(accepted) < len(message.calls):
            known = {call[0] for call in accepted}
            connection.send(Results([(n, NO_METHOD, NOTHING) for n, *_ in message.calls if n not in known]))
            if not accepted:
                return
            message = Calls(message.session, message.new, message.below, accepted)
            body = encode_value(message)
        results = Results(self._log(record_of(CALLS, self._now(), body), message))
        self._wait(connection, results, len(accepted), len(body))

    def _refusal(self, message: Calls, size: int) -> int:
        if self.leading is None:
            return NOT_PRIMARY
        if len(self.leading.log.in_sync) < self.settings.min_in_sync:
            return TOO_FEW
        sessions = self._machine.sessions
        session = sessions.get(message.session)
        too_many = len(sessions) >= SESSIONS if session is None else len(session.done) + len(message.calls) > MAX_KEPT
        return OVERLOADED if too_many or self._is_full(len(message.calls), size) else 0

    def _is_full(self, calls: int, size: int) -> bool:
        full = self._waiting_calls + calls > MAX_WAITING or self._waiting_bytes + size > MAX_WAITING_BYTES
        return full and bool(self._waiting)

    def _log(self, record: bytes, message: Calls | None = None) -> list[Result]:
        """Add a record, apply it, and have it sent at the end of this turn of the loop."""
        assert self.leading is not None
        self.leading.log.log.append(record)
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)
        return self._machine.apply(record, message)

    def _flush(self) -> None:
        self._flushing = False
        if self.leading is not None:
            self.leading.flush()

    def _wait(self, connection: Connection, message: Results | Answers, calls: int, size: int) -> None:
        """Send this once everything that was applied is acknowledged."""
        self._waiting.append(Waiting(self._machine.index, connection, message, calls, size))
        self._waiting_calls += calls
        self._waiting_bytes += size

    def _answer(self) -> None:
        assert self.leading is not None
        waiting, commit = self._waiting, self.leading.log.commit
        while waiting and waiting[0].index <= commit:
            done = waiting.popleft()
            self._waiting_calls -= done.calls
            self._waiting_bytes -= done.size
            self._reply(done.connection, done.message)

    def _reply(self, connection: Connection, message: Results | Answers) -> None:
        try:
            connection.send(message)
        except ProtocolError:  # too long together, or alone
            for number, code, value in message.results:
                try:
                    connection.send(type(message)([(number, code, value)]))
                except ProtocolError as error:
                    connection.send(type(message)([(number, RAISED, error_value(UsageError(f"what it returned: {error}")))]))

    def _now(self) -> float:
        return max(time.time(), self._machine.time)

    # --- queries ---------------------------------------------------------------------------------------------------

    def _on_asks(self, connection: Connection, message: Asks, size: int) -> None:
        if self.leading is not None and self._is_full(len(message.calls), size):
            connection.send(Answers([(number, OVERLOADED, NOTHING) for number, *_ in message.calls]))
            return
        if self.leading is not None:
            if self.settings.fast:
                self._log(record_of(BARRIER, self._now()))  # the other copies must say that none of them is primary
            self._wait(connection, Answers([self._machine.ask(call) for call in message.calls]), len(message.calls), size)
            self._answer()
            return
        fresh_at, code = self._following.fresh_at, 0
        if message.max_age is None:
            code = NOT_PRIMARY
        elif fresh_at is None or self._me.clock() - fresh_at > message.max_age:
            code = TOO_OLD
        found = [(call[0], code, NOTHING) if code else self._machine.ask(call) for call in message.calls]
        self._reply(connection, Answers(found))

    # --- now and then ----------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        ticked_at, checked = self._me.clock(), 0
        check_at = ticked_at + FIRST_CHECK_S
        while True:
            await asyncio.sleep(PING_S)
            now = self._me.clock()
            if self._disk is not None and self._disk.size > COMPACT_BYTES:
                self._compact(self._disk)
            if self.leading is None:
                self._following.ping()
                continue
            if len(self.leading.log.in_sync) < self.settings.min_in_sync:
                continue  # what is logged now would make queries wait
            if now >= ticked_at + TICK_S and self._machine.sessions:
                ticked_at = now
                self._log(record_of(TICK, self._now()))
            if now >= check_at and self._machine.index > checked:
                checked = self._check(self.leading)
                check_at = now + max(TICK_S, CHECK_SHARE * (self._me.clock() - now))

    def _check(self, leading: Leading) -> int:
        """Have every copy say what its state amounts to; return the index."""
        began = self._me.clock()
        try:
            self._machine.check_state()
        except UsageError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.error("%s: copies that start from now on would differ: %s", self._me.app, error)
        self._log(record_of(CHECK, self._now()))
        leading.expect_digest(self._machine.index, self._machine.digest(), self._me.clock() - began)
        return self._machine.index

    def _compact(self, disk: DiskLog) -> None:
        """Write a snapshot in the place of a log that has become long."""
        machine, backup = self._machine, self._following.backup
        if machine.instance is None:
            return
        commit = self.leading.log.commit if self.leading is not None else backup.commit
        after = [backup.log[index] for index in range(machine.index + 1, backup.log.last + 1)]
        disk.compact(machine.index, commit, machine.snapshot(), after)
