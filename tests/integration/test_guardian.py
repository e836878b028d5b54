"""The guardian alone, with a WatchDog that only passes on what the test says and hears."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from etcdreplica.app.protocol import FINAL_CODES, MARK_ENV, Decoder, encode
from etcdreplica.clock import boottime
from etcdreplica.guardian.tree import control_group, end_all, start_time
from etcdreplica.testing.journal import written_lines
from etcdreplica.testing.processes import descendants, spawn_bound
from tests.integration.conftest import wait_dead

pytestmark = pytest.mark.integration
PATIENCE_S = 60.0
FAR_S = 600.0
SLEEP = ("/bin/sleep", "600")
SETTLE = "settle-"  # of wards that are only there to be answered
RELAY = """
import os, select, socket, subprocess, sys
number, _, name = os.environ["ETCDREPLICA_GUARDIAN"].partition(",")
guardian = socket.socket(fileno=int(number))
test = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
test.connect("\\0" + sys.argv[1])
test.send(f"{os.getpid()} {name}".encode())
hears = [test, guardian]
while True:
    for ready in select.select(hears, [], [])[0]:
        if ready is guardian:
            data = guardian.recv(60000)
            if not data:
                os._exit(99)
            test.send(data)
            continue
        order = test.recv(1 << 18)
        if order[:1] == b"d":
            guardian.sendall(order[1:])
        elif order[:1] == b"x":
            os._exit(order[1])
        elif order[:1] == b"q":
            hears.remove(guardian)
        elif order[:1] == b"c":
            child = subprocess.Popen(["/bin/sleep", "600"], start_new_session=True)
            test.send(str(child.pid).encode())
        elif not order:
            os._exit(98)
"""


class Dog:
    """The test's end of one WatchDog."""

    def __init__(self, line: socket.socket) -> None:
        line.settimeout(PATIENCE_S)
        self._line = line
        self._decoder = Decoder()
        pid, self.name = line.recv(4096).decode().split()
        self.pid = int(pid)
        self.heard: list[Mapping[str, Any]] = []

    def send(self, kind: str, **fields: Any) -> None:
        """Have it say something to the guardian."""
        self.send_raw(encode(kind, **fields))

    def send_raw(self, data: bytes) -> None:
        """The same for what need not be a message."""
        self._line.send(b"d" + data)

    def exit(self, code: int) -> None:
        """Have it end."""
        self._line.send(bytes([ord("x"), code]))

    def turn_deaf(self) -> None:
        """Have it read its guardian's socket no more."""
        self._line.send(b"q")

    def breed(self) -> int:
        """Have it start a process in a session of its own; return its id."""
        self._line.send(b"c")
        return int(self._line.recv(4096))

    def wait(self, kind: str, ward: str | None = None) -> Mapping[str, Any]:
        """Return the next message of this kind, and forget those before."""
        while True:
            while self.heard:
                message = self.heard.pop(0)
                if message["type"] == kind and ward in (None, message.get("ward")):
                    return message
            data = self._line.recv(1 << 18)
            assert data, f"the WatchDog ended before {kind} of {ward}"
            self.heard += self._decoder.feed(data)

    def wards(self) -> dict[str, Mapping[str, Any]]:
        """Return what it is told at its start."""
        found: dict[str, Mapping[str, Any]] = {}
        while True:
            data = self._line.recv(1 << 18)
            assert data
            self.heard += self._decoder.feed(data)
            while self.heard:
                message = self.heard.pop(0)
                if message["type"] == "ready":
                    return found
                assert message["type"] == "ward"
                if not message["ward"].startswith(SETTLE):
                    found[message["ward"]] = message

    def spawn(self, ward: str, *argv: str, number: int = 1, **fields: Any) -> int:
        """Start a program and return its process id."""
        self.send_spawn(ward, *argv, number=number, **fields)
        return int(self.wait("spawned", ward)["pid"])

    def send_spawn(self, ward: str, *argv: str, number: int = 1, **fields: Any) -> None:
        """Ask for a program without waiting for what comes of it."""
        self.send("spawn", **{"ward": ward, "number": number, "argv": argv or SLEEP, "cwd": "/", "env": {}, **fields})

    def until(self, ward: str, after_s: float) -> float:
        """Set a deadline; return the moment."""
        at = boottime() + after_s
        self.send("until", wards={ward: at})
        return at

    def settle(self) -> None:
        """Return when the guardian has taken everything that was sent before."""
        ward = f"{SETTLE}{uuid.uuid4().hex}"
        self.send_spawn(ward, "/no/such/command")
        self.wait("refused", ward)
        self.send("release", ward=ward, memo=None)

    def close(self) -> None:
        """Hang up."""
        self._line.close()


