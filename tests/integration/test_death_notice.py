"""The early death notice with real processes: early where it is right, silent where it would be wrong."""

from __future__ import annotations

import fcntl
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from etcdreplica.app.kernel import PAGE, PAGE_NAME, Page, Slot
from etcdreplica.daemon import death_notice
from etcdreplica.daemon.guard import Guard, WardView
from etcdreplica.daemon.process import ReplicaProcess
from etcdreplica.daemon.status_page import StatusPage
from etcdreplica.errors import ProtocolError
from etcdreplica.guardian.tree import start_time

PATIENCE_S = 60.0
PROGRAM = """
import os, sys, threading, time
from etcdreplica.app.kernel import Notice, Page
held, free, end = threading.Event(), threading.Event(), threading.Event()
def holder():
    global notice, page
    page = Page()
    notice = Notice(page)
    print(page.fd, flush=True)
    held.set()
    while not end.is_set():
        if free.wait(0.01):
            notice.release()
            end.wait()
threading.Thread(target=holder, daemon=True).start()
held.wait()
sys.stdin.readline()
{then}
"""
Start = Callable[[str], tuple[subprocess.Popen[str], int, "queue.Queue[int]"]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a program that holds a notice and, once it reads a line, does something; watch it."""
    started: list[tuple[subprocess.Popen[str], int]] = []

    def go(then: str) -> tuple[subprocess.Popen[str], int, queue.Queue[int]]:
        program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(then=then)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        pidfd = os.pidfd_open(program.pid)
        started.append((program, pidfd))
        assert program.stdout is not None
        notices: queue.Queue[int] = queue.Queue()
        page = StatusPage(program.pid, int(program.stdout.readline()))
        death_notice.watch(program.pid, page, pidfd, notices.put)
        return program, pidfd, notices

    yield go
    for program, pidfd in started:
        program.kill()
        program.communicate()
        os.close(pidfd)


def _proceed(program: subprocess.Popen[str]) -> None:
    assert program.stdin is not None
    program.stdin.write("\n")
    program.stdin.flush()


@pytest.mark.parametrize("size_mib", [0, 512])
def test_killed(start: Start, size_mib: int) -> None:
    """SIGKILL gives a notice with the signal, with much memory too."""
    program, _, notices = start(f"memory = bytearray({size_mib} << 20); print('big', flush=True); time.sleep(600)")
    _proceed(program)
    assert program.stdout is not None
    assert program.stdout.readline() == "big\n"
    program.kill()
    assert os.waitstatus_to_exitcode(notices.get(timeout=PATIENCE_S)) == -signal.SIGKILL


def test_stopped_then_killed(start: Start) -> None:
    """A process that was stopped can be killed, and is noticed."""
    program, _, notices = start("time.sleep(600)")
    program.send_signal(signal.SIGSTOP)
    program.kill()
    assert os.waitstatus_to_exitcode(notices.get(timeout=PATIENCE_S)) == -signal.SIGKILL


def test_exit_status(start: Start) -> None:
    """An ordinary exit tells its status."""
    program, _, notices = start("os._exit(3)")
    _proceed(program)
    assert os.waitstatus_to_exitcode(notices.get(timeout=PATIENCE_S)) == 3


def _assert_silent_but_alive(program: subprocess.Popen[str], notices: queue.Queue[int]) -> None:
    """The waiting thread has looked and given up: no notice came, and the process was not killed."""
    for thread in threading.enumerate():
        if thread.name == f"death notice {program.pid}":
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
    assert notices.empty()
    assert program.poll() is None


def test_exec_is_no_death(start: Start) -> None:
    """A process that calls exec releases the futex and lives on."""
    program, _, notices = start("os.execvp('sh', ['sh', '-c', 'echo there; exec sleep 600'])")
    _proceed(program)
    assert program.stdout is not None
    assert program.stdout.readline() == "there\n"
    _assert_silent_but_alive(program, notices)


def test_end_of_the_holding_thread_is_no_death(start: Start) -> None:
    """A process whose holding thread ends lives on."""
    program, _, notices = start("end.set(); print('ended', flush=True); time.sleep(600)")
    _proceed(program)
    _assert_silent_but_alive(program, notices)


def test_end_of_the_main_thread_is_no_death(start: Start) -> None:
    """A process whose main thread and holding thread are gone, but not another one, lives on."""
    program, _, notices = start(
        "threading.Thread(target=lambda: time.sleep(600)).start(); import ctypes; end.set();"
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    _proceed(program)
    _assert_silent_but_alive(program, notices)


def test_vfork_child_is_no_death(start: Start) -> None:
    """A child started by vfork and exec comes and goes without a notice."""
    program, _, notices = start("import subprocess; subprocess.run(['true']); print('ran', flush=True); time.sleep(600)")
    _proceed(program)
    assert program.stdout is not None
    assert program.stdout.readline() == "ran\n"
    assert notices.empty()
    program.kill()
    assert notices.get(timeout=PATIENCE_S)


def test_release_is_no_death(start: Start) -> None:
    """A process that lets go of its notice ends the waiting, and lives on."""
    program, _, notices = start("free.set(); time.sleep(600)")
    _proceed(program)
    _assert_silent_but_alive(program, notices)


HOLDER = """
import socket
server = socket.create_server(("127.0.0.1", 0))
memory = bytearray(b"x") * (512 << 20)
print(server.getsockname()[1], flush=True)
time.sleep(600)
"""


async def test_gone_is_later_than_dead() -> None:
    """A process that can run no more may hold its port for as long as its memory is being freed; `gone` waits for that."""
    command = [sys.executable, "-c", PROGRAM.format(then=HOLDER)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:  # noqa: ASYNC220
        assert program.stdout is not None
        process = ReplicaProcess(Guard("test"), WardView("app", pid=program.pid, started=start_time(program.pid)))
        process.expect_notice(program.pid, StatusPage(program.pid, int(program.stdout.readline())))
        _proceed(program)
        port = int(program.stdout.readline())
        program.kill()
        await process.exited
        await process.gone()
        socket.create_server(("127.0.0.1", port)).close()


def test_signs_of_life_cross() -> None:
    """What one side beats the other reads, and the page outlives its descriptor."""
    page = Page()
    status = StatusPage(os.getpid(), page.fd)
    page.close()
    assert [status.read(slot) for slot in Slot] == [0.0] * len(Slot)
    for slot in Slot:
        page.beat(slot, slot + 0.5)
    assert [status.read(slot) for slot in Slot] == [slot + 0.5 for slot in Slot]


def test_not_a_page() -> None:
    """A pipe, a missing descriptor, memory of another name or size, and a page that could be cut off are refused."""
    unsealed, other = os.memfd_create(PAGE_NAME, os.MFD_ALLOW_SEALING), os.memfd_create("other", os.MFD_ALLOW_SEALING)
    small = os.memfd_create(PAGE_NAME, os.MFD_ALLOW_SEALING)
    read, write = os.pipe()
    fds = (unsealed, other, small, read, write)
    os.ftruncate(unsealed, PAGE)
    os.ftruncate(other, PAGE)
    for fd in (small, other):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    try:
        for fd in (unsealed, other, small, read, 987654, -1):
            with pytest.raises(ProtocolError):
                StatusPage(os.getpid(), fd)
    finally:
        for fd in fds:
            os.close(fd)
