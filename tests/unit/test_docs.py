"""What the pages of docs/ and README.md say of commands, against the commands; and the site that is made of them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from etcdreplica.cli import cli
from tests.pages import PAGES, ROOT, Shown, commands

SHOWN = [command for page in PAGES for command in commands(page)]


def of_etcdreplica(shown: Shown) -> Iterator[list[str]]:
    """Yield the arguments of each `etcdreplica` in a line of shell."""
    lexer = shlex.shlex(shown.text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("();<>|&"):
            if "etcdreplica" in words:
                yield words[words.index("etcdreplica") + 1 :]
            words = []
        else:
            words.append(word)


def parsed(words: list[str], *, whole: bool) -> None:
    """Parse as the command would, and do nothing. A mere mention need not have the arguments. Raises click.UsageError."""
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group):
        if not words or words[0].startswith("-") or words[0] == "COMMAND":
            return  # `etcdreplica --version`
        name, *words = words
        found = command.get_command(context, name)
        if found is None:
            raise click.UsageError(f"no command {name}")
        command = found
    if whole or words:
        with command.make_context(command.name, words):
            pass


def wrong_with(shown: Shown) -> list[str]:
    """Return what is wrong with the commands in a line."""
    found = []
    for words in of_etcdreplica(shown):
        try:
            parsed(words, whole=shown.whole)
        except click.exceptions.Exit:
            pass  # --help
        except click.UsageError as error:
            if not error.format_message().endswith("does not exist."):  # a file that only the reader has
                found.append(f"{shown}: {error.format_message()}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_and_option_in_the_pages_is_there(page: Path) -> None:
    """Commands, their options, values and the number of their arguments."""
    assert [error for shown in commands(page) for error in wrong_with(shown)] == []


@pytest.mark.parametrize("words", ["status --frobnicate", "frobnicate", "status -o toml", "describe"])
def test_a_wrong_command_in_a_page_would_be_found(words: str) -> None:
    """The check checks."""
    assert wrong_with(Shown("", 0, f"true && etcdreplica {words} > file", whole=True))


def test_every_target_and_script_in_the_pages_is_there() -> None:
    """Of `make`, and of `python` where a script of the repository is run."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {found for shown in SHOWN for found in re.findall(r"\bmake ([a-z]+)", shown.text)}
    assert named - targets == set()
    scripts = {found for shown in SHOWN for found in re.findall(r"(?:^|\s)((?:tests|docs)/\S+\.py)", shown.text)}
    assert [script for script in scripts if not (ROOT / script).exists()] == []


def test_every_test_that_the_pages_name_is_there() -> None:
    """A promise whose proof was renamed has none."""
    files: dict[str, str] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):  # two directories may have one of the same name
        files[path.name] = files.get(path.name, "") + path.read_text()
    text = "\n".join(page.read_text() for page in PAGES)
    assert {name for name in re.findall(r"\b(test_\w+\.py)\b", text) if name not in files} == set()
    for name, test in re.findall(r"\b(test_\w+\.py)::(test_\w+)", text):
        assert f"def {test}(" in files[name], f"{name} has no {test}"


def test_the_site_is_whole() -> None:
    """Every page is in the menu, and every link leads somewhere."""
    pytest.importorskip("zensical", reason="no zensical: pip install -e '.[docs]'")
    done = subprocess.run([sys.executable, ROOT / "docs/build.py"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
