"""`accept-etcd`: go on with an etcd that is not the one of before."""

from __future__ import annotations

import getpass
import socket
from typing import Any

import click

from etcdreplica.cli.options import connection_options, with_store
from etcdreplica.errors import EtcdReplicaError


@click.command("accept-etcd", short_help="Go on with an etcd that was restored or is empty.")
@click.argument("lost")
@click.option("--force", is_flag=True, help="Although hosts work with it: those that have never seen the one before do.")
@connection_options
def accept_etcd_command(lost: str, force: bool, **options: Any) -> None:
    """Go on with an etcd that was restored from a backup, or is empty, after the one before is lost for good.

    Every host refuses an etcd that does not know all it was told; the error in the log of its node names LOST, the origin of
    the etcd before. Stop that one first, if any of it still runs. Every host goes on with this one after one lease TTL. What
    was registered, placed and acknowledged since the backup may be forgotten (etcdreplica list, etcdreplica checkpoints list).

    \b
    Example:
      etcdreplica accept-etcd 5f1d9c3a77e0b482 --etcd 10.0.0.1:2379
    """
    from etcdreplica.store import Key, Kind, Put, Store, Txn, accepted_origin

    cluster = options["cluster"]
    origin = accepted_origin(lost, f"{getpass.getuser()}@{socket.gethostname()}")

    async def accept(store: Store) -> None:
        hosts = [entry.key.names[0] for entry in (await store.list(Kind.HOSTS)).entries]
        if hosts and not force:
            raise EtcdReplicaError(
                f"hosts work with this etcd: {', '.join(sorted(hosts))}. If it was restored just now, they are of the backup: "
                "try again after one lease TTL. If they are new, and others refuse it, use --force"
            )
        await store.commit(Txn((), (Put(Key(Kind.ORIGIN, (cluster,)), origin),)))

    with_store(accept, **options)
    click.echo(f"accepted in place of {lost}: the hosts of cluster {cluster} go on with this etcd after one lease TTL")
