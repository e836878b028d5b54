"""Options that several commands share. Each can also be given by environment."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from attrs import evolve

from etcdreplica.cli.config_file import config_option
from etcdreplica.cli.settings import CHECKPOINTS, CONNECTION, HOST, HOST_NAME, PEER_TLS, STATE_DIR, TIMING, add
from etcdreplica.core.timing import preset
from etcdreplica.errors import StoreUnavailableError

if TYPE_CHECKING:
    from etcdreplica.daemon.settings import NodeSettings
    from etcdreplica.daemon.tls import PeerTls
    from etcdreplica.store import EtcdOptions, Store

PATIENCE_S = 3.0  # a person waits longer than a daemon does
_QUIET = logging.NullHandler()
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

wait_option = click.option("--wait/--no-wait", default=True, show_default=True, help="Wait until it is done.")
output_option = click.option(
    "-o", "--output", type=click.Choice(["table", "json", "yaml"]), default="table", show_default=True, help="How to print."
)


def connection_options(function: F) -> F:
    """Add the options that say which etcd and which cluster."""
    return config_option(add(*CONNECTION)(function))


def peer_options(function: F) -> F:
    """Add the options that reach the hosts themselves, the connection included."""
    return config_option(add(*CONNECTION, *PEER_TLS)(function))


def host_options(function: F) -> F:
    """Add the options of a host's daemon, the connection included."""
    return config_option(add(*CONNECTION, *HOST, *PEER_TLS, *TIMING)(function))


def manager_options(function: F) -> F:
    """Add the options of a candidate for ReplicaManager, the connection included."""
    return config_option(add(*CONNECTION, HOST_NAME, STATE_DIR, *PEER_TLS, *TIMING)(function))


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
    from etcdreplica.daemon.tls import check_files

    check_files(options["etcd_ca"], options["etcd_cert"], options["etcd_key"])
    timing = preset(options["timing"], options["lease_ttl_s"])
    pairs = [label.partition("=") for label in labels]
    for key, sign, _ in pairs:
        if not key or not sign:
            raise click.BadParameter(f"write it KEY=VALUE, not {key!r}", param_hint="--label")
    given = ["host", "address", "state_dir", "socket_path", "capacity", "cluster", "peer_listen", "insecure"]
    given += [setting.key for setting in CHECKPOINTS]
    return NodeSettings(
        etcd=evolve(etcd_options(**options), timeout_s=timing.timeout_s),
        timing=timing,
        labels={key: value for key, _, value in pairs},
        peer_tls=peer_tls(**options),
        **{name: options[name] for name in given if options.get(name) is not None},
    )


def daemon_store(settings: NodeSettings, state_dir: Path | None) -> Store:
    """Return the store of a daemon, which works with no other etcd than the one of before.

    Without a directory only this process remembers that.
    """
    from etcdreplica.store import Lineage, Store
    from etcdreplica.store.lineage import file_name

    lineage = Lineage(state_dir and state_dir / file_name(settings.cluster), settings.lease_ttl_s)
    return Store(settings.etcd, settings.cluster, lineage=lineage)


def watched(read: Callable[[Store], Awaitable[T]], show: Callable[[T], None], interval_s: float, **options: Any) -> None:
    """Read and show again and again, in place on a terminal, until interrupted. It goes on when etcd is away for a time."""
    while True:
        text = io.StringIO()
        try:
            with contextlib.redirect_stdout(text):
                show(with_store(read, **options))
        except StoreUnavailableError as error:
            click.echo(f"Error: {error}", file=text)
        click.echo(("\x1b[H\x1b[J" if sys.stdout.isatty() else "") + text.getvalue(), nl=False)
        time.sleep(interval_s)


def with_store(work: Callable[[Store], Awaitable[T]], **options: Any) -> T:
    """Run `work` with a store, and fail fast with a clear message when etcd is not there."""
    from etcdreplica.store import Store

    logging.getLogger("etcdreplica").addHandler(_QUIET)  # the error that comes of it says enough

    async def run() -> T:
        patient = evolve(etcd_options(**options), timeout_s=PATIENCE_S)
        async with Store(patient, options["cluster"]) as store:
            return await work(store)

    try:
        return asyncio.run(run())
    except StoreUnavailableError as error:
        raise StoreUnavailableError(
            f"{error} (tried {options['etcd']}): is it running, and is --etcd right (or $ETCDREPLICA_ETCD, or the file)? "
            "'etcdreplica dev' starts one on a laptop"
        ) from None
