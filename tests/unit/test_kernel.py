"""The page between a replica and its WatchDog, and the deadline that the kernel enforces, in processes of their own."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from etcdreplica.app.kernel import PAGE, PAGE_NAME, Page, Slot
from etcdreplica.clock import boottime
from etcdreplica.daemon.status_page import StatusPage, open_memory
from etcdreplica.errors import ProtocolError

PATIENCE_S = 60.0
Start = Callable[..., "subprocess.Popen[str]"]

PAGE_CHILD = """
import sys
from etcdreplica.app.kernel import Page, Slot
page = Page()
print(page.fd, flush=True)
for line in sys.stdin:
    slot, value = line.split()
    page.beat(Slot(int(slot)), float(value))
    print("beaten", flush=True)
"""
MEMORY_CHILD = """
import fcntl, os, sys, time
kind, name, size, seals = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if kind == "memory":
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
else:
    fd = os.open(name, os.O_RDONLY)
print(fd, flush=True)
time.sleep(600)
"""
DEADLINE_CHILD = """
import ctypes, os, signal, sys, time
from etcdreplica.app.kernel import Deadline
from etcdreplica.clock import boottime
def sleep_until(at):
    while boottime() < at:
        time.sleep(0.01)
def say(*what):
    print(*what, flush=True)
