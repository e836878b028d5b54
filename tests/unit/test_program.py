"""How a process captures the command that starts it again: tried with real interpreters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import msgspec
import pytest

from etcdreplica.app.program import capture, default_name
from etcdreplica.model import Program
from etcdreplica.store.keys import encode
from etcdreplica.words import NAME

SOURCE = textwrap.dedent(
    """
    import json, sys
    from etcdreplica.app.program import capture, default_name
    from etcdreplica.errors import UsageError

    def main(): pass
    def serve(): pass

    try:
        told = {"program": capture(), "names": [default_name(main), default_name(serve)]}
    except UsageError as error:
        told = {"refused": str(error)}
    print(json.dumps(told))
    """
)


def told_by(directory: Path, *arguments: str, stdin: str = "", env: dict[bytes, bytes] | None = None) -> dict[str, Any]:
    """Run an interpreter in a directory, and return what the source told of itself."""
    environment = {**os.environb, **(env or {})}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=directory, input=stdin, env=environment, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a directory with a script and a package."""
    (tmp_path / "shop.py").write_text(SOURCE)
    package = tmp_path / "pkg"
    package.mkdir()
    for name in ("__init__.py", "sub.py", "__main__.py"):
        (package / name).write_text("" if name == "__init__.py" else SOURCE)
    return tmp_path


def test_script(directory: Path) -> None:
    """A script is started with the same interpreter, arguments and directory, and its file is needed."""
    told = told_by(directory, "shop.py", "--port", "1")
    assert told["program"]["argv"] == [sys.executable, "shop.py", "--port", "1"]
    assert told["program"]["cwd"] == str(directory)
    assert told["program"]["needs"] == [str(directory / "shop.py")]
    assert told["names"] == ["shop", "shop.serve"]


def test_script_by_absolute_path(directory: Path) -> None:
    """The command is kept as it was typed."""
    script = str(directory / "shop.py")
    told = told_by(Path("/"), script)
    assert told["program"]["argv"] == [sys.executable, script]
    assert told["program"]["needs"] == [script]


@pytest.mark.parametrize(("module", "name"), [("pkg.sub", "pkg.sub"), ("pkg", "pkg")])
def test_module(directory: Path, module: str, name: str) -> None:
    """A module is started by its name, which is also the application's, and no one file is needed."""
    told = told_by(directory, "-m", module, "x")
    assert told["program"]["argv"] == [sys.executable, "-m", module, "x"]
    assert told["program"]["needs"] == []
    assert told["names"] == [name, f"{name}.serve"]


@pytest.mark.parametrize("flags", [["-c"], ["-Bc"], ["-u", "-c"]])
def test_command(directory: Path, flags: list[str]) -> None:
    """A command on the command line is part of it."""
    told = told_by(directory, *flags, SOURCE, "x")
    assert told["program"]["argv"] == [sys.executable, *flags, SOURCE, "x"]
    assert told["program"]["needs"] == []
    assert all(NAME.fullmatch(name) for name in told["names"])


def test_command_written_together(directory: Path) -> None:
    """The interpreter also takes a command without a space after -c."""
    told = told_by(directory, f"-c{SOURCE}")
    assert told["program"]["argv"] == [sys.executable, f"-c{SOURCE}"]


def test_interpreter_options_are_kept(directory: Path) -> None:
    """What was given to the interpreter matters as much as what was given to the script."""
    told = told_by(directory, "-X", "utf8", "-B", "-W", "ignore", "shop.py", "-v")
    assert told["program"]["argv"] == [sys.executable, "-X", "utf8", "-B", "-W", "ignore", "shop.py", "-v"]


@pytest.mark.parametrize("arguments", [["-c", "shop.toml"], ["-m", "5"], ["-rm"]])
def test_the_scripts_own_options_are_no_interpreter_options(directory: Path, arguments: list[str]) -> None:
    """A script called with an option -c or -m of its own needs its file all the same."""
    told = told_by(directory, "shop.py", *arguments)
    assert told["program"]["argv"] == [sys.executable, "shop.py", *arguments]
    assert told["program"]["needs"] == [str(directory / "shop.py")]


def test_script_with_a_dash_as_last_argument(directory: Path) -> None:
    """To many programs `-` means standard input as data; the program itself is a file."""
    assert told_by(directory, "shop.py", "-")["program"]["argv"][-1] == "-"


