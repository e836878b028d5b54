"""Learning of a replica's death before the kernel has freed its memory; the other side is `app.kernel.Notice`.

A thread waits on the futex that a thread of the replica holds. When the kernel releases it, that thread has ended, which
alone proves little: the process may have called exec, or have ended only that thread. The notice is believed when every
task of the process has PF_EXITING set: none of them will run user code again. In between SIGKILL is sent, so that no task
that escaped the first look can start another one. Anything less certain is left to the pidfd.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from etcdreplica.daemon.status_page import StatusPage
from etcdreplica.guardian.tree import exiting_status

LOOKS, LOOK_S = 100, 0.0002
_FUTEX_OWNER_DIED = 0x40000000
_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine())
_libc = ctypes.CDLL(None, use_errno=True)
_FUTEX_ARGUMENTS: list[Any] = [
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    *[ctypes.c_void_p] * 2,
    ctypes.c_int,
]
_libc.syscall.argtypes = _FUTEX_ARGUMENTS


def watch(pid: int, page: StatusPage, pidfd: int, on_dying: Callable[[int], None]) -> None:
    """Call `on_dying(exit status as from wait)` in a thread of its own once process `pid` cannot run user code any more."""
    if _SYS_FUTEX is None:
        return
    own_pidfd = os.dup(pidfd)

    def wait() -> None:
        try:
            if _wait_owner_died(page) and (status := _confirm(pid, own_pidfd)) is not None:
                on_dying(status)
        finally:
            os.close(own_pidfd)

    threading.Thread(target=wait, name=f"death notice {pid}", daemon=True).start()


def _wait_owner_died(page: StatusPage) -> bool:
    assert page.address is not None
    word = ctypes.c_uint32.from_address(page.address)
    for _ in range(1000):  # a word that changes all the time is not ours to wait for
        seen = word.value
        if seen & _FUTEX_OWNER_DIED:
            return True
        if seen == 0:
            return False
        _libc.syscall(_SYS_FUTEX, page.address, 0, seen, None, None, 0)
    return False


def _confirm(pid: int, pidfd: int) -> int | None:
    """Return the exit status once every task is exiting, or None when that does not come true soon."""
    for look in range(LOOKS):
        if exiting_status(pid) is not None:
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except ProcessLookupError:
                return None  # reaped already: the pidfd has told
            return exiting_status(pid)
        time.sleep(LOOK_S if look > 10 else 0)
    return None
