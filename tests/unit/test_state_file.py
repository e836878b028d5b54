"""What a WatchDog leaves behind, and what the next one makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from etcdreplica.app.protocol import MARK_ENV
from etcdreplica.daemon.state_file import StateFile, last_guardian
from etcdreplica.errors import ConfigurationError
from etcdreplica.guardian.tree import start_time

EARLIER, NOW = "guardian-1", "guardian-2"


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """Return a process that an earlier WatchDog may have left."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def change(directory: Path, **fields: object) -> None:
    """Change what stands in the file."""
    path = directory / "watchdog.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


async def test_nothing_left_behind(tmp_path: Path) -> None:
    """The first WatchDog of a host finds nothing."""
    assert await StateFile(tmp_path).end_leftovers(NOW) is None


async def test_leftovers_are_ended(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    """What runs is dead before the lease is given up."""
    before = StateFile(tmp_path)
    before.record_session(EARLIER, 77)
    before.record_process("shop", child.pid, start_time(child.pid))
    assert await StateFile(tmp_path).end_leftovers(NOW) == 77
    assert start_time(child.pid) is None


async def test_same_guardian_keeps_everything(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    """A WatchDog that its guardian started again ends nothing, and goes on with the file."""
    before = StateFile(tmp_path)
    before.record_session(NOW, 77)
    before.record_process("shop", child.pid, start_time(child.pid))
    after = StateFile(tmp_path)
    assert await after.end_leftovers(NOW) is None
    assert child.poll() is None
    after.forget_process("never")
    after.record_process("bank", os.getpid(), start_time(os.getpid()))
    after.forget_process("bank")
    assert await StateFile(tmp_path).end_leftovers("guardian-3") == 77
    assert start_time(child.pid) is None


def test_marked_leftovers_are_ended(tmp_path: Path) -> None:
    """What an earlier guardian started carries its mark, and is found without being in the file."""
    StateFile(tmp_path).record_session(EARLIER, 77)
    marks = [f"{EARLIER}/shop.1", f"{NOW}/shop.1"]
    theirs, ours = (subprocess.Popen(["sleep", "600"], env={**os.environ, MARK_ENV: mark}) for mark in marks)
    with theirs, ours:
        for child in (theirs, ours):
            while MARK_ENV.encode() not in Path(f"/proc/{child.pid}/environ").read_bytes():
                assert child.poll() is None  # Popen returns a little before exec has set it
        assert asyncio.run(StateFile(tmp_path).end_leftovers(NOW)) == 77
        assert start_time(theirs.pid) is None
        assert ours.poll() is None
        ours.kill()


def test_last_guardian(tmp_path: Path) -> None:
    """Whoever stopped in order, or was never there, is not named."""
    assert last_guardian(tmp_path) is None
    state = StateFile(tmp_path)
    state.record_session(EARLIER, 77)
    assert last_guardian(tmp_path) == EARLIER
    state.forget()
    assert last_guardian(tmp_path) is None


async def test_what_was_forgotten_is_left_alone(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    """A replica that is known dead is no leftover, even if its number is used again."""
    before = StateFile(tmp_path)
    before.record_session(EARLIER, 77)
    before.record_process("shop", child.pid, start_time(child.pid))
    before.forget_process("shop")
    before.forget_process("never")
    assert await StateFile(tmp_path).end_leftovers(NOW) == 77
    assert child.poll() is None


async def test_end_in_order_leaves_nothing(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    """After `forget` there is neither a process nor a lease, and it may be called twice."""
    before = StateFile(tmp_path)
    before.record_session(EARLIER, 77)
    before.record_process("shop", child.pid, start_time(child.pid))
    before.forget()
    before.forget()
    assert await StateFile(tmp_path).end_leftovers(NOW) is None
    assert child.poll() is None


async def test_number_used_again_is_spared(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    """Only a process with the very start time that was recorded is the one that was left."""
    before = StateFile(tmp_path)
    before.record_process("shop", child.pid, start_time(child.pid))
    started = start_time(child.pid)
    assert started is not None
    change(tmp_path, processes={"shop": [child.pid, started - 1]})
    assert await StateFile(tmp_path).end_leftovers(NOW) is None
    assert child.poll() is None


async def test_other_boot_is_spared(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    """After a reboot numbers and start times mean others; the lease is still ours."""
    before = StateFile(tmp_path)
    before.record_session(EARLIER, 77)
    before.record_process("shop", child.pid, start_time(child.pid))
    change(tmp_path, boot="another")
    assert await StateFile(tmp_path).end_leftovers(NOW) == 77
    assert child.poll() is None


def test_dead_leftover_costs_nothing(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    """What is dead already need not be ended."""
    before = StateFile(tmp_path)
    before.record_session(EARLIER, 77)
    before.record_process("shop", child.pid, start_time(child.pid))
    child.kill()
    child.wait()
    assert asyncio.run(StateFile(tmp_path).end_leftovers(NOW)) == 77


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '{"boot": 1}', '{"lease": "x"}', "\x00"])
async def test_unreadable_file_is_as_none(tmp_path: Path, text: str) -> None:
    """It only makes a restart quick; without it leases expire by themselves."""
    (tmp_path / "watchdog.json").write_text(text)
    assert await StateFile(tmp_path).end_leftovers(NOW) is None


@pytest.mark.parametrize("processes", [[], None, {"shop": 7}, {"shop": [1]}])
async def test_file_with_a_strange_part_stops_no_watchdog(tmp_path: Path, processes: object) -> None:
    """A file that somebody edited must not keep a host down."""
    StateFile(tmp_path).record_session(EARLIER, 77)
    change(tmp_path, processes=processes)
    assert await StateFile(tmp_path).end_leftovers(NOW) in (77, None)


def test_process_that_is_gone_is_not_recorded(tmp_path: Path) -> None:
    """There is nothing to end later."""
    StateFile(tmp_path).record_process("shop", 2**22 + 1, start_time(2**22 + 1))
    assert not (tmp_path / "watchdog.json").exists()


def test_one_watchdog_a_directory(tmp_path: Path) -> None:
    """The second is told what to do; when the first lets go, it may."""
    directory = tmp_path / "state"
    first, second = StateFile(directory), StateFile(directory)
    first.lock()
    with pytest.raises(ConfigurationError, match=r"another WatchDog uses .*state: give this one another --state-dir"):
        second.lock()
    first.unlock()
    second.lock()
    second.unlock()
    second.unlock()
    assert directory.stat().st_mode & 0o777 == 0o700


def test_refused_lock_leaves_nothing_open(tmp_path: Path) -> None:
    """Trying again and again costs no descriptors."""
    first = StateFile(tmp_path)
    first.lock()

    def opened() -> list[Path]:
        """Return what is open below the directory; what else is may be closed by the garbage collector meanwhile."""
        found = []
        for fd in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(fd.readlink())
        return [path for path in found if path.is_relative_to(tmp_path)]

    before = opened()
    assert before
    for _ in range(3):
        second = StateFile(tmp_path)
        with pytest.raises(ConfigurationError):
            second.lock()
        second.unlock()
    assert opened() == before
    first.unlock()


def test_directory_that_cannot_be_used(tmp_path: Path) -> None:
    """The message names the directory and the reason."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"cannot use the state directory .*file/state: Not a directory"):
        StateFile(tmp_path / "file" / "state").lock()
