"""What a copy does for the others while it is primary: it has them take over its log, and keeps the in-sync set.

It connects to every copy that etcd shows. One that has all there is joins the set, one that is gone or too slow leaves it, by
transactions of the WatchDog; nothing is acknowledged meanwhile that either set might miss.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from functools import partial

from attrs import define, frozen

from etcdreplica.clock import Clock
from etcdreplica.errors import EtcdReplicaError, ObjectError, ProtocolError, UsageError
from etcdreplica.objects.backup import BackupLog
from etcdreplica.objects.connection import Connection, dial
from etcdreplica.objects.copies import Copy, Members, WatchDogLine
from etcdreplica.objects.disk import DiskLog
from etcdreplica.objects.machine import Machine
from etcdreplica.objects.primary import PrimaryLog
from etcdreplica.objects.tasks import Tasks
from etcdreplica.objects.wire import VERSION, Ack, Digest, Follow, Message, Part, Ping, Pong, Position, Records, Refuse

log = logging.getLogger(__name__)

DIAL_S = 2.0
REDIAL_S = (0.02, 1.0)
GONE_S = 0.3  # how long an in-sync copy may be without a connection
SLOW_S = 1.0  # how long it may hold nothing more although there is more
RETRY_S = 0.05
COMMIT_TOLD_S = 0.005  # after which copies learn what is committed although there is nothing new
PART = 1 << 20
DIGEST_PATIENCE = 10  # how much longer another copy may take for it than this one
DIGESTS = 10  # that are remembered, for copies that are behind


@frozen
class Me:
    """Which copy this is."""

    app: str
    host: str
    incarnation: int
    clock: Clock


@define
class Peer:
    """Another copy. `sent`: the last record that is on its way; `told`: the last commit that it knows of."""

    copy: Copy
    connection: Connection | None = None
    sent: int = 0
    told: int = 0
    gone_at: float | None = None  # since when it has no connection
    behind_at: float | None = None  # since when it has not held record `due`
    due: int = 0
    task: asyncio.Task[None] | None = None


class Leading:
    """One epoch. `log` has what is replicated; call `flush` when something was added to it, and `see` when copies come or go.

    `members` stood in etcd when this copy became primary. `on_commit` is called when more is acknowledged.
    """

    def __init__(
        self,
        me: Me,
        epoch: int,
        machine: Machine,
        backup: BackupLog,
        members: Members,
        line: WatchDogLine | None,
        tasks: Tasks,
        on_commit: Callable[[], None],
        disk: DiskLog | None = None,
        min_in_sync: int = 1,
    ) -> None:
        self.epoch = epoch
        self._me = me
        self._machine = machine
        self._line = line
        self._tasks = tasks
        self._on_commit = on_commit
        self._disk = disk
        self._written = backup.log.last  # what the disk has, or was asked to have
        self._recorded = members
        self._hosts = dict(members.hosts)
        self.log = PrimaryLog(me.incarnation, survivors(me, members), backup.log, backup.commit, min_in_sync)
        self.log.advance()
        self._copies_known = False
        self._absent: dict[int, float] = {}  # in-sync copies that etcd does not show: since when
        self._peers: dict[int, Peer] = {}
        self._touched = asyncio.Event()
        self._telling = False
        self._digests: dict[int, bytes] = {}
        self._digesting_until = 0.0

    def start(self, copies: Iterable[Copy] | None) -> None:
        """Begin; `copies` as far as they are known."""
        if copies is not None:
            self.see(copies)
        if self._line is not None:
            self._tasks.spawn(self._keep_members(self._line))

    def stop(self) -> None:
        """Hang up."""
        for peer in self._peers.values():
            self._drop(peer, "this copy ends")

    def flush(self) -> None:
        """Send the copies what is new, and have it written."""
        for peer in self._peers.values():
            self._pump(peer)
        if self._disk is None:
            self._hold(self.log.log.last)
            return
        while self._written < self.log.log.last:
            first, records = self._written + 1, self.log.log.batch(self._written + 1)
            self._written += len(records)
            self._disk.append(first, records, partial(self._hold, self._written))

    def _hold(self, index: int) -> None:
        if self.log.ack(self._me.incarnation, index):
            self._on_commit()

    def expect_digest(self, index: int, digest: bytes, took_s: float) -> None:
        """Every copy must have this state after that record. Finding out takes them a while, as it took this one."""
        self._digests[index] = digest
        self._digesting_until = self._me.clock() + DIGEST_PATIENCE * took_s
        while len(self._digests) > DIGESTS:
            del self._digests[min(self._digests)]

    # --- copies ----------------------------------------------------------------------------------------------------

    def see(self, copies: Iterable[Copy]) -> None:
        """Learn which other copies there are."""
        self._copies_known = True
        there = {copy.incarnation: copy for copy in copies if copy.serves and copy.incarnation != self._me.incarnation}
        for incarnation in self._peers.keys() - there.keys():
            self._drop(self._peers.pop(incarnation), "it is gone")
        for incarnation in there.keys() - self._peers.keys():
            self._hosts[incarnation] = there[incarnation].host
            peer = self._peers[incarnation] = Peer(there[incarnation], gone_at=self._me.clock())
            peer.task = self._tasks.spawn(self._lead(peer))
        self._touched.set()

    def _drop(self, peer: Peer, why: str) -> None:
        if peer.task is not None:
            peer.task.cancel()
        if peer.connection is not None:
            peer.connection.close(why)

    async def _lead(self, peer: Peer) -> None:
        """Keep a copy following."""
        delay = REDIAL_S[0]
        while True:
            began = self._me.clock()
            try:
                await self._lead_once(peer)
            except UsageError as error:
                log.error("%s: the copy on %s cannot have a snapshot: %s", self._me.app, peer.copy.host, error)
            except (OSError, TimeoutError, EtcdReplicaError) as error:
                log.info("%s: the copy on %s does not follow: %s", self._me.app, peer.copy.host, error)
            if self._me.clock() - began > REDIAL_S[1]:
                delay = REDIAL_S[0]
            await asyncio.sleep(delay)
            delay = min(REDIAL_S[1], 2 * delay)

    async def _lead_once(self, peer: Peer) -> None:
        """Have a copy take over the log, and follow until its connection is lost. Raises OSError, TimeoutError, ObjectError."""
        loop, copy = asyncio.get_running_loop(), peer.copy
        assert copy.serves is not None
        connection = await dial(copy.serves, DIAL_S)
        lost: asyncio.Future[str] = loop.create_future()
        position: asyncio.Future[Position] = loop.create_future()
        connection.on_lost = lambda why: None if lost.done() else lost.set_result(why)

        def first(message: Message, _: bytes) -> None:
            if isinstance(message, Refuse):
                connection.close(message.reason)
            elif not isinstance(message, Position):
                raise ProtocolError(f"a copy answered with {type(message).__name__}")
            elif not position.done():
                position.set_result(message)

        connection.on_message = first
        try:
            connection.send(Follow(VERSION, self._me.app, self.epoch, self._me.incarnation))
            async with asyncio.timeout(DIAL_S):
                await asyncio.wait((lost, position), return_when=asyncio.FIRST_COMPLETED)
            if not position.done():
                raise ObjectError(lost.result())
            if position.result().incarnation != copy.incarnation:
                raise ObjectError("another copy answers at its address")
            connection.on_message = lambda message, _: self._on_copy(peer, connection, message)
            peer.sent = await self._bring_up(copy, connection, position.result())
            peer.connection, peer.gone_at, peer.behind_at, peer.told = connection, None, None, 0
            connection.on_resumed = lambda: self._pump(peer)
            self._pump(peer)
            raise ObjectError(await lost)
        finally:
            if peer.connection is connection:
                peer.connection, peer.gone_at = None, self._me.clock()
            self.log.gone(copy.incarnation)
            connection.close("this copy leads it no longer")
            self._touched.set()

    async def _bring_up(self, copy: Copy, connection: Connection, position: Position) -> int:
        """Give a copy what it has not: the records after those it has applied, or a snapshot. Return how far that goes."""
        records, at = self.log.log, position.applied + 1
        if position.history == self._machine.history and records.first <= at <= records.last + 1:
            until = records.last
            while True:
                if at < records.first:
                    raise ObjectError("it was too slow: what it lacks is not kept any more")
                batch = records.batch(at)
                connection.send(Records(self.epoch, at, batch, self.log.commit, until))
                at += len(batch)
                if at > until:
                    return at - 1
                await connection.drained()
        data, index = self._machine.snapshot(), self._machine.index
        log.info("%s: the copy on %s gets a snapshot of %d bytes", self._me.app, copy.host, len(data))
        for at in range(0, len(data), PART):
            connection.send(Part(self.epoch, at, len(data), data[at : at + PART]))
            await connection.drained()
        return index

    def _pump(self, peer: Peer) -> None:
        """Send a copy what is new, unless it does not read."""
        records, connection = self.log.log, peer.connection
        if connection is None:
            return
        if peer.sent + 1 < records.first:
            connection.close("it is too far behind")
            return
        while not connection.paused and peer.sent < records.last:
            batch = records.batch(peer.sent + 1)
            connection.send(Records(self.epoch, peer.sent + 1, batch, self.log.commit, -1))
            peer.sent += len(batch)
            peer.told = self.log.commit
        connection.flush()
        if peer.behind_at is None and self.log.acked.get(peer.copy.incarnation, -1) < records.last:
            peer.behind_at, peer.due = self._me.clock(), records.last

    def _on_copy(self, peer: Peer, connection: Connection, message: Message) -> None:
        if isinstance(message, Ack):
            self._on_ack(peer, message)
        elif isinstance(message, Ping):
            connection.send(Pong(message.number, self.log.commit))
        elif isinstance(message, Digest):
            ours = self._digests.get(message.index)
            if ours not in (None, message.digest):
                log.error("%s: the state of the copy on %s is not that of the primary", self._me.app, peer.copy.host)
                connection.send(Refuse(f"its state differs from the primary's after record {message.index}", diverged=True))
        elif isinstance(message, Refuse):
            connection.close(message.reason)
        else:
            raise ProtocolError(f"a copy sent {type(message).__name__}")

    def _on_ack(self, peer: Peer, message: Ack) -> None:
        if message.epoch != self.epoch:
            return
        copy = peer.copy.incarnation
        more = self.log.ack(copy, message.index)
        if message.index >= self.log.log.last:
            peer.behind_at = None
        elif message.index >= peer.due:
            peer.behind_at, peer.due = self._me.clock(), self.log.log.last
        if more:
            self._on_commit()
            if not self._telling:
                self._telling = True
                asyncio.get_running_loop().call_later(COMMIT_TOLD_S, self._tell_commit)
        if copy not in self.log.in_sync:
            self._touched.set()

    def _tell_commit(self) -> None:
        self._telling = False
        for peer in self._peers.values():
            connection = peer.connection
            if connection is not None and peer.told < self.log.commit and not connection.paused:
                connection.send(Records(self.epoch, peer.sent + 1, [], self.log.commit, -1))
                peer.told = self.log.commit

    # --- the in-sync set -------------------------------------------------------------------------------------------

    async def _keep_members(self, line: WatchDogLine) -> None:
        """Have the in-sync set follow what the copies do."""
        while True:
            self._touched.clear()
            wanted, look_again_s = self._wanted()
            if not self._is_settled(wanted):
                await self._change(line, wanted)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(look_again_s):
                    await self._touched.wait()

    def _wanted(self) -> tuple[frozenset[int], float | None]:
        """Return what the set should become, and when to look again in any case."""
        now, wanted, looks = self._me.clock(), {self._me.incarnation}, []
        for copy in self.log.in_sync - wanted:
            left = self._patience_s(copy, now)
            if left > 0:
                wanted.add(copy)
                looks.append(left)
        wanted |= {copy for copy, peer in self._peers.items() if peer.connection is not None and self.log.may_join(copy)}
        return frozenset(wanted), min(looks, default=None)

    def _is_settled(self, wanted: frozenset[int]) -> bool:
        recorded = self._recorded
        ours = recorded.primary == self._me.incarnation and recorded.epoch == self.epoch
        return ours and wanted == self.log.in_sync and not self.log.changing

    def _patience_s(self, copy: int, now: float) -> float:
        """Return for how long an in-sync copy is waited for, as it is."""
        peer = self._peers.get(copy)
        if peer is None:  # its key in etcd is gone, or we do not know yet which there are
            return GONE_S - (now - self._absent.setdefault(copy, now)) if self._copies_known else GONE_S
        self._absent.pop(copy, None)
        if peer.connection is None:
            return GONE_S - (now - (peer.gone_at or now))
        if peer.behind_at is None:
            return SLOW_S
        return max(SLOW_S - (now - peer.behind_at), self._digesting_until - now)

    async def _change(self, line: WatchDogLine, wanted: frozenset[int]) -> None:
        hosts = {**self._hosts, self._me.incarnation: self._me.host}
        members = {copy: hosts[copy] for copy in sorted(wanted)}
        based_on = self._recorded.revision
        self.log.change(wanted)
        try:
            revision = await line.change(based_on, [(host, copy) for copy, host in members.items()])
        except ObjectError as error:
            log.info("%s: the in-sync set is not changed yet: %s", self._me.app, error)
            await asyncio.sleep(RETRY_S)
            await self._reread(line, based_on)
            return
        for copy in self.log.in_sync - wanted:
            log.warning("%s: the copy on %s is not in sync any more", self._me.app, hosts.get(copy, "?"))
        self._recorded = Members(revision, self.epoch, self._me.incarnation, members)
        if self.log.changed(wanted):
            self._on_commit()

    async def _reread(self, line: WatchDogLine, based_on: int) -> None:
        """Learn what stands in etcd after a change did not succeed, or we do not know.

        Once the revision that it was based on is over, neither it nor an earlier one can happen any more. A refusal alone does
        not say so: the WatchDog may refuse a change while an earlier one, which we wait for no longer, is under way.
        """
        members = self._recorded = await read_members(self._me, line)
        self._hosts.update(members.hosts)
        if members.epoch > self.epoch:
            raise ObjectError(f"epoch {self.epoch} is over: there is a primary of epoch {members.epoch}")
        if members.revision != based_on and self.log.changed(survivors(self._me, members)):
            self._on_commit()


async def read_members(me: Me, line: WatchDogLine) -> Members:
    """Read the in-sync set, however long that takes."""
    while True:
        try:
            return await line.members()
        except ObjectError as error:
            log.warning("%s: the in-sync set cannot be read yet: %s", me.app, error)
            await asyncio.sleep(RETRY_S)


def survivors(me: Me, members: Members) -> frozenset[int]:
    """Return which copies of the set there may still be when `me` is primary: an earlier primary is dead.

    Empty if `me` is not among them: then a manager has found that none of them is left.
    """
    found = frozenset(members.hosts) - (frozenset() if members.primary == me.incarnation else {members.primary})
    return found if me.incarnation in found else frozenset()
