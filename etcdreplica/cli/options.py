"""Options that several commands share. Each can also be given by environment."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from attrs import evolve

from etcdreplica.core.timing import PRESETS, preset
from etcdreplica.errors import StoreUnavailableError

if TYPE_CHECKING:
    from etcdreplica.daemon.settings import NodeSettings
    from etcdreplica.daemon.tls import PeerTls
    from etcdreplica.store import EtcdOptions, Store

CHECKPOINT_OPTIONS = ("checkpoint_listen", "checkpoint_keep", "checkpoint_mib_s")
PATIENCE_S = 3.0  # a person waits longer than a daemon does
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_CONNECTION = (
    click.option(
        "--etcd",
        envvar="ETCDREPLICA_ETCD",
        default="127.0.0.1:2379",
        show_default=True,
        metavar="HOST:PORT,...",
        help="Endpoints of etcd. [$ETCDREPLICA_ETCD]",
    ),
    click.option(
        "--cluster",
        envvar="ETCDREPLICA_CLUSTER",
        default="default",
        show_default=True,
        help="Name of the cluster; several may share one etcd. [$ETCDREPLICA_CLUSTER]",
    ),
    click.option("--etcd-ca", envvar="ETCDREPLICA_ETCD_CA", metavar="FILE", help="CA of etcd's certificate; turns TLS on."),
    click.option("--etcd-cert", envvar="ETCDREPLICA_ETCD_CERT", metavar="FILE", help="Client certificate."),
    click.option("--etcd-key", envvar="ETCDREPLICA_ETCD_KEY", metavar="FILE", help="Its key."),
    click.option(
        "--etcd-user",
        envvar="ETCDREPLICA_ETCD_USER",
        help="User of etcd; the password comes from $ETCDREPLICA_ETCD_PASSWORD.",
    ),
)
_TIMING = (
    click.option(
        "--timing",
        envvar="ETCDREPLICA_TIMING",
        type=click.Choice(list(PRESETS)),
        default="safe",
        show_default=True,
        help="How soon a host that is cut off counts as lost: after 5 s, 2 s (quiet network and disks) or 15 s (crowded "
        "hosts). [$ETCDREPLICA_TIMING]",
    ),
    click.option(
        "--lease-ttl",
        "lease_ttl_s",
        envvar="ETCDREPLICA_LEASE_TTL",
        type=float,
        help="That time in seconds. [default: as --timing says]",
    ),
)
_STATE_DIR = click.option(
    "--state-dir",
    envvar="ETCDREPLICA_STATE_DIR",
    type=click.Path(path_type=Path),
    help="Where state and logs go. [default: /var/lib/etcdreplica, or ~/.local/state/etcdreplica]",
)
_HOST = (
    click.option("--host", envvar="ETCDREPLICA_HOST", help="Name of this host. [default: its host name]"),
    click.option("--address", envvar="ETCDREPLICA_ADDRESS", help="Where other hosts reach it. [default: its host name]"),
    _STATE_DIR,
    click.option(
        "--socket",
        "socket_path",
        envvar="ETCDREPLICA_SOCKET",
        type=click.Path(path_type=Path),
        help="Where applications reach the WatchDog. [default: in /run/etcdreplica, or in $XDG_RUNTIME_DIR]",
    ),
    click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label of this host; may be repeated."),
    click.option("--capacity", type=int, default=100, show_default=True, help="How many replicas it may hold."),
    click.option(
        "--peer-listen",
        envvar="ETCDREPLICA_PEER_LISTEN",
        default="127.0.0.1:0",
        show_default=True,
        metavar="HOST:PORT",
        help='Where it answers other hosts\' probes (failover="fast"); port 0 takes any.',
    ),
    click.option(
        "--checkpoint-listen",
        envvar="ETCDREPLICA_CHECKPOINT_LISTEN",
        default="127.0.0.1:0",
        show_default=True,
        metavar="HOST:PORT",
        help="Where its CheckpointServer answers those of other hosts; port 0 takes any.",
    ),
    click.option(
        "--checkpoint-keep",
        envvar="ETCDREPLICA_CHECKPOINT_KEEP",
        type=int,
        default=3,
        show_default=True,
        help="How many checkpoints of each application stay on its disk.",
    ),
    click.option(
        "--checkpoint-bandwidth",
        "checkpoint_mib_s",
        envvar="ETCDREPLICA_CHECKPOINT_BANDWIDTH",
        type=float,
        default=0.0,
        metavar="MIB_S",
        help="At most so many MiB of checkpoints are sent in a second. [default: no limit]",
    ),
    click.option(
        "--insecure", envvar="ETCDREPLICA_INSECURE", is_flag=True, help="Let other hosts reach it at these without TLS."
    ),
)
_PEER_TLS = (
    click.option("--peer-ca", envvar="ETCDREPLICA_PEER_CA", metavar="FILE", help="CA of all hosts; turns TLS between them on."),
    click.option("--peer-cert", envvar="ETCDREPLICA_PEER_CERT", metavar="FILE", help="Certificate of this host."),
    click.option("--peer-key", envvar="ETCDREPLICA_PEER_KEY", metavar="FILE", help="Its key."),
)
wait_option = click.option("--wait/--no-wait", default=True, show_default=True, help="Wait until it is done.")
output_option = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True, help="How to print."
)


def _all(decorators: tuple[Callable[[F], F], ...]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def connection_options(function: F) -> F:
    """Add the options that say which etcd and which cluster."""
    return _all(_CONNECTION)(function)


def peer_options(function: F) -> F:
    """Add the options that reach the hosts themselves, the connection included."""
    return _all((*_CONNECTION, *_PEER_TLS))(function)


def host_options(function: F) -> F:
    """Add the options of a host's daemon, the connection included."""
    return _all((*_CONNECTION, *_HOST, *_PEER_TLS, *_TIMING))(function)