class Host:
    """A guardian, and the WatchDogs that it starts one after the other."""

    def __init__(self, directory: Path, prefix: Sequence[str] = ()) -> None:
        self.log = directory / "guardian.log"
        self._address = f"etcdreplica-test-{uuid.uuid4().hex}"
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.bind("\0" + self._address)
        self._server.listen(64)
        self._server.settimeout(PATIENCE_S)
        self.dogs: list[Dog] = []
        relay = directory / "relay.py"
        relay.write_text(RELAY)
        command = [*prefix, sys.executable, "-m", "etcdreplica.guardian", sys.executable, "-S", str(relay), self._address]
        self.process: subprocess.Popen[bytes] = spawn_bound(command, log=self.log)

    def next_dog(self) -> Dog:
        """Wait for the next WatchDog."""
        dog = Dog(self._server.accept()[0])
        self.dogs.append(dog)
        return dog

    def first_dog(self) -> Dog:
        """Wait for the first one, and until it has been told that there is nothing."""
        dog = self.next_dog()
        assert dog.wards() == {}
        return dog

    def wait_end(self) -> int:
        """Return the exit code of the guardian."""
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        """Leave nothing."""
        for dog in self.dogs:
            dog.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        self._server.close()
        if self.dogs:
            end_all(self.dogs[0].name)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A guardian that has just been started."""
    host = Host(tmp_path)
    yield host
    host.close()


def wait(condition: Callable[[], object], what: str) -> None:
    """Wait until something is so that raises no event."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    return start_time(pid) is not None


def noted(path: Path, count: int) -> list[int]:
    """Wait for this many process ids in a file."""
    wait(lambda: len(written_lines(path)) >= count, f"{count} processes")
    return [int(line) for line in written_lines(path)]


def family(path: Path) -> tuple[str, ...]:
    """Return a program whose three children, each in a session of its own, note their process ids, as it does itself."""
    one = f"setsid sh -c 'echo $$ >> {path}; exec sleep 600' & "
    return ("/bin/sh", "-c", f"{one * 3} echo $$ >> {path}; exec sleep 600")


PATHS = {"PATH": os.environ.get("PATH", os.defpath)}


# --- starting --------------------------------------------------------------------------------------------------------


def test_spawn(host: Host, tmp_path: Path) -> None:
    """With its arguments, directory, environment, mark and log, in a session of its own, reading nothing."""
    dog = host.first_dog()
    log = tmp_path / "logs" / "app.log"
    code = "import os, sys; print(os.getcwd(), os.getsid(0) == os.getpid(), dict(os.environ), sys.stdin.read(), sys.argv[1])"
    dog.send_spawn("app", sys.executable, "-S", "-c", code, "x y", number=7, cwd=str(tmp_path), env={"A": "b"}, log=str(log))
    told = dog.wait("spawned", "app")
    assert told["mark"] == f"{dog.name}/app.7"
    assert isinstance(told["started"], int)
    assert dog.wait("exited", "app")["status"] == 0
    said = log.read_text()
    assert said.startswith(f"{tmp_path} True ")
    assert said.endswith(" x y\n")
    assert f"'{MARK_ENV}': '{dog.name}/app.7'" in said
    assert "'A': 'b'" in said
    assert "ETCDREPLICA_GUARDIAN" not in said


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"argv": ["/no/such/command"]}, errno.ENOENT),
        ({"argv": ["no-such-command"]}, errno.ENOENT),
        ({"argv": ["/etc/passwd"]}, errno.EACCES),
        ({"argv": ["/"]}, errno.EACCES),
        ({"cwd": "/no/such/directory"}, errno.ENOENT),
        ({"cwd": "/dev/null"}, errno.ENOTDIR),
        ({"log": "/dev/null/app.log"}, None),
        ({"argv": []}, errno.ENOEXEC),
        ({"argv": ["/bin/true", "\0"]}, errno.ENOEXEC),
        ({"env": {"A": 1}}, errno.ENOEXEC),
    ],
)
def test_refused(host: Host, fields: dict[str, Any], code: int | None) -> None:
    """It says why, and goes on with the next one."""
    dog = host.first_dog()
    dog.send_spawn("app", **fields)
    found = dog.wait("refused", "app")["errno"]
    assert found > 0 if code is None else found == code
    dog.send("release", ward="app", memo=None)
    assert is_alive(dog.spawn("app", number=2))


