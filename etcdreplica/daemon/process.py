"""Processes of replicas: started or adopted, watched by pidfd, ended as a whole group."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from etcdreplica.daemon import death_notice
from etcdreplica.errors import RefusedError
from etcdreplica.model import Program

LOG_LIMIT = 10 << 20  # a larger log is put aside at the next start


class ReplicaProcess:
    """One replica's process. `exited` is done, with the reason in words, once it can run no user code any more.

    `on_exit` is called at that very moment; a future's callbacks only come a turn of the loop later.
    """

    def __init__(self, pid: int, child: subprocess.Popen[bytes] | None) -> None:
        self.pid = pid
        self.on_exit: Callable[[], None] = lambda: None
        self.returncode: int | None = None
        self.exited: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._child = child
        self._alive: dict[int, int] = {}  # pid -> pidfd
        self._dying: set[int] = set()  # of them, those that only the kernel still works on
        self._watch(pid)

    @property
    def is_child(self) -> bool:
        """Whether this WatchDog started it."""
        return self._child is not None

    @classmethod
    def spawn(cls, program: Program, environment: Mapping[str, str], log: Path) -> ReplicaProcess:
        """Start a program in a session of its own. Raises RefusedError when this host cannot."""
        check_program(program)
        with _open_log(log) as output:
            try:
                child = subprocess.Popen(
                    program.argv,
                    cwd=program.cwd,
                    env={**program.env, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise RefusedError(f"cannot start {program.argv[0]}: {error.strerror or error}") from None
        return cls(child.pid, child)

    @classmethod
    def adopt(cls, pid: int) -> ReplicaProcess:
        """Take over a process that somebody else started. Raises ProcessLookupError when it is gone."""
        return cls(pid, None)

    def include(self, pid: int) -> None:
        """Watch one more process of the group: the replica is dead when either ends."""
        if pid not in self._alive:
            self._watch(pid)

    def expect_notice(self, pid: int, remote_fd: int) -> None:
        """Take the early death notice that a watched process holds. Raises ProtocolError."""
        if pid in self._alive:
            loop = asyncio.get_running_loop()

            def dying(status: int) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self._on_dying, pid, status)

            death_notice.watch(pid, remote_fd, self._alive[pid], dying)

    def signal(self, number: signal.Signals) -> None:
        """Signal the whole group, or only the process if the group is not its own."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.is_child or os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)

    async def kill(self) -> None:
        """Kill the group and return when no watched process can run user code any more."""
        self.signal(signal.SIGKILL)
        while self._alive.keys() - self._dying:
            for fd in self._alive.values():
                with contextlib.suppress(OSError):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
            await asyncio.sleep(0.002)

    def _watch(self, pid: int) -> None:
        fd = os.pidfd_open(pid)
        self._alive[pid] = fd
        asyncio.get_running_loop().add_reader(fd, self._on_exit, pid)

    def _on_dying(self, pid: int, status: int) -> None:
        """Every task of the process is exiting. A status of 0 may be a completion: that waits for the pidfd."""
        if pid in self._alive and status != 0 and not self.exited.done():
            self._dying.add(pid)
            self._exited(os.waitstatus_to_exitcode(status))

    def _on_exit(self, pid: int) -> None:
        fd = self._alive.pop(pid)
        self._dying.discard(pid)
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)
        if self._child is not None and pid == self._child.pid:
            self._exited(self._child.wait())
        else:
            status = death_notice.exiting_status(pid)  # a zombie of somebody else's still tells
            self._exited(None if status is None else os.waitstatus_to_exitcode(status))

    def _exited(self, returncode: int | None) -> None:
        if not self.exited.done():
            self.returncode = returncode
            self.exited.set_result(_in_words(returncode))
            self.on_exit()


def _in_words(returncode: int | None) -> str:
    if returncode is None:
        return "its process ended"
    if returncode < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-returncode).name}"
    return f"exited with code {returncode}"


def check_program(program: Program) -> None:
    """Raise RefusedError, naming what is missing, unless this host can start the program."""
    if not program.argv:
        raise RefusedError("the program has no command")
    if not Path(program.cwd).is_dir():
        raise RefusedError(f"no directory {program.cwd}")
    command = program.argv[0]
    found = Path(program.cwd, command) if "/" in command else shutil.which(command, path=program.env.get("PATH", os.defpath))
    if found is None or not Path(found).is_file() or not os.access(found, os.X_OK):
        raise RefusedError(f"no program {command}")
    for path in program.needs:
        if not os.access(Path(program.cwd, path), os.R_OK):
            raise RefusedError(f"no readable file {path}")


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot, or None if there is none (a zombie counts as none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


@contextlib.contextmanager
def _open_log(path: Path) -> Iterator[int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        if path.stat().st_size > LOG_LIMIT:
            path.rename(path.with_suffix(".log.1"))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
