"""The part of one host in the checkpoints of one application: storing them, fetching them, and finding the newest."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Executor
from typing import Any, TypeVar

from attrs import define, evolve, field, frozen

from etcdreplica.checkpoint.files import Files, Stored
from etcdreplica.checkpoint.format import Manifest, chunk_count
from etcdreplica.checkpoint.peers import INLINE, Holds, Peers
from etcdreplica.checkpoint.wire import Piece
from etcdreplica.clock import Clock
from etcdreplica.core.holders import NOTHING, enough, may_restore
from etcdreplica.errors import (
    CheckpointError,
    CheckpointUnavailableError,
    DamagedError,
    StaleEpochError,
    StorageError,
    StoreError,
)
from etcdreplica.model import Checkpoint, Placement, Server, Stamp
from etcdreplica.store import Entry, Key, Kind, Store

log = logging.getLogger(__name__)

T = TypeVar("T")
ASK_S = 2.0  # how long a peer may take to say what it holds
ASK_AGAIN_S = 0.3
TOLD = 256  # chunks from which on a transfer is told of
TELL_S = 0.01
AHEAD = 8  # pieces of a large state that are being written at once


@frozen
class Context:
    """What all applications of one CheckpointServer share. Small states have threads of their own, so that none waits long."""

    host: str
    store: Store
    files: Files
    peers: Peers
    clock: Clock
    quick: Executor
    slow: Executor
    servers: dict[str, Server] = field(factory=dict)  # by host
    slots: asyncio.Semaphore = field(factory=lambda: asyncio.Semaphore(2))  # large checkpoints that are fetched at once

    def executor(self, size: int) -> Executor:
        """Where a state of so many bytes is worked on."""
        return self.quick if size <= INLINE else self.slow


@define
class Source:
    """A state that can be read already while it is being stored: bytes, or the sealed memory that an application has filled.

    It owns its descriptor, for as long as somebody reads.
    """

    manifest: Manifest
    data: bytes | memoryview | None = None  # of sealed memory: mapped
    fd: int | None = None
    begin: int = 0

    def read(self, at: int, length: int) -> bytes | memoryview:
        """Return some of it. May block. Raises OSError."""
        if self.data is not None:
            return self.data[at : at + length]
        assert self.fd is not None
        return os.pread(self.fd, length, self.begin + at)

    def __del__(self) -> None:
        if self.fd is not None:
            os.close(self.fd)

    @classmethod
    def of(cls, stored: Stored) -> Source:
        """Open a stored one. Raises OSError."""
        return cls(stored.manifest, fd=os.open(stored.path, os.O_RDONLY | os.O_CLOEXEC), begin=stored.begin)


class Holding:
    """One application on this host. `placement` is this host's part in it, None while it has none."""

    def __init__(self, context: Context, app: str) -> None:
        self.app = app
        self.placement: Placement | None = None
        self.placement_revision = 0
        self.followers: set[Callable[[Stored], None]] = set()
        self.offered: Source | None = None  # what is being stored and handed out just now
        self._context = context
        self._telling = False
        self._fence = 0
        self._writing = asyncio.Lock()
        self._pulling: set[asyncio.Task[Any]] = set()  # for peers that offer

    @property
    def born(self) -> int:
        """What is older belongs to an earlier application of this name."""
        return self.placement.born if self.placement else 0

    @property
    def key(self) -> Key:
        """Where it stands in etcd what is durable."""
        return Key(Kind.CHECKPOINTS, (self.app,))

    @property
    def newest(self) -> Stored | None:
        """The newest checkpoint on this host."""
        return self._context.files.newest(self.app, self.born)

    @property
    def stamp(self) -> Stamp:
        """Which that is."""
        newest = self.newest
        return newest.manifest.stamp if newest else NOTHING

    @property
    def epoch(self) -> int:
        """The newest epoch this host has heard of."""
        return max(self._fence, self.placement.epoch if self.placement else 0, self.stamp.epoch)

    def fence(self, epoch: int) -> None:
        """Refuse anything of an older epoch from now on. Raises StaleEpochError when this one is old itself."""
        if epoch < self.epoch:
            raise StaleEpochError(f"{self.app}: epoch {epoch} is over: {self._context.host} knows of {self.epoch}")
        self._fence = max(self._fence, epoch)

    # --- storing ---------------------------------------------------------------------------------------------------

    async def keep(self, source: Source) -> None:
        """Store a state. Raises StorageError."""
        context, manifest = self._context, source.manifest

        def write() -> Stored:
            draft = context.files.draft(manifest)
            try:
                if source.fd is not None:
                    draft.fill(source.fd)
                else:
                    draft.put(0, source.data or b"")
            except BaseException:
                draft.discard()
                raise
            return draft.commit()

        async with self._writing:
            if manifest.stamp > self.stamp:
                await self._in_thread(manifest.size, write)
                self._tell()

    async def take(self, manifest: Manifest, data: bytes) -> None:
        """Store what a peer has sent. Raises CheckpointError."""
        if len(data) != manifest.size:
            raise CheckpointError(f"{self.app}: checkpoint {manifest.stamp} came with {len(data)} of {manifest.size} bytes")
        await self.keep(Source(manifest, data=data))

    async def forget(self) -> None:
        """Remove all of it from this host."""
        async with self._writing:
            await self._in_thread(0, lambda: self._context.files.forget(self.app))

    async def pull(self, host: str, manifest: Manifest) -> None:
        """Fetch a checkpoint from another host, as far as it is not here yet. Raises CheckpointError.

        What has come before a failure is not fetched again.
        """
        async with self._context.slots:
            task = asyncio.current_task()
            assert task is not None
            self._pulling.add(task)
            try:
                await self._pull(host, manifest)
            finally:
                self._pulling.discard(task)

    async def _pull(self, host: str, manifest: Manifest) -> None:
        context = self._context
        async with self._writing:
            if manifest.stamp <= self.stamp:
                return
            draft = await self._in_thread(manifest.size, lambda: context.files.draft(manifest))
            try:
                missing = await self._in_thread(manifest.size, draft.missing)
                if manifest.count >= TOLD:
                    log.info(
                        "%s: %d of %d chunks of %s come from %s", self.app, len(missing), manifest.count, manifest.stamp, host
                    )
                if missing:
                    server = context.servers.get(host)
                    if server is None:
                        raise CheckpointError(f"{host} has no CheckpointServer just now")
                    async with contextlib.aclosing(context.peers.fetch(server.address, manifest, missing)) as pieces:
                        await self._write(draft.put, pieces, manifest, missing)
            except BaseException:
                draft.keep()
                raise
            await self._in_thread(manifest.size, draft.commit)
            self._tell()

    async def receive(self, manifest: Manifest, pieces: AsyncIterator[Piece]) -> None:
        """Store a checkpoint that must be newer than those here, as its pieces come, in order. Raises CheckpointError."""
        context = self._context
        async with context.slots, self._writing:
            if manifest.stamp <= self.stamp:
                raise CheckpointError(f"{context.host} holds {self.stamp} already")
            draft = await self._in_thread(manifest.size, lambda: context.files.draft(manifest))
            try:
                await self._write(draft.put, in_order(pieces), manifest, range(manifest.count))
            except BaseException:
                draft.discard()
                raise
            await self._in_thread(manifest.size, draft.commit)
            self._tell()

    async def _write(
        self,
        put: Callable[[int, bytes | memoryview], None],
        pieces: AsyncIterator[Piece],
        manifest: Manifest,
        wanted: Iterable[int],
    ) -> None:
        """Write pieces while others are on their way."""
        writing: set[asyncio.Future[None]] = set()
        missing = set(wanted)
        try:
            async for first, data in pieces:
                missing.difference_update(range(first, first + chunk_count(len(data))))
                writing.add(asyncio.get_running_loop().run_in_executor(self._context.slow, put, first, data))
                if len(writing) >= AHEAD:
                    done, writing = await asyncio.wait(writing, return_when=asyncio.FIRST_COMPLETED)
                    for each in done:
                        each.result()
        finally:
            await _over(*writing)
        for each in writing:
            each.result()
        if missing:
            raise CheckpointError(f"{self.app}: {len(missing)} chunks of checkpoint {manifest.stamp} did not come")

    def _tell(self) -> None:
        """Tell the followers, a moment later and then of the newest one only: whoever waits for an answer comes first."""
        if self.followers and not self._telling:
            self._telling = True
            asyncio.get_running_loop().call_later(TELL_S, self._tell_now)

    def _tell_now(self) -> None:
        newest, self._telling = self.newest, False
        if newest is not None:
            for follower in list(self.followers):
                follower(newest)

    async def _in_thread(self, size: int, work: Callable[[], T]) -> T:
        """Do something that may block. If this is cancelled meanwhile, what was begun ends first: it works on open files."""
        future = asyncio.get_running_loop().run_in_executor(self._context.executor(size), work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await _over(future)
            raise

    # --- finding ---------------------------------------------------------------------------------------------------

    async def restore(self, epoch: int, loaded: Stamp, until: float) -> Stored | None:
        """Return the newest checkpoint, on this host and verified unless it is `loaded` already; None if there is none.

        `epoch` fences older ones here and on every host that is asked; 0 for a copy that only reads. Raises
        StaleEpochError, CheckpointUnavailableError when a newer one may exist but cannot be reached until `until`.
        """
        if epoch:
            self.fence(epoch)
        why = "etcd does not answer"
        while True:
            try:
                recorded = await self._recorded()
                found, why = await self._find(recorded, epoch, loaded)
            except (StoreError, StorageError) as error:
                why = str(error)
            else:
                if epoch:
                    self.fence(epoch)  # else a primary that was replaced meanwhile would begin with what is old by now
                if not why:
                    return found
            left = until - self._context.clock()
            if left <= 0:
                raise CheckpointUnavailableError(f"{self.app}: the newest checkpoint cannot be had: {why}")
            await asyncio.sleep(min(left, ASK_AGAIN_S))

    async def _recorded(self) -> Checkpoint | None:
        entry: Entry | None = await self._context.store.get(self.key)
        return entry.value if entry is not None and entry.value.epoch >= self.born else None

    async def _find(self, recorded: Checkpoint | None, epoch: int, loaded: Stamp) -> tuple[Stored | None, str]:
        """Return the newest checkpoint, or why it cannot be said which it is."""
        context, files = self._context, self._context.files
        holders = frozenset(recorded.holders) if recorded else frozenset[str]()
        least = recorded.stamp if recorded else NOTHING
        if may_restore(context.host, holders, self.stamp, least, damaged=files.has_lost(self.app)):
            found = await self._verified(loaded)
            if not files.has_lost(self.app):
                return found, ""
        answers = await self._ask(holders | set(self.placement.peers if self.placement else ()), epoch)
        lossy = {host for host, holds in answers.items() if holds.lost}
        stamps = {host: holds.stamp for host, holds in answers.items()}
        if not enough(holders, stamps, lossy, least):
            silent = ", ".join(sorted(holders - answers.keys())) or "no host"
            return None, f"{silent} may hold a newer one than {max(stamps.values())} and cannot be asked"
        best = max(stamps, key=lambda host: (stamps[host], host == context.host))
        if stamps[best] > self.stamp:
            manifest = answers[best].manifests[0]
            for task in self._pulling if epoch else ():
                task.cancel()  # what a primary of before was handing out
            try:
                await self._pull(best, manifest)
            except DamagedError as error:
                await self._have_verified(best)
                return None, str(error)  # and now that it is known there, others are asked again
            except CheckpointError as error:
                return None, str(error)
        found = await self._verified(loaded)
        if (found.manifest.stamp if found else NOTHING) >= stamps[best]:
            return found, ""
        return None, "it is damaged on this host"  # and now that this is known, others are asked again

    async def _have_verified(self, host: str) -> None:
        """Have a host look at what it holds, so that it does not offer again what is damaged."""
        server = self._context.servers.get(host)
        if server is not None:
            with contextlib.suppress(CheckpointError):
                async for _ in self._context.peers.verify(server.address, self.app):
                    pass

    async def _verified(self, loaded: Stamp) -> Stored | None:
        newest = self.newest
        if newest is None or newest.manifest.stamp == loaded:
            return newest
        return await self._in_thread(newest.manifest.size, lambda: self._context.files.verified(self.app, self.born))

    async def _ask(self, hosts: set[str] | frozenset[str], epoch: int) -> dict[str, Holds]:
        """Return what each host holds, this one and those that answer. Raises StaleEpochError."""
        context = self._context

        async def ask(host: str) -> tuple[str, Holds] | None:
            server = context.servers.get(host)
            if server is None:
                return None
            try:
                holds = await context.peers.have(host, server.address, self.app, epoch, ASK_S)
            except CheckpointError as error:
                log.info("%s: cannot ask %s what it holds: %s", self.app, host, error)
                return None
            return host, evolve(holds, manifests=tuple(m for m in holds.manifests if m.stamp.epoch >= self.born))

        answered = await asyncio.gather(*(ask(host) for host in hosts if host != context.host))
        return {**dict(answer for answer in answered if answer), context.host: self.holds()}

    def holds(self) -> Holds:
        """What is on this host."""
        files = self._context.files
        stored = [s.manifest for s in files.all(self.app) if s.manifest.stamp.epoch >= self.born]
        return Holds(tuple(stored), files.has_lost(self.app))


async def in_order(pieces: AsyncIterator[Piece], at: int = 0) -> AsyncIterator[Piece]:
    """Yield pieces that follow each other, from chunk `at` on. Raises CheckpointError when one does not."""
    async for first, data in pieces:
        if first != at:
            raise CheckpointError(f"chunk {first} came where chunk {at} belongs")
        yield first, data
        at += chunk_count(len(data))


async def _over(*futures: asyncio.Future[Any]) -> None:
    """Return when all are done, however often this is cancelled."""
    while waiting := [future for future in futures if not future.done()]:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(waiting)