@pytest.mark.parametrize(
    ("command", "status"), [("exit 0", 0), ("exit 3", 3 << 8), ("kill -9 $$", 9), ("kill -15 $$", 15), ("exit 255", 255 << 8)]
)
def test_exit_statuses(host: Host, command: str, status: int) -> None:
    """As wait tells them."""
    dog = host.first_dog()
    pid = dog.spawn("app", "/bin/sh", "-c", command)
    told = dog.wait("exited", "app")
    assert (told["pid"], told["status"]) == (pid, status)


# --- remembering -----------------------------------------------------------------------------------------------------


def test_the_next_watchdog_is_told_of_all_wards(host: Host) -> None:
    """Also of those that ended while there was none, and of memos without a process; released ones are forgotten."""
    dog = host.first_dog()
    lives, ends, goes = dog.spawn("lives"), dog.spawn("ends"), dog.spawn("goes")
    dog.send("keep", ward="@session", memo={"lease": 5}, until=boottime() + FAR_S)
    dog.send("keep", ward="lives", memo=["anything", None, 1.5])
    dog.send("release", ward="goes", memo=None)
    dog.send("keep", ward="was", memo=1)
    dog.send("release", ward="was", memo={"ended": True})
    until = dog.until("lives", FAR_S)
    dog.settle()
    os.kill(host.process.pid, signal.SIGSTOP)  # so that nobody is there to hear of the end
    os.kill(dog.pid, signal.SIGKILL)
    os.kill(ends, signal.SIGKILL)
    wait_dead(ends)
    os.kill(host.process.pid, signal.SIGCONT)
    wards = host.next_dog().wards()
    assert set(wards) == {"lives", "ends", "@session", "was"}
    assert (wards["lives"]["pid"], wards["lives"]["status"], wards["lives"]["until"]) == (lives, None, until)
    assert wards["lives"]["memo"] == ["anything", None, 1.5]
    assert wards["lives"]["started"] == start_time(lives)
    assert wards["lives"]["is_child"]
    assert (wards["ends"]["pid"], wards["ends"]["status"]) == (ends, 9)
    assert wards["@session"]["memo"] == {"lease": 5}
    assert wards["@session"]["pid"] is None
    assert (wards["was"]["memo"], wards["was"]["pid"]) == ({"ended": True}, None)
    wait_dead(goes)
    assert is_alive(lives)


def test_release_of_a_child_ends_what_it_has_started(host: Host, tmp_path: Path) -> None:
    """And the name is free again, for the next incarnation, which is not touched."""
    dog = host.first_dog()
    dog.spawn("app", *family(tmp_path / "pids"), env=PATHS)
    pids = noted(tmp_path / "pids", 4)
    dog.send("release", ward="app", memo={"ended": True})
    after = dog.spawn("app", number=2)
    for pid in pids:
        wait_dead(pid)
    assert is_alive(after)
    wait(lambda: control_group(f"{dog.name}/app.1") is None, "its cgroup to be gone")


def test_watched_process(host: Host) -> None:
    """Somebody else's process is told to the next WatchDog, lives on when released, and dies at its deadline."""
    dog = host.first_dog()
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(subprocess.Popen(SLEEP)) for _ in range(2))
        stack.callback(first.kill)
        stack.callback(second.kill)
        for ward, process in (("first", first), ("second", second)):
            dog.send("watch", ward=ward, pid=process.pid, started=start_time(process.pid), mark=f"{dog.name}/{ward}.1")
        dog.send("release", ward="first", memo=None)
        dog.settle()
        os.kill(dog.pid, signal.SIGKILL)
        dog = host.next_dog()
        wards = dog.wards()
        assert set(wards) == {"second"}
        assert (wards["second"]["pid"], wards["second"]["is_child"]) == (second.pid, False)
        at = dog.until("second", 0.3)
        assert second.wait(PATIENCE_S) == -9
        assert boottime() >= at
        assert first.poll() is None


