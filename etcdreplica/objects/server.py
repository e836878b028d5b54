"""One copy of an object: it answers clients; as primary it hands the log to the other copies, as backup it follows.

All of it runs in the loop of `connection`. A copy that becomes primary reads the in-sync set from etcd, applies whatever it
holds, and serves; it connects to the other copies, and each of them takes over its log, before anything new is acknowledged.
A copy that has all there is joins the set, one that is gone or too slow leaves it: by transactions of the WatchDog.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from attrs import define, field, frozen

from etcdreplica.clock import Clock, boottime
from etcdreplica.errors import CheckpointError, DivergedError, EtcdReplicaError, ObjectError, ProtocolError, UsageError
from etcdreplica.objects.backup import BackupLog
from etcdreplica.objects.connection import Connection, dial
from etcdreplica.objects.copies import Copy, Members, MembersUnknownError, WatchDogLine
from etcdreplica.objects.machine import BARRIER, CALLS, CHECK, NOTHING, TICK, Machine, record_of
from etcdreplica.app.methods import UPDATE
from etcdreplica.objects.primary import PrimaryLog
from etcdreplica.objects.wire import (
    NO_METHOD,
    NOT_PRIMARY,
    OVERLOADED,
    TOO_FEW,
    TOO_OLD,
    VERSION,
    Ack,
    Answers,
    Asks,
    Calls,
    Digest,
    Follow,
    Hello,
    Message,
    Part,
    Ping,
    Pong,
    Position,
    Records,
    Refuse,
    Results,
    Standing,
    encode_value,
)

log = logging.getLogger(__name__)

DIAL_S = 2.0
REDIAL_S = (0.02, 1.0)
HELLO_S = 5.0
PING_S = 0.1
GONE_S = 0.3  # how long an in-sync copy may be without a connection
SLOW_S = 1.0  # how long it may hold nothing more although there is more
RETRY_S = 0.05
TICK_S = 10.0
CHECK_SHARE = 100  # digests take at most one in so many seconds
COMMIT_TOLD_S = 0.005  # after which backups learn what is committed although there is nothing new
PART = 1 << 20
MAX_CLIENTS = 1000
MAX_WAITING = 50_000  # calls that are not acknowledged yet, of all clients
MAX_WAITING_BYTES = 64 << 20


@frozen
class Settings:
    """How the object is kept. `min_in_sync`: with fewer copies updates are refused. `fast`: a lease proves nothing."""

    app: str
    min_in_sync: int = 1
    fast: bool = False
    checks: bool = True


@define
class Peer:
    """Another copy, as the primary sees it. `sent`: the last record that is on its way."""

    copy: Copy
    connection: Connection | None = None
    sent: int = 0
    told: int = 0  # the last commit that it was told
    gone_at: float | None = None  # since when it has no connection
    behind_at: float | None = None  # since when it has held nothing more
    task: asyncio.Task[None] | None = None


@define
class Waiting:
    """Answers that wait for a record to be committed."""

    index: int
    connection: Connection
    message: Results | Answers
    calls: int = field(default=0)
    size: int = field(default=0)


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
        self.machine = machine
        self.address = ""
        self.primary: PrimaryLog | None = None  # while this copy is primary and serves
        self.backup = BackupLog(machine)
        self._incarnation = incarnation
        self._host = host
        self._line = line
        self._fail = fail
        self._clock = clock
        self._epoch = 0
        self._revision = 0  # of the in-sync set in etcd
        self._recorded: Members | None = None
        self._copies: list[Copy] = []
        self._copies_known = False
        self._absent: dict[int, float] = {}  # in-sync copies that etcd does not show: since when
        self._peers: dict[int, Peer] = {}
        self._clients: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._waiting: deque[Waiting] = deque()
        self._waiting_calls = 0
        self._waiting_bytes = 0
        self._flushing = False
        self._telling = False
        self._applying = False
        self._touched = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._digests: dict[int, bytes] = {}
        self._fresh_at: float | None = None  # the state is no older than this
        self._pings: deque[tuple[int, float]] = deque()
        self._above: Connection | None = None  # the primary's connection to us

    async def start(self, host: str, port: int = 0) -> str:
        """Listen; return HOST:PORT. Raises OSError."""
        self._server = await asyncio.get_running_loop().create_server(self._accept, host, port)
        port = self._server.sockets[0].getsockname()[1]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._spawn(self._tick())
        return self.address

    async def stop(self) -> None:
        """Hang up on everybody."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        for peer in self._peers.values():
            if peer.task is not None:
                peer.task.cancel()
            if peer.connection is not None:
                peer.connection.close()
        for connection in [*self._clients, *([self._above] if self._above else [])]:
            connection.close("this copy ends")
        await asyncio.sleep(0)

    # --- what the WatchDog says ------------------------------------------------------------------------------------

    def become(self, epoch: int, *, primary: bool) -> None:
        """Take a role. A primary never becomes a backup again: its process ends."""
        self._epoch = max(self._epoch, epoch)
        if primary and self.primary is None:
            self.backup.fence(epoch)
            self._spawn(self._reign(epoch))

    def see(self, copies: Iterable[Copy]) -> None:
        """Learn which copies there are."""
        self._copies = [copy for copy in copies if copy.incarnation != self._incarnation]
        self._copies_known = True
        self._dial_all()
        self._touched.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if not isinstance(error, EtcdReplicaError):
                log.error("%s: a bug ended this copy", self.settings.app, exc_info=error)
                error = ObjectError(f"a bug ended this copy: {type(error).__name__}: {error}")
            self._fail(error)

    # --- connections -----------------------------------------------------------------------------------------------

    def _accept(self) -> Connection:
        connection = Connection(polite=True)
        hasty = asyncio.get_running_loop().call_later(HELLO_S, connection.close, "no hello in time")

        def first(message: Message, _: bytes) -> None:
            hasty.cancel()
            if not isinstance(message, Hello | Follow) or message.version != VERSION or message.app != self.settings.app:
                connection.send(Refuse(f"this is {self.settings.app}, and it speaks version {VERSION}"))
                connection.close("no hello")
            elif isinstance(message, Follow):
                self._follow(connection, message)
            elif len(self._clients) >= MAX_CLIENTS:
                connection.send(Refuse(f"{self.settings.app} has {MAX_CLIENTS} clients already"))
                connection.close("too many clients")
            else:
                self._clients.add(connection)
                connection.on_lost = lambda _: self._clients.discard(connection)
                connection.on_message = lambda message, body: self._on_client(connection, message, body)
                connection.send(self._standing)

        connection.on_message = first
        return connection

    @property
    def _standing(self) -> Standing:
        methods = {name: method.kind for name, method in self.machine.methods.items()}
        return Standing(self._epoch, self.primary is not None, methods)

    def _on_client(self, connection: Connection, message: Message, body: bytes) -> None:
        if isinstance(message, Calls):
            self._on_calls(connection, message, body)
        elif isinstance(message, Asks):
            self._on_asks(connection, message)
        else:
            raise ProtocolError(f"a client sent {type(message).__name__}")

    # --- updates ---------------------------------------------------------------------------------------------------

    def _on_calls(self, connection: Connection, message: Calls, body: bytes) -> None:
        primary = self.primary
        if primary is None or (code := self._refusal(primary, len(message.calls), len(body))):
            code = NOT_PRIMARY if primary is None else code
            connection.send(Results([(number, code, NOTHING) for number, *_ in message.calls]))
            return
        accepted = [call for call in message.calls if self.machine.accepts(call, UPDATE)]
        if len(accepted) < len(message.calls):
            known = {call[0] for call in accepted}
            connection.send(Results([(n, NO_METHOD, NOTHING) for n, *_ in message.calls if n not in known]))
            if not accepted:
                return
            message = Calls(message.session, message.new, message.below, accepted)
            body = encode_value(message)
        self._log(record_of(CALLS, self._now(), body), connection, message)

    def _refusal(self, primary: PrimaryLog, calls: int, size: int) -> int:
        if len(primary.in_sync) < self.settings.min_in_sync:
            return TOO_FEW
        full = self._waiting_calls + calls > MAX_WAITING or self._waiting_bytes + size > MAX_WAITING_BYTES
        return OVERLOADED if full and self._waiting else 0

    def _log(self, record: bytes, connection: Connection | None = None, message: Calls | None = None) -> None:
        assert self.primary is not None
        index = self.primary.log.append(record)
        results = self.machine.apply(record, message)
        if connection is not None and message is not None:
            self._wait(Waiting(index, connection, Results(results), len(message.calls), len(record)))
        self._flush_soon()

    def _wait(self, waiting: Waiting) -> None:
        self._waiting.append(waiting)
        self._waiting_calls += waiting.calls
        self._waiting_bytes += waiting.size

    def _now(self) -> float:
        return max(time.time(), self.machine.time)

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Send what is new to the copies, and the answers that are acknowledged."""
        self._flushing = False
        primary = self.primary
        if primary is None:
            return
        primary.ack(primary.me, primary.log.last)
        for peer in self._peers.values():
            self._pump(peer)
        self._answer()

    def _answer(self) -> None:
        assert self.primary is not None
        waiting, commit = self._waiting, self.primary.commit
        while waiting and waiting[0].index <= commit:
            done = waiting.popleft()
            self._waiting_calls -= done.calls
            self._waiting_bytes -= done.size
            self._reply(done.connection, done.message)

    def _reply(self, connection: Connection, message: Results | Answers) -> None:
        try:
            connection.send(message)
        except ProtocolError:  # too long together, or alone
            for result in message.results:
                with contextlib.suppress(ProtocolError):
                    connection.send(type(message)([result]))

    # --- queries ---------------------------------------------------------------------------------------------------

    def _on_asks(self, connection: Connection, message: Asks) -> None:
        primary = self.primary
        if primary is not None:
            if self.settings.fast and message.max_age is None:  # the others must say that none of them is primary
                self._log(record_of(BARRIER, self._now()))
            answers = Answers([self.machine.ask(call) for call in message.calls])
            self._wait(Waiting(primary.log.last, connection, answers))
            if primary.log.last <= primary.commit:
                self._answer()
        elif message.max_age is None:
            connection.send(Answers([(number, NOT_PRIMARY, NOTHING) for number, *_ in message.calls]))
        elif self._fresh_at is None or self._clock() - self._fresh_at > message.max_age:
            connection.send(Answers([(number, TOO_OLD, NOTHING) for number, *_ in message.calls]))
        else:
            self._reply(connection, Answers([self.machine.ask(call) for call in message.calls]))

    # --- as primary ------------------------------------------------------------------------------------------------

    async def _reign(self, epoch: int) -> None:
        """Become primary: with the in-sync set that stands in etcd, less the primary that is dead."""
        members = await self._members() if self._line is not None else Members(0, 0, 0, {})
        if self.primary is not None:
            return
        known = frozenset(members.hosts)
        if members.primary != self._incarnation:
            known -= {members.primary}
        if self.machine.instance is None and self._incarnation in known:
            raise ObjectError("this copy is in sync by what stands in etcd, but has no state")
        if known and self._incarnation not in known:
            log.error("%s: every in-sync copy was lost; what they had acknowledged last may be missing", self.settings.app)
            known = frozenset()
        if self._above is not None:
            self._above.close("this copy is primary now")
            self._above = None
        self.backup.apply_all()
        if self.machine.instance is None:
            self.machine.begin(self._now())
        self._revision, self._recorded = members.revision, members
        self.primary = PrimaryLog(self._incarnation, known, self.backup.log, self.backup.commit)
        self.primary.advance()
        for client in self._clients:
            client.send(self._standing)
        self._dial_all()
        if self._line is not None:
            self._spawn(self._keep_members())

    async def _members(self) -> Members:
        assert self._line is not None
        while True:
            try:
                return await self._line.members()
            except ObjectError as error:
                log.warning("%s: the in-sync set cannot be read yet: %s", self.settings.app, error)
                await asyncio.sleep(RETRY_S)

    def _dial_all(self) -> None:
        if self.primary is None:
            return
        there = {copy.incarnation: copy for copy in self._copies if copy.serves}
        for incarnation, peer in list(self._peers.items()):
            if incarnation not in there:
                del self._peers[incarnation]
                self._drop(peer, "it is gone")
        for incarnation, copy in there.items():
            if incarnation not in self._peers:
                peer = self._peers[incarnation] = Peer(copy, gone_at=self._clock())
                peer.task = self._spawn(self._lead(peer))

    def _drop(self, peer: Peer, why: str) -> None:
        if peer.task is not None:
            peer.task.cancel()
        if peer.connection is not None:
            peer.connection.close(why)

    async def _lead(self, peer: Peer) -> None:
        """Keep a copy following."""
        delay = REDIAL_S[0]
        while True:
            began = self._clock()
            try:
                await self._lead_once(peer)
            except (OSError, TimeoutError, ObjectError, ProtocolError) as error:
                log.info("%s: the copy on %s does not follow: %s", self.settings.app, peer.copy.host, error)
            if self._clock() - began > REDIAL_S[1]:
                delay = REDIAL_S[0]
            await asyncio.sleep(delay)
            delay = min(REDIAL_S[1], 2 * delay)

    async def _lead_once(self, peer: Peer) -> None:
        primary, copy = self.primary, peer.copy.incarnation
        assert primary is not None
        assert peer.copy.serves is not None
        connection = await dial(peer.copy.serves, DIAL_S)
        lost = asyncio.get_running_loop().create_future()
        connection.on_lost = lambda why: None if lost.done() else lost.set_result(why)
        position: asyncio.Future[Position] = asyncio.get_running_loop().create_future()

        def first(message: Message, _: bytes) -> None:
            if isinstance(message, Position):
                if not position.done():
                    position.set_result(message)
            elif isinstance(message, Refuse):
                connection.close(message.reason)
            else:
                raise ProtocolError(f"a copy answered with {type(message).__name__}")

        connection.on_message = first
        try:
            connection.send(Follow(VERSION, self.settings.app, self._epoch, primary.me))
            async with asyncio.timeout(DIAL_S):
                await asyncio.wait((lost, position), return_when=asyncio.FIRST_COMPLETED)
            if not position.done():
                raise ObjectError(lost.result())
            if position.result().incarnation != copy:
                raise ObjectError("another copy answers at its address")
            connection.on_message = lambda message, _: self._on_copy(peer, message)
            await self._bring_up(peer, connection, position.result())
            peer.connection, peer.gone_at, peer.behind_at = connection, None, None
            connection.on_resumed = lambda: self._pump(peer)
            self._pump(peer)
            raise ObjectError(await lost)
        finally:
            if peer.connection is connection:
                peer.connection, peer.gone_at = None, self._clock()
            primary.gone(copy)
            connection.close("this copy leads no longer")
            self._touched.set()

    async def _bring_up(self, peer: Peer, connection: Connection, position: Position) -> None:
        """Give a copy what it has not: the records after those it has applied, or else a snapshot."""
        primary, epoch = self.primary, self._epoch
        assert primary is not None
        log_ = primary.log
        if position.history == self.machine.history and log_.first <= position.applied + 1 <= log_.last + 1:
            until, at = log_.last, position.applied + 1
            while True:
                records = log_.batch(at)
                connection.send(Records(epoch, at, records, primary.commit, until))
                at += len(records)
                if at > until:
                    peer.sent = at - 1
                    return
                await connection.drained()
        data, index = self.machine.snapshot(), self.machine.index
        log.info("%s: the copy on %s gets a snapshot of %d bytes", self.settings.app, peer.copy.host, len(data))
        for at in range(0, len(data), PART):
            connection.send(Part(epoch, at, len(data), data[at : at + PART]))
            await connection.drained()
        if log_.first > index + 1:
            raise ObjectError("it was too slow to take the snapshot")
        peer.sent = index

    def _pump(self, peer: Peer) -> None:
        """Send a copy what is new, unless it does not read."""
        primary, connection = self.primary, peer.connection
        if primary is None or connection is None:
            return
        if peer.sent + 1 < primary.log.first:
            connection.close("it is too far behind")
            return
        while not connection.paused and peer.sent < primary.log.last:
            records = primary.log.batch(peer.sent + 1)
            connection.send(Records(self._epoch, peer.sent + 1, records, primary.commit, -1))
            peer.sent += len(records)
            peer.told = primary.commit
        if peer.behind_at is None and peer.sent > primary.acked.get(peer.copy.incarnation, 0):
            peer.behind_at = self._clock()

    def _tell_commit(self) -> None:
        self._telling = False
        primary = self.primary
        assert primary is not None
        for peer in self._peers.values():
            connection = peer.connection
            if connection is not None and peer.told < primary.commit and not connection.paused:
                connection.send(Records(self._epoch, peer.sent + 1, [], primary.commit, -1))
                peer.told = primary.commit

    def _on_copy(self, peer: Peer, message: Message) -> None:
        primary = self.primary
        if primary is None:
            return
        if isinstance(message, Ack):
            if message.epoch != self._epoch:
                return
            more = primary.ack(peer.copy.incarnation, message.index)
            peer.behind_at = None if message.index >= peer.sent else self._clock()
            if more:
                self._answer()
                if not self._telling:
                    self._telling = True
                    asyncio.get_running_loop().call_later(COMMIT_TOLD_S, self._tell_commit)
            if peer.copy.incarnation not in primary.in_sync:
                self._touched.set()
        elif isinstance(message, Ping):
            if peer.connection is not None:
                peer.connection.send(Pong(message.number, primary.commit))
        elif isinstance(message, Digest):
            self._compare(peer, message)
        elif isinstance(message, Refuse):
            log.info("%s: the copy on %s refuses: %s", self.settings.app, peer.copy.host, message.reason)
        else:
            raise ProtocolError(f"a copy sent {type(message).__name__}")

    def _compare(self, peer: Peer, message: Digest) -> None:
        ours = self._digests.get(message.index)
        if ours is None or ours == message.digest or peer.connection is None:
            return
        log.error("%s: the state of the copy on %s is not that of the primary", self.settings.app, peer.copy.host)
        reason = (
            f"its state differs from the primary's after record {message.index}: an update does not depend on its "
            "arguments and the state alone (a clock, random numbers, the order of a set?)"
        )
        peer.connection.send(Refuse(reason, diverged=True))

    # --- the in-sync set -------------------------------------------------------------------------------------------

    async def _keep_members(self) -> None:
        """Have the in-sync set follow what the copies do."""
        while self.primary is not None:
            self._touched.clear()
            wanted, look_again_s = self._wanted()
            if wanted is not None:
                await self._change(wanted)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(look_again_s):
                    await self._touched.wait()

    def _wanted(self) -> tuple[frozenset[int] | None, float | None]:
        """Return what the set should become, None if it is that; and when to look again in any case."""
        primary, now = self.primary, self._clock()
        assert primary is not None
        wanted, looks = {primary.me}, [SLOW_S] if primary.in_sync != {primary.me} else []
        for copy in primary.in_sync - {primary.me}:
            left = self._patience(copy, now)
            if left > 0:
                wanted.add(copy)
                looks.append(left)
        wanted |= {copy for copy, peer in self._peers.items() if peer.connection is not None and primary.may_join(copy)}
        recorded = self._recorded
        settled = (
            recorded is not None
            and recorded.primary == primary.me
            and recorded.epoch == self._epoch
            and wanted == primary.in_sync
            and not primary.changing
        )
        return (None if settled else frozenset(wanted)), min(looks, default=None)

    def _patience(self, copy: int, now: float) -> float:
        """Return for how long an in-sync copy is waited for, as it is."""
        peer = self._peers.get(copy)
        if peer is None:  # its key in etcd is gone, or we do not know yet which there are
            return GONE_S - (now - self._absent.setdefault(copy, now)) if self._copies_known else GONE_S
        self._absent.pop(copy, None)
        if peer.connection is None:
            return GONE_S - (now - (peer.gone_at or now))
        return SLOW_S if peer.behind_at is None else SLOW_S - (now - peer.behind_at)

    async def _change(self, wanted: frozenset[int]) -> None:
        primary, line = self.primary, self._line
        assert primary is not None
        assert line is not None
        hosts = {copy: peer.copy.host for copy, peer in self._peers.items()} | {primary.me: self._host}
        known = self._recorded.hosts if self._recorded is not None else {}
        primary.change(wanted)
        try:
            members = [(hosts.get(copy) or known[copy], copy) for copy in sorted(wanted)]
            revision = await line.change(self._revision, members)
        except ObjectError as error:
            log.info("%s: the in-sync set is not changed yet: %s", self.settings.app, error)
            await asyncio.sleep(RETRY_S)
            members_now = await self._members()
            if members_now.epoch > self._epoch:
                raise ObjectError(f"epoch {self._epoch} is over: there is a primary of epoch {members_now.epoch}") from None
            self._revision, self._recorded = members_now.revision, members_now
            if not isinstance(error, MembersUnknownError):
                ours = members_now.primary == primary.me
                in_sync = frozenset(members_now.hosts) - (frozenset() if ours else {members_now.primary})
                if primary.changed(in_sync if members_now.revision else {primary.me}):
                    self._answer()
            return
        left = primary.in_sync - wanted
        self._revision = revision
        self._recorded = Members(revision, self._epoch, primary.me, {copy: host for host, copy in members})
        if left:
            log.warning("%s: not in sync any more: %s", self.settings.app, ", ".join(known.get(c, str(c)) for c in left))
        if primary.changed(wanted):
            self._answer()

    # --- as backup -------------------------------------------------------------------------------------------------

    def _follow(self, connection: Connection, message: Follow) -> None:
        """Another copy says that it is primary."""
        if self.primary is not None or not self.backup.fence(message.epoch):
            connection.send(Refuse(f"epoch {message.epoch} is over: this copy knows of {max(self._epoch, self.backup.epoch)}"))
            connection.close("an older epoch")
            return
        if self._above is not None:
            self._above.close("another primary")
        self._above = connection
        self._epoch = max(self._epoch, message.epoch)
        connection.on_message = lambda message, _: self._on_above(connection, message)
        connection.on_lost = lambda _: self._lost_above(connection)
        connection.send(self.backup.position(self._incarnation))

    def _lost_above(self, connection: Connection) -> None:
        if self._above is connection:
            self._above = None

    def _on_above(self, connection: Connection, message: Message) -> None:
        if self._above is not connection or self.primary is not None:
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
            elif isinstance(message, Refuse):
                raise DivergedError(message.reason) if message.diverged else ProtocolError(message.reason)
            else:
                raise ProtocolError(f"a primary sent {type(message).__name__}")
        except (DivergedError, CheckpointError, UsageError) as error:
            connection.close(str(error))
            self._fail(error)

    def _apply(self, connection: Connection) -> None:
        self._applying = False
        if self.primary is not None:
            return
        try:
            for index in self.backup.apply_committed():
                connection.send(Digest(index, self.machine.digest()))
        except DivergedError as error:
            connection.close(str(error))
            self._fail(error)

    def _on_pong(self, message: Pong) -> None:
        while self._pings and self._pings[0][0] <= message.number:
            number, asked_at = self._pings.popleft()
            if number == message.number and self.machine.index >= message.commit:
                self._fresh_at = asked_at

    # --- now and then ----------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        number, ticked_at, check_at, checked = 0, self._clock(), self._clock() + 1.0, 0
        while True:
            await asyncio.sleep(PING_S)
            now = self._clock()
            if self.primary is None:
                if self._above is not None:
                    number += 1
                    self._pings.append((number, now))
                    self._above.send(Ping(number))
                continue
            if now >= ticked_at + TICK_S and self.machine.sessions:
                ticked_at = now
                self._log(record_of(TICK, self._now()))
            if self.settings.checks and now >= check_at and self.machine.index > checked:
                checked = self._check()
                check_at = now + max(TICK_S, CHECK_SHARE * (self._clock() - now))

    def _check(self) -> int:
        """Have every copy say what its state amounts to; return the index. Raises UsageError for a state that is not kept."""
        self.machine.check_state()
        self._log(record_of(CHECK, self._now()))
        self._digests = {**dict(list(self._digests.items())[-9:]), self.machine.index: self.machine.digest()}
        return self.machine.index
