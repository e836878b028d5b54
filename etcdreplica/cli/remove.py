"""`remove`: end an application everywhere."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import click

from etcdreplica.cli.completion import applications
from etcdreplica.cli.options import connection_options, with_store
from etcdreplica.errors import EtcdReplicaError


@click.command("remove", short_help="End applications everywhere and forget them.")
@connection_options
@click.option("--no-wait", is_flag=True, help="Do not wait until the last copy has ended.")
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds to wait.")
@click.option("--missing-ok", is_flag=True, help="Do not complain about names that are not registered.")
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=applications)
def remove_command(no_wait: bool, timeout: float, missing_ok: bool, names: tuple[str, ...], **options: Any) -> None:
    """Ask every copy of the named applications to end, kill what does not, and forget the registrations.

    \b
    Examples:
      etcdreplica remove shop
      etcdreplica remove shop mailer --no-wait
    """
    from etcdreplica.store import Delete, Exists, Key, Kind, Store, Txn

    async def remove(store: Store) -> list[str]:
        missing = []
        for name in names:
            key, pause = Key(Kind.REGISTRATIONS, (name,)), Key(Kind.PAUSES, ("app", name))
            if not (await store.commit(Txn((Exists(key),), (Delete(key), Delete(pause))))).succeeded:
                missing.append(name)
        if not no_wait:
            await _wait_gone(store, [name for name in names if name not in missing], timeout)
        return missing

    missing = with_store(remove, **options)
    for name in names:
        if name not in missing:
            click.echo(f"{name} {'is being removed' if no_wait else 'has been removed'}")
    if missing and not missing_ok:
        raise EtcdReplicaError(f"not registered: {', '.join(missing)} (see 'etcdreplica list')")


async def _wait_gone(store: Any, names: list[str], timeout: float) -> None:
    from etcdreplica.store import Kind

    left: set[str] = set()
    try:
        async with asyncio.timeout(timeout), contextlib.aclosing(store.follow(Kind.ASSIGNMENTS)) as batches:
            async for batch in batches:
                for entry in batch.entries:
                    if entry.key.names[0] in names:
                        (left.discard if entry.value is None else left.add)(entry.key.names[0])
                if not left:
                    return
    except TimeoutError:
        raise EtcdReplicaError(
            f"{', '.join(sorted(left))}: unregistered, but not gone after {timeout:g} s: is a manager running "
            "(etcdreplica status), and can its hosts be reached?"
        ) from None