def manager_options(function: F) -> F:
    """Add the options of a candidate for ReplicaManager, the connection included."""
    return _all((*_CONNECTION, _HOST[0], _STATE_DIR, *_PEER_TLS, *_TIMING))(function)


def etcd_options(
    etcd: str, etcd_ca: str | None, etcd_cert: str | None, etcd_key: str | None, etcd_user: str | None, **_: Any
) -> EtcdOptions:
    """Build them from a command's parameters."""
    from etcdreplica.store import EtcdOptions

    return EtcdOptions(
        endpoints=tuple(part.strip() for part in etcd.split(",") if part.strip()),
        ca_file=etcd_ca,
        cert_file=etcd_cert,
        key_file=etcd_key,
        user=etcd_user,
        password=os.environ.get("ETCDREPLICA_ETCD_PASSWORD") if etcd_user else None,
    )


def peer_tls(peer_ca: str | None, peer_cert: str | None, peer_key: str | None, **_: Any) -> PeerTls:
    """Build it from a command's parameters. Raises ConfigurationError."""
    from etcdreplica.daemon.tls import PeerTls

    tls = PeerTls(peer_ca, peer_cert, peer_key)
    tls.check()
    return tls


def node_settings(labels: tuple[str, ...] = (), **options: Any) -> NodeSettings:
    """Build them from the parameters that the command has. Raises ConfigurationError or UsageError."""
    from etcdreplica.daemon.settings import NodeSettings

    timing = preset(options["timing"], options["lease_ttl_s"])
    pairs = [label.partition("=") for label in labels]
    for key, sign, _ in pairs:
        if not key or not sign:
            raise click.BadParameter(f"write it KEY=VALUE, not {key!r}", param_hint="--label")
    given = ("host", "address", "state_dir", "socket_path", "capacity", "cluster", "peer_listen", "insecure")
    return NodeSettings(
        etcd=evolve(etcd_options(**options), timeout_s=timing.timeout_s),
        timing=timing,
        labels={key: value for key, _, value in pairs},
        peer_tls=peer_tls(**options),
        **{name: options[name] for name in (*given, *CHECKPOINT_OPTIONS) if options.get(name) is not None},
    )


def daemon_store(settings: NodeSettings, state_dir: Path | None) -> Store:
    """Return the store of a daemon, which works with no other etcd than the one of before.

    Without a directory only this process remembers that.
    """
    from etcdreplica.store import Lineage, Store
    from etcdreplica.store.lineage import file_name

    lineage = Lineage(state_dir and state_dir / file_name(settings.cluster), settings.lease_ttl_s)
    return Store(settings.etcd, settings.cluster, lineage=lineage)


def with_store(work: Callable[[Store], Awaitable[T]], **options: Any) -> T:
    """Run `work` with a store, and fail fast with a clear message when etcd is not there."""
    from etcdreplica.store import Store

    logging.getLogger("etcdreplica").addHandler(logging.NullHandler())  # the error that comes of it says enough

    async def run() -> T:
        patient = evolve(etcd_options(**options), timeout_s=PATIENCE_S)
        async with Store(patient, options["cluster"]) as store:
            return await work(store)

    try:
        return asyncio.run(run())
    except StoreUnavailableError as error:
        raise StoreUnavailableError(
            f"{error} (tried {options['etcd']}): is it running, and is --etcd (or $ETCDREPLICA_ETCD) right? "
            "'etcdreplica dev' starts one on a laptop"
        ) from None
