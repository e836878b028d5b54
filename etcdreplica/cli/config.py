"""`config`: what the settings are, where they come from, and whether a file may be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from etcdreplica.cli.config_file import config_file, take_file
from etcdreplica.cli.options import host_options, node_settings, output_option
from etcdreplica.cli.settings import NODE, SETTINGS, VERBOSE, Setting, add
from etcdreplica.cli.texts import printed, table


@click.group("config", short_help="Show and check the settings.")
def config_command() -> None:
    """Show where each setting comes from, and check a configuration file before a node reads it.

    \b
    Examples:
      etcdreplica config show
      etcdreplica config check /etc/etcdreplica/etcdreplica.toml
    """


@config_command.command("show", short_help="Show every setting, its value and where that comes from.")
@host_options
@add(*NODE, VERBOSE)
@output_option
def show_command(output: str, **options: Any) -> None:
    """Show every setting that a node started here and now would have, and where it comes from.

    A node that runs already has taken what can be taken at its last SIGHUP.

    \b
    Examples:
      etcdreplica config show
      etcdreplica config show --config new.toml -o json
    """
    found = node_settings(**options)
    found_out = {name: getattr(found, name) for name in ("host", "address", "state_dir", "socket_path", "lease_ttl_s")}
    values = {s.key: options[s.key] if options[s.key] is not None else found_out.get(s.key) for s in SETTINGS}
    shown = [{"name": s.name, "value": _plain(s, values[s.key]), "from": _source(s)} for s in SETTINGS]
    if printed(shown, output):
        return
    table(["setting", "value", "from"], [[each["name"], _text(each["value"]), each["from"]] for each in shown], empty="")


@config_command.command("check", short_help="Check a configuration file.")
@host_options
@add(*NODE, VERBOSE)
@click.argument("file", required=False, type=click.Path(path_type=Path), is_eager=True, expose_value=False, callback=take_file)
def check_command(**options: Any) -> None:
    """Check FILE, or the one that would be read, as a node does: its keys, its values, and whether they fit together.

    The environment and flags count, as they do for a node. The exit code is 2 if something is wrong.

    \b
    Examples:
      etcdreplica config check
      etcdreplica config check new.toml
    """
    node_settings(**options)
    path = config_file().path
    click.echo(
        f"{path}: nothing is wrong with it" if path else "there is no configuration file; nothing is wrong with the rest"
    )


def _source(setting: Setting) -> str:
    source = click.get_current_context().get_parameter_source(setting.key)
    if source is ParameterSource.COMMANDLINE:
        return f"--{setting.name}"
    if source is ParameterSource.ENVIRONMENT:
        return f"${setting.variable}"
    return str(config_file().path) if source is ParameterSource.DEFAULT_MAP else "default"


def _plain(setting: Setting, value: Any) -> Any:
    if setting.is_pairs:
        return dict(pair.partition("=")[::2] for pair in value)
    return str(value) if isinstance(value, Path) else value


def _text(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value
