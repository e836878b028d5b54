"""`--help` of everything, and command lines that make no sense."""

from __future__ import annotations

import pytest

from etcdreplica.cli import COMMANDS
from tests.integration.apps_cli.cli_harness import cli, the_error

pytestmark = pytest.mark.integration


CONFIG = ("show", "check")
CHECKPOINTS = ("list", "inspect", "export", "import", "verify")


@pytest.mark.parametrize(
    "words",
    [
        *((name,) for name in COMMANDS),
        ("bench", "failover"),
        *(("checkpoints", word) for word in CHECKPOINTS),
        *(("config", word) for word in CONFIG),
    ],
    ids=" ".join,
)
def test_help_of_a_command_has_an_example(words: tuple[str, ...]) -> None:
    """Each example stands on a line of its own, and can be copied from there."""
    done = cli(*words, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    examples = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith(f"etcdreplica {' '.join(words)}")]
    assert examples, done.stdout
    assert "\\b" not in done.stdout
    assert all(line.count("etcdreplica ") == 1 for line in examples)


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_of_the_group(option: str) -> None:
    """It names every command and says how to try it."""
    done = cli(option)
    assert (done.returncode, done.stderr) == (0, "")
    listed = [line.split()[0] for line in done.stdout.partition("Commands:")[2].splitlines() if line.strip()]
    assert listed == list(COMMANDS)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["Try", "it:", "etcdreplica", "demo"] in lines
    assert "\\b" not in done.stdout


def test_without_a_command_it_shows_the_help() -> None:
    """Nothing asked for: the help, no traceback."""
    done = cli()
    assert "Commands:" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_version() -> None:
    """It tells its version."""
    from etcdreplica import __version__

    done = cli("--version")
    assert done.returncode == 0
    assert __version__ in done.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("frobnicate",), "frobnicate"),
        (("list", "--frobnicate"), "--frobnicate"),
        (("status", "-o", "xml"), "xml"),
        (("describe",), "NAME"),
        (("remove",), "NAME"),
        (("bench", "frobnicate"), "frobnicate"),
        (("bench", "failover", "--trials", "0"), "trials"),
        (("bench", "failover", "--style", "lukewarm"), "lukewarm"),
        (("demo", "--style", "lukewarm"), "lukewarm"),
        (("node", "--capacity", "many"), "many"),
        (("dev", "--port", "many"), "many"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_a_wrong_command_line_exits_2(words: tuple[str, ...], named: str) -> None:
    """Unknown commands, options and values are named."""
    assert named in the_error(cli(*words), 2)
