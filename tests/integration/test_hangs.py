"""Every way in which a copy can hang: found, ended, replaced, and told with its reason and evidence."""

from __future__ import annotations

import itertools
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from etcdreplica.model import Event, FailureKind
from etcdreplica.testing import LocalCluster
from etcdreplica.words import Role
from tests.integration.conftest import wait_dead

pytestmark = pytest.mark.integration
PATIENT = Path(__file__).parent / "apps" / "patient.py"
_numbers = itertools.count()


class Patient:
    """The application under a name of its own."""

    def __init__(self, cluster: LocalCluster, directory: Path) -> None:
        self.cluster = cluster
        self.name = f"patient-{next(_numbers)}"
        self.when = directory / f"{self.name}.ill"

    def start(self, *arguments: str) -> int:
        """Start it by hand; return its epoch when all of it is ready."""
        self.cluster.start(PATIENT, "--name", self.name, "--when", str(self.when), *arguments)
        return self.cluster.wait_ready(self.name)

    def fall_ill(self) -> None:
        """Have the primary fall ill."""
        self.when.touch()

    def wait_replaced(self, epoch: int) -> tuple[int, Event]:
        """Wait until there is a whole new reign, and return its epoch and how the reign before ended."""
        after = self.cluster.wait_ready(self.name, after_epoch=epoch, timeout=60)
        return after, self.wait_event(lambda event: event.failure.epoch == epoch and event.failure.role is Role.PRIMARY)

    def wait_event(self, condition: Callable[[Event], bool]) -> Event:
        """Wait for something in its history, and return it."""
        self.cluster.wait_until(lambda _: any(map(condition, self.events())), "the event in the history", 60)
        return next(filter(condition, self.events()))

    def events(self) -> list[Event]:
        """Return its history so far."""
        return [event for (app, _), event in list(self.cluster.events.items()) if app == self.name]


@pytest.fixture
def make_patient(shared_cluster: LocalCluster, tmp_path: Path) -> Iterator[Callable[[], Patient]]:
    """Make patients on the cluster of this module; what was stopped goes on, and they are removed afterwards."""
    made: list[Patient] = []

    def make() -> Patient:
        made.append(Patient(shared_cluster, tmp_path))
        return made[-1]

    yield make
    for patient in made:
        if patient.name in shared_cluster.view.apps:
            shared_cluster.remove(patient.name)


@pytest.fixture
def patient(make_patient: Callable[[], Patient]) -> Patient:
    """One of them."""
    return make_patient()


