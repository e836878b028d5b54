"""One process that stands in for thousands of replicas of a host, on the WatchDog's socket.

`python -m etcdreplica.testing.stand_in SOCKET REPORT register FIRST COUNT` registers applications as a process started by hand
would, and is the primary of all of them. `... take` answers for the copies that the WatchDog starts (`stand_in_start.py`).
Each role that a copy is given is a line of JSON in REPORT: app, role, epoch, at (CLOCK_BOOTTIME seconds).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any, TextIO

from etcdreplica.app.kernel import set_precedence
from etcdreplica.app.protocol import VERSION, Decoder, Message, encode
from etcdreplica.clock import boottime
from etcdreplica.guardian.wards import URGENT_NICE
from etcdreplica.words import Role, Style

START = Path(__file__).with_name("stand_in_start.py")
AT_ONCE = 32  # registrations under way


def registration(name: str) -> dict[str, Any]:
    """Return what a process would send to register such an application: warm, two copies."""
    program = {
        "argv": [sys.executable, "-S", str(START), name],
        "cwd": "/",
        "env": {"PATH": os.environ.get("PATH", os.defpath)},
    }
    return {
        "name": name,
        "style": Style.WARM,
        "degree": 2,
        "program": program,
        "hang_timeout_s": 0,
        "stop_timeout_s": 1.0,
    }


class Copy(asyncio.Protocol):
    """One replica's connection. `placed` is done once it has a role."""

    def __init__(self, name: str, report: TextIO, hello: bytes = b"") -> None:
        self.placed = asyncio.get_running_loop().create_future()
        self._name = name
        self._report = report
        self._hello = hello
        self._epoch = 0
        self._decoder = Decoder()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say who it is, unless that was said before."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._hello:
            transport.write(self._hello)

    def data_received(self, data: bytes) -> None:
        """Take what the WatchDog says."""
        for message in self._decoder.feed(data):
            self._take(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._say(role="", epoch=self._epoch, at=boottime())
        if not self.placed.done():
            self.placed.set_result(None)

    def _take(self, message: Message) -> None:
        kind = message["type"]
        if kind in ("welcome", "role"):
            self._become(Role(message["role"]), int(message["epoch"]))
        elif kind == "error":
            self._say(error=message.get("message"))

    def _become(self, role: Role, epoch: int) -> None:
        now = boottime()
        first, self._epoch = self._epoch == 0, epoch
        if role is Role.PRIMARY and self._transport is not None:
            self._transport.write(encode("running", at=now))
        self._say(role=role, epoch=epoch, at=now)
        if first and not self.placed.done():
            self.placed.set_result(None)

    def _say(self, **fields: Any) -> None:
        self._report.write(json.dumps({"app": self._name, **fields}) + "\n")
        self._report.flush()


async def register(path: str, report: TextIO, first: int, count: int) -> None:
    """Register applications, and be the primary of each, until killed."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(name: str) -> None:
        async with slots:
            hello = encode("hello", version=VERSION, adopt=True, registration=registration(name))
            _, copy = await asyncio.get_running_loop().create_unix_connection(lambda: Copy(name, report, hello), path)
            await copy.placed

    await asyncio.gather(*(one(f"app-{number}") for number in range(first, first + count)))
    await asyncio.Event().wait()


async def take(path: str, report: TextIO) -> None:
    """Answer for every copy whose connection is handed over, until killed."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{path}.stand-in")
        listening.listen(512)
        listening.setblocking(False)
        async with asyncio.TaskGroup() as taking:
            while True:
                giver, _ = await loop.sock_accept(listening)
                taking.create_task(_take_one(giver, report))


async def _take_one(giver: socket.socket, report: TextIO) -> None:
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    with giver:
        loop.add_reader(giver, told.set)
        await told.wait()
        loop.remove_reader(giver)
        name, fds, _, _ = socket.recv_fds(giver, 256, 1)
        if fds:  # else it was killed before it could give it
            line = socket.socket(fileno=fds[0])
            line.setblocking(False)
            await loop.connect_accepted_socket(lambda: Copy(name.decode(), report), line)
            with contextlib.suppress(OSError):  # it was killed meanwhile
                giver.send(b".")


def main() -> None:
    """Stand in until killed."""
    set_precedence(URGENT_NICE)  # it is a thousand processes of hosts that are not this busy
    path, report, what, *numbers = sys.argv[1:]
    with Path(report).open("a") as lines:
        asyncio.run(take(path, lines) if what == "take" else register(path, lines, *map(int, numbers)))


if __name__ == "__main__":
    main()
