"""Copies of a replicated object in one process and one event loop, with a stand-in for their nodes and etcd.

For tests of what the object itself does. The stand-in keeps the in-sync set as etcd would: a change needs the revision it is
based on, and comes from the primary. It chooses only in-sync copies as primary.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attrs import evolve

from etcdreplica.app.protocol import Decoder, encode
from etcdreplica.app.state import Codec
from etcdreplica.errors import EtcdReplicaError
from etcdreplica.objects.client import Client
from etcdreplica.objects.copies import Copy, WatchDogLine
from etcdreplica.objects.machine import Machine
from etcdreplica.objects.proxy import AsyncProxy
from etcdreplica.objects.server import ObjectServer, Settings
from etcdreplica.words import Role


class CopyHandle:
    """One copy. `error` is why it could not go on."""

    def __init__(self, copies: Copies, host: str, incarnation: int) -> None:
        self.host, self.incarnation = host, incarnation
        self.error: EtcdReplicaError | None = None
        self.is_up = True
        self.address = ""
        self.role = Role.BACKUP
        self.line = WatchDogLine(lambda kind, **fields: copies.hear(self, kind, fields))
        self.machine = Machine(copies.cls, Codec(copies.codec), copies.args)
        settings = copies.settings
        if settings.durable is not None:  # each host has a disk of its own
            settings = evolve(settings, durable=settings.durable / host)
        self.server = ObjectServer(settings, self.machine, incarnation, host, self.line, self._fail)

    def _fail(self, error: EtcdReplicaError) -> None:
        self.error = self.error or error


class Copies:
    """An object of class `cls`. Use it in `async with`; clients find it through the socket at `socket`."""

    def __init__(self, cls: type[Any], directory: Path, *args: Any, codec: Any = "msgpack", **settings: Any) -> None:
        self.cls, self.args, self.codec = cls, args, codec
        self.settings = Settings(cls.__name__.lower(), **settings)
        self.socket = str(directory / "node.sock")
        self.copies: list[CopyHandle] = []
        self.epoch = 0
        self.revision = 0
        self.record: tuple[int, int, dict[int, str]] = (0, 0, {})  # epoch, primary, members
        self.refuse_changes = False
        self.lose_answers = False  # changes happen, but nobody is told
        self._incarnation = 100
        self._locators: set[asyncio.StreamWriter] = set()
        self._clients: list[Client] = []
        self._node: asyncio.Server | None = None

    async def __aenter__(self) -> Copies:
        self._node = await asyncio.start_unix_server(self._locate, self.socket)
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients:
            await client.close()
        assert self._node is not None
        self._node.close()
        for writer in list(self._locators):
            writer.close()
        for copy in self.copies:
            await copy.server.stop()
        await asyncio.sleep(0.01)

    async def start(self, host: str) -> CopyHandle:
        """Start a copy; the first one of all becomes primary."""
        self._incarnation += 1
        copy = CopyHandle(self, host, self._incarnation)
        copy.address = f"127.0.0.1:{await copy.server.start('127.0.0.1')}"
        self.copies.append(copy)
        if self.primary is None:
            self.promote(copy)
        self._tell()
        return copy

    async def kill(self, copy: CopyHandle) -> None:
        """End a copy, as a crash would: nobody is told but by its connections, and by etcd."""
        copy.is_up = False
        await copy.server.stop()
        self.copies.remove(copy)
        self._tell()

    def promote(self, copy: CopyHandle) -> None:
        """Make it primary, in a new epoch."""
        self.epoch += 1
        copy.role = Role.PRIMARY
        copy.server.become(self.epoch, primary=True)
        self._tell()

    async def fail_over(self) -> CopyHandle:
        """Kill the primary and promote an in-sync copy."""
        old = self.primary
        assert old is not None
        await self.kill(old)
        successor = next(copy for copy in self.copies if copy.incarnation in self.record[2])
        self.promote(successor)
        return successor

    @property
    def primary(self) -> CopyHandle | None:
        """The primary."""
        return next((copy for copy in self.copies if copy.role is Role.PRIMARY), None)

    async def in_sync(self, count: int) -> None:
        """Wait until so many copies are in sync, by what etcd says."""
        await self.until(lambda: self.record[1] == (self.primary and self.primary.incarnation) and len(self.record[2]) == count)

    async def until(self, condition: Any) -> None:
        """Wait until something holds."""
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110  (conditions look at several objects)
                await asyncio.sleep(0.002)

    async def client(self, timeout_s: float = 20.0) -> Any:
        """Return a proxy."""
        client = Client(self.settings.app, self.socket)
        self._clients.append(client)
        return AsyncProxy(client, await client.found(timeout_s), timeout_s)

    def hear(self, copy: CopyHandle, kind: str, fields: dict[str, Any]) -> None:
        """Answer as the WatchDog of a copy would, a moment later."""
        loop = asyncio.get_running_loop()
        if copy.is_up:
            loop.call_later(0.001, self._answer, copy, kind, fields)

    def _answer(self, copy: CopyHandle, kind: str, fields: dict[str, Any]) -> None:
        epoch, primary, members = self.record
        answer: dict[str, Any] = {"type": kind, "question": fields["question"]}
        if kind == "members":
            pairs = [[host, incarnation] for incarnation, host in members.items()]
            answer |= {"revision": self.revision, "epoch": epoch, "primary": primary, "members": pairs}
        elif copy.role is not Role.PRIMARY or fields["revision"] != self.revision or self.refuse_changes or not copy.is_up:
            answer |= {"type": "changed", "error": "the conditions do not hold", "unknown": False}
        else:
            self.revision += 1
            self.record = (self.epoch, copy.incarnation, {number: host for host, number in fields["members"]})
            answer |= {"type": "changed", "revision": self.revision}
            if self.lose_answers:
                answer |= {"error": "no answer", "unknown": True}
        copy.line.take(answer)

    def _list(self) -> list[list[Any]]:
        return [[c.host, c.incarnation, c.role.value, self.epoch, c.address] for c in self.copies if c.is_up]

    def _tell(self) -> None:
        there = [Copy(*fields) for fields in self._list()]
        for copy in self.copies:
            copy.server.see(there)
        for writer in self._locators:
            writer.write(encode("replicas", replicas=self._list()))

    async def _locate(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        list(Decoder().feed(await reader.read(65536)))
        writer.write(encode("replicas", replicas=self._list()))
        self._locators.add(writer)
        with contextlib.suppress(OSError):
            await reader.read()
        self._locators.discard(writer)
        writer.close()


def values(copies: Iterable[CopyHandle], name: str) -> list[Any]:
    """Return an attribute of the instance in every copy."""
    return [getattr(copy.machine.instance, name) for copy in copies]
