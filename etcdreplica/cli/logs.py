"""`logs`: what copies have printed, from any host."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from etcdreplica.cli.checkpoints import registered, with_peers
from etcdreplica.cli.completion import applications, hosts
from etcdreplica.cli.options import peer_options
from etcdreplica.cli.show import read_view
from etcdreplica.errors import EtcdReplicaError, RefusedError

if TYPE_CHECKING:
    from etcdreplica.checkpoint.peers import Peers
    from etcdreplica.core.view import AppView, ClusterView
    from etcdreplica.store import Store


@click.command("logs", short_help="Print what copies have printed, from any host.")
@peer_options
@click.option("--host", shell_complete=hosts, help="Of the copies on this host. [default: that of the primary]")
@click.option(
    "--tail", type=click.IntRange(0, 100_000), default=100, show_default=True, help="Begin so many lines before the end."
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is printed from now on, until Ctrl-C.")
@click.argument("name", shell_complete=applications)
def logs_command(host: str | None, tail: int, follow: bool, name: str, **options: Any) -> None:
    """Print the output of the copies that a host's node has started, standard output and standard error, the newest last.

    A copy that was started by hand prints where it was started. The output of a copy stays when it ends; more than 10 MiB are
    put aside when the next one starts, and what is aside then is gone. It comes from the CheckpointServer of the host.

    \b
    Examples:
      etcdreplica logs shop
      etcdreplica logs shop --host db-2 --tail 20 --follow
    """

    async def work(store: Store, peers: Peers) -> None:
        view = (await read_view(store))[0] if host else (await registered(store, name))[0]
        chosen = host or _host_of(view.app(name))
        address = _server(view, chosen, name)
        try:
            async for data in peers.log(chosen, address, name, tail, follow=follow):
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
        except RefusedError as error:
            raise EtcdReplicaError(
                f"{error}: its node has started no copy there, and one that was started by hand prints where it was started; "
                "--host names another host"
            ) from None

    with_peers(work, options)


def _host_of(app: AppView) -> str:
    seats = app.assignment.seats if app.assignment else ()
    if not seats:
        raise EtcdReplicaError(f"{app.name} runs nowhere now: name the host whose output you want with --host")
    return seats[0].host


def _server(view: ClusterView, host: str, name: str) -> str:
    if host in view.servers:
        return view.servers[host].address
    if host in view.hosts:
        raise EtcdReplicaError(f"{host} has no CheckpointServer just now: read logs/{name}.log in its state directory there")
    raise EtcdReplicaError(f"no host {host} is up (up are: {', '.join(sorted(view.hosts)) or 'none'})")
