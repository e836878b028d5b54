"""docs/tutorial.md, followed to the letter: its files written, its commands typed into terminals, its promises compared.

It happens in namespaces, as on a machine of its own: port 2379, /run and /var/lib are those of a root user.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from etcdreplica.testing import find_etcd
from etcdreplica.testing.processes import descendants, spawn_bound
from tests.integration.apps_cli.cli_harness import PATIENCE_S, clean_environment, eventually
from tests.pages import ROOT, Block, blocks

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces take root"),
    pytest.mark.skipif(not find_etcd(), reason="no etcd"),
]
STAYS = ("etcdreplica dev", "etcdreplica node")  # what keeps its terminal
LOOKS = ("etcdreplica status", "etcdreplica describe", "cat ")  # what a reader repeats until it shows what is promised
MACHINE = "ip link set lo up && mount -t tmpfs none /run && mount -t tmpfs none /var/lib && exec sleep infinity"


class Terminal:
    """A shell in the directory of the tutorial, on the machine of its own."""

    def __init__(self, machine: int, directory: Path, name: str) -> None:
        self._output = directory.parent / f"{name}.output"
        self._done = 0
        environment = clean_environment({"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
        with self._output.open("wb") as output:
            self.shell = subprocess.Popen(
                ["nsenter", f"--target={machine}", "--net", "--mount", "--pid", f"--wd={directory}", "bash", "--norc"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def close(self) -> None:
        """Close the window."""
        self.shell.kill()
        self.shell.communicate()

    def said(self, since: int = 0) -> str:
        """Return what stands in it."""
        return self._output.read_bytes()[since:].decode()

    def type(self, text: str) -> int:
        """Type a block; return where its output begins. The shell says when it is done, and how it ended."""
        since = self._output.stat().st_size
        self._done += 1
        assert self.shell.stdin is not None
        self.shell.stdin.write(f'{text.rstrip()}\necho "[done {self._done}: $?]"\n'.encode())
        self.shell.stdin.flush()
        return since

    def wait_done(self) -> int:
        """Wait for the end of what was typed last; return its exit code."""
        mark = re.compile(rf"\[done {self._done}: (\d+)\]")
        eventually(lambda: mark.search(self.said()), f"the end of what was typed, after\n{self.said()}")
        found = mark.search(self.said())
        assert found is not None
        return int(found[1])

    def interrupt(self) -> None:
        """Ctrl-C: to what runs in it."""
        shell = next(descendants(self.shell.pid))
        os.kill(next(pid for pid in descendants(shell)), signal.SIGINT)


class Machine:
    """Its first process, with which all others end, and its terminals."""

    def __init__(self, holder: int, directory: Path) -> None:
        self.first = next(descendants(holder))
        self.directory = directory
        self.terminals: dict[str, Terminal] = {}

    def terminal(self, name: str) -> Terminal:
        """Return the one of this name, opened when it is first asked for."""
        if name not in self.terminals:
            self.terminals[name] = Terminal(self.first, self.directory, name)
        return self.terminals[name]

    def commands(self) -> Iterator[bytes]:
        """Yield the command line of everything that runs on it."""
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (process / "ns/pid").readlink() == Path(f"/proc/{self.first}/ns/pid").readlink():
                    yield (process / "cmdline").read_bytes()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A machine of its own."""
    directory = tmp_path / "tutorial"
    directory.mkdir()
    flags = ("--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
    if subprocess.run(["unshare", *flags, "true"], capture_output=True, timeout=PATIENCE_S, check=False).returncode:
        pytest.skip("this machine makes no namespaces")
    holder = spawn_bound(["unshare", *flags, "sh", "-c", MACHINE], log=tmp_path / "machine.log")
    machine = None
    try:
        eventually(lambda: any(b"infinity" in _command(pid) for pid in descendants(holder.pid)), "a machine to begin")
        yield (machine := Machine(holder.pid, directory))
    finally:
        holder.kill()
        holder.wait()
        for terminal in machine.terminals.values() if machine else ():
            terminal.close()


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def missing(promised: str, said: str) -> str:
    """Return the first line that was promised and has not come, in order; "" if all have. … is any text."""
    at = 0
    for line in promised.splitlines():
        pattern = r"\s+".join(".*?".join(map(re.escape, word.split("…"))) for word in line.split())
        found = re.compile(pattern).search(said, at)
        if found is None:
            return line
        at = found.end()
    return ""


def follow(block: Block, promised: str, terminal: Terminal) -> None:
    """Do what one block says, and see that what follows it comes true."""
    lines = block.text.splitlines()
    if block.text.startswith("^C"):
        terminal.interrupt()
        assert terminal.wait_done() in (0, 130)
    elif all(line.startswith(LOOKS) for line in lines):
        deadline = time.monotonic() + PATIENCE_S
        while True:
            since = terminal.type(block.text)
            code = terminal.wait_done()
            lacks = missing(promised, said := terminal.said(since))
            if code == 0 and not lacks:
                break
            assert time.monotonic() < deadline, f"{block.page}:{block.line} promises {lacks!r}, and not\n{said}"
    else:
        since = terminal.type(block.text)
        eventually(lambda: not missing(promised, terminal.said(since)), f"{block.page}:{block.line} to show {promised}")
        if not lines[-1].startswith(STAYS):
            assert terminal.wait_done() == 0, terminal.said(since)


def test_the_tutorial_is_true(machine: Machine) -> None:
    """Every command works, every output is as promised, the count never goes back, and nothing is left at the end."""
    steps = list(blocks(ROOT / "docs/tutorial.md"))
    assert sum(step.language == "bash" for step in steps) > 10
    for step, following in pairwise([*steps, Block("", 0, "", "", "")]):
        if step.language == "bash":
            follow(step, following.text if following.language == "text" else "", machine.terminal(step.title))
        elif step.language != "text":
            (machine.directory / step.title).write_text(step.text)
    reports = re.findall(r"(\d+) by desk-\w, epoch (\d+)", machine.terminal("second terminal").said())
    seen = [(int(epoch), int(count)) for count, epoch in reports]
    assert len(seen) >= 3
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(seen)), seen
    assert len({epoch for epoch, _ in seen}) == 3
    running = list(machine.commands())
    assert any(b"infinity" in command for command in running)
    assert not [command for command in running if b"counter.py" in command or b"desk-a" in command]
