"""What runs beside a plain program: its hooks, and the standby command of a warm backup.

Each is a process of the guardian under a ward of its own, APPLICATION:NAME, so that it ends as the program does: the whole
tree, at the deadline of the copy that it belongs to, also when the WatchDog is dead. The next WatchDog ends what it finds of
them before it goes on with that copy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from attrs import evolve, frozen

from etcdreplica.clock import Clock
from etcdreplica.daemon.guard import Guard
from etcdreplica.daemon.process import ReplicaProcess
from etcdreplica.errors import RefusedError
from etcdreplica.model import Program

log = logging.getLogger(__name__)

SEPARATOR = ":"  # no name of an application contains it
OUTPUT_LIMIT = 1000  # of bytes of its output that are kept, the last ones; all of it stands in its log
WAITING_LIMIT = 20  # notifications of one application that wait for their turn


def is_beside(ward: str) -> bool:
    """Whether a ward is that of a hook or a standby command."""
    return SEPARATOR in ward


def app_of(ward: str) -> str:
    """Return the application beside which it runs."""
    return ward.partition(SEPARATOR)[0]


@frozen
class Job:
    """One of them. `program` says where and with what environment, `log` where its output goes."""

    name: str
    command: str
    program: Program
    environment: Mapping[str, str]
    limit_s: float
    log: Path


@frozen
class Outcome:
    """What a hook came to, in words with its output."""

    succeeded: bool
    text: str


class Beside:
    """The processes beside one copy of an application, or its notifications. `until` tells by when they must be dead."""

    def __init__(
        self, guard: Guard, process: type[ReplicaProcess], app: str, clock: Clock, until: Callable[[], float | None]
    ) -> None:
        self._guard = guard
        self._process = process
        self._app = app
        self._clock = clock
        self._until = until
        self._spawns: dict[str, asyncio.Task[ReplicaProcess]] = {}  # by ward

    @property
    def wards(self) -> tuple[str, ...]:
        """Those that may have a process now."""
        return tuple(self._spawns)

    async def start(self, job: Job) -> ReplicaProcess:
        """Start one and return its process. `end` must follow, or `kill`. Raises RefusedError."""
        ward, number = f"{self._app}{SEPARATOR}{job.name}", int(self._clock() * 1000)
        program = evolve(job.program, argv=("/bin/sh", "-c", job.command), needs=())
        self._guard.keep(ward, None, self._until())
        spawning = asyncio.create_task(
            self._process.spawn(self._guard, ward, number, program, job.environment, job.log), name=ward
        )
        self._spawns[ward] = spawning
        return await asyncio.shield(spawning)

    async def run(self, job: Job) -> Outcome:
        """Run one to its end, or to its time limit, and kill what it has left running. When cancelled, `kill` must follow."""
        began, (end, _) = self._clock(), await asyncio.to_thread(_tail, job.log, None)
        try:
            process = await self.start(job)
            async with asyncio.timeout(job.limit_s):
                await asyncio.shield(process.exited)
            reason = "" if process.returncode == 0 else process.exited.result()
        except TimeoutError:
            reason = f"did not end within {job.limit_s:g} s and was killed"
        except RefusedError as error:
            reason = str(error)
        took_s = self._clock() - began
        await self.end(job.name)
        _, output = await asyncio.to_thread(_tail, job.log, end)
        text = f"{job.name} {reason or f'done in {took_s:.2f} s'}" + (f": {output}" if output else "")
        return Outcome(not reason, text)

    async def end(self, name: str) -> None:
        """See that one is dead, the whole of it, and forget it."""
        ward = f"{self._app}{SEPARATOR}{name}"
        if ward in self._spawns:
            with contextlib.suppress(RefusedError):
                await (await asyncio.shield(self._spawns[ward])).kill()
            self._spawns.pop(ward, None)
            self._guard.release(ward)

    async def kill(self) -> None:
        """End all of them."""
        await asyncio.gather(*(self.end(ward.partition(SEPARATOR)[2]) for ward in self._spawns))


class Notifier:
    """Runs the notify commands of this host: those of one application in turn, and nobody waits for them.

    They are no part of a copy, which may have ended already; only the time limit and the end of this node end them.
    """

    def __init__(self, guard: Guard, process: type[ReplicaProcess], clock: Clock) -> None:
        self._guard = guard
        self._process = process
        self._clock = clock
        self._waiting: dict[str, deque[tuple[Job, Callable[[str], None]]]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def tell(self, app: str, job: Job, note: Callable[[str], None]) -> None:
        """Run one when those before it have ended; `note` is told what it came to."""
        waiting = self._waiting.setdefault(app, deque())
        waiting.append((job, note))
        if len(waiting) > WAITING_LIMIT:
            waiting.popleft()
            log.warning("%s: a notification is left out: those before it take too long", app)
        if app not in self._tasks:
            self._tasks[app] = asyncio.create_task(self._work(app), name=f"notify {app}")

    async def close(self, limit_s: float) -> None:
        """Wait for those under way, but not for longer than this, and end the rest."""
        tasks = list(self._tasks.values())
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=limit_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _work(self, app: str) -> None:
        try:
            while self._waiting[app]:
                job, note = self._waiting[app].popleft()
                outcome = await self._run(app, job)
                if not outcome.succeeded:
                    log.warning("%s: %s", app, outcome.text)
                note(outcome.text)
        finally:
            del self._tasks[app], self._waiting[app]

    async def _run(self, app: str, job: Job) -> Outcome:
        until = self._clock() + job.limit_s + 1  # by when the guardian ends it, if nobody is there to do it before
        beside = Beside(self._guard, self._process, app, self._clock, lambda: until)
        try:
            return await beside.run(job)
        finally:
            await beside.kill()


def _tail(path: Path, after: int | None) -> tuple[int, str]:
    """Return where a file ends, and in one line what stands there after a place, at most the last of it."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            if after is None:
                return end, ""
            begin = after if after <= end else 0  # it was put aside for a new one
            file.seek(max(begin, end - OUTPUT_LIMIT))
            return end, " ".join(file.read(OUTPUT_LIMIT).decode(errors="replace").split())
    except OSError:
        return 0, ""