deadline = Deadline()
"""
SHRINK, GROW, SEAL = 2, 4, 1  # fcntl.F_SEAL_*


@pytest.fixture
def start() -> Iterator[Start]:
    """Run Python code in a child; whatever is left of it is killed."""
    with contextlib.ExitStack() as stack:

        def begin(code: str, *arguments: object) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", code, *map(str, arguments)]
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.enter_context(child)
            stack.callback(child.kill)
            return child

        yield begin


def said(child: subprocess.Popen[str]) -> str:
    """Return the next line of a child."""
    assert child.stdout is not None
    return child.stdout.readline().strip()


def tell(child: subprocess.Popen[str], line: str) -> None:
    """Send a line to a child."""
    assert child.stdin is not None
    child.stdin.write(line + "\n")
    child.stdin.flush()


# --- the page --------------------------------------------------------------------------------------------------------


def test_page_of_another_process(start: Start) -> None:
    """Every slot is seen as it was written last, and only that slot."""
    child = start(PAGE_CHILD)
    page = StatusPage(child.pid, int(said(child)))
    assert [page.read(slot) for slot in Slot] == [0.0] * len(Slot)
    for slot in Slot:
        tell(child, f"{int(slot)} {slot + 0.125}")
        assert said(child) == "beaten"
        assert page.read(slot) == slot + 0.125
    assert [page.read(slot) for slot in Slot] == [slot + 0.125 for slot in Slot]
    tell(child, "0 nan")
    assert said(child) == "beaten"
    assert math.isnan(page.read(Slot.PULSE))


def test_page_outlives_its_process(start: Start) -> None:
    """What a killed process said last can still be read."""
    child = start(PAGE_CHILD)
    page = StatusPage(child.pid, int(said(child)))
    tell(child, "2 41.5")
    said(child)
    child.kill()
    child.wait()
    assert page.read(Slot.PROGRESS) == 41.5


def test_page_of_this_process() -> None:
    """Both sides in one process; the memory stays after the descriptor was given back."""
    page = Page()
    seen = StatusPage(os.getpid(), page.fd)
    page.beat(Slot.HEALTH, 3.0)
    page.close()
    page.beat(Slot.LOOP, 4.0)
    assert (seen.read(Slot.HEALTH), seen.read(Slot.LOOP)) == (3.0, 4.0)


def test_page_gives_back_what_it_took() -> None:
    """Neither a mapping nor a descriptor is left of a page that nobody uses any more."""
    gc.collect()  # pages of other tests
    page = Page()
    before, fds = _mappings(), _descriptors()
    pages = [StatusPage(os.getpid(), page.fd) for _ in range(20)]
    assert _mappings() == before + 20
    del pages
    gc.collect()
    assert _mappings() == before
    assert _descriptors() <= fds
    page.close()


def _mappings() -> int:
    return sum(PAGE_NAME in line for line in Path("/proc/self/maps").read_text().splitlines())


def _descriptors() -> int:
    gc.collect()  # of what earlier tests have left open
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(
    ("kind", "name", "size", "seals", "reason"),
    [
        ("memory", PAGE_NAME, PAGE, 0, "cut off"),
        ("memory", PAGE_NAME, PAGE, GROW, "cut off"),
        ("memory", PAGE_NAME, PAGE, SHRINK, "cut off"),
        ("memory", PAGE_NAME, PAGE, SEAL, "cut off"),
        ("memory", PAGE_NAME, 0, SHRINK | GROW, "cut off"),
        ("memory", PAGE_NAME, PAGE - 1, SHRINK | GROW, "cut off"),
        ("memory", PAGE_NAME, 2 * PAGE, SHRINK | GROW, "cut off"),
        ("memory", "something-else", PAGE, SHRINK | GROW, "is no etcdreplica-page"),
        ("file", "/dev/null", 0, 0, "is no etcdreplica-page"),
        ("file", "/", 0, 0, "is no etcdreplica-page"),
        ("file", sys.executable, 0, 0, "is no etcdreplica-page"),
    ],
)
def test_what_is_no_page_is_refused(start: Start, kind: str, name: str, size: int, seals: int, reason: str) -> None:
    """Only a sealed page of exactly its size is mapped: one that is cut off would kill the WatchDog that reads it."""
    child = start(MEMORY_CHILD, kind, name, size, seals)
    fd, before = int(said(child)), _descriptors()
    with pytest.raises(ProtocolError, match=reason):
        StatusPage(child.pid, fd)
    assert _descriptors() <= before


def test_page_by_any_other_maker(start: Start) -> None:
    """Whoever seals a page of the right name and size is read."""
    child = start(MEMORY_CHILD, "memory", PAGE_NAME, PAGE, SHRINK | GROW)
    assert StatusPage(child.pid, int(said(child))).read(Slot.PULSE) == 0.0


@pytest.mark.parametrize("fd", [-1, 999, 2**31, 2**70])
def test_descriptor_that_is_not_there(fd: int) -> None:
    """No such descriptor of this process."""
    with pytest.raises(ProtocolError, match="cannot open"):
        StatusPage(os.getpid(), fd)


@pytest.mark.parametrize("pid", [-1, 0, 2**22 + 1])
def test_process_that_is_not_there(pid: int) -> None:
    """No such process."""
    with pytest.raises(ProtocolError, match="cannot open"):
        open_memory(pid, 3, PAGE_NAME)


# --- the deadline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "doing",
    [
        "ctypes.PyDLL(None).sleep(60)",  # holds the GIL
        "ctypes.CDLL(None).sleep(60)",
        "os.kill(os.getpid(), signal.SIGSTOP)",
        "while True: pass",
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)); time.sleep(60)",
    ],
)
def test_deadline_fires_whatever_the_process_does(start: Start, doing: str) -> None:
    """Not before, and with SIGKILL."""
    child = start(f"{DEADLINE_CHILD}\nat = boottime() + 0.4\ndeadline.arm(at)\nsay(at)\n{doing}")
    at = float(said(child))
    assert child.wait(PATIENCE_S) == -9
    assert boottime() >= at


@pytest.mark.parametrize("at", ["boottime() - 1", "0.0", "0", "-5.0", "1e-9"])
def test_moment_in_the_past_kills_at_once(start: Start, at: str) -> None:
    """Also 0, which the kernel would take for disarming."""
    child = start(f"{DEADLINE_CHILD}\ndeadline.arm({at})\ntime.sleep(60)")
    assert child.wait(PATIENCE_S) == -9


def test_arming_anew_moves_it_back_and_forth(start: Start) -> None:
    """Past the first moment the process lives; the last one counts."""
    child = start(
        f"{DEADLINE_CHILD}\nfirst = boottime() + 1.5\ndeadline.arm(first)\ndeadline.arm(first + 600)\n"
        "sleep_until(first + 0.1)\nsay('alive')\nat = boottime() + 0.2\ndeadline.arm(at)\nsay(at)\ntime.sleep(60)"
    )
    assert said(child) == "alive"
    at = float(said(child))
    assert child.wait(PATIENCE_S) == -9
    assert boottime() >= at


@pytest.mark.parametrize("disarm", ["deadline.arm(None)", "deadline.close()"])
def test_disarming(start: Start, disarm: str) -> None:
    """The moment passes and nothing happens."""
    child = start(f"{DEADLINE_CHILD}\nat = boottime() + 1.5\ndeadline.arm(at)\n{disarm}\nsleep_until(at + 0.1)\nsys.exit(7)")
    assert child.wait(PATIENCE_S) == 7


def test_deadline_is_not_inherited_by_fork(start: Start) -> None:
    """The child lives on when its parent was killed."""
    child = start(
        f"{DEADLINE_CHILD}\nat = boottime() + 1.0\ndeadline.arm(at)\nparent = os.getpid()\n"
        "if os.fork() == 0:\n"
        "    while os.getppid() == parent: time.sleep(0.01)\n"
        "    sleep_until(at + 0.1)\n    say('survived')\n    os._exit(0)\n"
        "time.sleep(60)"
    )
    assert said(child) == "survived"
    assert child.wait(PATIENCE_S) == -9


def test_deadline_ends_with_exec(start: Start) -> None:
    """A program that takes the place of the process is not killed."""
    child = start(
        f"{DEADLINE_CHILD}\nat = boottime() + 1.5\ndeadline.arm(at)\nsay(at)\nos.execv('/bin/cat', ['cat'])",
    )
    at = float(said(child))
    while boottime() < at + 0.1:
        assert child.poll() is None
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.05)
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(PATIENCE_S) == 0


def test_two_deadlines_of_one_process(start: Start) -> None:
    """Whichever comes first."""
    child = start(f"{DEADLINE_CHILD}\ndeadline.arm(boottime() + 600)\nDeadline().arm(boottime() + 0.2)\ntime.sleep(60)")
    assert child.wait(PATIENCE_S) == -9
