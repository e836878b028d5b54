"""A disk that can lose its power: ext4 in a file, which forgets what was not flushed when it is shut down."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_NO_LOG_FLUSH = 2  # nothing more reaches the disk, not even the journal
MIB = 64


class Disk:
    """Mounted at `path`."""

    def __init__(self, image: Path, path: Path) -> None:
        self.path = path
        self._image = image

    def make(self) -> None:
        """Make and mount it. Raises OSError where this cannot be done."""
        if shutil.which("mkfs.ext4") is None:
            raise OSError("no mkfs.ext4 here")
        with self._image.open("wb") as file:
            file.truncate(MIB << 20)
        self.path.mkdir(exist_ok=True)
        try:
            _run("mkfs.ext4", "-q", str(self._image))
            self.mount()
        except subprocess.CalledProcessError as error:
            raise OSError(f"no disk of its own: {error.stderr.decode().strip()}") from None

    def mount(self) -> None:
        """Mount it; the journal is replayed."""
        _run("mount", "-o", "loop,nodiscard", str(self._image), str(self.path))

    def lose_power(self) -> None:
        """Drop all that was not flushed, and mount what is left. Nobody may use it any more."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(fd)
        _run("umount", str(self.path))
        self.mount()

    def fill(self) -> None:
        """Leave no room on it."""
        with (self.path / "ballast").open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass

    def free(self) -> None:
        """Give the room back."""
        (self.path / "ballast").unlink(missing_ok=True)

    def remove(self) -> None:
        """Unmount and remove it."""
        subprocess.run(["umount", "--lazy", str(self.path)], check=False, capture_output=True, timeout=30)
        self._image.unlink(missing_ok=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)
