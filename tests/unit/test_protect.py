"""The options of `protect`: what they make, and what is refused before anybody is asked."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from etcdreplica.cli.protect import protect_command, registration_from
from etcdreplica.errors import UsageError
from etcdreplica.model import PLAIN_PATH, Hooks, Probe, Program, Registration
from etcdreplica.words import Failover, Keep, Style


def made(*words: str) -> Registration:
    """Return what a command line makes."""
    context = protect_command.make_context("protect", list(words))
    return registration_from(**context.params)


def test_every_option() -> None:
    """Each has its place; what stands after the program is the program's own."""
    registration = made(
        *("--name", "shop", "--style", "warm", "--degree", "3", "--probe", "tcp:80", "--probe", "exec:true", "--host", "a"),
        *("--host", "b", "--host", "c", "--label", "disk=ssd", "--cwd", "/srv", "--env", "A=1=2", "--needs", "/srv/x"),
        *("--standby", "keep", "--pre-start", "p", "--on-promote", "q", "--on-demote", "r", "--notify", "s"),
        *("--hook-timeout", "3", "--start-timeout", "4", "--stop-timeout", "5", "--keep", "until-done", "--restarts-here", "1"),
        *("--max-restarts", "2", "--restart-window", "60", "--failover", "fast", "--failsafe", "server", "--name", "its own"),
    )
    program = Program(("server", "--name", "its own"), "/srv", {"A": "1=2"}, ("/srv/x",))
    assert registration == Registration(
        name="shop",
        style=Style.WARM,
        degree=3,
        program=program,
        hosts=("a", "b", "c"),
        labels={"disk": "ssd"},
        keep=Keep.UNTIL_DONE,
        stop_timeout_s=5.0,
        start_timeout_s=4.0,
        probes=(Probe("tcp:80"), Probe("exec:true")),
        restarts_here=1,
        max_restarts=2,
        restart_window_s=60.0,
        failover=Failover.FAST,
        failsafe=True,
        plain=True,
        standby="keep",
        hooks=Hooks("p", "q", "r", "s", 3.0),
    )
    assert registration.program_on("a").env == {"PATH": PLAIN_PATH, "A": "1=2"}
    assert registration.end_timeout_s == 8.0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--env", "A", "x"), "KEY=VALUE"),
        (("--label", "=b", "x"), "KEY=VALUE"),
        (("--degree", "0", "x"), "bad degree 0"),
        (("--degree", "2", "--host", "a", "x"), "cannot be met on 1 host"),
        (("--style", "hot", "x"), "style hot"),
        (("--style", "warm", "x"), "style warm needs standby"),
        (("--standby", "y", "x"), "standby is for style warm"),
        (("--probe", "call", "x"), 'a probe "call"'),
        (("--probe", "6379", "x"), "bad probe '6379'"),
        (("--failsafe", "--degree", "1", "x"), "failsafe needs a degree"),
        (("--hook-timeout", "0", "x"), "hook_timeout"),
        (("--notify", " ", "x"), "bad notify ' '"),
        ((), "command"),
    ],
)
def test_what_makes_no_sense_is_refused(words: tuple[str, ...], named: str) -> None:
    """Nothing is registered, and the option is named."""
    with pytest.raises((UsageError, click.UsageError)) as caught:
        made("--name", "shop", *words)
    assert named in str(caught.value)


def test_a_file_of_here_is_not_found_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program runs in /, so a path that is right only in this directory is refused, unless --cwd says what is meant."""
    (tmp_path / "server.py").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=rf"server.py is a file here, but .* write {tmp_path}/server.py, or give --cwd"):
        made("--name", "shop", "python3", "server.py")
    assert made("--name", "shop", "--cwd", str(tmp_path), "python3", "server.py").program.cwd == str(tmp_path)
    assert made("--name", "shop", "server.py").program.argv == ("server.py",)  # looked for in PATH, as a shell would
