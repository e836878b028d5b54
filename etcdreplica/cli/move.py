"""`switchover` and `failover`: have another copy become primary."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import click

from etcdreplica.cli.asking import follow_view, me, registered, tell_who_leads
from etcdreplica.cli.completion import applications, hosts
from etcdreplica.cli.options import connection_options, output_option, wait_option, with_store
from etcdreplica.cli.texts import printed
from etcdreplica.errors import EtcdReplicaError, RefusedError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from etcdreplica.core.view import AppView, ClusterView
    from etcdreplica.model import Ask, Request
    from etcdreplica.store import Store

MARGIN_S = 30.0  # beside the stop timeout of the application
LEAST_S = 5.0  # for so long a request stands at least when nobody takes it back

to_option = click.option(
    "--to", metavar="HOST", shell_complete=hosts, help="Which backup is to follow. [default: the best one]"
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Only say what would happen.")
timeout_option = click.option(
    "--timeout", type=click.FloatRange(0), help="Seconds to wait. [default: the application's stop timeout and 30]"
)


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed((connection_options, to_option, dry_run_option, wait_option, timeout_option, output_option)):
        function = option(function)
    return click.argument("name", metavar="APP", shell_complete=applications)(function)


@click.command("switchover", short_help="Have a backup become primary, in order.")
@_options
def switchover_command(
    name: str, to: str | None, dry_run: bool, wait: bool, timeout: float | None, output: str, **options: Any
) -> None:
    """Ask the primary of an application to end; once it has, a backup that is ready takes over.

    The old primary sees `replica.stopping` and may store a last checkpoint; what does not end within its stop timeout is
    killed. Its host then gets a backup again. Under style cold the program is started on the new host after that. If HOST is
    primary already, nothing is done. What no manager has begun within the timeout is taken back.

    \b
    Examples:
      etcdreplica switchover shop
      etcdreplica switchover shop --to host-b --dry-run
      etcdreplica switchover shop --to host-b --timeout 120 -o json
    """
    from etcdreplica.model import Ask

    told = with_store(lambda store: Change(store, Ask.SWITCHOVER, name, to).make(dry_run, wait, timeout), **options)
    _tell(told, output)


@click.command("failover", short_help="Kill the primary and have a backup follow.")
@_options
def failover_command(
    name: str, to: str | None, dry_run: bool, wait: bool, timeout: float | None, output: str, **options: Any
) -> None:
    """Kill the primary of an application that works badly, and have a backup that is ready take over.

    The same as 'switchover', but that the old primary is not asked: what it has not stored is lost. It does not count as a
    failure. Also for a switchover that takes too long.

    \b
    Examples:
      etcdreplica failover shop
      etcdreplica failover shop --to host-b --dry-run
    """
    from etcdreplica.model import Ask

    told = with_store(lambda store: Change(store, Ask.FAILOVER, name, to).make(dry_run, wait, timeout), **options)
    _tell(told, output)


def _tell(told: dict[str, Any], output: str) -> None:
    if printed(told, output):
        return
    name, before, to = told["application"], told["from"], told["to"]
    if not told["changed"] and before == to:
        click.echo(f"{name}: {to} is primary already")
    elif told["dry_run"]:
        how = "is killed" if told["asked"] == "failover" else "is asked to end"
        click.echo(f"{name}: {before} {how}, then {to} takes over; nothing was changed")
    elif told["epoch"] is None:
        click.echo(f"{name}: {to} will take over from {before}")
    else:
        click.echo(f"{name}: {to} is primary now, after {before} (epoch {told['epoch']}, {told['seconds']:.2f} s)")


class Change:
    """One change of primary that a person asks for."""

    def __init__(self, store: Store, ask: Ask, name: str, to: str | None) -> None:
        self._store = store
        self._ask = ask
        self._name = name
        self._to = to
        self._revision: int | None = None  # of the request, once it is written
        self._lease = 0
        self._timeout = MARGIN_S

    async def make(self, dry_run: bool, wait: bool, timeout: float | None) -> dict[str, Any]:
        """Ask, wait, and return what came of it. Raises EtcdReplicaError."""
        async with contextlib.aclosing(follow_view(self._store)) as views:
            async for view in views:  # again when something has changed before the request was written
                app = registered(view, self._name)
                assert app.registration is not None
                self._timeout = app.registration.end_timeout_s + MARGIN_S if timeout is None else timeout
                told = self._plan(app, view)
                if dry_run or told["from"] == told["to"]:
                    return {**told, "dry_run": dry_run}
                request = self._under_way(app) or await self._request(app)
                if request is not None:
                    return {**told, **(await self._wait(views, request) if wait else {"changed": True})}
        raise AssertionError("following ends only by an error")

    def _plan(self, app: AppView, view: ClusterView) -> dict[str, Any]:
        """Say what would be done. Raises RefusedError."""
        from etcdreplica.core.moves import heirs, obstacle

        assignment = app.assignment
        primary = assignment.primary if assignment else None
        told: dict[str, Any] = {"application": self._name, "asked": str(self._ask), "from": primary.host if primary else None}
        told |= {"to": self._to, "changed": False, "dry_run": False, "epoch": None, "seconds": None}
        if primary is not None and primary.host == self._to and not (assignment and assignment.leaving):
            return told
        if (leaving := self._under_way(app)) is not None:
            return {**told, "to": leaving.to}
        if why := obstacle(app, view, self._ask, self._to):
            raise RefusedError(f"no {self._ask} of {self._name}: {why}")
        assert assignment is not None
        able = heirs(app, view, [seat for seat in assignment.backups if self._to in (None, seat.host)])
        return {**told, "to": able[0].host}

    def _under_way(self, app: AppView) -> Request | None:
        """Return what is being done already, if it is what is asked for."""
        from etcdreplica.model import Ask, Request

        assignment = app.assignment
        if assignment is None or assignment.primary is None or assignment.leaving is None or self._ask is Ask.FAILOVER:
            return None
        to = assignment.leaving.to
        return Request(self._ask, "", assignment.primary.incarnation, to) if to and self._to in (None, to) else None

    async def _request(self, app: AppView) -> Request | None:
        """Write the request, unless something has changed; it ends with its lease if nobody takes it up or back."""
        from etcdreplica.model import Request
        from etcdreplica.store import Exists, Key, Kind, Put, Txn, Unchanged

        assert app.assignment is not None
        assert app.assignment.primary is not None
        request = Request(self._ask, me(), app.assignment.primary.incarnation, self._to, time.time())
        lease = await self._store.leases.grant(max(LEAST_S, self._timeout))
        self._store.leases.drop(lease)
        self._lease = lease.id
        key = Key(Kind.REQUESTS, (self._name,))
        conditions = (
            Exists(Key(Kind.REGISTRATIONS, (self._name,))),
            Unchanged(key, app.request_revision),
            Unchanged(Key(Kind.ASSIGNMENTS, (self._name,)), app.assignment_revision),
        )
        result = await self._store.commit(Txn(conditions, (Put(key, request, lease.id),)))
        if not result.succeeded:
            await self._store.leases.revoke_id(lease.id)
            return None
        self._revision = result.revision
        return request

    async def _wait(self, views: AsyncGenerator[ClusterView, None], request: Request) -> dict[str, Any]:
        began, last = time.monotonic(), ""
        try:
            async with asyncio.timeout(self._timeout):
                async for view in views:
                    epoch, last = self._outcome(view, request)
                    if epoch is not None:
                        return {"changed": True, "to": last, "epoch": epoch, "seconds": round(time.monotonic() - began, 3)}
            raise AssertionError("following ends only by an error")
        except TimeoutError:
            raise await self._late(last) from None
        finally:
            with contextlib.suppress(StoreError):  # then it ends by itself
                await self._take_back()

    def _outcome(self, view: ClusterView, request: Request) -> tuple[int | None, str]:
        """Return the epoch and host of the new primary, or None and what is being waited for. Raises EtcdReplicaError."""
        from etcdreplica.model import AssignmentState, ReplicaState

        app = registered(view, self._name)
        assignment, primary = app.assignment, app.assignment.primary if app.assignment else None
        if assignment is None or (primary is None and assignment.state is not AssignmentState.PENDING):
            raise EtcdReplicaError(f"{self._name} is {assignment.state if assignment else 'gone'} now, by what came between")
        if primary is None or primary.incarnation != request.primary:
            replica = app.replica(primary) if primary else None
            if primary is None or replica is None or replica.state is not ReplicaState.RUNNING:
                return None, f"{primary.host if primary else 'the next one'} is not running yet"
            if self._to not in (None, primary.host):
                raise EtcdReplicaError(f"{self._to} could not take over: {primary.host} is primary of {self._name} now")
            return assignment.epoch, primary.host
        if assignment.leaving is not None:
            return None, f"the old primary on {primary.host} has not ended yet"
        written = self._revision
        if written is None or app.request_revision > written or (app.request is None and view.revision > written):
            raise EtcdReplicaError(
                f"{self._name}: the request was taken back, or nobody has begun it in time; nothing was changed"
            )
        return None, "no manager has begun it"

    async def _late(self, last: str) -> EtcdReplicaError:
        """Take the request back, and say how far it has come."""
        what = f"{self._ask} of {self._name}: not done within {self._timeout:g} s: {last}"
        if await self._take_back():
            return EtcdReplicaError(f"{what} ({await tell_who_leads(self._store)}); it was taken back, and nothing was changed")
        return EtcdReplicaError(f"{what}; it goes on: see 'etcdreplica status {self._name}'")

    async def _take_back(self) -> bool:
        """End what is left of the request; return whether nobody had begun it."""
        from etcdreplica.store import Delete, Key, Kind, Txn, Unchanged

        if self._revision is None:
            return False
        key = Key(Kind.REQUESTS, (self._name,))
        result = await self._store.commit(Txn((Unchanged(key, self._revision),), (Delete(key),)))
        self._revision = None
        await self._store.leases.revoke_id(self._lease)
        return result.succeeded