def test_number_of_a_watched_process_that_is_somebody_else_s(host: Host) -> None:
    """A deadline kills no process that started at another time."""
    dog = host.first_dog()
    with subprocess.Popen(SLEEP, start_new_session=True) as process:
        try:
            started = start_time(process.pid) or 0
            dog.send("watch", ward="app", pid=process.pid, started=started - 1, mark=f"{dog.name}/app.1")
            dog.until("app", 0.0)
            dog.settle()
            wait(lambda: "app: its lease was not confirmed" in host.log.read_text(), "the deadline")
            dog.settle()
            assert process.poll() is None
        finally:
            process.kill()


# --- deadlines -------------------------------------------------------------------------------------------------------


def test_deadline_kills_the_whole_tree_and_not_before(host: Host, tmp_path: Path) -> None:
    """The process, and its children in sessions of their own."""
    dog = host.first_dog()
    pid = dog.spawn("app", *family(tmp_path / "pids"), env=PATHS)
    pids = noted(tmp_path / "pids", 4)
    other = dog.spawn("other")
    at = dog.until("app", 0.5)
    told = dog.wait("exited", "app")
    assert boottime() >= at
    assert (told["pid"], told["status"]) == (pid, 9)
    for each in pids:
        wait_dead(each)
    assert is_alive(other)


def test_until_moves_the_deadline(host: Host) -> None:
    """Later and earlier, as often as wanted; when it has passed it has passed."""
    dog = host.first_dog()
    pid = dog.spawn("app")
    first = dog.until("app", 1.5)
    dog.until("app", FAR_S)
    wait(lambda: boottime() > first + 0.3, "the first deadline to pass")
    dog.settle()
    assert is_alive(pid)
    dog.send("keep", ward="app", memo=1)  # says nothing of the deadline
    at = dog.until("app", 0.2)
    dog.wait("exited", "app")
    assert boottime() >= at
    dog.until("app", FAR_S)
    dog.settle()
    os.kill(dog.pid, signal.SIGKILL)
    assert host.next_dog().wards()["app"]["until"] == at


def test_deadline_by_keep_and_in_the_past(host: Host) -> None:
    """`keep` may carry one; a moment that has passed is now."""
    dog = host.first_dog()
    dog.spawn("app")
    dog.send("keep", ward="app", memo=1, until=boottime() - 5)
    assert dog.wait("exited", "app")["status"] == 9


def test_deadline_of_a_stopped_process(host: Host) -> None:
    """It dies all the same."""
    dog = host.first_dog()
    os.kill(dog.spawn("app"), signal.SIGSTOP)
    dog.until("app", 0.2)
    assert dog.wait("exited", "app")["status"] == 9


def test_deadline_while_there_is_no_watchdog(host: Host) -> None:
    """A WatchDog that is stopped, dead or not started yet delays nothing."""
    dog = host.first_dog()
    pid = dog.spawn("app")
    dog.until("app", 0.5)
    dog.settle()
    os.kill(dog.pid, signal.SIGSTOP)
    wait_dead(pid)
    os.kill(dog.pid, signal.SIGKILL)
    assert host.next_dog().wards()["app"]["status"] == 9


def test_watchdog_that_does_not_read_blocks_no_deadline(host: Host) -> None:
    """However much there is to tell it; and what it sends is still taken."""
    dog = host.first_dog()
    first, second = dog.spawn("first"), dog.spawn("second")
    dog.turn_deaf()
    dog.until("first", 0.5)
    for number in range(40):
        dog.send_spawn(f"{number}-" + "x" * 50_000, "/no/such/command")
    wait_dead(first)
    dog.until("second", 0.2)
    wait_dead(second)
    os.kill(dog.pid, signal.SIGKILL)
    wards = host.next_dog().wards()
    assert len(wards) == 42
    assert (wards["first"]["status"], wards["second"]["status"]) == (9, 9)


def test_stopped_guardian_dies_by_its_own_timer(host: Host) -> None:
    """And everything that it has started with it, though nobody else could have."""
    dog = host.first_dog()
    pids = [dog.spawn("app"), dog.spawn("other"), dog.pid]
    dog.send("backstop", after=0.1)
    at = dog.until("app", 1.0)
    dog.settle()
    os.kill(host.process.pid, signal.SIGSTOP)
    assert host.wait_end() == -9
    assert boottime() >= at
    for pid in pids:
        wait_dead(pid)


def test_killed_guardian_takes_its_children_along(host: Host) -> None:
    """Wards and WatchDog; what they have started is for `end_all`."""
    dog = host.first_dog()
    pids = [dog.spawn("app"), dog.spawn("other"), dog.pid]
    host.process.kill()
    for pid in pids:
        wait_dead(pid)


