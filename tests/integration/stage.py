"""Where the tests of one primary and of calm act: a cluster, an application that claims to be primary, and a witness."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from etcdreplica.app.kernel import set_precedence
from etcdreplica.clock import boottime
from etcdreplica.core.view import ClusterView
from etcdreplica.guardian.wards import URGENT_NICE
from etcdreplica.model import Event
from etcdreplica.testing import LocalCluster
from etcdreplica.testing.processes import descendants, halt
from etcdreplica.testing.witness import Witness

CLAIMANT = Path(__file__).parent / "apps" / "claimant.py"
PATIENCE_S = 60.0
NO_CHECKPOINTS = dict.fromkeys(("host-a", "host-b", "host-c"), ("--no-checkpoints",))  # arguments of nodes that need none
_numbers = itertools.count()


@contextlib.contextmanager
def urgent() -> Iterator[None]:
    """Have the scheduler prefer this process, as it does daemons, so that what shall last for a short time does."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    _prefer(URGENT_NICE)
    try:
        yield
    finally:
        _prefer(before)


def _prefer(nice: int) -> None:
    for thread in Path("/proc/self/task").iterdir():  # a new one has what its maker has
        set_precedence(nice, int(thread.name))


class WallClock:
    """The wall clock of every Python process that is started with `prefix`."""

    _PROGRAM = """
import pathlib, sys, time
real, by = time.time, pathlib.Path({by!r})
def jumpy():
    grpc = sys._getframe(1).f_globals["__name__"].startswith("grpc")  # it adds a timeout, and its C code takes it off again
    return real() + (0 if grpc else float(by.read_text()))
time.time = jumpy
"""

    def __init__(self, directory: Path) -> None:
        self._by = directory / "clock-is-ahead-by"
        self._by.write_text("0")
        modules = directory / "modules"
        modules.mkdir()
        (modules / "sitecustomize.py").write_text(self._PROGRAM.format(by=str(self._by)))
        self.prefix = ("env", f"PYTHONPATH={modules}")

    def jump(self, seconds: float) -> None:
        """Have it be ahead of this machine's by so much."""
        following = self._by.with_suffix(".next")
        following.write_text(str(seconds))
        following.rename(self._by)


class Stage:
    """A cluster, the application under a name of its own on two of its hosts, and the witness."""

    def __init__(self, cluster: LocalCluster, directory: Path) -> None:
        self.cluster = cluster
        self.app = f"claimant-{next(_numbers)}"
        self.witness = Witness(directory / "claims")
        self.gil = directory / "hold-gil"
        self.stopped: list[int] = []
        self._hit: set[str] = set()

    def start(self, *arguments: str, spawned: bool = True, host: str | None = None) -> None:
        """Start it, on a host if that matters; with `spawned`, make its primary one that a guardian has started."""
        words = ("--name", self.app, "--claims", str(self.witness.path), "--hold-gil", str(self.gil))
        self.cluster.start(CLAIMANT, *words, *arguments, host=host)
        epoch = self.cluster.wait_ready(self.app)
        if spawned:
            self.cluster.kill_replica(self.app)
            self.cluster.wait_ready(self.app, after_epoch=epoch)

    def wait_backed(self) -> None:
        """Wait until etcd says who vouches for the present primary."""

        def is_backed(view: ClusterView) -> bool:
            app = view.apps[self.app]
            assert app.assignment is not None
            vouchers, seats = app.vouchers, app.assignment.seats
            backups = tuple(seat.host for seat in seats[1:])
            return vouchers is not None and (vouchers.incarnation, vouchers.hosts) == (seats[0].incarnation, backups)

        self.cluster.wait_until(is_backed, "somebody to vouch")

    def leave(self) -> None:
        """Leave the cluster as it was: without the application, and with nodes that nothing has happened to."""
        self.go_on()
        for host in self._hit:
            self.cluster.hosts[host].kill()
            self.cluster.restart(host)
        if self.app in self.cluster.view.apps:
            self.cluster.remove(self.app)

    def hit(self) -> str:
        """Return the host of the primary, of which nothing can be expected after what follows."""
        host = self.host
        self._hit.add(host)
        return host

    @property
    def host(self) -> str:
        """The host of the primary."""
        return self.cluster.primary(self.app)[0]

    @property
    def epoch(self) -> int:
        """The epoch of the assignment."""
        assignment = self.cluster.view.apps[self.app].assignment
        assert assignment is not None
        return assignment.epoch

    def watchdog(self) -> int:
        """Return the process id of the WatchDog of the primary's host."""
        return self.cluster.view.hosts[self.host].host.pid

    def guardian(self) -> int:
        """Return that of its guardian."""
        process = self.cluster.hosts[self.host].process
        assert process is not None
        return process.pid

    def manager(self) -> int:
        """Return that of the leading manager."""
        leader = self.cluster.leaders["manager"]
        process = self.cluster.hosts[leader].process
        assert process is not None
        return next(
            pid for pid in descendants(process.pid) if b"manager" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        )

    def etcd(self) -> int:
        """Return that of etcd."""
        process = self.cluster.etcd.process
        assert process is not None
        return process.pid

    def stop(self, pid: int) -> None:
        """SIGSTOP a process; it is continued at the end at the latest."""
        halt(pid)
        self.stopped.append(pid)

    def go_on(self) -> None:
        """SIGCONT what was stopped, if it still is."""
        while self.stopped:
            pid = self.stopped.pop()
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGCONT)

    def wait_acting(self, after_epoch: int) -> None:
        """Wait until a primary of a later epoch has acted."""
        deadline = time.monotonic() + PATIENCE_S
        while not any(reign.epoch > after_epoch for reign in self.witness.reigns(self.app)):
            assert time.monotonic() < deadline, f"no later primary acts\n{self.cluster.describe()}"
            time.sleep(0.02)  # a file raises no event

    def still_acting(self, seconds: float) -> None:
        """Wait until the primary has acted for so long from now on."""
        reigning = self.witness.reigns(self.app)[-1]
        until = boottime() + seconds
        deadline = time.monotonic() + seconds + PATIENCE_S
        while self.witness.reigns(self.app)[-1].end < until:
            assert time.monotonic() < deadline, self.cluster.describe()
            time.sleep(0.05)  # a file raises no event
        assert self.witness.reigns(self.app)[-1].epoch == reigning.epoch, self.events()

    def events(self) -> list[Event]:
        """Return its history so far."""
        return [event for (app, _), event in list(self.cluster.events.items()) if app == self.app]

    def verdict(self) -> None:
        """No two at a time, and epochs only grew."""
        assert self.witness.violations() == []
