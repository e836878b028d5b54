"""An outside witness of who acted as primary, and when.

Each copy writes a line to one shared file at every moment at which it acts as primary. A file needs no receiver that could
be late, and keeps what a killed process has said. Afterwards `Witness.violations` says where two copies acted at a time, or
an epoch did not grow. All hosts of a test are one machine and share CLOCK_BOOTTIME; only therefore may stamps be compared.
"""

from __future__ import annotations

import os
from pathlib import Path

from attrs import frozen

from etcdreplica.app.replica import Replica
from etcdreplica.clock import boottime
from etcdreplica.testing.journal import written_lines
from etcdreplica.words import Role


@frozen
class Reign:
    """One copy's time as primary: from the first to the last moment at which it was seen to act."""

    app: str
    epoch: int
    pid: int
    begin: float
    end: float


class Testimony:
    """What one copy says. Make one in the body, and call it as often as the body would act."""

    def __init__(self, path: str | Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._pid = os.getpid()

    def __call__(self, replica: Replica) -> None:
        """Say that this copy acts now, if it believes to be primary."""
        if replica.role is Role.PRIMARY:
            os.write(self._fd, f"{replica.name} {replica.epoch} {self._pid} {boottime():.6f}\n".encode())


class Witness:
    """Reads what was said."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def reigns(self, app: str | None = None) -> list[Reign]:
        """Return every reign so far, by application and begin."""
        found: dict[tuple[str, int, int], list[float]] = {}
        for line in written_lines(self.path):
            name, epoch, pid, at = line.split()
            if app in (None, name):
                found.setdefault((name, int(epoch), int(pid)), []).append(float(at))
        reigns = [Reign(*key, min(stamps), max(stamps)) for key, stamps in found.items()]
        return sorted(reigns, key=lambda reign: (reign.app, reign.begin))

    def violations(self) -> list[str]:
        """Return, in words, where two copies were primary at one time or an epoch did not grow."""
        found = []
        latest: Reign | None = None  # of the reigns so far, the one that lasted longest
        for reign in self.reigns():
            if latest is not None and latest.app == reign.app:
                if reign.begin <= latest.end:
                    found.append(f"{latest} and {reign} overlap by {1000 * (latest.end - reign.begin):.1f} ms")
                if reign.epoch <= latest.epoch:
                    found.append(f"{reign} came after {latest}")
            if latest is None or latest.app != reign.app or reign.end > latest.end:
                latest = reign
        return found