@pytest.fixture
def port() -> int:
    """A port of this machine that is free."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        number: int = found.getsockname()[1]
        return number


def test_blocked_event_loop(patient: Patient) -> None:
    """The reason names the loop, the evidence the function that blocks it; the next primary hangs in the same way."""
    epoch = patient.start("--illness", "block_loop")
    for _ in range(2):
        patient.fall_ill()
        epoch, event = patient.wait_replaced(epoch)
        assert event.failure.kind is FailureKind.HANG
        assert event.failure.reason == "the event loop did not run for 1 s"
        assert "never_end_to_compute" in event.failure.evidence
        assert "thread " in event.failure.evidence


def test_no_heartbeat_after_the_first(patient: Patient) -> None:
    """A body that has called it once must go on calling."""
    epoch = patient.start("--illness", "no_heartbeat")
    patient.fall_ill()
    _, event = patient.wait_replaced(epoch)
    assert (event.failure.kind, event.failure.reason) == (FailureKind.HANG, "the body called no heartbeat for 1 s")
    assert "in body" in event.failure.evidence


def test_start_that_never_ends(patient: Patient, tmp_path: Path) -> None:
    """A copy that does not reach the protected call in time is ended, and another one is started."""
    late = tmp_path / "late"
    late.mkdir()
    arguments = ("--late-on", str(late), "--start-timeout", "15")
    epoch = patient.start(*arguments)
    (late / "once").touch()
    patient.cluster.kill_replica(patient.name)  # its replacement is late
    event = patient.wait_event(lambda event: event.failure.kind is FailureKind.HANG)
    assert event.failure.reason == "it did not reach the protected call within 15 s"
    wait_dead(int(next(tmp_path.glob("once.*")).suffix[1:]))
    patient.cluster.wait_ready(patient.name, after_epoch=epoch, timeout=60)


def test_hung_backup(patient: Patient) -> None:
    """It is replaced while the primary goes on; what the kernel says of a stopped process is the evidence."""
    epoch = patient.start("--style", "hot")
    host, pid = patient.cluster.primary(patient.name)
    backups = {h: r for h, r in patient.cluster.view.apps[patient.name].replicas.items() if h != host}
    (backup,) = backups.values()
    assert backup.pid is not None
    os.kill(backup.pid, signal.SIGSTOP)
    event = patient.wait_event(lambda event: event.failure.incarnation == backup.incarnation)
    assert (event.failure.kind, event.failure.role) == (FailureKind.HANG, Role.BACKUP)
    assert event.failure.reason == "the process gave no sign of life for 1 s"
    assert ": stopped" in event.failure.evidence
    wait_dead(backup.pid)
    assert patient.cluster.wait_ready(patient.name) == epoch
    assert patient.cluster.primary(patient.name) == (host, pid)


def test_stopped_primary(patient: Patient) -> None:
    """The same for the primary."""
    epoch = patient.start()
    pid = patient.cluster.primary(patient.name)[1]
    os.kill(pid, signal.SIGSTOP)
    _, event = patient.wait_replaced(epoch)
    assert (event.failure.kind, event.failure.reason) == (FailureKind.HANG, "the process gave no sign of life for 1 s")
    assert ": stopped" in event.failure.evidence
    wait_dead(pid)


def test_no_hang_timeout(make_patient: Callable[[], Patient]) -> None:
    """With None nobody is judged: another application, stopped later on the same hosts, is replaced meanwhile."""
    eternal, mortal = make_patient(), make_patient()
    first, other = eternal.start("--hang-timeout", "0"), mortal.start()
    eternal.cluster.kill_replica(eternal.name)  # one started by hand must be awake to have its deadline moved
    epoch, _ = eternal.wait_replaced(first)
    before = eternal.cluster.primary(eternal.name)
    os.kill(before[1], signal.SIGSTOP)
    try:
        for _ in range(2):
            os.kill(mortal.cluster.primary(mortal.name)[1], signal.SIGSTOP)
            other, _ = mortal.wait_replaced(other)
    finally:
        os.kill(before[1], signal.SIGCONT)
    assert eternal.cluster.wait_ready(eternal.name) == epoch
    assert eternal.cluster.primary(eternal.name) == before
    assert [event.failure.epoch for event in eternal.events()] == [first]


@pytest.mark.parametrize(
    ("illness", "probe", "reason"),
    [
        ("close_port", "tcp:%d", "probe tcp:{} failed 2 times in a row: connection refused"),
        ("bad_http", "http://127.0.0.1:%d/", "probe http://127.0.0.1:{}/ failed 2 times in a row: "),
        ("health_raises", "call", "probe call failed 2 times in a row: RuntimeError: no database"),
        ("health_hangs", "call", "probe call failed: the health function has not returned for "),
    ],
)
def test_probes(patient: Patient, port: int, illness: str, probe: str, reason: str) -> None:
    """A copy that answers badly is replaced by one that answers well, and the history says what was wrong."""
    epoch = patient.start("--illness", illness, "--probe", probe, "--port", str(port))
    host = patient.cluster.primary(patient.name)[0]
    patient.fall_ill()
    _, event = patient.wait_replaced(epoch)
    assert event.failure.kind is FailureKind.HANG
    assert event.failure.reason.startswith(reason.format(port)), event.failure.reason
    assert event.failure.host == host
    assert patient.events() == [event]


def test_command_probe(patient: Patient, tmp_path: Path) -> None:
    """A command that exits with anything but 0 is a bad answer."""
    well = tmp_path / "well"
    well.touch()
    epoch = patient.start("--probe", f"exec:test -e {well}")
    well.unlink()
    event = patient.wait_event(lambda event: event.failure.epoch == epoch)
    well.touch()
    assert event.failure.kind is FailureKind.HANG
    assert event.failure.reason.startswith(f"probe exec:test -e {well} failed 2 times in a row: "), event.failure.reason
    patient.cluster.wait_ready(patient.name, after_epoch=epoch, timeout=60)
