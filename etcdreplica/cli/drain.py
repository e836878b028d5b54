"""`drain` and `undrain`: empty a host before somebody works on it, and take it into use again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

import click

from etcdreplica.cli.asking import follow_view, me, tell_who_leads
from etcdreplica.cli.completion import hosts
from etcdreplica.cli.options import connection_options, output_option, wait_option, with_store
from etcdreplica.cli.show import read_view
from etcdreplica.cli.texts import printed, table
from etcdreplica.errors import EtcdReplicaError, RefusedError

if TYPE_CHECKING:
    from etcdreplica.core.view import AppView, ClusterView
    from etcdreplica.model import Assignment
    from etcdreplica.store import Store

SAID_S = 1.0  # how often progress is said at most


@click.command("drain", short_help="Move everything away from a host.")
@connection_options
@click.option("--reason", default="", help="Why, for others to read.")
@click.option("--dry-run", is_flag=True, help="Only say what would happen.")
@wait_option
@click.option("--timeout", type=click.FloatRange(0), default=300.0, show_default=True, help="Seconds to wait.")
@output_option
@click.argument("host", shell_complete=hosts)
def drain_command(reason: str, dry_run: bool, wait: bool, timeout: float, output: str, host: str, **options: Any) -> None:
    """Give a host no new copy, and move those that it has: each is replaced elsewhere first, then it ends.

    A primary hands over to a backup that is ready, as by 'switchover'. No application has fewer copies meanwhile than before,
    as long as there are other hosts that can run it. What no other host can take stays, as a backup if possible. The host
    stays drained, also when it is started anew, until 'undrain'. To run this again goes on waiting.

    Progress is told on stderr. Exit code 1 if something is still there after the timeout; that is listed, with the reason.

    \b
    Examples:
      etcdreplica drain host-a --reason "new disks"
      etcdreplica drain host-a --dry-run
      etcdreplica drain host-a --timeout 60 -o json
    """
    if dry_run:
        plan = with_store(lambda store: _foresee(store, host), **options)
        if not printed({"host": host, "dry_run": True, "applications": plan}, output):
            heads = ["application", "role", "what would happen"]
            table(heads, [[row["name"], row["role"], row["what"]] for row in plan], empty=f"nothing is on {host}")
        return
    told = with_store(lambda store: _drain(store, host, reason, timeout if wait else None), **options)
    left, moved = told["left"], told["moved"]
    if printed(told, output):
        pass
    elif not left:
        click.echo(f"{host} is drained: nothing is on it ({moved} moved)")
    elif not wait:
        click.echo(f"{host} gets no new copy, and {len(left)} are to move: 'etcdreplica drain {host}' waits for them")
    if left and wait:
        text = f"{host} stays drained, but is not empty after {timeout:g} s: {moved} of {moved + len(left)} moved"
        text += f" (of the managers, {told['managers']})"
        raise EtcdReplicaError(text + "".join(f"\n  {name}: {why}" for name, why in left.items()))


@click.command("undrain", short_help="Take a drained host into use again.")
@connection_options
@output_option
@click.argument("host", shell_complete=hosts)
def undrain_command(output: str, host: str, **options: Any) -> None:
    """Let a host have copies again. What was moved away stays where it is; what is still there stays there.

    \b
    Examples:
      etcdreplica undrain host-a
      etcdreplica undrain host-a -o json
    """
    from etcdreplica.store import Delete, Exists, Key, Kind, Txn

    key = Key(Kind.DRAINS, (host,))

    async def undrain(store: Store) -> bool:
        return (await store.commit(Txn((Exists(key),), (Delete(key),)))).succeeded

    changed = with_store(undrain, **options)
    if not printed({"host": host, "changed": changed}, output):
        click.echo(f"{host} is drained no longer" if changed else f"{host} was not drained")


async def _drain(store: Store, host: str, reason: str, timeout: float | None) -> dict[str, Any]:
    """Write the drain, and wait if there is a timeout. Raises RefusedError for a host that nobody knows."""
    view, _ = await read_view(store)
    await _write(store, view, host, reason)
    left, most, said_at = _left(view, host), 0, 0.0
    if timeout is None:
        return {"host": host, "moved": 0, "left": dict.fromkeys(left, "not waited for"), "managers": ""}
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout), contextlib.aclosing(follow_view(store)) as views:
            async for view in views:
                if host not in view.drains:
                    raise EtcdReplicaError(f"somebody has undrained {host} meanwhile; {len(left)} are still there")
                left = _left(view, host)
                most = max(most, len(left))
                if not left or time.monotonic() >= said_at + SAID_S:
                    said_at = time.monotonic()
                    click.echo(f"{host}: {most - len(left)} of {most} moved" + _first_reasons(view, left, host), err=True)
                if not left:
                    break
    why = {name: _why_there(view, app, host) for name, app in left.items()}
    return {"host": host, "moved": most - len(left), "left": why, "managers": await tell_who_leads(store)}


async def _write(store: Store, view: ClusterView, host: str, reason: str) -> None:
    from etcdreplica.model import Drain
    from etcdreplica.store import Key, Kind, Put, Txn, Unchanged

    if host not in view.hosts and host not in view.drains and not _left(view, host):
        raise RefusedError(f"no host {host} (up are: {', '.join(sorted(view.hosts)) or 'none'})")
    key = Key(Kind.DRAINS, (host,))
    await store.commit(Txn((Unchanged(key, 0),), (Put(key, Drain(me(), reason, time.time())),)))  # else it is drained already


def _left(view: ClusterView, host: str) -> dict[str, AppView]:
    """Return the applications that have a seat there, or a copy that has not ended yet."""

    def is_there(app: AppView) -> bool:
        seats = app.assignment.seats if app.assignment else ()
        return host in app.replicas or any(seat.host == host for seat in seats)

    return {name: app for name, app in sorted(view.apps.items()) if is_there(app)}


def _why_there(view: ClusterView, app: AppView, host: str) -> str:
    from etcdreplica.core.moves import remains

    return remains(app, view, host)


def _first_reasons(view: ClusterView, left: dict[str, AppView], host: str) -> str:
    """Say of a few what they wait for."""
    some = [f"{name}: {_why_there(view, app, host)}" for name, app in list(left.items())[:3]]
    more = [f"and {len(left) - len(some)} more"] if len(left) > len(some) else []
    return f" ({'; '.join((*some, *more))})" if some else ""


async def _foresee(store: Store, host: str) -> list[dict[str, str]]:
    """Return what a manager would do first with each application of a host, by planning it."""
    from etcdreplica.core.plan import Memory, PlannerSettings
    from etcdreplica.core.planner import decide
    from etcdreplica.model import Drain

    view, _ = await read_view(store)
    if host not in view.hosts and not _left(view, host):
        raise RefusedError(f"no host {host} (up are: {', '.join(sorted(view.hosts)) or 'none'})")
    view.apply("drains", (host,), Drain(me()), 0, 0)
    rows = []
    for name, app in _left(view, host).items():
        before = app.assignment
        decision = decide(app, view, Memory(), 0.0, PlannerSettings())
        if decision.plan is not None and decision.plan.assignment is not None:
            view.expect(app, decision.plan.assignment)  # so that the next one knows who has what
        after = app.assignment
        if before is not None and after is not None:
            role = "primary" if before.primary and before.primary.host == host else "backup"
            rows.append({"name": name, "role": role, "what": _what(view, app, host, before, after)})
    return rows


def _what(view: ClusterView, app: AppView, host: str, before: Assignment, after: Assignment) -> str:
    new = [seat.host for seat in after.seats if seat.host not in {old.host for old in before.seats}]
    is_primary = before.primary is not None and before.primary.host == host
    if after.leaving is not None and is_primary:
        stays = "" if app.registration and len(after.seats) > app.registration.degree else "; a backup stays here"
        return f"hands over to {after.leaving.to}{stays}"
    if new:
        return f"{'hands over' if is_primary else 'ends'} when {', '.join(new)} has a copy"
    return f"stays: {_why_there(view, app, host)}" if host in app.seated_on else "ends"
