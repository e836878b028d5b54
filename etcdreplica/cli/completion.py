"""Completion in shells: the script that a shell reads, and names from the cluster for arguments that take one.

A shell runs the command anew for each press of TAB, and shows whatever it prints. So a name is looked up within a moment, and
anything that is wrong only means that there is nothing to offer.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any

import click

from etcdreplica.cli.settings import CONNECTION

if TYPE_CHECKING:
    from etcdreplica.store import Kind, Store

WITHIN_S = 0.5
SHELLS = ("bash", "zsh", "fish")


@click.command("completion", short_help="Print the script that completes commands in a shell.")
@click.argument("shell", type=click.Choice(SHELLS))
def completion_command(shell: str) -> None:
    """Print a script for a shell to read: then TAB completes commands, options, and names of applications and hosts.

    \b
    Examples:
      etcdreplica completion bash > /etc/bash_completion.d/etcdreplica
      etcdreplica completion zsh > "${fpath[1]}/_etcdreplica"
      etcdreplica completion fish > ~/.config/fish/completions/etcdreplica.fish
    """
    from click.shell_completion import get_completion_class

    kind, root = get_completion_class(shell), click.get_current_context().find_root().command
    assert kind is not None
    made = kind(root, {}, "etcdreplica", "_ETCDREPLICA_COMPLETE")
    click.echo(made.source_template % made.source_vars())  # `source` would ask which version of bash is here


def applications(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Return the registered applications that begin like this, but for those that are named already."""
    from etcdreplica.store import Kind

    named = ctx.params.get("names") or ()
    return [name for name in _names(ctx, Kind.REGISTRATIONS, incomplete) if name not in named]


def hosts(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Return the hosts that are up and begin like this."""
    from etcdreplica.store import Kind

    return _names(ctx, Kind.HOSTS, incomplete)


def _names(ctx: click.Context, kind: Kind, incomplete: str) -> list[str]:
    import asyncio

    logging.disable()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with contextlib.suppress(Exception), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # noqa: PTH123
        found = asyncio.run(_read(_connection(ctx), kind))
        return sorted(name for name in found if name.startswith(incomplete))
    return []


async def _read(options: dict[str, Any], kind: Kind) -> list[str]:
    import asyncio

    from attrs import evolve

    from etcdreplica.cli.options import etcd_options
    from etcdreplica.store import Store

    store: Store
    async with (
        asyncio.timeout(WITHIN_S),
        Store(evolve(etcd_options(**options), timeout_s=WITHIN_S), options["cluster"]) as store,
    ):
        return [entry.key.names[0] for entry in (await store.list(kind)).entries]


def _connection(ctx: click.Context) -> dict[str, Any]:
    """Return the settings of the connection; click does not fill in defaults while it completes."""
    found = {}
    for setting in CONNECTION:
        value = ctx.params.get(setting.key)
        for other in (os.environ.get(setting.variable), (ctx.default_map or {}).get(setting.key), setting.default):
            value = other if value is None else value
        found[setting.key] = value
    return found
