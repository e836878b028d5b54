"""One copy of a plain program: what the library does inside a program that uses it, done from outside.

The program is running from its start, or, with probes, once all of them were answered well. Its role exists only in what its
host does about it: under style cold and under warm with a standby command the program runs on the primary's host alone;
otherwise it runs on every host, and the on-promote hook makes it serve.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable

from etcdreplica.app.protocol import SOCKET_ENV
from etcdreplica.daemon.context import HostContext
from etcdreplica.daemon.hooks import Beside, Job, Outcome
from etcdreplica.daemon.probes import ask
from etcdreplica.daemon.vitals import probe_runner
from etcdreplica.daemon.waiting import first
from etcdreplica.errors import RefusedError
from etcdreplica.model import FailureKind, Placement, Probe, Registration, ReplicaState
from etcdreplica.words import Role

log = logging.getLogger(__name__)

FIRST_LOOK_S, LOOKS_GROW = 0.02, 1.5  # how soon a program that starts is asked its probes again
NOTES_KEPT = 5
NO_ROLE = "none"  # what a notification says when a copy has ended


class PlainCopy:
    """`show` publishes a state, `note` what a hook came to; `standing` and `until` tell the placement and the deadline of now.

    Once `failed` is set, `failure` says why it cannot go on.
    """

    def __init__(
        self,
        context: HostContext,
        app: str,
        registration: Registration,
        standing: Callable[[], Placement],
        until: Callable[[], float | None],
        show: Callable[[ReplicaState], None],
        note: Callable[[str], None],
    ) -> None:
        self.failed = asyncio.Event()
        self.failure: tuple[FailureKind, str] | None = None
        self._context = context
        self._app = app
        self._registration = registration
        self._program = registration.program_on(context.host)
        self._standing = standing
        self._show = show
        self._note = note
        self._beside = Beside(context.guard, context.machine.process, app, context.clock, until)
        self._primary = standing().primary or ""  # the last one on another host that is known
        self._told: tuple[str, ...] | None = None  # in the last notification
        self._serves = False  # or may, because the on-promote hook has begun
        self._pid: int | None = None
        self._arriving: asyncio.Task[None] | None = None

    @property
    def wards(self) -> tuple[str, ...]:
        """What runs beside it now."""
        return self._beside.wards

    @property
    def environment(self) -> dict[str, str]:
        """What the program is told of itself."""
        placement, context = self._standing(), self._context
        is_primary = placement.role is Role.PRIMARY
        return {
            SOCKET_ENV: str(context.settings.socket_path),
            "ETCDREPLICA_APP": self._app,
            "ETCDREPLICA_HOST": context.host,
            "ETCDREPLICA_ROLE": placement.role,
            "ETCDREPLICA_EPOCH": str(placement.epoch),
            "ETCDREPLICA_PRIMARY": context.host if is_primary else placement.primary or "",
            "ETCDREPLICA_OLD_PRIMARY": self._primary if is_primary else "",
        }

    def placed(self) -> None:
        """The placement is a newer one."""
        if (primary := self._standing().primary) is not None:
            self._primary = primary
        if self._told is not None and self._standing().role is Role.BACKUP:
            self.tell()

    # --- its life, in order ------------------------------------------------------------------------------------------

    async def stand_by(self, *ends: Awaitable[object]) -> None:
        """Have the standby command run until one of `ends`; then it is dead, if this copy may still wait for that."""
        job = self._job("standby", self._registration.standby)
        process = await self._beside.start(job)
        self._show(ReplicaState.READY)
        self.tell()

        async def failed() -> None:
            await asyncio.shield(process.exited)
            if process.returncode == 0:  # what it prepares is prepared
                await asyncio.Event().wait()
            self._fail(FailureKind.EXIT, f"its standby command {process.exited.result()}")

        await first(failed(), *ends)
        process.signal(signal.SIGTERM)
        await asyncio.wait([process.exited], timeout=self._registration.stop_timeout_s)
        await self._beside.end(job.name)

    async def prepare(self) -> None:
        """Run the pre-start hook. Raises RefusedError when it fails."""
        outcome = await self._run("pre-start", self._registration.hooks.pre_start)
        if not outcome.succeeded:
            raise RefusedError(outcome.text)

    def begin(self, pid: int, state: ReplicaState, promoted: asyncio.Event) -> None:
        """The program runs: see when it is ready, and when it is promoted."""
        self._pid = pid
        self._arriving = asyncio.create_task(self._arrive(state, promoted), name=f"plain {self._app}")
        self._arriving.add_done_callback(self._arrived)

    def _arrived(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: could not be seen to its role", self._app, exc_info=error)
            self._fail(FailureKind.HOOK, f"its WatchDog could not see it to its role: {error!r}")

    async def _arrive(self, state: ReplicaState, promoted: asyncio.Event) -> None:
        if state is ReplicaState.STOPPING:
            return  # an earlier WatchDog was asked to end it, and this one will be
        if state is ReplicaState.STARTING and (reason := await self._silence()):
            limit = f"{self._registration.start_timeout_s:g} s"
            self._fail(FailureKind.HANG, f"it did not answer its probes within {limit} of its start: {reason}")
            return
        if not promoted.is_set():
            self._show(ReplicaState.READY)
            self.tell()
            await promoted.wait()
        self._serves = True
        if state is not ReplicaState.RUNNING:
            outcome = await self._run("on-promote", self._registration.hooks.on_promote)
            if not outcome.succeeded:
                self._fail(FailureKind.HOOK, outcome.text)
                return
            self._show(ReplicaState.RUNNING)
        self.tell()

    async def _silence(self) -> str:
        """Return "" once every probe was answered well, or in words what is wrong when the time for that is over."""
        until = self._context.clock() + self._registration.start_timeout_s
        asked, wait_s = list(self._registration.probes), FIRST_LOOK_S
        run = probe_runner(self._program)
        while asked:
            reason = await _answer(asked[0], run)
            if not reason:
                del asked[0]
            elif self._context.clock() > until:
                return f"probe {asked[0].target}: {reason}"
            else:
                await asyncio.sleep(min(wait_s, asked[0].interval_s))
                wait_s *= LOOKS_GROW
        return ""

    async def demote(self) -> None:
        """Run the on-demote hook, if this copy serves: it is about to end as planned."""
        self.stop()
        if self._serves:
            await self._beside.kill()  # an on-promote hook that has not ended
            await self._run("on-demote", self._registration.hooks.on_demote)

    def tell(self, role: str | None = None) -> None:
        """Notify of the role, unless that was the last thing told."""
        environment, command = self.environment, self._registration.hooks.notify
        if role is not None:
            primary = self._standing().primary or ""
            environment |= {"ETCDREPLICA_ROLE": role, "ETCDREPLICA_PRIMARY": primary, "ETCDREPLICA_OLD_PRIMARY": ""}
        told = tuple(environment[f"ETCDREPLICA_{name}"] for name in ("ROLE", "EPOCH", "PRIMARY"))
        if command and told != self._told:
            self._context.notifier.tell(self._app, self._job("notify", command, environment), self._note)
        self._told = told

    def stop(self) -> None:
        """Begin nothing more."""
        if self._arriving is not None:
            self._arriving.cancel()

    async def kill(self) -> None:
        """End what runs beside the program."""
        self.stop()
        await self._beside.kill()

    def tell_end(self) -> None:
        """Notify of the end of this copy, if it has had a role."""
        if self._told is not None:
            self.tell(NO_ROLE)

    # --- how ---------------------------------------------------------------------------------------------------------

    def _fail(self, kind: FailureKind, reason: str) -> None:
        self.failure = kind, reason
        self.failed.set()

    async def _run(self, name: str, command: str) -> Outcome:
        if not command:
            return Outcome(True, "")
        outcome = await self._beside.run(self._job(name, command))
        log.log(logging.INFO if outcome.succeeded else logging.WARNING, "%s: %s", self._app, outcome.text)
        self._note(outcome.text)
        return outcome

    def _job(self, name: str, command: str, environment: dict[str, str] | None = None) -> Job:
        more = {"ETCDREPLICA_HOOK": name, "ETCDREPLICA_PID": str(self._pid or "")}
        path = self._context.log_path(f"{self._app}:{name}")
        limit_s = self._registration.hooks.timeout_s
        return Job(name, command, self._program, {**(environment or self.environment), **more}, limit_s, path)


async def _answer(probe: Probe, run: Callable[[str, float], Awaitable[int | None]]) -> str:
    try:
        return await ask(probe, run)
    except OSError as error:  # we could not ask
        return f"could not be asked: {error.strerror or error}"
