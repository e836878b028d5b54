"""Everything that one replica has started: found, killed and known dead as a whole.

Two ways. With a cgroup (version 2) of its own, where this host lets us make one, the kernel keeps the list and kills all of
it at once, whatever the processes do. Otherwise /proc is searched: a process belongs to the replica if it is in its process
group, descends from it, or carries its mark in the environment it was started with. Such a search misses a process that
has left the group, lost its parent and cleaned its environment.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Iterable, Iterator

from etcdreplica.app.protocol import MARK_ENV

PF_EXITING = 0x4


class Tree:
    """The processes of one replica: `pid`, started at `started` (see `start_time`), and what came of it.

    `mark` is <guardian>/<ward>; what was started by hand carries it in the environment only from its protected call on.
    """

    def __init__(self, mark: str, pid: int, started: int | None) -> None:
        self.mark = mark
        self.pid = pid
        self.started = started
        self.group = control_group(mark) if mark else None

    def strike(self) -> None:
        """Send SIGKILL to what can be reached at once: its cgroups, its process group, its main process."""
        for group in self._groups():
            with contextlib.suppress(FileNotFoundError):  # removed: nothing is left in it
                _write(f"{group}/cgroup.kill", b"1")
        if start_time(self.pid) == self.started is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(self.pid) == self.pid:
                    os.killpg(self.pid, signal.SIGKILL)  # a group is killed as one, however fast it forks
                os.kill(self.pid, signal.SIGKILL)

    def kill(self) -> list[int]:
        """Send SIGKILL to all of it, and return those that may still run code of the user.

        Raises OSError when that cannot be told now: then it must be tried again.
        """
        self.strike()
        return self.sweep()

    def sweep(self, processes: Processes | None = None) -> list[int]:
        """Send SIGKILL to what a strike has left, and return it. `processes` spares a search. Raises OSError as `kill` does."""
        alive = self.alive(processes)
        for pid in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)  # in a cgroup: one whose main thread has ended, which the kernel leaves out
        return alive

    def alive(self, processes: Processes | None = None) -> list[int]:
        """Return those that may still run code of the user. Raises OSError when that cannot be told now."""
        return [pid for pid in self._members(processes) if not _is_over(pid)]

    def forget(self) -> bool:
        """Remove what was made for it; False if that has to be tried again because something in it is still ending."""
        try:
            for group in reversed(self._groups()):
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(group)  # noqa: PTH106
        except OSError:
            return False
        return True

    def _groups(self) -> list[str]:
        """Its cgroup and those that it has made below, the nearest first."""
        found = [self.group] if self.group is not None else []
        for group in found:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(group).st_nlink > 2:  # noqa: PTH116
                    found += [entry.path for entry in os.scandir(group) if entry.is_dir(follow_symlinks=False)]
        return found

    def _members(self, processes: Processes | None) -> Iterator[int]:
        if self.group is None:
            yield from self._search(processes or Processes())
            return
        members = {self.pid} if start_time(self.pid) == self.started is not None else set()  # it may have moved away
        for group in self._groups():
            with contextlib.suppress(FileNotFoundError):
                members.update(map(int, _read(f"{group}/cgroup.procs").split()))
        yield from members

    def _search(self, processes: Processes) -> Iterator[int]:
        main = processes.stats.get(self.pid)
        reused = main is not None and int(main[19]) != self.started  # the number is somebody else's by now
        found = [self.pid] if main is not None and not reused else []
        if self.mark:
            found += processes.in_group(self.pid) if self.pid > 0 and not reused else []
            found += processes.marked(self.mark)
        members: set[int] = set()
        while found:
            pid = found.pop()
            if pid not in members and pid != os.getpid():
                members.add(pid)
                found += processes.children(pid)
        yield from sorted(members, key=processes.age)  # parents before their children


class Processes:
    """All processes of the machine at one moment, so that many trees are found in one search."""

    def __init__(self) -> None:
        self.stats = dict(_all_processes())
        self._children: dict[int, list[int]] = {}
        self._groups: dict[int, list[int]] = {}
        self._marked: dict[str, list[int]] | None = None
        for pid, fields in self.stats.items():
            self._children.setdefault(int(fields[1]), []).append(pid)
            self._groups.setdefault(int(fields[2]), []).append(pid)

    def age(self, pid: int) -> int:
        """Return when a process was started."""
        return int(self.stats[pid][19])

    def children(self, pid: int) -> list[int]:
        """Return what a process has started."""
        return self._children.get(pid, [])

    def in_group(self, group: int) -> list[int]:
        """Return the processes of a group."""
        return self._groups.get(group, [])

    def marked(self, mark: str) -> list[int]:
        """Return the processes that carry a mark, or one below it, in their environment."""
        if self._marked is None:
            self._marked = {}
            for pid in self.stats:
                parts = _mark_of(pid).split("/")
                for length in range(1, len(parts) + 1):
                    self._marked.setdefault("/".join(parts[:length]), []).append(pid)
        return self._marked.get(mark, [])


def kill_all(trees: Iterable[Tree]) -> list[Tree]:
    """Kill several, all at once and then each as a whole; return those of which something may still run."""
    trees = list(trees)
    for tree in trees:
        with contextlib.suppress(OSError):
            tree.strike()
    try:
        processes = Processes() if any(tree.group is None for tree in trees) else None
    except OSError:
        return trees
    left = []
    for tree in trees:
        try:
            if tree.sweep(processes):
                left.append(tree)
        except OSError:
            left.append(tree)
    return left


def end_all(guardian: str, known: Iterable[Tree] = ()) -> None:
    """Kill whatever a guardian that is dead has left behind, and return when none of it can run any more.

    `known` are trees of it that may not be found otherwise.
    """
    group = control_group(guardian)
    by_mark = Tree(guardian, 0, None)
    by_mark.group = None
    wards: list[Tree] = []
    with contextlib.suppress(FileNotFoundError):  # its undertaker may have removed it by now
        wards = [Tree(f"{guardian}/{entry.name}", 0, None) for entry in os.scandir(group) if entry.is_dir()] if group else []
    left = [*wards, *known, by_mark]
    while left := kill_all(left):
        time.sleep(0.002)
    for _ in range(500):
        wards = [tree for tree in wards if not tree.forget()]
        if not wards:
            break
        time.sleep(0.01)
    if group:
        with contextlib.suppress(OSError):
            os.rmdir(group)  # noqa: PTH106


def join_control_group(group: str) -> None:
    """Move this process into a cgroup; if that cannot be, remove it, so that nobody relies on it."""
    try:
        _write(f"{group}/cgroup.procs", b"0")
    except OSError:
        with contextlib.suppress(OSError):
            os.rmdir(group)  # noqa: PTH106


def make_control_group(mark: str) -> str | None:
    """Make a cgroup for a ward, if this host lets us."""
    base = _base()
    path = f"{base}/etcdreplica-{mark}" if base else ""
    try:
        if base:
            os.makedirs(path, exist_ok=True)  # noqa: PTH103
            if os.access(f"{path}/cgroup.kill", os.W_OK) and os.access(f"{path}/cgroup.procs", os.W_OK):
                return path
            os.rmdir(path)  # noqa: PTH106
    except OSError:
        pass
    return None


def control_group(mark: str) -> str | None:
    """Return the cgroup that was made for a ward or a guardian, if there is one."""
    base = _base()
    path = f"{base}/etcdreplica-{mark}"
    return path if base and os.path.isdir(path) else None  # noqa: PTH112


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot, or None if there is none (a zombie counts as none)."""
    fields = _stat(f"/proc/{pid}/stat")
    return None if fields is None or _is_zombie(fields) else int(fields[19])


