"""Kernel features that the standard library does not offer, called by ctypes (2 ms to import, only when needed).

The early death notice: before a killed process is reported dead the kernel frees its memory, which takes 35 ms a GiB. Its
robust futexes it releases first. So a replica's thread holds one in a shared page, and whoever waits on that page learns
of the death in a fraction of a millisecond, whatever the size (`daemon.death_notice` is the other side).
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


class Notice:
    """A robust futex in a sealed shared page, held by the thread that makes this; `fd` is the page's descriptor.

    Raises OSError where the C library or the kernel does not offer it; death is then noticed a little later.
    """

    def __init__(self) -> None:
        import ctypes

        self._libc = libc = ctypes.CDLL(None)
        self.fd = os.memfd_create(NOTICE_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, PAGE)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._page = mmap.mmap(self.fd, PAGE)
        self._mutex = ctypes.c_char.from_buffer(self._page)
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
        word = ctypes.c_uint32.from_buffer(self._page)
        word.value |= FUTEX_WAITERS

    def release(self) -> None:
        """Let go, in the thread that holds it: whoever waits learns that there will be no notice."""
        import ctypes

        _check(self._libc.pthread_mutex_unlock(ctypes.byref(self._mutex)))
        del self._mutex  # the page cannot be unmapped while something points into it
        self._page.close()
        os.close(self.fd)


def _check(code: int) -> None:
    if code:
        raise OSError(code, os.strerror(code))
