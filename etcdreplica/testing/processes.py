"""Child processes that never outlive whoever started them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
_BOUND = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9, 0, 0, 0); "
    "os.getppid() == int(sys.argv[1]) or os._exit(1); os.execvp(sys.argv[2], sys.argv[2:])"
)


def spawn_bound(command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a program that the kernel kills when the calling thread ends, with its output in a file."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-S", "-c", _BOUND, str(os.getpid()), *command],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run_bound(command: Sequence[str]) -> int:
    """Run a program here until it ends, passing on SIGTERM and Ctrl-C; return its exit code. It dies with this process."""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", _BOUND, str(os.getpid()), *command], stdin=subprocess.DEVNULL, start_new_session=True
    ) as process:
        before = {
            number: signal.signal(number, lambda number, _: process.send_signal(number))
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            return process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def stop(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Ask a process to end, and kill it if it does not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def halt(pid: int) -> None:
    """SIGSTOP a process, and wait until none of its threads runs: those on other processors go on for a moment."""
    os.kill(pid, signal.SIGSTOP)
    while any(_runs(task) for task in Path(f"/proc/{pid}/task").glob("*")):
        time.sleep(0.001)


def _runs(task: Path) -> bool:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] not in "TtZX"
    except OSError:
        return False


def descendants(pid: int) -> Iterator[int]:
    """Yield every process started below `pid`, nearest first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    level = [pid]
    while level:
        level = [child for parent in level for child in children.get(parent, ())]
        yield from level


def cpu_s(pid: int) -> float:
    """Return the CPU time that a process has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident_mib(pid: int) -> float:
    """Return the memory that a process has resident."""
    return round(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / (1 << 20), 1)


def kill_tree(pid: int) -> None:
    """SIGKILL a process and everything below it, the process first: as close to a power cut as a machine allows."""
    for each in [pid, *descendants(pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
