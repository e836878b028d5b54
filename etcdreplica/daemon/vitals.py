"""Whether one replica still lives, by the signs of life in its page, and what to keep as evidence when it does not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

from etcdreplica.app.kernel import Slot
from etcdreplica.app.protocol import MARK_ENV, Message
from etcdreplica.app.stacks import STACKS_NAME
from etcdreplica.core.hang import Silence
from etcdreplica.core.probing import call_verdict
from etcdreplica.daemon.probes import Prober, Run, shell_runner
from etcdreplica.daemon.status_page import StatusPage, open_memory
from etcdreplica.errors import ProtocolError
from etcdreplica.guardian.tree import start_time
from etcdreplica.model import Probe, Program, Registration
from etcdreplica.words import PROBE_CALL

EVIDENCE_LIMIT = 8192  # characters; it stands in etcd
STACKS_S = 0.2  # a signal handler writes its stacks within this, or not at all
LOOK_S = 0.01
RETURN_S = 5.0  # a process that lives says hello to a new WatchDog well within this
_WORDS = {
    Slot.PULSE: "the process gave no sign of life",
    Slot.LOOP: "the event loop did not run",
    Slot.PROGRESS: "the body called no heartbeat",
}


class Vitals:
    """Signs of life of one process, judged between `begin` and `end`. `at` is time as `core.hang.Awake` tells it.

    `on_hung` is called once, when it is found hung; `hung` then says why.
    """

    def __init__(self, on_hung: Callable[[], None], open_page: Callable[[int, int], StatusPage] = StatusPage) -> None:
        self.page: StatusPage | None = None
        self._open_page = open_page
        self.health = 0, ""  # bad answers of the `health` function in a row, and the last one's reason
        self.hung = ""
        self.arrived = False  # at the protected call
        self.awaited = False  # it had arrived, and has not come back to this WatchDog yet
        self._on_hung = on_hung
        self._registration: Registration | None = None  # while it is judged
        self._prober: Prober | None = None
        self._pid = 0
        self._stacks: tuple[int, int] | None = None  # its descriptor of the memory, and the signal that fills it
        self._silences = {slot: Silence() for slot in _WORDS}
        self._answers = Silence()
        self._first_answer = 0.0
        self._waiting_since: float | None = None
        self._seen = b""  # what stood in the page at the last look
        self._due = 0.0  # when that alone could be too old

    def attach(self, pid: int, message: Message) -> None:
        """Take where the process gives its signs of life. Raises ProtocolError."""
        self.page = self._open_page(pid, int(message["fd"]))
        self._pid = pid
        if signal.SIGRTMIN <= int(message.get("signal", 0)) <= signal.SIGRTMAX:
            self._stacks = int(message["stacks"]), int(message["signal"])

    def begin(self, registration: Registration) -> None:
        """Judge it from now on."""
        self._registration = registration

    def probe(self, program: Program) -> None:
        """Ask its probes from now on, once: its body runs."""
        if self._prober is None and self._registration is not None and self._registration.probes:
            self._prober = Prober(self._registration.probes, probe_runner(program), self._find)
            self._prober.start()

    def end(self) -> None:
        """Judge it no longer: it is ending."""
        self._registration = None
        if self._prober is not None:
            self._prober.stop()

    def check(self, at: float) -> None:
        """Look at the signs of life."""
        if self._registration is not None and (reason := self._verdict(self._registration, at)):
            self._find(reason)

    def _find(self, reason: str) -> None:
        if self._registration is not None and not self.hung:
            self.hung = reason
            self._on_hung()

    @property
    def progress_at(self) -> float:
        """When the body called `heartbeat` last, if it is to be believed; 0 if it never did."""
        return self.page.read(Slot.PROGRESS) if self.page is not None else 0.0

    def _verdict(self, registration: Registration, at: float) -> str:
        if self.page is None:
            self._waiting_since = at if self._waiting_since is None else self._waiting_since
            if self.awaited and registration.hang_timeout_s:
                limit_s = RETURN_S + registration.hang_timeout_s
                late = at - self._waiting_since > limit_s
                return f"it did not come back to its WatchDog, which was replaced, within {limit_s:g} s" if late else ""
            if self.arrived:
                return ""  # it could not give signs of life: only its probes tell
            late = at - self._waiting_since > registration.start_timeout_s
            return f"it did not reach the protected call within {registration.start_timeout_s:g} s" if late else ""
        seen = self.page.slots()
        if seen == self._seen and at < self._due:
            return ""  # the usual case
        self._seen = seen
        limit, longest = registration.hang_timeout_s or float("inf"), 0.0
        for slot, silence in self._silences.items():
            silent_s = silence.observe(self.page.read(slot), at)
            if silent_s > limit:
                return f"{_WORDS[slot]} for {limit:g} s"
            longest = max(longest, silent_s)
        probe = next((probe for probe in registration.probes if probe.target == PROBE_CALL), None)
        self._due = at if probe else at + limit - longest
        return self._health_verdict(probe, self.page.read(Slot.HEALTH), at) if probe else ""

    def _health_verdict(self, probe: Probe, answered: float, at: float) -> str:
        silent_s = self._answers.observe(answered, at)
        self._first_answer = self._first_answer or answered
        if answered == self._first_answer:
            silent_s -= probe.grace_s
        bad, reason = self.health
        return call_verdict(probe, bad=bad, reason=reason, silent_s=silent_s)

    async def evidence(self, main: int) -> str:
        """Return what each thread is doing: as the kernel sees it, and, of Python, its stack."""
        pid = self._pid or main
        threads = _threads(pid)
        stopped = any(": stopped" in line for line in threads)
        stacks = "" if stopped or self._stacks is None else await _stacks(pid, *self._stacks)
        return "\n".join((*threads, stacks))[:EVIDENCE_LIMIT].rstrip()


def probe_runner(program: Program) -> Run:
    """Return what runs the probes' commands of a program."""
    return shell_runner(program.cwd, {**program.env, MARK_ENV: os.environ[MARK_ENV]})  # what a probe leaves behind ends with us


def _threads(pid: int) -> list[str]:
    return [_thread(task) for task in sorted(Path(f"/proc/{pid}/task").glob("*"))]


def _thread(task: Path) -> str:
    """Name, state and, where the kernel tells it, the function of the kernel in which a thread waits."""
    words = {"R": "running", "S": "sleeping", "D": "waiting for a disk", "T": "stopped", "t": "stopped by a tracer"}
    with contextlib.suppress(OSError, IndexError):
        name, fields = (task / "comm").read_text().strip(), (task / "stat").read_text().rpartition(")")[2].split()
        place = ""
        with contextlib.suppress(OSError):
            place = (task / "wchan").read_text().strip("0")
        return f"thread {task.name} {name}: {words.get(fields[0], fields[0])}" + (f" in {place}" if place else "")
    return f"thread {task.name}: gone"


async def _stacks(pid: int, remote_fd: int, number: int) -> str:
    try:
        fd = open_memory(pid, remote_fd, STACKS_NAME)
    except ProtocolError:
        return ""
    try:
        size = os.fstat(fd).st_size
        if start_time(pid) is None:
            return ""
        os.kill(pid, number)
        seen = size
        for _ in range(int(STACKS_S / LOOK_S)):
            await asyncio.sleep(LOOK_S)
            now = os.fstat(fd).st_size
            if now == seen > size:
                break
            seen = now
        return os.pread(fd, EVIDENCE_LIMIT, size).decode(errors="replace")
    except (OSError, ValueError):
        return ""
    finally:
        os.close(fd)
