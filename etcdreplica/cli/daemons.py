"""`node`, `watchdog`, `manager` and `dev`: the processes that run for long."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import click

from etcdreplica.app.protocol import GUARDIAN_ENV
from etcdreplica.cli.config_file import CONFIG_ENV, NO_FILE
from etcdreplica.cli.options import daemon_store, host_options, manager_options, node_settings
from etcdreplica.cli.settings import CONNECTION, HOST, HOST_NAME, NODE, PEER_TLS, STATE_DIR, TIMING, VERBOSE, Setting, add
from etcdreplica.errors import ConfigurationError

verbose_option = add(VERBOSE)


def _log(verbose: bool) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger().setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


@click.command("node", short_help="Run this host: WatchDog and manager.")
@host_options
@add(*NODE)
@verbose_option
def node_command(**given: Any) -> None:
    """Run this host's one daemon: the WatchDog, a CheckpointServer, and a manager that campaigns to be ReplicaManager.

    It runs in the foreground until SIGTERM or Ctrl-C, then hands over what it runs. SIGHUP has it read the configuration file
    again, and is how it is brought to a new version; what it runs goes on.

    \b
    Examples:
      etcdreplica node --etcd 10.0.0.1:2379,10.0.0.2:2379,10.0.0.3:2379
      etcdreplica node --config /etc/etcdreplica/etcdreplica.toml
      etcdreplica node --host db-1 --label zone=a --capacity 20
    """
    _be_guarded(given)
    from etcdreplica.cli.reload import in_force
    from etcdreplica.daemon.guard import Guard
    from etcdreplica.daemon.node import Node
    from etcdreplica.daemon.service import serve

    _log(given["verbose"])

    async def run() -> None:
        guard = await Guard.connect()
        options = await in_force(guard, given)
        _log(options["verbose"])
        settings = node_settings(**options)
        async with daemon_store(settings, settings.state_dir) as store:
            manager = None if options["no_manager"] else _environment(options, _MANAGER)
            checkpoints = None if options["no_checkpoints"] else {**_REUSE_MEMORY, **_environment(options, _CHECKPOINTS)}
            await Node(settings, store, guard, manager, checkpoints).run()

    serve(run())


@click.command("watchdog", short_help="Run only the WatchDog of this host.")
@host_options
@verbose_option
def watchdog_command(**given: Any) -> None:
    """Run only the WatchDog of this host, without a manager beside it.

    \b
    Example:
      etcdreplica watchdog --host db-1 --etcd 10.0.0.1:2379
    """
    _be_guarded(given)
    from etcdreplica.cli.reload import in_force
    from etcdreplica.daemon.guard import Guard
    from etcdreplica.daemon.service import serve
    from etcdreplica.daemon.watchdog import WatchDog

    _log(given["verbose"])

    async def run() -> None:
        guard = await Guard.connect()
        options = await in_force(guard, given)
        _log(options["verbose"])
        settings = node_settings(**options)
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


def _be_guarded(options: dict[str, Any]) -> None:
    """Become the guardian of this host, which runs this very command again as its WatchDog; then, go on."""
    if GUARDIAN_ENV not in os.environ:
        if os.getpid() == 1:
            raise ConfigurationError(
                "a node cannot be process 1 of a container, which no timer of the kernel could end in time: give the container "
                "an init (docker run --init; in a compose file init: true; in a pod shareProcessNamespace: true)"
            )
        node_settings(**options)  # raises what is wrong with them while nothing runs yet
        guardian = (sys.executable, "-m", "etcdreplica.guardian", *_THIS, *sys.argv[1:])
        os.execv(guardian[0], guardian)  # noqa: S606


def _environment(options: dict[str, Any], settings: Sequence[Setting]) -> dict[str, str]:
    """Tell a child by environment what this command was told, so that it reads no file of its own."""
    given = {setting.variable: options[setting.key] for setting in settings}
    variables = {name: str(value) for name, value in given.items() if value not in (None, False)}
    files = [Path(options[setting.key]).read_bytes() for setting in settings if setting.is_file and options[setting.key]]
    if files:  # so that a child is replaced when one of its files was
        variables["ETCDREPLICA_FILES"] = sha256(b"".join(files)).hexdigest()
    return {**variables, CONFIG_ENV: NO_FILE, "PYTHONUNBUFFERED": os.environ.get("PYTHONUNBUFFERED", "1")}


# For glibc: keep the memory of pieces of a state instead of having the kernel map and clear it for each of them.
_REUSE_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(8 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
_MANAGER = (*CONNECTION, HOST_NAME, STATE_DIR, *PEER_TLS, *TIMING)
_OF_THE_WATCHDOG = ("label", "capacity", "peer-listen")  # and of none of its children
_CHECKPOINTS = (*CONNECTION, *(s for s in HOST if s.name not in _OF_THE_WATCHDOG), *PEER_TLS, *TIMING)
