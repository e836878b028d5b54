"""Processes of replicas: started by the guardian or adopted, watched by pidfd, ended as a whole tree."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from weakref import WeakKeyDictionary

from etcdreplica.daemon import death_notice
from etcdreplica.daemon.guard import Guard, WardView
from etcdreplica.daemon.status_page import StatusPage
from etcdreplica.errors import RefusedError
from etcdreplica.guardian.tree import Tree, exiting_status, kill_all, start_time
from etcdreplica.model import Program

KILL_AGAIN_S = 0.002


class ReplicaProcess:
    """One replica's process. `exited` is done, with the reason in words, once it can run no user code any more.

    `on_exit` is called at that very moment; a future's callbacks only come a turn of the loop later.
    """

    def __init__(self, guard: Guard, ward: WardView) -> None:
        """`ward` says which process; it may have ended already."""
        assert ward.pid is not None
        self.pid = ward.pid
        self.is_child = ward.is_child  # of the guardian, and not started by hand
        self.on_exit: Callable[[], None] = lambda: None
        self.returncode: int | None = None
        self.exited: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._tree = Tree(ward.mark, ward.pid, ward.started)
        self._alive: dict[int, int] = {}  # pid -> pidfd
        self._dying: set[int] = set()  # of them, those that only the kernel still works on
        self._gone = asyncio.Event()
        if ward.status is not None:
            self._exited(ward.status)
            return
        is_there = self._start_time(ward.pid) == ward.started and self._watch(ward.pid)
        if ward.is_child:  # also if it has just ended: the guardian tells how
            guard.on_exit(ward.ward, ward.pid, self._exited)
        elif not is_there:
            self._exited(None)

    @classmethod
    async def spawn(
        cls, guard: Guard, ward: str, number: int, program: Program, environment: Mapping[str, str], log: Path | None
    ) -> ReplicaProcess:
        """Start a program in a session of its own. Raises RefusedError when this host cannot."""
        cls.check(program)
        return cls(guard, await guard.spawn(ward, number, program, environment, log))

    @staticmethod
    def check(program: Program) -> None:
        """Raise RefusedError, naming what is missing, unless this host can start the program."""
        check_program(program)

    @staticmethod
    async def end(ward: WardView) -> None:
        """Kill what is left of a ward, and return when all of it is dead."""
        if ward.pid is not None:
            tree = Tree(ward.mark, ward.pid, ward.started)
            while await _sweep(tree):  # noqa: ASYNC110  (nothing tells when a whole tree is dead)
                await asyncio.sleep(KILL_AGAIN_S)

    @classmethod
    def adopt(cls, guard: Guard, ward: str, number: int, pid: int) -> ReplicaProcess:
        """Take charge of a process that somebody else started. Raises ProcessLookupError when it is gone."""
        started = cls._start_time(pid)
        if started is None:
            raise ProcessLookupError(pid)
        mark = f"{guard.name}/{ward}.{number}"
        guard.watch(ward, pid, started, mark)
        return cls(guard, WardView(ward, pid=pid, started=started, mark=mark))

    @property
    def mark(self) -> str:
        """What everything that it starts should carry in its environment as MARK_ENV."""
        return self._tree.mark

    @property
    def started(self) -> int | None:
        """When it was started, as `guardian.tree.start_time` tells it."""
        return self._tree.started

    def include(self, pid: int) -> None:
        """Watch one more process of the tree: the replica is dead when either ends."""
        if pid not in self._alive and not self.exited.done():
            self._watch(pid)

    def has(self, pid: int) -> bool:
        """Whether a process belongs to this replica."""
        with contextlib.suppress(ProcessLookupError):
            return pid == self.pid or (self.is_child and os.getsid(pid) == self.pid)
        return False

    def expect_notice(self, pid: int, page: StatusPage) -> None:
        """Take the early death notice that a watched process holds in its page."""
        if pid in self._alive:
            loop = asyncio.get_running_loop()

            def dying(status: int) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self._on_dying, pid, status)

            death_notice.watch(pid, page, self._alive[pid], dying)

    def signal(self, number: signal.Signals) -> None:
        """Signal the whole group, or only the process if the group is not its own."""
        if self.pid not in self._alive:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.is_child or os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)

    async def kill(self) -> None:
        """Kill all of it and return when nothing of it can run user code any more."""
        while await self._kill_once():  # noqa: ASYNC110  (nothing tells when a whole tree is dead)
            await asyncio.sleep(KILL_AGAIN_S)

    async def gone(self) -> None:
        """Return when the kernel has taken back what the watched processes held: memory, ports and locks.

        That may be long after `exited`, in proportion to their memory.
        """
        if self._alive:
            await self._gone.wait()

    @staticmethod
    def _start_time(pid: int) -> int | None:
        return start_time(pid)

    async def _kill_once(self) -> bool:
        """Kill all of it; whether something of it may still run."""
        for fd in self._alive.values():
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        return bool(await _sweep(self._tree) or self._alive.keys() - self._dying)

    def _watch(self, pid: int) -> bool:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        self._alive[pid] = fd
        self._gone.clear()
        asyncio.get_running_loop().add_reader(fd, self._on_pidfd, pid)
        return True

    def _on_dying(self, pid: int, status: int) -> None:
        """Every task of the process is exiting. A status of 0 may be a completion: that waits for the pidfd."""
        if pid in self._alive and status != 0 and not self.exited.done():
            self._dying.add(pid)
            self._exited(status)

    def _on_pidfd(self, pid: int) -> None:
        fd = self._alive.pop(pid)
        self._dying.discard(pid)
        if not self._alive:
            self._gone.set()
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)
        status = exiting_status(pid)  # a zombie of somebody else's still tells
        if status is not None or not self.is_child or pid != self.pid:
            self._exited(status)  # else the guardian has taken it already, and tells in a moment

    def _exited(self, status: int | None) -> None:
        if not self.exited.done():
            self.returncode = None if status is None else os.waitstatus_to_exitcode(status)
            self.exited.set_result(_in_words(self.returncode))
            self.on_exit()


_ending: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Tree, asyncio.Future[bool]]] = WeakKeyDictionary()


async def _sweep(tree: Tree) -> bool:
    """Kill a tree; whether something of it may still run. All that end in one turn of the loop share one search of /proc."""
    loop = asyncio.get_running_loop()
    ending = _ending.setdefault(loop, {})
    if not ending:
        loop.call_soon(_sweep_all, ending)
    if tree not in ending:
        ending[tree] = loop.create_future()
    return await asyncio.shield(ending[tree])


def _sweep_all(ending: dict[Tree, asyncio.Future[bool]]) -> None:
    trees = dict(ending)
    ending.clear()
    left = set(kill_all(trees))
    for tree, future in trees.items():
        future.set_result(tree in left)


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
