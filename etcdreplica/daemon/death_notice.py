"""Learning of a replica's death before the kernel has freed its memory; the other side is `app.kernel.Notice`.

A thread waits on the futex that a thread of the replica holds. When the kernel releases it, that thread has ended, which
alone proves little: the process may have called exec, or have ended only that thread. The notice is believed when every
task of the process has PF_EXITING set: none of them will run user code again. In between SIGKILL is sent, so that no task
that escaped the first look can start another one. Anything less certain is left to the pidfd.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from etcdreplica.app.kernel import NOTICE_NAME, PAGE
from etcdreplica.errors import ProtocolError

PF_EXITING = 0x4
LOOKS, LOOK_S = 100, 0.0002
_FUTEX_OWNER_DIED = 0x40000000
_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine())
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FUTEX_ARGUMENTS: list[Any] = [
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    *[ctypes.c_void_p] * 2,
    ctypes.c_int,
]
_libc.syscall.argtypes = _FUTEX_ARGUMENTS


def watch(pid: int, remote_fd: int, pidfd: int, on_dying: Callable[[int], None]) -> None:
    """Call `on_dying(exit status as from wait)` in a thread of its own once process `pid` cannot run user code any more.

    `remote_fd` is the page's number in that process. Raises ProtocolError when it is no such page.
    """
    if _SYS_FUTEX is None:
        return
    address = _map(pid, remote_fd)
    own_pidfd = os.dup(pidfd)

    def wait() -> None:
        try:
            if _wait_owner_died(address) and (status := _confirm(pid, own_pidfd)) is not None:
                on_dying(status)
        finally:
            os.close(own_pidfd)
            _libc.munmap(address, PAGE)

    threading.Thread(target=wait, name=f"death notice {pid}", daemon=True).start()


def _map(pid: int, remote_fd: int) -> int:
    path = f"/proc/{pid}/fd/{int(remote_fd)}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{NOTICE_NAME}"):  # noqa: PTH115  (not a real path)
            raise ProtocolError(f"descriptor {remote_fd} of process {pid} is no death notice")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # read-only descriptors do not tell their seals
    except OSError as error:
        raise ProtocolError(f"cannot open the death notice of process {pid}: {error.strerror}") from None
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS or os.fstat(fd).st_size != PAGE:
            raise ProtocolError(f"the death notice of process {pid} could be cut off under us")
        address = _libc.mmap(None, PAGE, 1, 1, fd, 0)  # PROT_READ, MAP_SHARED: we only ever look
    finally:
        os.close(fd)
    if address is None or address == ctypes.c_void_p(-1).value:
        raise ProtocolError(f"cannot map the death notice of process {pid}")
    return int(address)


def _wait_owner_died(address: int) -> bool:
    word = ctypes.c_uint32.from_address(address)
    for _ in range(1000):  # a word that changes all the time is not ours to wait for
        seen = word.value
        if seen & _FUTEX_OWNER_DIED:
            return True
        if seen == 0:
            return False
        _libc.syscall(_SYS_FUTEX, address, 0, seen, None, None, 0)
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


def _stat(path: str) -> list[bytes] | None:
    """Return the fields after the name, or None when the task is gone."""
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
