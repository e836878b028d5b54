"""`explain`: why an application is where it is, and why nothing happens."""

from __future__ import annotations

from typing import Any

import click

from etcdreplica.cli.asking import registered
from etcdreplica.cli.completion import applications
from etcdreplica.cli.options import connection_options, output_option, with_store
from etcdreplica.cli.show import read_view
from etcdreplica.cli.texts import printed, table


@click.command("explain", short_help="Say why an application is where it is.")
@connection_options
@output_option
@click.argument("name", shell_complete=applications)
def explain_command(output: str, name: str, **options: Any) -> None:
    """Say why each copy of an application is where it is, why no other host has one, and what would happen if it failed now.

    \b
    primary, successor, backup   the host has a copy, and this is why, or what it lacks
    next                         the host would get the next copy
    spare                        it could have one, but comes later
    unfit, down                  it cannot have one

    The rules are those of the ReplicaManager. What only the manager that leads remembers, such as for how long it still waits,
    is not known here.

    \b
    Examples:
      etcdreplica explain shop
      etcdreplica explain shop -o json
    """
    from etcdreplica.core.explain import Explanation, explain
    from etcdreplica.store import Corrupt, Kind, Store

    async def read(store: Store) -> Explanation:
        view, _ = await read_view(store)
        app = registered(view, name)
        entries = (await store.list(Kind.HISTORY, name)).entries
        events = sorted((e.value for e in entries if not isinstance(e.value, Corrupt)), key=lambda event: event.wall)
        return explain(app, view, tuple(events))

    found = with_store(read, **options)
    hosts = [{"host": part.host, "part": part.part, "reason": part.reason} for part in found.hosts]
    if printed({"name": name, "reasons": list(found.reasons), "hosts": hosts}, output):
        return
    for reason in found.reasons:
        click.echo(f"{name}: {reason}")
    table(["host", "part", "reason"], [list(each.values()) for each in hosts], empty="there is nothing to say of hosts")
