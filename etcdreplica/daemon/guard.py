"""The WatchDog's line to the guardian of its host (`etcdreplica.guardian`), which starts and remembers for it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from attrs import frozen

from etcdreplica.app.protocol import GUARDIAN_ENV, Decoder, Message, encode
from etcdreplica.errors import RefusedError
from etcdreplica.model import Program


@frozen
class WardView:
    """What the guardian knows of one ward. `until` and `started` as in `guardian.wards.Ward`."""

    ward: str
    memo: Any = None
    until: float | None = None
    pid: int | None = None
    started: int | None = None
    mark: str = ""
    status: int | None = None
    is_child: bool = False


class Guard(asyncio.Protocol):
    """Connected to the guardian that started this WatchDog. `wards` is what an earlier WatchDog left there."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.wards: dict[str, WardView] = {}
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._decoder = Decoder()
        self._transport: asyncio.WriteTransport | None = None
        self._starting: dict[str, asyncio.Future[WardView]] = {}
        self._on_exit: dict[str, dict[int, Callable[[int], None]]] = {}  # by ward and process
        self._exited: dict[str, dict[int, int]] = {}  # statuses that nobody has asked for yet

    @classmethod
    async def connect(cls) -> Guard:
        """Take the line that the guardian has given this process."""
        number, _, name = os.environ.pop(GUARDIAN_ENV).partition(",")
        line = socket.socket(fileno=int(number))
        line.set_inheritable(False)
        line.setblocking(False)
        loop = asyncio.get_running_loop()
        _, guard = await loop.create_connection(lambda: cls(name), sock=line)
        await guard._ready
        return guard

    async def spawn(
        self, ward: str, number: int, program: Program, environment: Mapping[str, str], log: Path | None
    ) -> WardView:
        """Start a program as the process of a ward. Raises RefusedError when this host cannot.

        `number` tells one start of a ward from the next.
        """
        started: asyncio.Future[WardView] = asyncio.get_running_loop().create_future()
        self._starting[ward] = started
        self._send(
            "spawn",
            ward=ward,
            number=number,
            argv=program.argv,
            cwd=program.cwd,
            env={**program.env, **environment},
            log=str(log) if log else None,
        )
        try:
            return await started
        except OSError as error:
            self.release(ward)
            raise RefusedError(f"cannot start {program.argv[0]}: {os.strerror(error.errno or 0)}") from None
        finally:
            del self._starting[ward]

    def keep(self, ward: str, memo: object, until: float | None = None) -> None:
        """Have something remembered for the next WatchDog of this host."""
        deadline = {} if until is None else {"until": until}
        self._send("keep", ward=ward, memo=msgspec.to_builtins(memo), **deadline)

    def watch(self, ward: str, pid: int, started: int, mark: str) -> None:
        """Have a process that somebody else started killed at its deadline too, and what carries its mark."""
        self._send("watch", ward=ward, pid=pid, started=started, mark=mark)

    def backstop(self, after_s: float) -> None:
        """Have the kernel kill the guardian itself when it has not acted so long after a deadline."""
        self._send("backstop", after=after_s)

    def until(self, deadlines: Mapping[str, float]) -> None:
        """Move deadlines."""
        if deadlines:
            self._send("until", wards=dict(deadlines))

    def release(self, ward: str, memo: object = None) -> None:
        """Forget a process that is dead, and without a memo all of its ward."""
        self._on_exit.pop(ward, None)
        self._exited.pop(ward, None)
        self._send("release", ward=ward, memo=msgspec.to_builtins(memo))

    def on_exit(self, ward: str, pid: int, callback: Callable[[int], None]) -> None:
        """Call `callback(status as from wait)` once the guardian has seen the end of its child."""
        if pid in self._exited.get(ward, ()):
            callback(self._exited[ward].pop(pid))
        else:
            self._on_exit.setdefault(ward, {})[pid] = callback

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way out."""
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Take what the guardian says."""
        for message in self._decoder.feed(data):
            self._take(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """The guardian is dead: the kernel is about to end this process too, and must not find it waiting."""
        if not self._ready.done():
            self._ready.set_exception(RefusedError("the guardian of this host is gone"))

    def _take(self, message: Message) -> None:
        kind = message["type"]
        if kind == "ready":
            self._ready.set_result(None)
        elif kind == "ward":
            view = msgspec.convert({k: v for k, v in message.items() if k != "type"}, WardView)
            self.wards[view.ward] = view
        elif kind == "exited":
            ward, pid = message["ward"], message["pid"]
            if pid in self._on_exit.get(ward, ()):
                self._on_exit[ward].pop(pid)(message["status"])
            else:
                self._exited.setdefault(ward, {})[pid] = message["status"]
        elif (waiting := self._starting.get(message["ward"])) and not waiting.done():
            if kind == "spawned":
                fields = ("ward", "pid", "started", "mark")
                waiting.set_result(WardView(**{name: message[name] for name in fields}, is_child=True))
            else:
                waiting.set_exception(OSError(message["errno"], "not started"))

    def _send(self, kind: str, **fields: Any) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(kind, **fields))