@pytest.mark.parametrize("arguments", [[], ["-"], ["-u"], ["-u", "-"], ["-", "x"], ["-", "-c"]])
def test_standard_input_is_refused(directory: Path, arguments: list[str]) -> None:
    """What was typed in exists on no other host."""
    assert "use a file" in told_by(directory, *arguments, stdin=SOURCE)["refused"]


def test_environment_is_kept_but_for_what_is_local(directory: Path) -> None:
    """Settings of the application travel; those of this login, terminal, service or test run do not."""
    kept = {"PATH": os.environ.get("PATH", ""), "SHOP_URL": "http://x", "LANG": "C.UTF-8", "PYTHONHASHSEED": "7"}
    local = [
        "PWD",
        "OLDPWD",
        "SHLVL",
        "TERM",
        "TERM_PROGRAM",
        "COLUMNS",
        "DISPLAY",
        "SSH_CONNECTION",
        "SSH_AUTH_SOCK",
        "SUDO_USER",
        "XDG_SESSION_ID",
        "XDG_RUNTIME_DIR",
        "TMUX_PANE",
        "INVOCATION_ID",
        "JOURNAL_STREAM",
        "NOTIFY_SOCKET",
        "LISTEN_FDS",
        "PYTEST_CURRENT_TEST",
        "ETCDREPLICA_SOCKET",
        "ETCDREPLICA_INCARNATION",
        "_",
    ]
    given = {**kept, **dict.fromkeys(local, "1")}
    told = told_by(directory, "shop.py", env={name.encode(): value.encode() for name, value in given.items()})
    env = told["program"]["env"]
    assert {name: env.get(name) for name in kept} == kept
    assert not env.keys() & set(local)


@pytest.mark.parametrize("name", ["TERMS_URL", "LINES_PER_PAGE", "MAILER", "DISPLAY_NAME", "HOSTNAMES"])
def test_names_that_only_look_local_are_kept(directory: Path, name: str) -> None:
    """An application's own setting may begin like a terminal's."""
    told = told_by(directory, "shop.py", env={name.encode(): b"1"})
    assert told["program"]["env"].get(name) == "1"


def test_captured_program_can_be_written_to_etcd(directory: Path) -> None:
    """A variable that is not UTF-8, as an old locale leaves behind, must not make a registration that cannot be stored."""
    told = told_by(directory, "shop.py", env={b"OLD_NAME": b"caf\xe9"})
    assert encode(msgspec.convert(told["program"], Program))


def test_detach_option_is_left_out(directory: Path) -> None:
    """`etcdreplica start --detach` only registers; the copies are to run."""
    told = told_by(directory, "shop.py", "--detach", "--port", "1", env={b"ETCDREPLICA_DETACH": b"1"})
    assert told["program"]["argv"] == [sys.executable, "shop.py", "--port", "1"]
    told = told_by(directory, "shop.py", "--detach")
    assert told["program"]["argv"][-1] == "--detach"


def test_console_script(directory: Path) -> None:
    """The tests themselves are started by one: interpreter and script are both in the command."""
    found = capture()
    assert found["argv"][0] == sys.executable
    assert found["argv"][1:] == sys.orig_argv[1:]


def named(module: str, qualified: str) -> str:
    """Return the default name of a function of this module and name."""

    def function() -> None:
        """Do nothing."""

    function.__module__, function.__qualname__ = module, qualified
    return default_name(function)


@pytest.mark.parametrize(
    ("module", "qualified", "name"),
    [
        ("shop", "main", "shop"),
        ("shop", "serve", "shop.serve"),
        ("pkg.__main__", "main", "pkg"),
        ("pkg.sub", "main", "pkg.sub"),
        ("shop", "Server.run", "shop.Server.run"),
        ("_shop_", "main", "shop"),
    ],
)
def test_default_names(module: str, qualified: str, name: str) -> None:
    """A name says module and function, unless the function is called main."""
    assert named(module, qualified) == name


@pytest.mark.parametrize(
    ("module", "qualified"),
    [("shop", "make.<locals>.serve"), ("a" * 100, "main"), ("a" * 62, "serve"), ("a" * 61, "_x"), ("b" * 62 + "_", "main")],
)
def test_default_name_is_always_valid(module: str, qualified: str) -> None:
    """Whatever a module and function are called, the application gets a name that is allowed."""
    assert NAME.fullmatch(named(module, qualified))
