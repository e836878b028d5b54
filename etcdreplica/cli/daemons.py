"""`node`, `watchdog`, `manager` and `dev`: the processes that run for long."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from etcdreplica.app.protocol import GUARDIAN_ENV
from etcdreplica.cli.options import CHECKPOINT_OPTIONS, daemon_store, host_options, manager_options, node_settings
from etcdreplica.errors import ConfigurationError

verbose_option = click.option("-v", "--verbose", is_flag=True, help="Log more.")


def _log(verbose: bool) -> None:
    level = logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("asyncio").setLevel(logging.WARNING)


@click.command("node", short_help="Run this host: WatchDog and manager.")
@host_options
@click.option("--no-manager", is_flag=True, help="This host is never ReplicaManager.")
@click.option("--no-checkpoints", is_flag=True, help="This host holds no checkpoints, and so no application that makes some.")
@verbose_option
def node_command(no_manager: bool, no_checkpoints: bool, verbose: bool, **options: Any) -> None:
    """Run this host's one daemon: the WatchDog, a CheckpointServer, and a manager that campaigns to be ReplicaManager.

    It runs in the foreground until SIGTERM or Ctrl-C, then hands over what it runs.

    \b
    Examples:
      etcdreplica node --etcd 10.0.0.1:2379,10.0.0.2:2379,10.0.0.3:2379
      etcdreplica node --host db-1 --label zone=a --capacity 20
    """
    settings = node_settings(**options)
    _be_guarded()
    from etcdreplica.daemon.guard import Guard
    from etcdreplica.daemon.node import Node
    from etcdreplica.daemon.service import serve

    _log(verbose)

    async def run() -> None:
        guard = await Guard.connect()
        async with daemon_store(settings, settings.state_dir) as store:
            given = {**options, "state_dir": settings.state_dir}
            manager = None if no_manager else _environment(given, _MANAGER_NAMES)
            checkpoints = None if no_checkpoints else {**_REUSE_MEMORY, **_environment(given, _CHECKPOINT_NAMES)}
            await Node(settings, store, guard, manager, checkpoints).run()

    serve(run())


@click.command("watchdog", short_help="Run only the WatchDog of this host.")
@host_options
@verbose_option
def watchdog_command(verbose: bool, **options: Any) -> None:
    """Run only the WatchDog of this host, without a manager beside it.

    \b
    Example:
      etcdreplica watchdog --host db-1 --etcd 10.0.0.1:2379
    """
    settings = node_settings(**options)
    _be_guarded()
    from etcdreplica.daemon.guard import Guard
    from etcdreplica.daemon.service import serve
    from etcdreplica.daemon.watchdog import WatchDog

    _log(verbose)

    async def run() -> None:
        guard = await Guard.connect()
        async with daemon_store(settings, settings.state_dir) as store:
            await WatchDog(settings, store, guard).run()

    serve(run())


@click.command("manager", short_help="Run only a candidate for ReplicaManager.")
@manager_options
@verbose_option
def manager_command(verbose: bool, **options: Any) -> None:
    """Run only a candidate for ReplicaManager and SuperWatchDog. Several may run; one leads.

    With --state-dir the next one here knows which etcd this one has worked with.

    \b
    Example:
      etcdreplica manager --etcd 10.0.0.1:2379
    """
    from etcdreplica.daemon.manager import Manager
    from etcdreplica.daemon.peers import PeerClient
    from etcdreplica.daemon.service import serve

    _log(verbose)
    settings = node_settings(**options)

    async def run() -> None:
        async with daemon_store(settings, options["state_dir"]) as store:
            await Manager(store, settings.host, settings.lease_ttl_s, peers=PeerClient(settings.peer_tls)).run()

    serve(run())


@click.command("checkpoint-server", short_help="Run only the CheckpointServer of this host.")
@host_options
@verbose_option
def checkpoint_server_command(verbose: bool, **options: Any) -> None:
    """Run only the CheckpointServer of this host: it stores checkpoints and exchanges them with its peers.

    The applications find it beside the WatchDog's socket, so both must be told the same --socket.

    \b
    Example:
      etcdreplica checkpoint-server --host db-1 --etcd 10.0.0.1:2379 --checkpoint-listen 10.0.0.4:7410 --insecure
    """
    from etcdreplica.app.kernel import set_precedence
    from etcdreplica.checkpoint.server import CheckpointServer
    from etcdreplica.daemon.service import serve

    _log(verbose)
    settings = node_settings(**options)
    set_precedence(0)  # it must not compete with the daemon that renews leases

    async def run() -> None:
        async with daemon_store(settings, settings.state_dir) as store:
            await CheckpointServer(settings, store).run()

    serve(run())


@click.command("dev", short_help="Run an etcd and a node on this laptop.")
@host_options
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=2379,
    show_default=True,
    help="Where the embedded etcd listens on loopback.",
)
@verbose_option
def dev_command(port: int, verbose: bool, **options: Any) -> None:
    """Run an embedded etcd and one node in one command, until Ctrl-C. For trying on a laptop, not for production.

    Then, in another terminal, run any program with @protected in it; Ctrl-C here ends everything.

    \b
    Examples:
      etcdreplica dev
      etcdreplica dev --port 12379      # then: export ETCDREPLICA_ETCD=127.0.0.1:12379
    """
    from etcdreplica.testing.etcd import EmbeddedEtcd
    from etcdreplica.testing.processes import run_bound

    options["etcd"] = f"127.0.0.1:{port}"
    settings = node_settings(**options)
    data = Path(settings.state_dir, "dev-etcd")
    with EmbeddedEtcd(port=port, data_dir=data) as etcd:
        click.echo(f"etcd listens on {etcd.endpoint}, its data are in {data}; this host is {settings.host}. Ctrl-C ends all.")
        raise SystemExit(run_bound([*_THIS, "node", *_without_port(sys.argv[2:]), "--etcd", etcd.endpoint]))


_THIS = (sys.executable, "-m", "etcdreplica")


def _without_port(arguments: list[str]) -> Iterator[str]:
    """Leave out what `node` does not know."""
    rest = iter(arguments)
    for argument in rest:
        if argument == "--port":
            next(rest)
        elif not argument.startswith("--port="):
            yield argument


def _be_guarded() -> None:
    """Become the guardian of this host, which runs this very command again as its WatchDog; then, go on."""
    if GUARDIAN_ENV not in os.environ:
        if os.getpid() == 1:
            raise ConfigurationError(
                "a node cannot be process 1 of a container, which no timer of the kernel could end in time: give the container "
                "an init (docker run --init; in a compose file init: true; in a pod shareProcessNamespace: true)"
            )
        guardian = (sys.executable, "-m", "etcdreplica.guardian", *_THIS, *sys.argv[1:])
        os.execv(guardian[0], guardian)  # noqa: S606


def _environment(options: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Tell a child by environment what this command was told by options."""
    given = {_VARIABLES.get(name, name.upper()): options[name] for name in names if options.get(name) not in (None, False)}
    variables = {f"ETCDREPLICA_{name}": str(value) for name, value in given.items()}
    return {**variables, "PYTHONUNBUFFERED": os.environ.get("PYTHONUNBUFFERED", "1")}


# For glibc: keep the memory of pieces of a state instead of having the kernel map and clear it for each of them.
_REUSE_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(8 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
_VARIABLES = {"lease_ttl_s": "LEASE_TTL", "socket_path": "SOCKET", "checkpoint_mib_s": "CHECKPOINT_BANDWIDTH"}
_MANAGER_NAMES = (
    *("etcd", "cluster", "etcd_ca", "etcd_cert", "etcd_key", "etcd_user", "host", "timing", "lease_ttl_s", "state_dir"),
    *("peer_ca", "peer_cert", "peer_key"),
)
_CHECKPOINT_NAMES = (*_MANAGER_NAMES, "address", "socket_path", "insecure", *CHECKPOINT_OPTIONS)