# --- the WatchDog ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "meant"), [(told, meant) for meant, told in FINAL_CODES.items()])
def test_final_exit_codes(host: Host, code: int, meant: int, tmp_path: Path) -> None:
    """The guardian ends with the code that is meant, and nothing is left."""
    dog = host.first_dog()
    dog.spawn("app", *family(tmp_path / "pids"), env=PATHS)
    pids = [*noted(tmp_path / "pids", 4), dog.spawn("other")]
    dog.exit(code)
    assert host.wait_end() == meant
    assert not any(map(is_alive, pids))
    assert control_group(dog.name) is None


@pytest.mark.parametrize("end", [1, 2, 3, 127, 255, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_other_ends_start_the_next_one(host: Host, end: int | signal.Signals) -> None:
    """With the same name, and the wards live."""
    dog = host.first_dog()
    pid = dog.spawn("app")
    if isinstance(end, signal.Signals):
        os.kill(dog.pid, end)
    else:
        dog.exit(end)
    after = host.next_dog()
    assert after.wards()["app"]["pid"] == pid
    assert (after.name, after.pid != dog.pid) == (dog.name, True)
    assert is_alive(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_guardian_is_asked_to_end(host: Host, number: signal.Signals) -> None:
    """It asks its WatchDog, and leaves nothing."""
    dog = host.first_dog()
    pid = dog.spawn("app")
    host.process.send_signal(number)
    assert host.wait_end() == 0
    assert not is_alive(pid)
    assert not is_alive(dog.pid)
    assert control_group(dog.name) is None


def test_guardian_is_asked_to_end_while_it_waits_to_start_a_watchdog(host: Host) -> None:
    """After several short lives there is a pause; it ends then, too."""
    dog = host.first_dog()
    pid = dog.spawn("app")
    for _ in range(5):
        dog.exit(3)
        dog = host.next_dog()
        dog.wards()
    dog.exit(3)
    wait(lambda: host.log.read_text().count("exit code 3") == 6, "the last one to be gone")
    host.process.terminate()
    assert host.wait_end() == 0
    assert not is_alive(pid)


def test_hangup_replaces_the_watchdog(host: Host) -> None:
    """Also one that is stopped; the wards live."""
    dog = host.first_dog()
    pid = dog.spawn("app")
    for stopped in (False, True):
        if stopped:
            os.kill(dog.pid, signal.SIGSTOP)
        host.process.send_signal(signal.SIGHUP)
        before, dog = dog, host.next_dog()
        assert dog.wards()["app"]["pid"] == pid
        assert not is_alive(before.pid)
    assert is_alive(pid)


def test_what_a_watchdog_has_started_ends_with_it(host: Host) -> None:
    """A probe in a session of its own, say."""
    dog = host.first_dog()
    pid, left = dog.spawn("app"), dog.breed()
    wait(lambda: Path(f"/proc/{left}/environ").read_bytes(), "exec to be done: before, its mark cannot be read")
    os.kill(dog.pid, signal.SIGKILL)
    host.next_dog().wards()
    wait_dead(left)
    assert is_alive(pid)


def test_orphans_are_reaped(host: Host, tmp_path: Path) -> None:
    """What has lost its parent becomes the guardian's child, and no zombie."""
    dog = host.first_dog()
    notes = tmp_path / "pids"
    one = f"(setsid sh -c 'echo $$ >> {notes}; exec sleep 600' &) ;"
    dog.spawn("app", "/bin/sh", "-c", f"{one * 3} exec sleep 600", env=PATHS)
    pids = noted(notes, 3)
    for pid in pids:
        wait(lambda pid=pid: _parent(pid) == host.process.pid, "the guardian to be its parent")  # type: ignore[misc]
        os.kill(pid, signal.SIGKILL)
    wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "no zombie to be left")


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


GARBAGE = {
    "a frame that is too long": b"\xff" * 64,
    "not JSON": _frame(b"{"),
    "no object": _frame(b"[]"),
    "no type": _frame(b"{}"),
    "an unknown message": encode("dance", ward="app"),
    "no ward": encode("spawn"),
    "a ward that is no text": encode("keep", ward=["app"], memo=1),
    "no number": encode("spawn", ward="app2", argv=["true"], cwd="/", env={}),
    "no memo": encode("keep", ward="app"),
    "until of a list": encode("until", wards=["app"]),
    "until without wards": encode("until"),
    "until of a text": encode("until", wards={"app": "soon"}),
    "until of nothing": encode("until", wards={"app": None}),
    "until of NaN": encode("until", wards={"app": float("nan")}),
    "until of Infinity": encode("until", wards={"app": float("inf")}),
    "a memo until NaN": encode("keep", ward="app", memo=1, until=float("nan")),
    "a backstop of NaN": encode("backstop", after=float("nan")),
    "a backstop of Infinity": encode("backstop", after=float("inf")),
    "watching no process": encode("watch", ward="app2", pid="x", started=1, mark=""),
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_replaces_the_watchdog(host: Host, garbage: str) -> None:
    """The guardian and all wards live, and deadlines are still enforced."""
    dog = host.first_dog()
    pid = dog.spawn("app")
    dog.until("app", FAR_S)
    dog.settle()
    dog.send_raw(GARBAGE[garbage])
    before, dog = dog, host.next_dog()
    assert dog.wards()["app"]["pid"] == pid
    assert not is_alive(before.pid)
    assert is_alive(pid)
    dog.until("app", 0.1)
    assert dog.wait("exited", "app")["status"] == 9


def test_messages_in_pieces(host: Host) -> None:
    """A frame may come byte by byte, and many at once."""
    dog = host.first_dog()
    data = b"".join(encode("spawn", ward=f"app-{number}", number=1, argv=SLEEP, cwd="/", env={}) for number in range(3))
    for i in range(0, len(data), 7):
        dog.send_raw(data[i : i + 7])
    assert {dog.wait("spawned")["ward"] for _ in range(3)} == {"app-0", "app-1", "app-2"}


def test_many_wards(host: Host) -> None:
    """A hundred at once, all told, all ended with the guardian."""
    dog = host.first_dog()
    for number in range(100):
        dog.send_spawn(f"app-{number}")
    pids = [dog.wait("spawned")["pid"] for _ in range(100)]
    assert len(set(pids)) == 100
    dog.exit(0)
    assert host.wait_end() == 0
    assert not any(map(is_alive, pids))
    assert control_group(dog.name) is None


def test_orphans_of_a_killed_guardian_are_ended(host: Host, tmp_path: Path) -> None:
    """The kernel ends its children; what those have started is ended by the undertaker."""
    dog = host.first_dog()
    dog.spawn("app", *family(tmp_path / "pids"), env=PATHS)
    pids = noted(tmp_path / "pids", 4)
    os.kill(host.process.pid, signal.SIGKILL)
    for pid in pids:
        wait_dead(pid)


WITHOUT_CGROUPS = (
    *("unshare", "--mount", "/bin/sh", "-c"),
    "for at in $(grep -o '^cgroup2 [^ ]*' /proc/mounts | cut -d' ' -f2); do umount -l $at || exit 1; done; exec \"$@\"",
    "sh",
)


@pytest.fixture
def bare_host(tmp_path: Path) -> Iterator[Host]:
    """A guardian that finds no cgroups of version 2."""
    if subprocess.run([*WITHOUT_CGROUPS, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs root, to have no cgroups")
    host = Host(tmp_path, WITHOUT_CGROUPS)
    yield host
    host.close()


def test_orphans_that_carry_no_mark_are_ended(bare_host: Host, tmp_path: Path) -> None:
    """As of a program that overwrites its environment (nginx): without cgroups its group tells. Also to the next undertaker."""
    dog = bare_host.first_dog()
    unmarked = ("/bin/sh", "-c", f"env -i /bin/sleep 600 & echo $! >> {tmp_path}/pids; wait")
    dog.spawn("early", *unmarked)
    undertaker = next(pid for pid in descendants(bare_host.process.pid) if os.getsid(pid) == pid and is_undertaker(pid))
    os.kill(undertaker, signal.SIGKILL)
    dog.spawn("late", *unmarked)
    pids = noted(tmp_path / "pids", 2)
    assert control_group(dog.name) is None
    while any(b"ETCDREPLICA" in Path(f"/proc/{pid}/environ").read_bytes() for pid in pids):
        time.sleep(0.01)  # noted before it becomes the other program, which raises no event
    os.kill(bare_host.process.pid, signal.SIGKILL)
    for pid in pids:
        wait_dead(pid)


def is_undertaker(pid: int) -> bool:
    """Whether a child of a guardian is a copy of it, and no program."""
    return b"etcdreplica.guardian" in Path(f"/proc/{pid}/cmdline").read_bytes()
