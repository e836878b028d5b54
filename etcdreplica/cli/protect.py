"""`protect`: put any program under protection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from etcdreplica.cli.options import connection_options, output_option, with_store
from etcdreplica.errors import NoWatchDogError, ProtocolError, RefusedError, UsageError

if TYPE_CHECKING:
    from etcdreplica.model import Registration
    from etcdreplica.store import Store

ANSWER_S = 30.0  # a WatchDog that says nothing for so long beyond what it was given says nothing at all
_STRINGS = ("style", "keep", "failover", "cwd", "standby", "pre_start", "on_promote", "on_demote", "notify")
_NUMBERS = ("degree", "stop_timeout", "start_timeout", "restarts_here", "max_restarts", "restart_window", "hook_timeout")


@click.command("protect", context_settings={"allow_interspersed_args": False}, short_help="Protect any program.")
@connection_options
@click.option(
    "--socket", "socket_path", envvar="ETCDREPLICA_SOCKET", help="The WatchDog to register it with, if no --etcd is given."
)
@click.option("--name", required=True, help="Name of the application.")
@click.option("--style", help="cold (backups do not run) or warm; see below.  [default: cold]")
@click.option("--degree", type=int, help="Number of copies, the primary included.  [default: 2]")
@click.option(
    "--probe", "probes", multiple=True, metavar="PROBE", help="tcp:PORT, http://URL or exec:COMMAND; may be repeated."
)
@click.option("--host", "hosts", multiple=True, metavar="NAME", help="A host that may run it; may be repeated.  [default: any]")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="What a host's labels must contain.")
@click.option("--cwd", metavar="DIR", help="Where it runs.  [default: /]")
@click.option("--env", multiple=True, metavar="KEY=VALUE", help="Added to its environment; may be repeated.")
@click.option("--needs", multiple=True, metavar="FILE", help="A file that a host must have to run it; may be repeated.")
@click.option("--standby", metavar="COMMAND", help="Under warm: what runs on backups in the program's place.")
@click.option("--pre-start", metavar="COMMAND", help="Hook: before each start; if it fails, another host is tried.")
@click.option("--on-promote", metavar="COMMAND", help="Hook: the copy is to serve; if it fails, the copy has failed.")
@click.option("--on-demote", metavar="COMMAND", help="Hook: before a planned end of the primary.")
@click.option("--notify", metavar="COMMAND", help="Hook: after each change of role; it cannot hinder anything.")
@click.option("--hook-timeout", type=float, help="Seconds after which a hook is killed.  [default: 10]")
@click.option("--start-timeout", type=float, help="Seconds it may take to answer its probes.  [default: 60]")
@click.option("--stop-timeout", type=float, help="Seconds from SIGTERM to SIGKILL.  [default: 10]")
@click.option("--keep", help="always (started again when it exits with 0) or until-done.  [default: always]")
@click.option("--restarts-here", type=int, help="Restarts on the same host before another takes over.  [default: 0]")
@click.option("--max-restarts", type=int, help="Failures in the window before it is parked; 0: never.  [default: 10]")
@click.option("--restart-window", type=float, help="The window in seconds.  [default: 600]")
@click.option("--failover", help="When its host is lost: safe or fast.  [default: safe]")
@click.option("--failsafe", is_flag=True, help="It runs on while etcd is away and its backups' nodes vouch for it.")
@click.option("--wait", is_flag=True, help="Return when its primary runs.")
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds to wait for that.")
@output_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def protect_command(
    ctx: click.Context,
    /,
    name: str,
    socket_path: str | None,
    wait: bool,
    timeout: float,
    output: str,
    command: tuple[str, ...],
    **options: Any,
) -> None:
    """Register a program, as it is, as an application. Its hosts start it; this command returns.

    The program must stay in the foreground, and end on SIGTERM. It counts as running from its start, or, with probes, once
    all of them were answered well. Under style cold it runs on the primary's host. Under warm, either --standby runs on the
    backups and is ended before the program is started there; or the program itself runs on every host, and --on-promote makes
    one of them serve.

    Hooks are shell commands with ETCDREPLICA_ROLE, _EPOCH, _HOST and others in their environment: docs/programs.md lists them.
    It is registered with the WatchDog of this host, or straight in etcd with --etcd. The same again changes nothing; to change
    something use 'etcdreplica apply'.

    \b
    Examples:
      etcdreplica protect --name cache --probe tcp:6379 -- redis-server /etc/redis/redis.conf
      etcdreplica protect --name web --degree 3 --probe http://127.0.0.1/ --wait -- nginx -g 'daemon off;'
      etcdreplica protect --name web --cwd /srv/web --env PORT=8000 -- python3 server.py
    """
    registration = registration_from(name, command, **options)
    if ctx.get_parameter_source("etcd") is ParameterSource.DEFAULT:
        told = _by_watchdog(socket_path, registration, timeout if wait else None)
    else:
        told = _by_etcd(registration, timeout if wait else None, options)
    if output == "json":
        click.echo(json.dumps({"name": name, **told}, indent=2))
    elif told:
        click.echo(f"{name} is protected; its primary runs on {told['primary']}")
    else:
        click.echo(f"{name} is protected; its hosts start it. See: etcdreplica status {name}")


def registration_from(name: str, command: tuple[str, ...], **options: Any) -> Registration:
    """Return what the options say. Raises UsageError."""
    from etcdreplica.cli.appfile import registration_of

    settings: dict[str, Any] = {"command": list(command)}
    settings |= {key: options[key] for key in (*_STRINGS, *_NUMBERS) if options[key] is not None}
    settings |= {key: list(options[key]) for key in ("hosts", "probes", "needs") if options[key]}
    settings |= {key: _pairs(option, options[key]) for key, option in (("labels", "--label"), ("env", "--env")) if options[key]}
    settings |= {"failsafe": True} if options["failsafe"] else {}
    if options["cwd"] is None:
        _check_paths(command)
    return registration_of(name, settings)


def _pairs(option: str, given: tuple[str, ...]) -> dict[str, str]:
    pairs = [each.partition("=") for each in given]
    for key, sign, _ in pairs:
        if not key or not sign:
            raise click.BadParameter(f"write it KEY=VALUE, not {key!r}", param_hint=option)
    return {key: value for key, _, value in pairs}


def _check_paths(command: tuple[str, ...]) -> None:
    """Refuse what is found here and will not be found in /."""
    for number, word in enumerate(command):
        relative = not word.startswith("/") and ("/" in word or number > 0)
        if relative and Path(word).is_file():
            raise UsageError(f"{word} is a file here, but the program runs in /: write {Path(word).resolve()}, or give --cwd")


def _by_watchdog(path: str | None, registration: Registration, wait_s: float | None) -> dict[str, Any]:
    import msgspec

    from etcdreplica.app.link import Link
    from etcdreplica.app.protocol import VERSION, default_socket

    path = path or default_socket()
    try:
        link = Link(path)
    except NoWatchDogError:
        raise NoWatchDogError(
            f"no WatchDog listens on {path}: start one with 'etcdreplica node' (or 'etcdreplica dev' on a laptop), or say with "
            "--etcd where etcd is"
        ) from None
    try:
        more = {} if wait_s is None else {"wait": wait_s}
        link.send("hello", version=VERSION, adopt=False, registration=msgspec.to_builtins(registration), **more)
        answer = link.receive(ANSWER_S + (wait_s or 0.0))
    finally:
        link.close()
    if answer is None:
        raise NoWatchDogError("the WatchDog of this host does not answer: see 'etcdreplica status'")
    if answer["type"] == "error":
        raise RefusedError(answer["message"])
    if answer["type"] != "ok":
        raise ProtocolError(f"the WatchDog of this host answers {answer['type']!r}: is it of this version?")
    return {key: answer[key] for key in ("primary", "epoch") if key in answer}


def _by_etcd(registration: Registration, wait_s: float | None, options: dict[str, Any]) -> dict[str, Any]:
    from etcdreplica.daemon.registry import await_primary, register

    async def work(store: Store) -> dict[str, Any]:
        await register(store, registration, None)
        if wait_s is None:
            return {}
        host, epoch = await await_primary(store, registration.name, wait_s)
        return {"primary": host, "epoch": epoch}

    return with_store(work, **options)
