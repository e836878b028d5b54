"""The process that waits for the end of a guardian, however it comes, and then ends what is left of its wards.

The kernel kills the children of a dead guardian, but not the children of those. Where there are cgroups these are found by
them; elsewhere by the mark in their environment, which a program may have overwritten, or by their process group. So the
undertaker is told which processes the wards have.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, NoReturn

from etcdreplica.guardian.tree import Tree, end_all

if TYPE_CHECKING:
    from collections.abc import Iterable

_ADD, _DROP = "+", "-"


class Undertaker:
    """As its guardian knows it. `pid` is that of its process, while it has one."""

    def __init__(self, guardian: str) -> None:
        self.pid: int | None = None
        self._guardian = guardian
        self._tell: int | None = None  # our end of the pipe: it closes with this process

    def start(self, trees: Iterable[Tree]) -> None:
        """Start it, knowing these already."""
        known = {tree.mark: tree for tree in trees}
        hear, tell = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(tell, False)
        if self._tell is not None:
            os.close(self._tell)
        self._tell = tell
        pid = os.fork()
        if pid == 0:
            _wait(hear, self._guardian, known)
        os.close(hear)
        self.pid = pid

    def add(self, tree: Tree) -> None:
        """There is one more."""
        self._say(f"{_ADD} {tree.pid} {tree.started or 0} {tree.mark}\n")

    def drop(self, tree: Tree) -> None:
        """It is dead."""
        self._say(f"{_DROP} 0 0 {tree.mark}\n")

    def end(self) -> None:
        """There is nothing left for it to do."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def _say(self, line: str) -> None:
        """Tell it; one that does not listen is replaced by one that knows everything."""
        if self._tell is None or self.pid is None:
            return
        try:
            os.write(self._tell, line.encode())  # less than what a pipe takes as one
        except OSError:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def _wait(hear: int, guardian: str, known: dict[str, Tree]) -> NoReturn:
    """Be the undertaker."""
    try:
        os.closerange(3, hear)
        os.closerange(hear + 1, os.sysconf("SC_OPEN_MAX"))
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        heard = b""
        while data := os.read(hear, 1 << 16):
            *lines, heard = (heard + data).split(b"\n")
            for line in lines:
                what, pid, started, mark = line.decode().split(" ", 3)
                known.pop(mark, None)
                if what == _ADD:
                    known[mark] = Tree(mark, int(pid), int(started) or None)
        end_all(guardian, known.values())
    finally:
        os._exit(0)
