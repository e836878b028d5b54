"""`scale`: another degree or style for an application, while it runs."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import click
from attrs import evolve

from etcdreplica.cli.asking import follow_view, registered, tell_who_leads
from etcdreplica.cli.completion import applications
from etcdreplica.cli.options import connection_options, output_option, wait_option, with_store
from etcdreplica.cli.texts import printed
from etcdreplica.errors import EtcdReplicaError, RefusedError
from etcdreplica.words import Style

if TYPE_CHECKING:
    from etcdreplica.core.view import AppView, ClusterView
    from etcdreplica.model import Registration
    from etcdreplica.store import Store


@click.command("scale", short_help="Change the degree or the style of an application.")
@connection_options
@click.option("--degree", type=int, help="Number of copies, the primary included.")
@click.option("--style", type=click.Choice([style.value for style in Style]), help="What backups do.")
@wait_option
@click.option("--timeout", type=click.FloatRange(0), default=60.0, show_default=True, help="Seconds to wait.")
@output_option
@click.argument("name", metavar="APP", shell_complete=applications)
def scale_command(
    degree: int | None, style: str | None, wait: bool, timeout: float, output: str, name: str, **options: Any
) -> None:
    """Change the degree or the style of an application while it runs. Its primary is not touched.

    Another degree starts or ends backups only; `checkpoint(wait=True)` waits for as many hosts from then on. Another style
    starts each backup anew on its host, one after the other: with degree 2 nobody can take over at once until that one is
    ready. A replicated object cannot change from or to hot, since its state is kept in another way there. The change lasts
    until the application is removed, or has completed and is registered anew.

    \b
    Examples:
      etcdreplica scale shop --degree 3
      etcdreplica scale shop --style warm
      etcdreplica scale shop --style cold --degree 2 --no-wait -o json
    """
    if degree is None and style is None:
        raise click.UsageError("say what to change: --degree or --style")
    wanted = Style(style) if style else None
    told = with_store(lambda store: rescale(store, name, degree, wanted, timeout if wait else None), **options)
    if printed(told, output):
        return
    if not told["changed"]:
        click.echo(f"{name} is {told['style']} with degree {told['degree']} already")
    else:
        click.echo(f"{name} {'is' if wait else 'will be'} {told['style']} with degree {told['degree']}")


async def rescale(store: Store, name: str, degree: int | None, style: Style | None, timeout: float | None) -> dict[str, Any]:
    """Change it, wait if there is a timeout, and return what came of it. Raises EtcdReplicaError."""
    async with contextlib.aclosing(follow_view(store)) as views:
        async for view in views:  # again when the registration has changed before ours was written
            app = registered(view, name)
            assert app.registration is not None
            old = app.registration
            new = evolve(old, degree=old.degree if degree is None else degree, style=style or old.style)
            told = {"application": name, "changed": new != old, "degree": new.degree, "style": str(new.style)}
            _check(view, app, old, new)
            revision = app.registration_revision if new == old else await _write(store, app, new)
            if revision:
                if timeout is not None:
                    await _wait(store, views, view, name, revision, timeout)
                return told
    raise AssertionError("following ends only by an error")


def _check(view: ClusterView, app: AppView, old: Registration, new: Registration) -> None:
    from etcdreplica.model import AssignmentState

    state = app.assignment.state if app.assignment else None
    if old.object and new.style is not old.style and Style.HOT in (old.style, new.style):
        raise RefusedError(f"{app.name} is a replicated object, whose state is kept in another way under {new.style}")
    if state in (AssignmentState.COMPLETED, AssignmentState.FAILED):
        raise RefusedError(f"{app.name} does not run: it is {state}; see 'etcdreplica status {app.name}'")
    if app.pause or view.pause:
        raise RefusedError(f"{app.name} is paused, so that nothing moves: first 'etcdreplica resume' it")


async def _write(store: Store, app: AppView, new: Registration) -> int:
    """Return the revision of the new registration, or 0 if it has changed."""
    from etcdreplica.store import Key, Kind, Put, Txn, Unchanged

    key = Key(Kind.REGISTRATIONS, (app.name,))
    result = await store.commit(Txn((Unchanged(key, app.registration_revision),), (Put(key, new),)))
    return result.revision if result.succeeded else 0


async def _wait(store: Store, views: Any, view: ClusterView, name: str, revision: int, timeout: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            while _missing(view, name, revision):
                view = await anext(views)
            return
    raise EtcdReplicaError(
        f"{name}: changed, but not carried out within {timeout:g} s: {_missing(view, name, revision)} "
        f"(of the managers, {await tell_who_leads(store)})"
    )


def _missing(view: ClusterView, name: str, revision: int) -> str:
    """Say what is not yet as the registration of this revision wants it."""
    from etcdreplica.core.moves import unready
    from etcdreplica.model import AssignmentState

    app = registered(view, name)
    assignment, registration = app.assignment, app.registration
    assert registration is not None
    if assignment is not None and assignment.state is AssignmentState.STOPPED:
        return ""
    if assignment is None or assignment.registration_revision < revision:
        return "no manager has taken it"
    if assignment.degraded or len(assignment.seats) != registration.degree:
        return assignment.reason or f"{len(assignment.seats)} of {registration.degree} copies"
    replicas = [(seat, app.replica(seat)) for seat in assignment.backups]
    late = [seat.host for seat, replica in replicas if replica is not None and replica.style is not registration.style]
    waits = [f"the copy on {host} has the old style" for host in late]
    return "; ".join((*waits, *filter(None, (unready(app, view, seat) for seat in assignment.backups))))
