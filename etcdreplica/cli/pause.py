"""`pause` and `resume`: keep applications as they are while somebody works on what is below them, and let them go on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

import click

from etcdreplica.cli.asking import me, tell_who_leads
from etcdreplica.cli.completion import applications
from etcdreplica.cli.options import connection_options, output_option, with_store
from etcdreplica.cli.show import read_view
from etcdreplica.cli.texts import printed
from etcdreplica.errors import EtcdReplicaError

if TYPE_CHECKING:
    from etcdreplica.core.view import AppView
    from etcdreplica.model import Pause
    from etcdreplica.store import Key, Store

all_option = click.option("--all", "everything", is_flag=True, help="The whole cluster.")
names_argument = click.argument("names", metavar="NAME...", nargs=-1, shell_complete=applications)


@click.command("pause", short_help="Keep applications as they are: no fail-over, no placing.")
@connection_options
@all_option
@click.option("--reason", default="", help="Why, for others to read.")
@click.option("--no-wait", is_flag=True, help="Do not wait until the manager has taken it.")
@click.option("--timeout", type=float, default=10.0, show_default=True, help="Seconds to wait.")
@output_option
@names_argument
def pause_command(
    everything: bool, reason: str, no_wait: bool, timeout: float, output: str, names: tuple[str, ...], **options: Any
) -> None:
    """Have the named applications, or the whole cluster, left as they are: what fails meanwhile is dealt with on resume.

    Copies that run go on. A copy whose lease cannot be renewed still ends itself, and 'remove' still works. With --all
    applications that are registered meanwhile wait too.

    \b
    Examples:
      etcdreplica pause shop mailer --reason "moving the database"
      etcdreplica pause --all --reason "upgrade of etcd" --timeout 30
    """
    from etcdreplica.model import Pause

    names = _check(names, everything)
    record = Pause(me(), reason, time.time())

    async def pause(store: Store) -> tuple[list[str], set[str]]:
        missing = await _write_pauses(store, record, None if everything else names)
        written = set(names) - set(missing)
        late = set() if no_wait else await _not_taken(store, None if everything else written, timeout)
        if late:
            await _tell_late(store, late, timeout, " ".join(["--all"] if everything else sorted(written)))
        return missing, written

    missing, written = with_store(pause, **options)
    done = [name for name in names if name in written]
    told = {"cluster": everything, "applications": done, "by": record.by, "reason": reason, "taken": not no_wait}
    if not printed(told, output):
        for what in ["the whole cluster"] if everything else done:
            click.echo(f"{what} {'will be' if no_wait else 'is'} paused")
    if missing:
        raise EtcdReplicaError(f"not registered: {', '.join(missing)} (see 'etcdreplica list')")


async def _write_pauses(store: Store, record: Pause, names: tuple[str, ...] | None) -> list[str]:
    """Return the names that are not registered."""
    from etcdreplica.store import Exists, Key, Kind, Put, Txn

    if names is None:
        await store.commit(Txn((), (Put(_cluster_key(store), record),)))
        return []
    missing = []
    for name in names:
        registered = Exists(Key(Kind.REGISTRATIONS, (name,)))
        if not (await store.commit(Txn((registered,), (Put(Key(Kind.PAUSES, ("app", name)), record),)))).succeeded:
            missing.append(name)
    return missing


async def _not_taken(store: Store, names: set[str] | None, timeout: float) -> set[str]:
    """Wait until the assignments say so, and return the names of those that do not. One that does not exist cannot come."""
    from etcdreplica.model import Assignment, AssignmentState
    from etcdreplica.store import Kind, Snapshot

    waiting: set[str] = set()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout), contextlib.aclosing(store.follow(Kind.ASSIGNMENTS)) as batches:
            async for batch in batches:
                if isinstance(batch, Snapshot):
                    waiting.clear()
                for entry in batch.entries:
                    name, found = entry.key.names[0], entry.value
                    if names is None or name in names:
                        open_ = isinstance(found, Assignment) and not found.paused
                        open_ = open_ and found.state is not AssignmentState.REMOVING
                        (waiting.add if open_ else waiting.discard)(name)
                if not waiting:
                    return waiting
    return waiting


async def _tell_late(store: Store, late: set[str], timeout: float, again: str) -> None:
    who = await tell_who_leads(store)
    raise EtcdReplicaError(
        f"{', '.join(sorted(late))}: the pause is written, but no manager has taken it within {timeout:g} s ({who}); "
        f"until one has, a named successor may still take over. 'etcdreplica resume {again}' takes it back"
    )


@click.command("resume", short_help="End a pause; start again what is parked or stopped.")
@connection_options
@all_option
@output_option
@names_argument
def resume_command(everything: bool, output: str, names: tuple[str, ...], **options: Any) -> None:
    """End the pause of the named applications; start them again if they were stopped, or parked as failed.

    With --all end the pause of the cluster and of every application, and start all again that are parked. What was stopped by
    'etcdreplica stop' stays so then: name it.

    \b
    Examples:
      etcdreplica resume shop
      etcdreplica resume --all
    """
    names = _check(names, everything)

    async def resume(store: Store) -> dict[str, Any]:
        view, _ = await read_view(store)
        apps = {name: app for name, app in view.apps.items() if app.registration or app.corrupt or app.pause}
        told: dict[str, Any] = {"cluster_paused": view.pause is not None and not everything}
        told |= {
            "resumed": [],
            "restarted": [],
            "started": [],
            "unchanged": [],
            "missing": [name for name in names if name not in apps],
        }
        for name in apps if everything else [name for name in names if name in apps]:
            told[await _resume(store, apps[name], everything)].append(name)
        if everything:
            await _lift(store, _cluster_key(store))
        return told

    told = with_store(resume, **options)
    missing = told.pop("missing")
    if not printed(told, output):
        _tell_resumed(told, everything)
    if missing:
        raise EtcdReplicaError(f"not registered: {', '.join(missing)} (see 'etcdreplica list')")


def _tell_resumed(told: dict[str, Any], everything: bool) -> None:
    if everything:
        click.echo("the cluster is not paused")
    for word, text in (
        ("resumed", "goes on"),
        ("restarted", "was parked and is started again"),
        ("started", "was stopped and is started again"),
    ):
        for name in told[word]:
            click.echo(f"{name} {text}")
    for name in [] if everything else told["unchanged"]:
        click.echo(f"{name} was neither paused nor parked nor stopped")
    if told["cluster_paused"]:
        click.echo("the whole cluster is paused still: 'etcdreplica resume --all' ends that")


async def _resume(store: Store, app: AppView, everything: bool) -> str:
    """Return what it came to: "resumed", "restarted", "started" or "unchanged"."""
    from etcdreplica.model import Ask, AssignmentState
    from etcdreplica.store import Delete, Key, Kind, Put, Txn, Unchanged

    pause, key = Key(Kind.PAUSES, ("app", app.name)), Key(Kind.REGISTRATIONS, (app.name,))
    parked = app.assignment is not None and app.assignment.state is AssignmentState.FAILED
    current = app.assignment is not None and app.assignment.registration_revision == app.registration_revision
    if parked and current and app.registration:
        same = Unchanged(key, app.registration_revision)
        if (await store.commit(Txn((same,), (Delete(pause), Put(key, app.registration))))).succeeded:
            return "restarted"
        raise EtcdReplicaError(f"somebody has just changed the registration of {app.name}: see 'etcdreplica status {app.name}'")
    if app.request is not None and app.request.ask is Ask.STOP and not everything:
        request = Key(Kind.REQUESTS, (app.name,))
        await store.commit(Txn((Unchanged(request, app.request_revision),), (Delete(request), Delete(pause))))
        return "started"
    return "resumed" if await _lift(store, pause) else "unchanged"


async def _lift(store: Store, key: Key) -> bool:
    """Delete a pause; return whether there was one."""
    from etcdreplica.store import Delete, Exists, Txn

    return (await store.commit(Txn((Exists(key),), (Delete(key),)))).succeeded


def _cluster_key(store: Store) -> Key:
    from etcdreplica.store import Key, Kind

    return Key(Kind.PAUSES, ("cluster", store.keys.cluster))


def _check(names: tuple[str, ...], everything: bool) -> tuple[str, ...]:
    if bool(names) == everything:
        raise click.UsageError("name applications, or say --all" + (", not both" if names else ""))
    return tuple(dict.fromkeys(names))
