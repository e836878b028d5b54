"""A daemon that runs beside the WatchDog as a process of its own: started by the guardian, and started again when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import etcdreplica
from etcdreplica.clock import Clock, boottime
from etcdreplica.daemon.guard import Guard
from etcdreplica.daemon.process import ReplicaProcess
from etcdreplica.errors import RefusedError
from etcdreplica.model import Program

log = logging.getLogger(__name__)

RESTART_S = 0.2
STEADY_S = 30.0  # one that ran this long is started again at once
STOP_S = 5.0


class Child:
    """`etcdreplica COMMAND`, with `environment` added to ours, under the name `ward`.

    One that an earlier WatchDog started with another environment, or another version, is replaced.

    `on_end` is awaited with its process id when it has ended without being asked to. It is started again after `RESTART_S`,
    twice that and so on, but no more than `longest_s`.
    """

    def __init__(
        self,
        guard: Guard,
        ward: str,
        command: str,
        environment: Mapping[str, str],
        on_end: Callable[[int], Awaitable[None]] | None = None,
        longest_s: float = 10.0,
        clock: Clock = boottime,
        process: type[ReplicaProcess] = ReplicaProcess,
    ) -> None:
        self._guard = guard
        self._ward = ward
        self._command = command
        self._environment = environment
        self._memo = {"environment": dict(environment), "version": etcdreplica.__version__}
        self._on_end = on_end
        self._longest_s = longest_s
        self._clock = clock
        self._process = process

    async def keep(self) -> None:
        """Have it running until cancelled; then end it in order."""
        delay = RESTART_S
        while True:
            started = self._clock()
            try:
                process = await self._start()
            except RefusedError as error:
                log.error("cannot start a %s process: %s; trying again", self._command, error)
                await asyncio.sleep(self._longest_s)
                continue
            try:
                reason = await asyncio.shield(process.exited)
            finally:
                await self._stop(process)
            log.error("the %s process ended (%s); starting it again", self._command, reason)
            if self._on_end is not None:
                await self._on_end(process.pid)
            delay = RESTART_S if self._clock() - started > STEADY_S else min(self._longest_s, delay * 2)
            await asyncio.sleep(delay)

    async def _stop(self, process: ReplicaProcess) -> None:
        process.signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await asyncio.shield(process.exited)
        await process.kill()
        self._guard.release(self._ward)

    async def _start(self) -> ReplicaProcess:
        """Return the process that an earlier WatchDog started, or a new one. Raises RefusedError."""
        kept = self._guard.wards.pop(self._ward, None)
        if kept is not None and kept.pid is not None:
            process = self._process(self._guard, kept)
            if kept.memo == self._memo:
                return process
            log.info("replacing the %s process: its settings or its version have changed", self._command)
            await self._stop(process)
            if self._on_end is not None:
                await self._on_end(process.pid)
        self._guard.keep(self._ward, self._memo)
        command = (sys.executable, "-m", "etcdreplica", self._command)
        program = Program(command, str(Path.cwd()), {**os.environ, **self._environment})
        return await self._process.spawn(self._guard, self._ward, int(self._clock() * 1000), program, {}, None)
