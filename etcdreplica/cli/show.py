"""`list`, `status` and `describe`: what is registered, and how it is."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import click

from etcdreplica.cli.completion import applications
from etcdreplica.cli.options import connection_options, output_option, watched, with_store
from etcdreplica.cli.texts import printed, size_text, table, when
from etcdreplica.errors import EtcdReplicaError

if TYPE_CHECKING:
    from etcdreplica.core.view import AppView, ClusterView
    from etcdreplica.store import Store


@click.command("list", short_help="Name the applications.")
@connection_options
@output_option
def list_command(output: str, **options: Any) -> None:
    """List the registered applications, one a line.

    \b
    Examples:
      etcdreplica list
      etcdreplica list -o json
    """
    picture = with_store(_picture, **options)
    if printed(picture["applications"], output):
        return
    table(
        ["name", "style", "degree", "state", "primary"],
        [[a["name"], a["style"], a["degree"], _state(a), a["primary"]] for a in picture["applications"]],
        empty="no application is registered",
    )
    _tell_pause(picture["pause"])
    for app in picture["applications"]:
        if app["pause"] or app["state"] in ("failed", "stopped"):
            _tell_reasons(app)


@click.command("status", short_help="Show applications, replicas, hosts and leaders.")
@connection_options
@output_option
@click.option("--watch", "-w", is_flag=True, help="Show it again and again, in place, until Ctrl-C.")
@click.option("--interval", type=click.FloatRange(0.1), default=2.0, show_default=True, help="Seconds from one to the next.")
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=applications)
def status_command(output: str, watch: bool, interval: float, names: tuple[str, ...], **options: Any) -> None:
    """Show how the named applications are, or all of them, with the hosts and the leaders.

    \b
    Examples:
      etcdreplica status
      etcdreplica status shop -o json
      etcdreplica status --watch --interval 0.5
    """

    def show(picture: dict[str, Any]) -> None:
        _tell_status(picture, output, names)

    if watch:
        watched(_picture, show, interval, **options)
    else:
        show(with_store(_picture, **options))


def _tell_status(picture: dict[str, Any], output: str, names: tuple[str, ...]) -> None:
    applications = picture["applications"] = _chosen(picture["applications"], names)
    if printed(picture, output):
        return
    rows = []
    for app in applications:
        first = [app["name"], app["style"], app["degree"], _state(app), app["epoch"]]
        for replica in app["replicas"] or [{}]:
            rows.append([*first, *(replica.get(key) for key in ("host", "role", "state", "pid", "endpoint"))])
            first = [None] * 5
    table(
        ["name", "style", "degree", "state", "epoch", "host", "role", "replica", "pid", "endpoint"],
        rows,
        empty="no application",
    )
    for app in applications:
        _tell_reasons(app)
        for host, error in app["refusals"].items():
            click.echo(f"{app['name']}: {host} cannot run it: {error}")
        for error in app["corrupt"]:
            click.echo(f"{app['name']}: {error}; left alone until it is mended or deleted with etcdctl")
        _tell_damage(app)
    _tell_pause(picture["pause"])
    if not names:
        click.echo()
        _tell_hosts(picture["hosts"])
        for role, holder in picture["leaders"].items():
            click.echo(f"leader of {role}: {holder or 'none'}")


def _tell_hosts(hosts: list[dict[str, Any]]) -> None:
    heads = ["host", "address", "replicas", "capacity", "labels", "version", "state"]
    rows = [[*(host[key] for key in ("name", *heads[1:-1])), _host_state(host)] for host in hosts]
    table(heads, rows, empty="no host is up")


@click.command("hosts", short_help="Show the hosts that are up.")
@connection_options
@output_option
def hosts_command(output: str, **options: Any) -> None:
    """Show the hosts that are up, how many replicas each has been given, and its labels.

    \b
    Examples:
      etcdreplica hosts
      etcdreplica hosts -o yaml
    """
    picture = with_store(_picture, **options)
    if not printed(picture["hosts"], output):
        _tell_hosts(picture["hosts"])


@click.command("leaders", short_help="Show which hosts lead.")
@connection_options
@output_option
def leaders_command(output: str, **options: Any) -> None:
    """Show which host's manager is ReplicaManager, and which is SuperWatchDog; no host if nobody leads just now.

    \b
    Examples:
      etcdreplica leaders
      etcdreplica leaders -o json
    """
    leaders = with_store(_picture, **options)["leaders"]
    if not printed(leaders, output):
        table(["role", "host"], [[role, host] for role, host in leaders.items()], empty="nobody")


@click.command("describe", short_help="Tell everything about one application.")
@connection_options
@output_option
@click.argument("name", shell_complete=applications)
def describe_command(output: str, name: str, **options: Any) -> None:
    """Tell everything about one application: how it is registered, where it runs, what has failed.

    \b
    Examples:
      etcdreplica describe shop
      etcdreplica describe shop -o json
    """

    async def read(store: Store) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        from etcdreplica.store import Corrupt, Kind

        picture = await _picture(store)
        history = await store.list(Kind.HISTORY, name)
        return picture, [_plain(entry.value) for entry in history.entries if not isinstance(entry.value, Corrupt)]

    picture, history = with_store(read, **options)
    app = {**_chosen(picture["applications"], (name,))[0], "history": sorted(history, key=lambda event: event["wall"])}
    if printed(app, output):
        return
    for key in ("name", "style", "degree", "state", "degraded", "paused", "reason", "epoch"):
        click.echo(f"{key + ':':<12}{app[key]}")
    for key in ("primary", "successor", "hosts", "labels"):
        click.echo(f"{key + ':':<12}{app[key]}")
    for pause in (app["pause"], picture["pause"]):
        if pause:
            click.echo(f"{'pause:':<12}{_pause_text(pause)}")
    click.echo(f"{'program:':<12}{' '.join(app['program']['argv'])}  (in {app['program']['cwd']})")
    click.echo(f"{'checkpoint:':<12}{_checkpoint_text(app['checkpoint'])}")
    if app["in_sync"] is not None:
        click.echo(f"{'in sync:':<12}{', '.join(app['in_sync']) or 'no copy'}")
    _tell_damage(app)
    keys = ["host", "role", "state", "epoch", "pid", "endpoint"]
    table(keys, [[replica.get(key) for key in keys] for replica in app["replicas"]], empty="no replica")
    for event in app["history"]:
        failure = event["failure"]
        click.echo(
            f"{when(event['wall'])}  {failure['host']} {failure['role']} {failure['kind']}: "
            f"{failure['reason']}; {event['action']}"
        )
        for line in failure["evidence"].splitlines():
            click.echo(f"    {line}")


async def read_view(store: Store) -> tuple[ClusterView, dict[str, str]]:
    """Read the whole cluster, and by role the host that leads."""
    from etcdreplica.core.view import ClusterView
    from etcdreplica.store import Corrupt, Kind

    snapshot = await store.list()
    view, leaders = ClusterView(), {"manager": "", "superwatchdog": ""}
    oldest: dict[str, int] = {}
    for entry in snapshot.entries:
        corrupt = isinstance(entry.value, Corrupt)
        if entry.key.kind is Kind.LEADERS and not corrupt:
            role = entry.key.names[0]
            if entry.create_revision < oldest.get(role, entry.create_revision + 1):
                oldest[role], leaders[role] = entry.create_revision, entry.value.host
        value, error = (None, entry.value.error) if corrupt else (entry.value, "")
        view.apply(entry.key.kind, entry.key.names, value, entry.mod_revision, entry.create_revision, error)
    return view, leaders


async def _picture(store: Store) -> dict[str, Any]:
    view, leaders = await read_view(store)
    return {
        "applications": [_application(view, app) for _, app in sorted(view.apps.items())],
        "hosts": [_host(view, name) for name in sorted({*view.hosts, *view.drains})],
        "leaders": leaders,
        "pause": _plain(view.pause) if view.pause else None,
    }


def _host(view: ClusterView, name: str) -> dict[str, Any]:
    """One that is up, or that is drained and may be up again."""
    known, drain = view.hosts.get(name), view.drains.get(name)
    record = _plain(known.host) if known else dict.fromkeys(("address", "capacity", "labels", "version"))
    own = {"replicas": view.seats[name], "up": known is not None, "drained": _plain(drain) if drain else None}
    return {"name": name, **record, **own}


def _host_state(host: dict[str, Any]) -> str:
    drained = f"drained {_pause_text(host['drained'])}" if host["drained"] else ""
    return ", ".join(filter(None, ("up" if host["up"] else "down", drained)))


def _application(view: ClusterView, app: AppView) -> dict[str, Any]:
    registration, assignment = app.registration, app.assignment
    program = _plain(registration.program) if registration else {"argv": [], "cwd": ""}
    program.pop("env", None)  # it may hold secrets
    paused = bool(app.pause or view.pause or (assignment and assignment.paused))
    return {
        "name": app.name,
        "style": registration.style if registration else None,
        "degree": registration.degree if registration else None,
        "hosts": list(registration.hosts) if registration else [],
        "labels": dict(registration.labels) if registration else {},
        "program": program,
        "state": "corrupt" if app.corrupt else assignment.state if assignment else "pending",
        "degraded": assignment.degraded if assignment else False,
        "paused": paused,
        "pause": _plain(app.pause) if app.pause else None,
        "reason": assignment.reason if assignment else f"waiting for {'the end of a pause' if paused else 'a ReplicaManager'}",
        "leaving": assignment.leaving.reason if assignment and assignment.leaving else None,
        "request": _plain(app.request) if app.request else None,
        "refusals": dict(assignment.refusals) if assignment else {},
        "corrupt": list(app.corrupt.values()),
        "epoch": assignment.epoch if assignment else None,
        "primary": assignment.primary.host if assignment and assignment.primary else None,
        "successor": assignment.successor if assignment else None,
        "replicas": _replicas(view, app),
        "checkpoint": _plain(app.own_checkpoint) if app.own_checkpoint else None,
        "in_sync": _in_sync(app),
        "damaged": damages(view, app.name),
    }


def _replicas(view: ClusterView, app: AppView) -> list[dict[str, Any]]:
    found = []
    for seat in app.assignment.seats if app.assignment else ():
        replica = app.replica(seat)
        role = "primary" if app.assignment and seat == app.assignment.primary else "backup"
        state = "awaited" if seat.host in view.hosts else "host down"
        shown = _plain(replica) if replica else {"state": state, "epoch": None, "pid": None, "endpoint": None}
        found.append({**shown, "host": seat.host, "role": role})
    return found


def _chosen(applications: list[dict[str, Any]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    known = {app["name"]: app for app in applications}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise no_application(unknown, known)
    return [known[name] for name in names] if names else applications


def no_application(unknown: Iterable[str], known: Collection[str]) -> EtcdReplicaError:
    """Return what to raise for names that are not registered."""
    there = f"registered are: {', '.join(known)}" if known else "none is registered"
    return EtcdReplicaError(f"no application {', '.join(unknown)} ({there})")


def damages(view: ClusterView, app: str) -> dict[str, str]:
    """Return, by host, which checkpoint of an application was found damaged last, and how."""
    return {host: server.damaged[app] for host, server in sorted(view.servers.items()) if app in server.damaged}


def _plain(record: Any) -> dict[str, Any]:
    import msgspec

    plain: dict[str, Any] = msgspec.to_builtins(record)
    return plain


def _state(app: dict[str, Any]) -> str:
    return ", ".join([app["state"], *(word for word in ("degraded", "paused") if app[word])])


def _tell_reasons(app: dict[str, Any]) -> None:
    if app["reason"]:
        click.echo(f"{app['name']}: {app['reason']}")
    if app["leaving"]:
        click.echo(f"{app['name']}: its primary on {app['primary']} is ending: {app['leaving']}")
    if app["state"] == "stopped":
        click.echo(f"{app['name']}: until 'etcdreplica resume {app['name']}'")
    if app["state"] == "failed":
        click.echo(f"{app['name']}: parked until 'etcdreplica resume {app['name']}'")
    if app["pause"]:
        click.echo(f"{app['name']}: paused {_pause_text(app['pause'])}")


def _tell_damage(app: dict[str, Any]) -> None:
    for host, what in app["damaged"].items():
        click.echo(f"{app['name']}: warning: {host} has found a checkpoint damaged, {what}")


def _checkpoint_text(checkpoint: dict[str, Any] | None) -> str:
    if checkpoint is None:
        return "none"
    stamp, size = f"{checkpoint['epoch']}.{checkpoint['sequence']}", size_text(checkpoint["size"])
    return f"{stamp}, {size}, of {when(checkpoint['wall'])}, on {', '.join(checkpoint['holders']) or 'no host'}"


def _tell_pause(pause: dict[str, Any] | None) -> None:
    if pause:
        click.echo(f"the whole cluster is paused {_pause_text(pause)}")


def _pause_text(pause: dict[str, Any]) -> str:
    since = f" since {when(pause['wall'])}" if pause["wall"] else ""
    return f"by {pause['by']}{since}" + (f": {pause['reason']}" if pause["reason"] else "")


def _in_sync(app: AppView) -> list[str] | None:
    """Return the hosts of the copies of an object that have all there is, the primary's first; None for what is no object."""
    if app.own_in_sync is None or app.assignment is None:
        return None
    members = {member.incarnation for member in app.own_in_sync.members}
    return [seat.host for seat in app.assignment.seats if seat.incarnation in members]
