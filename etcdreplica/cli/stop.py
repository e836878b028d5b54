"""`stop`: keep applications registered, with none of their copies running, until `resume`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

import click

from etcdreplica.cli.asking import follow_view, me, registered, tell_who_leads
from etcdreplica.cli.completion import applications
from etcdreplica.cli.options import connection_options, output_option, wait_option, with_store
from etcdreplica.cli.texts import printed
from etcdreplica.errors import EtcdReplicaError, RefusedError

if TYPE_CHECKING:
    from etcdreplica.core.view import AppView, ClusterView
    from etcdreplica.store import Store


@click.command("stop", short_help="End all copies of applications until 'resume'.")
@connection_options
@click.option("--discard-state", is_flag=True, help="Also stop a replicated object whose state is in memory only.")
@wait_option
@click.option("--timeout", type=click.FloatRange(0), default=60.0, show_default=True, help="Seconds to wait.")
@output_option
@click.argument("names", metavar="APP...", nargs=-1, required=True, shell_complete=applications)
def stop_command(discard_state: bool, wait: bool, timeout: float, output: str, names: tuple[str, ...], **options: Any) -> None:
    """End every copy of the named applications, which stay registered: 'resume' starts them again.

    First the primary is asked to end; it may store a last checkpoint. Then the backups end. Checkpoints stay where they are,
    and the next primary finds the last one. What does not end within its stop timeout is killed.

    \b
    Examples:
      etcdreplica stop shop
      etcdreplica stop shop mailer --timeout 120 -o json
      etcdreplica resume shop
    """
    names = tuple(dict.fromkeys(names))
    states = with_store(lambda store: _stop(store, names, discard_state, timeout if wait else None), **options)
    if printed({"applications": states}, output):
        return
    for name, state in states.items():
        click.echo(f"{name} {'is' if state != 'stopping' else 'will be'} {'stopped' if state == 'stopping' else state}")


async def _stop(store: Store, names: tuple[str, ...], discard_state: bool, timeout: float | None) -> dict[str, str]:
    """Return how each is by then. Raises RefusedError, with nothing changed, or EtcdReplicaError."""
    async with contextlib.aclosing(follow_view(store)) as views:
        view = await anext(views)
        apps = [registered(view, name) for name in names]
        if refused := [f"{app.name}: {why}" for app in apps if (why := _obstacle(view, app, discard_state))]:
            raise RefusedError("nothing was stopped: " + "; ".join(refused))
        for app in apps:
            await _write(store, app)
        if timeout is None:
            return {app.name: _state(view, app.name) or "stopping" for app in apps}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while any(_state(view, name) is None for name in names):
                    view = await anext(views)
                return {name: _state(view, name) or "" for name in names}
        left = [name for name in names if _state(view, name) is None]
    raise EtcdReplicaError(
        f"{', '.join(left)}: not stopped within {timeout:g} s (of the managers, {await tell_who_leads(store)}); it goes on: "
        "see 'etcdreplica status'"
    )


def _obstacle(view: ClusterView, app: AppView, discard_state: bool) -> str:
    registration = app.registration
    assert registration is not None
    if _state(view, app.name) is not None:
        return ""
    if app.pause or view.pause:
        return "it is paused, so that nothing moves: first 'etcdreplica resume' it"
    if registration.object and registration.style == "hot" and not registration.durable and not discard_state:
        return "its state is in the memory of its copies only, and would be lost: --discard-state if that is meant"
    return ""


async def _write(store: Store, app: AppView) -> None:
    """Ask for it, unless nothing of it runs or is to run."""
    from etcdreplica.model import Ask, AssignmentState, Request
    from etcdreplica.store import Exists, Key, Kind, Put, Txn

    if app.assignment is not None and app.assignment.state in (AssignmentState.COMPLETED, AssignmentState.FAILED):
        return
    if app.request is not None and app.request.ask is Ask.STOP:
        return
    request = Put(Key(Kind.REQUESTS, (app.name,)), Request(Ask.STOP, me(), wall=time.time()))
    if not (await store.commit(Txn((Exists(Key(Kind.REGISTRATIONS, (app.name,))),), (request,)))).succeeded:
        raise EtcdReplicaError(f"{app.name} has just been removed")


def _state(view: ClusterView, name: str) -> str | None:
    """Return in which state nothing of it runs, if so."""
    from etcdreplica.core.failsafe import in_doubt
    from etcdreplica.model import AssignmentState

    ended = (AssignmentState.STOPPED, AssignmentState.COMPLETED, AssignmentState.FAILED)
    app = view.apps.get(name)
    if app is None or app.registration is None:
        return "removed"
    found = app.assignment
    runs = app.replicas or in_doubt(app, view) is not None
    return str(found.state) if found is not None and found.state in ended and not runs else None
