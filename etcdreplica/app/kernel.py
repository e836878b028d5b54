"""Kernel features that the standard library does not offer, called by ctypes (2 ms to import, only when needed).

The early death notice: before a killed process is reported dead the kernel frees its memory, which takes 35 ms a GiB. Its
robust futexes it releases first. So a replica's thread holds one in a shared page, and whoever waits on that page learns
of the death in a fraction of a millisecond, whatever the size (see `daemon.death_notice` for the other side).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import signal

NOTICE_NAME = "etcdreplica-notice"
PAGE = mmap.PAGESIZE
FUTEX_WAITERS = 0x80000000
_PR_SET_PDEATHSIG = 1
_PTHREAD_PROCESS_SHARED = _PTHREAD_MUTEX_ROBUST = 1


def die_with_parent(number: signal.Signals) -> None:
    """Have the kernel send `number` to this process when the thread that started it ends."""
    import ctypes

    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent or parent == 1:
        os.kill(os.getpid(), number)  # it ended just before


def hold_notice() -> int:
    """Hold a robust futex in a sealed shared page until the calling thread ends; return the page's file descriptor.

    Raises OSError where the C library or the kernel does not offer it; death is then noticed a little later.
    """
    import ctypes

    libc = ctypes.CDLL(None)
    fd = os.memfd_create(NOTICE_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    page = mmap.mmap(fd, PAGE)
    mutex, attributes = ctypes.c_char.from_buffer(page), ctypes.create_string_buffer(64)
    for function, *arguments in (
        (libc.pthread_mutexattr_init,),
        (libc.pthread_mutexattr_setpshared, _PTHREAD_PROCESS_SHARED),
        (libc.pthread_mutexattr_setrobust, _PTHREAD_MUTEX_ROBUST),
    ):
        _check(function(ctypes.byref(attributes), *arguments))
    _check(libc.pthread_mutex_init(ctypes.byref(mutex), ctypes.byref(attributes)))
    _check(libc.pthread_mutex_lock(ctypes.byref(mutex)))
    # The kernel wakes whoever waits only if this bit is set. Nobody else ever locks it, so a plain write will do.
    word = ctypes.c_uint32.from_buffer(page)
    word.value |= FUTEX_WAITERS
    _held.append((page, mutex, word))
    return fd


_held: list[object] = []  # the page must stay mapped for as long as the process lives


def _check(code: int) -> None:
    if code:
        raise OSError(code, os.strerror(code))
