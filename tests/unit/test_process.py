"""What a WatchDog checks before it starts a program, and how it tells one process from another of the same number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from attrs import evolve

from etcdreplica.daemon.process import check_program
from etcdreplica.errors import RefusedError
from etcdreplica.guardian.tree import start_time
from etcdreplica.model import Program


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Return a program that this host can start."""
    script = tmp_path / "app.py"
    script.write_text("")
    return Program((sys.executable, "app.py"), str(tmp_path), {"PATH": "/usr/bin:/bin"}, (str(script),))


def test_good_program(program: Program) -> None:
    """Command, directory and files are there."""
    check_program(program)


def test_needs_may_be_relative_to_the_directory(program: Program) -> None:
    """As the program itself would open them."""
    check_program(evolve(program, needs=("app.py",)))
    with pytest.raises(RefusedError, match=r"no readable file other\.py"):
        check_program(evolve(program, needs=("app.py", "other.py")))


def test_no_command(program: Program) -> None:
    """A program without a command cannot be started."""
    with pytest.raises(RefusedError, match="no command"):
        check_program(evolve(program, argv=()))


@pytest.mark.parametrize("cwd", ["/no/such/directory", "/dev/null"])
def test_no_directory(program: Program, cwd: str) -> None:
    """The directory must exist here, and be one."""
    with pytest.raises(RefusedError, match=f"no directory {cwd}"):
        check_program(evolve(program, cwd=cwd))


@pytest.mark.parametrize("command", ["/no/such/python", "./missing", "no-such-command"])
def test_no_such_command(program: Program, command: str) -> None:
    """An absolute, a relative and a searched command."""
    with pytest.raises(RefusedError, match=f"no program {command}"):
        check_program(evolve(program, argv=(command,)))


def test_command_that_may_not_be_executed(program: Program, tmp_path: Path) -> None:
    """A file is not a program."""
    (tmp_path / "plain").write_text("")
    with pytest.raises(RefusedError, match=r"no program \./plain"):
        check_program(evolve(program, argv=("./plain",)))


def test_directory_is_no_command(program: Program, tmp_path: Path) -> None:
    """A directory may be entered, but not run."""
    with pytest.raises(RefusedError, match=f"no program {tmp_path}"):
        check_program(evolve(program, argv=(str(tmp_path),)))


def test_command_is_searched_in_the_programs_own_path(program: Program, tmp_path: Path) -> None:
    """The PATH of the registration counts, not that of the WatchDog."""
    tool = tmp_path / "only-here"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    with pytest.raises(RefusedError, match="no program only-here"):
        check_program(evolve(program, argv=("only-here",)))
    check_program(evolve(program, argv=("only-here",), env={"PATH": f"/nowhere:{tmp_path}"}))


def test_needed_file_is_missing(program: Program) -> None:
    """A host to which the program was not copied refuses it, and says which file."""
    with pytest.raises(RefusedError, match="no readable file /srv/missing"):
        check_program(evolve(program, needs=(*program.needs, "/srv/missing")))


def test_start_time_tells_processes_apart() -> None:
    """A living process has the same start time whenever it is asked."""
    mine = start_time(os.getpid())
    assert mine is not None
    assert start_time(os.getpid()) == mine
    parent = start_time(os.getppid())
    assert parent is None or parent <= mine


def test_dead_process_has_no_start_time() -> None:
    """Neither one that was never there, nor a zombie, nor one that is gone."""
    assert start_time(2**22 + 1) is None
    with subprocess.Popen(["sleep", "60"]) as child:
        assert start_time(child.pid) is not None
        child.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert start_time(child.pid) is None  # a zombie
        child.wait()
        assert start_time(child.pid) is None


def test_start_time_of_a_process_with_an_odd_name(tmp_path: Path) -> None:
    """The name in /proc may hold blanks and brackets."""
    odd = tmp_path / "a) Z (b 1"
    odd.symlink_to("/bin/sleep")
    with subprocess.Popen([odd, "60"]) as child:
        assert (start_time(child.pid) or 0) > 0
        child.kill()