def exiting_status(pid: int) -> int | None:
    """Return the exit status of a process all of whose tasks are exiting, else None."""
    status: int | None = None
    try:
        for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208  (this is the hot path)
            fields = _stat(f"/proc/{pid}/task/{task}/stat")
            if fields is None:
                continue  # gone since it was listed
            if not int(fields[6]) & PF_EXITING:
                return None
            status = int(fields[49])
    except (FileNotFoundError, ProcessLookupError):
        return None
    return status


def _is_over(pid: int) -> bool:
    return exiting_status(pid) is not None or not os.path.exists(f"/proc/{pid}/stat")  # noqa: PTH110


def _all_processes() -> Iterator[tuple[int, list[bytes]]]:
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit() and (fields := _stat(f"/proc/{name}/stat")) is not None and not _is_zombie(fields):
            yield int(name), fields


def _is_zombie(fields: list[bytes]) -> bool:
    """Whether all of a process has ended, and not only its main thread."""
    return fields[0] in b"ZX" and int(fields[17]) <= 1


def _mark_of(pid: int) -> str:
    name = f"{MARK_ENV}=".encode()
    try:
        environ = _read(f"/proc/{pid}/environ")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""
    return next((entry[len(name) :].decode(errors="replace") for entry in environ.split(b"\0") if entry.startswith(name)), "")


@functools.cache
def _base() -> str | None:
    """Return the directory of the cgroup that this process is in, as version 2 knows it."""
    with contextlib.suppress(OSError, StopIteration):
        mounts = (line.split() for line in _read("/proc/self/mounts").decode().splitlines())
        mount = next(fields[1] for fields in mounts if fields[2] == "cgroup2")
        lines = _read("/proc/self/cgroup").decode().splitlines()
        path = next(line[3:] for line in lines if line.startswith("0::"))
        return (mount + path).rstrip("/")
    return None


def _stat(path: str) -> list[bytes] | None:
    """Return the fields after the name, or None when there is no such task."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return os.read(fd, 4096).rpartition(b")")[2].split()
    except ProcessLookupError:
        return None
    finally:
        os.close(fd)


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(fd, 1 << 16)
        while chunk := os.read(fd, 1 << 16):
            data += chunk
        return data
    finally:
        os.close(fd)


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
