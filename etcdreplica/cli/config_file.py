"""The configuration file: one flat TOML table whose keys are the names of `cli.settings`.

Its values become the defaults of a command's options, so that click lets the environment and flags win over them.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from attrs import Factory, frozen

from etcdreplica.app.protocol import GUARDIAN_ENV
from etcdreplica.cli.settings import SETTINGS, Setting
from etcdreplica.errors import ConfigurationError

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_FILE = Path("/etc/etcdreplica/etcdreplica.toml")
NO_FILE = os.devnull  # for a child that was told all of it
CONFIG_ENV = "ETCDREPLICA_CONFIG"
_META = "etcdreplica.config"


@frozen
class ConfigFile:
    """What a file says, by parameter of commands. `problem`: why it cannot be used."""

    path: Path | None = None
    values: dict[str, Any] = Factory(dict)
    problem: str = ""


def read_file(path: Path) -> dict[str, Any]:
    """Return its values by parameter of commands. Raises ConfigurationError, which names the file and the key."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read the configuration file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}: not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: not TOML: {error}") from None
    known = {setting.name: setting for setting in SETTINGS}
    for key in data:
        if key not in known:
            nearest = difflib.get_close_matches(key.replace("_", "-"), known, n=1, cutoff=0.0)[0]
            raise ConfigurationError(
                f"{path}: unknown key {key!r}: the nearest one there is is {nearest!r} ('etcdreplica config show' has all)"
            )
    return {known[key].key: _value(path, known[key], value) for key, value in data.items()}


def _value(path: Path, setting: Setting, value: Any) -> Any:
    """Check one value as a flag would be, but for its type, which the file has already."""

    def wrong(wanted: str) -> ConfigurationError:
        return ConfigurationError(f"{path}: {setting.name} = {value!r}: {wanted}")

    if setting.is_pairs:
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise wrong(f'must be a table of texts, as {setting.name} = {{ zone = "a" }}')
        return tuple(f"{key}={text}" for key, text in value.items())
    if setting.listed and isinstance(value, list) and all(isinstance(text, str) for text in value):
        value = ",".join(value)
    types: tuple[type, ...] = {float: (int, float), Path: (str,)}.get(setting.type, (setting.type,))
    if not isinstance(value, types) or (isinstance(value, bool) and setting.type is not bool):
        names = {str: "a text", Path: "a text", int: "a whole number", float: "a number", bool: "true or false"}
        raise wrong(f"must be {names[setting.type]}")
    if setting.is_path:
        value = str(path.absolute().parent / str(value))  # what is relative is so to the file
    try:
        return setting.click_type.convert(value, None, None)
    except click.BadParameter as error:
        raise wrong(error.message) from None


def config_option(function: F) -> F:
    """Add --config, which is looked at before all other options."""
    return click.option(
        "--config",
        envvar=CONFIG_ENV,
        show_envvar=True,
        type=click.Path(path_type=Path),
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=take_file,
        help=f"Where other settings are read from. [default: {DEFAULT_FILE}, if it is there]",
    )(function)


def take_file(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Let a file give the defaults of a command. Raises ConfigurationError, except where an earlier process may go on."""
    if path is None and isinstance(parameter, click.Option) and DEFAULT_FILE.exists():
        path = DEFAULT_FILE
    if path is None or _META in ctx.meta:
        return
    try:
        found = ConfigFile(path, read_file(path))
    except ConfigurationError as error:
        if GUARDIAN_ENV not in os.environ and not ctx.resilient_parsing:
            raise
        found = ConfigFile(path, problem=str(error))
    ctx.meta[_META] = found
    ctx.default_map = found.values


def config_file() -> ConfigFile:
    """Return what the present command has read."""
    found = click.get_current_context().meta.get(_META)
    return found if isinstance(found, ConfigFile) else ConfigFile()
