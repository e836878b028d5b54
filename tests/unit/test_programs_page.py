"""docs/programs.md: its commands and files are ones that would be taken."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from etcdreplica.cli.appfile import KEYS, read_files, settings_of
from etcdreplica.cli.protect import protect_command, registration_from

PAGE = (Path(__file__).parents[2] / "docs" / "programs.md").read_text()
FILES = re.findall(r"^```toml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"^    etcdreplica (protect .*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("text", FILES, ids=lambda text: text.split("]")[0].strip("["))
def test_file(tmp_path: Path, text: str) -> None:
    """Each reads, and the one that has all keys shows their defaults."""
    (tmp_path / "app.toml").write_text(text)
    (registration,) = read_files([tmp_path / "app.toml"]).values()
    if "All keys" in PAGE.partition(text)[0][-200:]:
        stated = set(re.findall(r"^(\w+) = ", text, re.MULTILINE)) | {"env", "labels", "overrides"}
        decorated = {"decorated", "hang_timeout", "object", "min_in_sync", "durable"}
        assert stated - {"MALLOC_ARENA_MAX", "disk"} == set(KEYS) - decorated
        assert set(settings_of(registration)) == {"command", "style", "degree", "env", "labels", "overrides"}


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line.split()[2])
def test_command(line: str) -> None:
    """Each makes a registration."""
    name, *words = shlex.split(line)
    context = protect_command.make_context(name, words)
    assert registration_from(**context.params).name == context.params["name"]


def test_the_page_has_them() -> None:
    """The patterns above find what the page has."""
    assert (len(FILES), len(COMMANDS)) == (4, 4)
