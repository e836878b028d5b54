"""What the guardian knows of one ward, and how it starts one."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from etcdreplica.app.kernel import die_with_parent, set_precedence
from etcdreplica.app.protocol import MARK_ENV
from etcdreplica.guardian.tree import Tree, join_control_group, make_control_group, start_time

if TYPE_CHECKING:
    from typing import Any, NoReturn

URGENT_NICE = -15  # of the guardian and of daemons: what must renew leases cannot wait for a hundred programs that start
LOG_LIMIT = 10 << 20  # a larger log is put aside at the next start


class Ward:
    """Something the WatchDog wants remembered under a name, with a process or without.

    `until`: CLOCK_BOOTTIME seconds at which the process must be dead. `status`: of the process, as wait tells it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.memo: Any = None
        self.until: float | None = None
        self.pid: int | None = None
        self.started: int | None = None
        self.mark = ""
        self.status: int | None = None
        self.is_child = False
        self.starting: int | None = None  # the pipe that tells whether exec worked
        self.condemned = False  # its deadline has passed
        self.swept = False  # and nothing of it is alive any more
        self._tree: Tree | None = None

    @property
    def tree(self) -> Tree | None:
        """Its processes, if it has any."""
        if self._tree is None and self.pid is not None:
            self._tree = Tree(self.mark, self.pid, self.started)
        return self._tree

    def described(self) -> dict[str, Any]:
        """Return what a WatchDog is told of it."""
        names = ("memo", "until", "pid", "started", "mark", "status", "is_child")
        return {"ward": self.name, **{name: getattr(self, name) for name in names}}

    def start(self, mark: str, program: Mapping[str, Any], *, grouped: bool = True) -> None:
        """Start a program; `starting` becomes readable when it has, or with an errno when it could not be.

        Nothing here waits for a disk: the log, the directory and the program are opened in the child.
        """
        self.mark, self.is_child = mark, True
        group = make_control_group(mark) if grouped else None
        self.starting, tell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        guardian = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            self.abandon()
            raise
        finally:
            if os.getpid() == guardian:
                os.close(tell)
        if pid == 0:
            _become(guardian, group, mark, URGENT_NICE if self.name.startswith("@") else 0, program, tell)
        self.pid, self.started = pid, start_time(pid)

    def abandon(self) -> None:
        """Wait no longer for the outcome."""
        if self.starting is not None:
            os.close(self.starting)
            self.starting = None

    def outcome(self) -> int | None:
        """Return what `starting` has to tell: None for nothing yet, 0 for a success, else an errno."""
        assert self.starting is not None
        try:
            told = os.read(self.starting, 16)
        except BlockingIOError:
            return None
        self.abandon()
        return int(told) if told else 0


def _become(guardian: int, group: str | None, mark: str, nice: int, program: Mapping[str, Any], tell: int) -> NoReturn:
    """Turn this new child into the program."""
    code = errno.ENOEXEC
    try:
        os.setsid()
        if group is not None:
            join_control_group(group)
        die_with_parent(signal.SIGKILL, guardian)
        set_precedence(nice)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them; exec would pass that on
            signal.signal(number, signal.SIG_DFL)
        _redirect(program.get("log"))
        if program.get("cwd") is not None:
            os.chdir(program["cwd"])
        argv: list[str] = program["argv"]
        os.execvpe(argv[0], argv, {**program["env"], MARK_ENV: mark})  # noqa: S606
    except OSError as error:
        code = error.errno or code
    except BaseException as error:
        sys.stderr.write(f"etcdreplica guardian: cannot start {program.get('argv')}: {error!r}\n")
    os.write(tell, str(code).encode())
    os._exit(127)


def _redirect(log: str | None) -> None:
    """Read nothing; write to the log, or where the guardian writes."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    if log is None:
        return
    with contextlib.suppress(OSError):
        if os.stat(log).st_size > LOG_LIMIT:  # noqa: PTH116
            os.rename(log, f"{log}.1")  # noqa: PTH104
    os.makedirs(os.path.dirname(log), exist_ok=True)  # noqa: PTH103, PTH120
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
