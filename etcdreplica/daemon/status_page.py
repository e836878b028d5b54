"""The WatchDog's view of the page that a replica writes; `app.kernel.Page` is the other side.

Nothing in it is trusted: a value only tells something by changing.
"""

from __future__ import annotations

import ctypes
import fcntl
import os

from etcdreplica.app.kernel import PAGE, PAGE_NAME, SLOTS_AT, Slot
from etcdreplica.errors import ProtocolError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_PROT_READ = _MAP_SHARED = 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class StatusPage:
    """Mapped for reading at `address`. Raises ProtocolError when descriptor `remote_fd` of process `pid` is no such page."""

    address: int | None = None

    def __init__(self, pid: int, remote_fd: int) -> None:
        fd = open_memory(pid, remote_fd, PAGE_NAME)
        try:
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS or os.fstat(fd).st_size != PAGE:
                raise ProtocolError(f"the page of process {pid} could be cut off under us")
            address = _libc.mmap(None, PAGE, _PROT_READ, _MAP_SHARED, fd, 0)
        finally:
            os.close(fd)
        if address is None or address == ctypes.c_void_p(-1).value:
            raise ProtocolError(f"cannot map the page of process {pid}")
        self.address = address
        self._slots = (ctypes.c_double * len(Slot)).from_address(address + SLOTS_AT)

    def __del__(self) -> None:
        if self.address is not None:
            _libc.munmap(self.address, PAGE)

    def slots(self) -> bytes:
        """Return all signs of life as they stand, only to see whether one has changed."""
        assert self.address is not None
        return ctypes.string_at(self.address + SLOTS_AT, 8 * len(Slot))

    def read(self, slot: Slot) -> float:
        """Return a sign of life; 0 means that the replica gives none of this kind."""
        return self._slots[slot]


def open_memory(pid: int, remote_fd: int, name: str) -> int:
    """Open shared memory that a process has made under this name. Raises ProtocolError."""
    path = f"/proc/{pid}/fd/{int(remote_fd)}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{name}"):  # noqa: PTH115  (not a real path)
            raise ProtocolError(f"descriptor {remote_fd} of process {pid} is no {name}")
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)  # read-only descriptors do not tell their seals
    except OSError as error:
        raise ProtocolError(f"cannot open {name} of process {pid}: {error.strerror}") from None
