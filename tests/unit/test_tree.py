"""Everything that a replica has started is found and dies as a whole, and nothing else does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attrs import define

from etcdreplica.app.protocol import MARK_ENV
from etcdreplica.guardian.tree import Tree, control_group, end_all, exiting_status, make_control_group, start_time
from etcdreplica.testing.journal import written_lines

PATIENCE_S = 60.0
PF_EXITING = 0x4  # of a task that will run none of its own code any more
PRELUDE = """
import ctypes, os, signal, sys, threading, time
def join(group):
    if group:
        with open(group + "/cgroup.procs", "w") as procs:
            procs.write("0")
def note(path=sys.argv[1]):
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"%d\\n" % os.getpid())
    os.close(fd)
def rest():
    note()
    time.sleep(600)
def child(*first):
    if os.fork() == 0:
        for step in first:
            step()
        rest()
join(sys.argv[2])
"""
# Each notes every process of its own that is to stay, and the number of those processes is given.
FAMILIES = {
    "alone": ("rest()", 1),
    "children": ("for _ in range(3): child()\nrest()", 4),
    "children in sessions of their own": ("for _ in range(3): child(os.setsid)\nrest()", 4),
    "children in groups of their own": ("for _ in range(3): child(os.setpgrp)\nrest()", 4),
    "daemons": ("for _ in range(3): child(os.setsid, lambda: os.fork() and os._exit(0))\nrest()", 4),
    "stopped children": (
        "for _ in range(3): child(os.setsid, lambda: note() or os.kill(os.getpid(), signal.SIGSTOP))\nrest()",
        4,
    ),
    "grandchildren": ("child(os.setsid, lambda: child(os.setsid, lambda: child(os.setsid)))\nrest()", 4),
    "children of a main process that has ended": ("for _ in range(3): child(os.setsid)\nos._exit(0)", 3),
    "members of the group of a main process that has ended": ("for _ in range(3): child()\nos._exit(0)", 3),
    "children without its environment": (
        "for _ in range(3): child(os.setsid, note, lambda: os.execve('/bin/sleep', ['sleep', '600'], {}))\nrest()",
        4,
    ),
    "a main thread that has ended": (
        "threading.Thread(target=rest).start()\nctypes.CDLL(None).syscall(60, 0)",
        1,
    ),
    "blocked signals": ("signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nchild(os.setsid)\nrest()", 2),
}


@define
class Nursery:
    """Starts families under a mark, knows each of their processes, and ends what is left of them."""

    directory: Path
    guardian: str
    grouped: bool
    _families: list[subprocess.Popen[bytes]]
    _seen: dict[int, int]

    def start(self, code: str, size: int, ward: str = "ward.1", guardian: str | None = None) -> tuple[Tree, list[int]]:
        """Start one, and return it with the ids of its processes once all of them are there."""
        mark = f"{guardian or self.guardian}/{ward}"
        group = make_control_group(mark) if self.grouped else None
        if self.grouped and group is None:
            pytest.skip("no cgroup of version 2 can be made here")
        notes = self.directory / f"{uuid.uuid4().hex}"
        notes.touch()
        command = [sys.executable, "-S", "-c", PRELUDE + code, str(notes), group or ""]
        process = subprocess.Popen(command, start_new_session=True, env={**os.environ, MARK_ENV: mark})
        self._families.append(process)
        started = start_time(process.pid)
        wait(lambda: len(set(written_lines(notes))) >= size, "the family to be complete")
        pids = sorted({int(pid) for pid in written_lines(notes)})
        self._seen.update({pid: at for pid in pids if (at := start_time(pid)) is not None})
        tree = Tree(mark, process.pid, started)
        assert (tree.group is not None) == self.grouped
        return tree, pids

    def end(self) -> None:
        """Leave nothing."""
        for process in self._families:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
        for pid, at in self._seen.items():
            if start_time(pid) == at:
                os.kill(pid, signal.SIGKILL)
        end_all(self.guardian)


def wait(condition: Callable[[], object], what: str) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Whether any thread of a process may still run code of its own; the kernel may be busy with its end for longer."""
    try:
        tasks = [(task / "stat").read_text().rpartition(")")[2].split() for task in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(fields[0] not in "ZX" and not int(fields[6]) & PF_EXITING for fields in tasks)


def kill_all(tree: Tree) -> None:
    """Kill it as often as it takes, as its users do."""
    tree.kill()
    deadline = time.monotonic() + PATIENCE_S
    while tree.alive():
        assert time.monotonic() < deadline
        time.sleep(0.002)
        tree.kill()


@pytest.fixture(params=[True, False], ids=["cgroup", "proc"])
def nursery(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Nursery]:
    """With a cgroup for each family, and with nothing but /proc."""
    found = Nursery(tmp_path, f"test-{uuid.uuid4().hex}", request.param, [], {})
    yield found
    found.end()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_it_is_dead_after_kill(nursery: Nursery, family: str) -> None:
    """However they have come about; what neither descends from it nor has its mark is alone found by its cgroup."""
    if not nursery.grouped and family == "children without its environment":
        pytest.skip("their parent may be killed before they are found")
    tree, pids = nursery.start(*FAMILIES[family])
    assert all(is_alive(pid) for pid in pids)
    assert set(pids) <= set(tree.alive())
    kill_all(tree)
    wait(lambda: not any(map(is_alive, pids)), "all to be dead")
    assert tree.alive() == []


def test_what_has_cut_every_tie_is_found_by_its_cgroup_alone(nursery: Nursery) -> None:
    """Without a cgroup, a daemon that has cleaned its environment is nobody's: the module says so."""
    if not nursery.grouped:
        pytest.skip("documented as not found")
    clean = "lambda: os.fork() and os._exit(0), note, lambda: os.execve('/bin/sleep', ['sleep', '600'], {})"
    tree, pids = nursery.start(f"child(os.setsid, {clean})\nrest()", 2)
    kill_all(tree)
    wait(lambda: not any(map(is_alive, pids)), "all to be dead")


BOMB = """
def burst():
    while True:
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)
        time.sleep(0.001)
for _ in range(4):
    if os.fork() == 0:
        note()
        burst()
note()
for _ in range(500):
    if os.fork() == 0:
        time.sleep(600)
    time.sleep(0.001)
time.sleep(600)
"""


def test_fork_bomb(nursery: Nursery) -> None:
    """Processes that never stop to make new ones are all ended, the new ones too."""
    tree, pids = nursery.start(BOMB, 5)
    wait(lambda: len(tree.alive()) > 30, "the bomb to go off")
    kill_all(tree)
    wait(lambda: not any(map(is_alive, pids)), "the bomb to be over")
    assert tree.alive() == []


def test_others_are_left_alone(nursery: Nursery) -> None:
    """Another ward, a ward whose name begins the same, another guardian's ward of the same name, and no ward at all."""
    tree, _ = nursery.start(*FAMILIES["children"])
    others = [
        nursery.start(*FAMILIES["daemons"], ward="ward.2"),
        nursery.start(*FAMILIES["daemons"], ward="ward.11"),
        nursery.start(*FAMILIES["daemons"], ward="other.1"),
        nursery.start(*FAMILIES["daemons"], guardian=f"{nursery.guardian}2"),
    ]
    with subprocess.Popen(["sleep", "600"]) as unrelated:
        kill_all(tree)
        for other, pids in others:
            assert set(pids) <= set(other.alive())
            assert all(is_alive(pid) for pid in pids)
        assert unrelated.poll() is None
        unrelated.kill()
    end_all(f"{nursery.guardian}2")


def test_a_number_that_is_somebody_else_s_by_now_is_spared(tmp_path: Path) -> None:
    """The same process id with another start time: neither it, its children nor its group are touched."""
    child = [sys.executable, "-S", "-c", "import os, time; pid = os.fork(); pid and print(pid, flush=True); time.sleep(600)"]
    with subprocess.Popen(child, start_new_session=True, stdout=subprocess.PIPE, text=True) as reused:
        assert reused.stdout is not None
        pids = {reused.pid, int(reused.stdout.readline())}
        try:
            started = start_time(reused.pid)
            assert started is not None
            for mark in ("", f"test-{uuid.uuid4().hex}/ward.1"):
                stranger = Tree(mark, reused.pid, started - 1)
                stranger.kill()
                assert stranger.alive() == []
                assert all(map(is_alive, pids))
            own = Tree(f"test-{uuid.uuid4().hex}/ward.1", reused.pid, started)
            assert set(own.alive()) == pids
            kill_all(own)
            wait(lambda: not any(map(is_alive, pids)), "its own tree to be dead")
        finally:
            os.killpg(reused.pid, signal.SIGKILL)


def test_a_tree_without_a_mark_is_a_process_and_what_descends_from_it(nursery: Nursery) -> None:
    """Its group need not be its own, so that is left alone."""
    if nursery.grouped:
        pytest.skip("without a mark there is no cgroup")
    marked, pids = nursery.start("for _ in range(2): child(os.setsid)\nrest()", 3)
    tree = Tree("", marked.pid, marked.started)
    assert sorted(tree.alive()) == pids
    tree.pid, tree.started = pids[-1], start_time(pids[-1])
    kill_all(tree)
    wait(lambda: not is_alive(pids[-1]), "one child to be dead")
    assert all(is_alive(pid) for pid in pids[:-1])


def test_forget(nursery: Nursery) -> None:
    """The cgroup goes once nothing is in it; forgetting twice is no error."""
    tree, _ = nursery.start(*FAMILIES["daemons"])
    assert tree.forget() == (not nursery.grouped)
    kill_all(tree)
    wait(tree.forget, "the cgroup to be gone")
    assert tree.forget()
    assert control_group(tree.mark) is None
    tree.kill()
    assert tree.alive() == []


def test_end_all(nursery: Nursery) -> None:
    """Every ward of a guardian that is dead, and no ward of another; its cgroups go as well."""
    wards = [
        nursery.start(*FAMILIES[family], ward=f"{i}.1") for i, family in enumerate(("daemons", "children", "grandchildren"))
    ]
    _, spared = nursery.start(*FAMILIES["children"], guardian=f"{nursery.guardian}2")
    end_all(nursery.guardian)
    assert not any(is_alive(pid) for _, pids in wards for pid in pids)
    assert control_group(nursery.guardian) is None
    assert all(map(is_alive, spared))
    end_all(f"{nursery.guardian}2")
    assert not any(map(is_alive, spared))
    assert control_group(f"{nursery.guardian}2") is None
    end_all(nursery.guardian)  # there is nothing: that is no error


# --- what /proc tells ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status"),
    [("pass", 0), ("import sys; sys.exit(3)", 3 << 8), ("import os; os.kill(os.getpid(), 9)", 9), ("import os; os.abort()", 6)],
)
def test_exiting_status_of_a_zombie(code: str, status: int) -> None:
    """It still tells how it ended, as wait will."""
    with subprocess.Popen([sys.executable, "-S", "-c", code], stderr=subprocess.DEVNULL) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        found = exiting_status(child.pid)
        assert found is not None
        assert found & ~0x80 == status  # the flag of a core dump depends on the machine
        child.wait()
        assert exiting_status(child.pid) is None


def test_exiting_status_of_what_lives() -> None:
    """None, also when it is stopped, and when there never was such a process."""
    with subprocess.Popen(["sleep", "600"]) as child:
        assert exiting_status(child.pid) is None
        child.send_signal(signal.SIGSTOP)
        assert exiting_status(child.pid) is None
        child.kill()
    assert exiting_status(os.getpid()) is None
    assert exiting_status(2**22 + 1) is None


def test_a_process_whose_main_thread_has_ended_is_none_that_is_over(tmp_path: Path) -> None:
    """The kernel shows it as a zombie, and its other threads run on."""
    code = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.01), print('on', flush=True), time.sleep(600))).start()\n"
        "ctypes.CDLL(None).syscall(60, 0)"
    )
    with subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE) as child:
        started = start_time(child.pid)
        assert child.stdout is not None
        assert child.stdout.readline() == b"on\n"
        wait(lambda: " Z " in Path(f"/proc/{child.pid}/stat").read_text(), "the main thread to end")
        try:
            assert exiting_status(child.pid) is None
            assert start_time(child.pid) == started
        finally:
            child.kill()
