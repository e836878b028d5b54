"""Kernel features that the standard library does not offer, called by ctypes (2 ms to import, only when needed).

The page: one sealed shared page of memory that a replica writes and its WatchDog reads, so that a sign of life costs neither
of them a system call (`daemon.status_page` is the other side).

The early death notice in it: before a killed process is reported dead the kernel frees its memory, which takes 35 ms a GiB.
Its robust futexes it releases first. So a replica's thread holds one in the page, and whoever waits there learns of the
death in a fraction of a millisecond, whatever the size (`daemon.death_notice` is the other side).

The deadline: a timer of the kernel that kills this process, whatever its threads do, unless it is armed anew in time.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import mmap
import os
import signal

PAGE_NAME = "etcdreplica-page"
PAGE = mmap.PAGESIZE
SLOTS_AT = 1024  # the mutex stands at the beginning
FUTEX_WAITERS = 0x80000000
_CLOCK_BOOTTIME = 7
_TIMER_ABSTIME = 1
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_PTHREAD_PROCESS_SHARED = _PTHREAD_MUTEX_ROBUST = 1


class Slot(enum.IntEnum):
    """Where in the page which sign of life stands: CLOCK_BOOTTIME seconds, or 0 while it is not used."""

    PULSE = 0  # the process: the thread that talks to the WatchDog got to run
    LOOP = 1  # the event loop of an `async def`
    PROGRESS = 2  # the body called `heartbeat`
    HEALTH = 3  # the `health` function returned


def die_with_parent(number: signal.Signals, parent: int | None = None) -> None:
    """Have the kernel send `number` to this process when the thread that started it ends."""
    import ctypes

    expected = parent or os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != expected or (expected == 1 and parent is None):
        os.kill(os.getpid(), number)  # it ended just before


def become_subreaper() -> None:
    """Be the parent of every descendant whose own parent has ended."""
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def set_precedence(nice: int, pid: int = 0) -> None:
    """Have the scheduler prefer a process (this one), and its session, to others where it may: below 0 takes a privilege."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, nice)
    with contextlib.suppress(OSError), open(f"/proc/{pid or 'self'}/autogroup", "w") as autogroup:  # noqa: PTH123
        autogroup.write(str(nice))  # where sessions compete with each other, not processes


class Deadline:
    """A kernel timer that sends SIGKILL to this process at the moment it was last armed for.

    Nothing in the process can delay it: not the GIL, not a blocked signal, not SIGSTOP. A child made by fork does not
    inherit it; exec deletes it. Raises OSError where the kernel or the C library does not offer it: not to the first process of
    a container either, which no signal from within can end.
    """

    def __init__(self) -> None:
        import ctypes

        if os.getpid() == 1:
            raise OSError(errno.EPERM, "the kernel ends no process 1 by a timer")
        self._ctypes = ctypes
        self._libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(self._libc, "timer_create"):  # glibc before 2.34
            self._libc = ctypes.CDLL("librt.so.1", use_errno=True)
        event = (ctypes.c_int * 16)()  # struct sigevent: value (8 bytes), signal, how to notify (0: by that signal)
        event[2] = int(signal.SIGKILL)
        self._timer = ctypes.c_void_p()
        self._call("timer_create", _CLOCK_BOOTTIME, event, ctypes.byref(self._timer))

    def arm(self, at: float | None) -> None:
        """Die at `at`, CLOCK_BOOTTIME seconds (at once if that has passed); None disarms."""
        nanoseconds = 0 if at is None else max(1, int(at * 1e9))
        spec = (self._ctypes.c_long * 4)(0, 0, *divmod(nanoseconds, 10**9))
        self._call("timer_settime", self._timer, _TIMER_ABSTIME, spec, None)

    def close(self) -> None:
        """Delete the timer."""
        self._call("timer_delete", self._timer)

    def _call(self, name: str, *arguments: object) -> None:
        if getattr(self._libc, name)(*arguments):
            raise OSError(self._ctypes.get_errno(), f"{name} failed")


class Page:
    """The page of this process. `fd` is its descriptor; `beat` may be called from any thread."""

    def __init__(self) -> None:
        self.fd = os.memfd_create(PAGE_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, PAGE)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.memory = mmap.mmap(self.fd, PAGE)
        self._slots = memoryview(self.memory)[SLOTS_AT : SLOTS_AT + 8 * len(Slot)].cast("d")

    def beat(self, slot: Slot, at: float) -> None:
        """Give one sign of life."""
        self._slots[slot] = at

    def close(self) -> None:
        """Give the descriptor back; the memory stays for as long as somebody may beat."""
        os.close(self.fd)


class Notice:
    """A robust futex in a page, held by the thread that makes this.

    Raises OSError where the C library or the kernel does not offer it; death is then noticed a little later.
    """

    def __init__(self, page: Page) -> None:
        import ctypes

        self._libc = libc = ctypes.CDLL(None)
        self._mutex = ctypes.c_char.from_buffer(page.memory)
        attributes = ctypes.create_string_buffer(64)
        for function, *arguments in (
            (libc.pthread_mutexattr_init,),
            (libc.pthread_mutexattr_setpshared, _PTHREAD_PROCESS_SHARED),
            (libc.pthread_mutexattr_setrobust, _PTHREAD_MUTEX_ROBUST),
        ):
            _check(function(ctypes.byref(attributes), *arguments))
        _check(libc.pthread_mutex_init(ctypes.byref(self._mutex), ctypes.byref(attributes)))
        _check(libc.pthread_mutex_lock(ctypes.byref(self._mutex)))
        # The kernel wakes whoever waits only if this bit is set. Nobody else ever locks it, so a plain write will do.
        word = ctypes.c_uint32.from_buffer(page.memory)
        word.value |= FUTEX_WAITERS

    def release(self) -> None:
        """Let go, in the thread that holds it: whoever waits learns that there will be no notice."""
        import ctypes

        _check(self._libc.pthread_mutex_unlock(ctypes.byref(self._mutex)))
        del self._mutex  # the page cannot be unmapped while something points into it


def _check(code: int) -> None:
    if code:
        raise OSError(code, os.strerror(code))
