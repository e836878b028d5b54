"""The CheckpointServer of a host.

It stores what the applications of its host hand over, has the other hosts of their seats hold it too, and gives it back to
whoever is primary next. It learns from etcd which applications have a seat here (their placements) and where its peers are.
Nothing is held in memory alone: it can be killed at any moment, and goes on with what is on the disk and in etcd.

Limits: the size of a state is limited by memory on the application's host, which holds it twice while it is handed over.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from attrs import evolve

import etcdreplica
from etcdreplica.app.protocol import STATE_NAME, Message, checkpoint_socket
from etcdreplica.app.state import SEALS
from etcdreplica.checkpoint.bandwidth import Bandwidth
from etcdreplica.checkpoint.exchange import MAX_SIZE, ExchangeServer
from etcdreplica.checkpoint.files import Files, Stored
from etcdreplica.checkpoint.format import CHUNK, Manifest, chunk_count, digests
from etcdreplica.checkpoint.holding import Context, Holding, Source
from etcdreplica.checkpoint.peers import INLINE, Peers
from etcdreplica.checkpoint.reign import Reign, Waiter
from etcdreplica.clock import Clock, boottime
from etcdreplica.daemon.addresses import advertised
from etcdreplica.daemon.app_server import AppConnection, AppServer
from etcdreplica.daemon.settings import NodeSettings
from etcdreplica.daemon.status_page import open_memory
from etcdreplica.daemon.waiting import insist
from etcdreplica.errors import CheckpointError, ProtocolError, StoreError
from etcdreplica.model import Server, Stamp
from etcdreplica.store import Corrupt, Exists, Key, Kind, Lease, Put, Snapshot, Store, Txn
from etcdreplica.words import Role, check_name

log = logging.getLogger(__name__)

SEATED_S = 5.0  # how long an application may be quicker than the news of its placement
LEFT_S = 0.5  # the same where its seat has just been given up
RETRY_S = 0.5
LARGE_NICE = 10
SPLIT = 4  # parts of a large state whose digests are computed at once
TIDY_S = 600.0  # how often checkpoints of removed applications are looked for
ORPHANED_S = 7 * 86400.0  # those that were not seen to be removed stay for so long: etcd may have lost its data


class CheckpointServer:
    """One host's. `run` serves until cancelled."""

    def __init__(self, settings: NodeSettings, store: Store, clock: Clock = boottime) -> None:
        self._settings = settings
        self._store = store
        self._clock = clock
        self._damaged: dict[str, str] = {}
        self._announce = asyncio.Event()
        files = Files(settings.state_dir / "checkpoints" / settings.cluster, settings.checkpoint_keep, self._on_damage)
        self._context = Context(
            settings.host,
            store,
            files,
            Peers(settings.peer_tls),
            clock,
            ThreadPoolExecutor(8, "small checkpoints"),
            ThreadPoolExecutor(4, "large checkpoints", _step_back),
        )
        bandwidth = Bandwidth(settings.checkpoint_mib_s * (1 << 20), clock)
        self._exchange = ExchangeServer(self._context, self._holding, bandwidth, settings.peer_tls, settings.log_path)
        self._apps = AppServer(Path(checkpoint_socket(str(settings.socket_path))), self._on_hello)
        self._holdings: dict[str, Holding] = {}
        self._reigns: dict[str, Reign] = {}
        self._storing: dict[str, asyncio.Lock] = {}
        self._seated: dict[str, asyncio.Event] = {}
        self._left: set[str] = set()  # applications that have lost their seat here
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self) -> None:
        """Serve. Raises ConfigurationError, StorageError, StoreDeniedError."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._context.files.scan)
        try:
            await self._apps.start()
            placed = asyncio.get_running_loop().create_future()
            following = asyncio.create_task(self._follow_placements(placed))
            self._tasks.add(following)
            # Until the placements are known, no epoch is known to be over.
            await asyncio.wait((following, placed), return_when=asyncio.FIRST_COMPLETED)
            listen = self._settings.checkpoint_listen
            address = advertised(listen, await self._exchange.start(listen), self._settings.address)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._show(address))
                tasks.create_task(_as_coroutine(following))
                tasks.create_task(self._follow_servers())
                tasks.create_task(self._tidy_again())
        finally:
            await self._apps.close()
            for task in list(self._tasks):
                task.cancel()
            for app in list(self._reigns):
                self._end_reign(app)
            await self._exchange.stop()
            await self._context.peers.close()
            for executor in (self._context.quick, self._context.slow):
                executor.shutdown(wait=False, cancel_futures=True)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a bug in the CheckpointServer", exc_info=task.exception())

    # --- what etcd says --------------------------------------------------------------------------------------------

    async def _show(self, address: str) -> None:
        """Have our peers know where we are, under a lease of our own, for ever."""
        key = Key(Kind.SERVERS, (self._settings.host,))
        while True:
            lease: Lease | None = None
            try:
                lease = await self._store.leases.grant(self._settings.lease_ttl_s)
                while not lease.lost.done():
                    self._announce.clear()
                    server = Server(address, os.getpid(), etcdreplica.__version__, dict(self._damaged))
                    await self._store.commit(Txn((), (Put(key, server, lease.id),)))
                    changed = asyncio.create_task(self._announce.wait())
                    await asyncio.wait((changed, lease.lost), return_when=asyncio.FIRST_COMPLETED)
                    changed.cancel()
            except StoreError as error:
                log.warning("cannot show this CheckpointServer yet: %s", error)
                await asyncio.sleep(RETRY_S)
            finally:
                if lease is not None:
                    with contextlib.suppress(StoreError):
                        await self._store.leases.revoke(lease)

    def _on_damage(self, app: str, what: str) -> None:
        def note() -> None:
            self._damaged.pop(app, None)
            if what:
                self._damaged[app] = what
            self._announce.set()

        if self._loop is not None:
            self._loop.call_soon_threadsafe(note)

    async def _follow_servers(self) -> None:
        servers = self._context.servers
        async with contextlib.aclosing(self._store.follow(Kind.SERVERS)) as batches:
            async for batch in batches:
                before = dict(servers)
                if isinstance(batch, Snapshot):
                    servers.clear()
                for entry in batch.entries:
                    if entry.value is None or isinstance(entry.value, Corrupt):
                        servers.pop(entry.key.names[0], None)
                    else:
                        servers[entry.key.names[0]] = entry.value
                gone = {server.address for server in before.values()} - {server.address for server in servers.values()}
                for address in gone:
                    await self._context.peers.forget(address)
                anew = [host for host in servers if host in before and servers[host].pid != before[host].pid]
                for reign in self._reigns.values():
                    reign.servers_changed(anew)

    async def _follow_placements(self, placed: asyncio.Future[None]) -> None:
        """Follow them for ever; `placed` is done once they are known."""
        async with contextlib.aclosing(self._store.follow(Kind.PLACEMENTS, self._settings.host)) as batches:
            async for batch in batches:
                found = {entry.key.names[1] for entry in batch.entries}
                if isinstance(batch, Snapshot):
                    for app in self._holdings.keys() - found:
                        self._place(app, None, batch.revision)
                for entry in batch.entries:
                    if not isinstance(entry.value, Corrupt):
                        self._place(entry.key.names[1], entry.value, entry.mod_revision)
                        if entry.value is None:  # and not only missing, as when etcd has lost its data
                            self._spawn(self._tidy(entry.key.names[1]))
                if not placed.done():
                    placed.set_result(None)

    def _place(self, app: str, placement: Any, revision: int) -> None:
        holding = self._holding(app)
        holding.placement, holding.placement_revision = placement, revision
        reign = self._reigns.get(app)
        if placement is None:
            self._left.add(app)
            self._end_reign(app)
            self._seat_of(app).clear()
            return
        self._seat_of(app).set()
        self._left.discard(app)
        if placement.role is Role.PRIMARY and holding.newest is not None:
            self._begin_reign(holding, placement.epoch)
        elif reign is not None and placement.epoch > reign.epoch:
            self._end_reign(app)
        if app in self._reigns:
            self._reigns[app].seated()

    def _begin_reign(self, holding: Holding, epoch: int) -> Reign:
        reign = self._reigns.get(holding.app)
        if reign is not None and reign.epoch >= epoch:
            return reign
        self._end_reign(holding.app)
        reign = self._reigns[holding.app] = Reign(self._context, holding, epoch)
        reign.start()
        return reign

    def _end_reign(self, app: str) -> None:
        reign = self._reigns.pop(app, None)
        if reign is not None:
            reign.stop()

    def _holding(self, app: str) -> Holding:
        return self._holdings.get(app) or self._holdings.setdefault(app, Holding(self._context, app))

    async def _tidy_again(self) -> None:
        """Remove what was left behind long ago: this host, or its server, was away when the application was removed."""
        while True:
            for app in self._context.files.apps:
                if await asyncio.to_thread(self._context.files.age_s, app) > ORPHANED_S:
                    await self._tidy(app)
            await asyncio.sleep(TIDY_S)

    async def _tidy(self, app: str) -> None:
        """Remove the checkpoints of an application that has no seat here, if it is registered no longer."""
        key = Key(Kind.REGISTRATIONS, (app,))
        gone = Txn((Exists(key),), ())
        registered = await insist(f"reading {key}", lambda: self._store.commit(gone))
        holding = self._holdings.get(app)
        if registered.succeeded or (holding is not None and holding.placement is not None):
            return
        self._left.discard(app)
        for known in (self._holdings, self._damaged, self._seated, self._storing):
            known.pop(app, None)
        await (holding or Holding(self._context, app)).forget()

    # --- what the applications of this host say --------------------------------------------------------------------

    def _on_hello(self, connection: AppConnection, message: Message) -> None:
        app = check_name("application name", message["app"])
        closing: list[Callable[[], None]] = []

        def closed() -> None:
            for undo in closing:
                undo()

        connection.on_closed = closed
        connection.on_message = lambda message: self._on_message(app, connection, closing, message)
        connection.send("ok")

    def _on_message(self, app: str, connection: AppConnection, closing: list[Callable[[], None]], message: Message) -> None:
        kind = message["type"]
        if kind == "store":
            stamp = Stamp(int(message["epoch"]), int(message["sequence"]))
            size, codec, copies = int(message["size"]), str(message["codec"])[:64], int(message["copies"])
            if not 0 <= size <= MAX_SIZE or stamp.epoch < 1 or stamp.sequence < 1:
                raise ProtocolError(f"no such checkpoint: {stamp} of {size} bytes")
            fd = open_memory(connection.pid, int(message["fd"]), STATE_NAME)
            source = Source(Manifest(app, stamp, codec, size, b"", time.time()), fd=fd)
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS or os.fstat(fd).st_size != size:
                raise ProtocolError("the state could be changed under us")
            until = self._clock() + float(message["within"]) if message["wait"] else None
            self._spawn(self._store_state(app, connection, source, copies, until))
        elif kind == "restore":
            loaded = Stamp(*map(int, message["loaded"]))
            answer = partial(connection.send, question=int(message["question"]))
            self._spawn(self._restore(app, answer, int(message["epoch"]), loaded, float(message["within"])))
        elif kind == "follow":
            self._spawn(self._feed(app, connection, closing))
        else:
            raise ProtocolError(f"unknown message {kind!r}")

    async def _store_state(self, app: str, connection: AppConnection, source: Source, copies: int, until: float | None) -> None:
        """Store a state that is wanted on `copies` hosts; until when somebody waits for that, None for nobody."""
        stamp = source.manifest.stamp
        refuse = partial(connection.send, "refused", sequence=stamp.sequence)
        try:
            holding = await self._seat(app)
            holding.fence(stamp.epoch)
            reign = self._begin_reign(holding, stamp.epoch)
            async with self._storing.setdefault(app, asyncio.Lock()):
                if stamp > holding.stamp:
                    source = await self._with_digests(source)
                    reign.hand_out(source, copies)
                    await holding.keep(source)
            reign.held_here()
        except CheckpointError as error:
            log.error("%s", error)
            refuse(reason=str(error))
            return
        connection.send("kept", sequence=stamp.sequence)
        if until is not None:

            def tell(reached: int, trouble: str, done: bool) -> None:
                connection.send("reached", sequence=stamp.sequence, hosts=reached, done=done, trouble=trouble)

            waiter = Waiter(stamp, copies, tell, lambda reason: refuse(reason=reason))
            reign.wait(waiter)
            asyncio.get_running_loop().call_later(max(0.0, until - self._clock()), reign.forget, waiter)

    async def _with_digests(self, source: Source) -> Source:
        manifest, fd = source.manifest, source.fd
        assert fd is not None
        if manifest.size <= INLINE:
            data = os.pread(fd, manifest.size, 0)
            return Source(evolve(manifest, digests=digests(data)), data=data)

        loop, slow, step = asyncio.get_running_loop(), self._context.slow, CHUNK * -(-chunk_count(manifest.size) // SPLIT)
        source.data = view = memoryview(mmap.mmap(fd, manifest.size, mmap.MAP_PRIVATE, mmap.PROT_READ))
        parts = (view[at : at + step] for at in range(0, manifest.size, step))
        found = await asyncio.gather(*(loop.run_in_executor(slow, digests, part) for part in parts))
        source.manifest = evolve(manifest, digests=b"".join(found))
        return source

    async def _restore(self, app: str, answer: Callable[..., None], epoch: int, loaded: Stamp, within_s: float) -> None:
        try:
            holding = await self._seat(app)
            stored = await holding.restore(epoch, loaded, self._clock() + within_s)
            if epoch:
                self._begin_reign(holding, epoch)
        except CheckpointError as error:
            answer("unavailable", reason=str(error))
        else:
            answer("found", **(_told(stored) if stored is not None else {"path": None}))

    async def _feed(self, app: str, connection: AppConnection, closing: list[Callable[[], None]]) -> None:
        """Tell a copy of each checkpoint that comes to this host."""
        try:
            holding = await self._seat(app)
        except CheckpointError as error:
            connection.refuse(str(error))
            return

        def feed(stored: Stored) -> None:
            connection.send("newest", **_told(stored))

        holding.followers.add(feed)
        closing.append(lambda: holding.followers.discard(feed))
        if holding.newest is not None:
            feed(holding.newest)

    async def _seat(self, app: str) -> Holding:
        """Wait until this host is known to have a seat of the application. Raises CheckpointError."""
        try:
            async with asyncio.timeout(LEFT_S if app in self._left else SEATED_S):
                await self._seat_of(app).wait()
        except TimeoutError:
            raise CheckpointError(f"{self._settings.host} has no seat of {app}, or etcd does not answer") from None
        return self._holding(app)

    def _seat_of(self, app: str) -> asyncio.Event:
        return self._seated.setdefault(app, asyncio.Event())


def _step_back() -> None:
    """Let this thread have what others leave of the processors: what is large is not urgent."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LARGE_NICE)


async def _as_coroutine(task: asyncio.Task[None]) -> None:
    await task


def _told(stored: Stored) -> dict[str, Any]:
    manifest = stored.manifest
    return {
        "path": str(stored.path),
        "begin": stored.begin,
        "size": manifest.size,
        "codec": manifest.codec,
        "epoch": manifest.stamp.epoch,
        "sequence": manifest.stamp.sequence,
    }
