"""Which settings a WatchDog works with that comes after another one on the same guardian: after SIGHUP, a crash or an upgrade.

The guardian remembers what the one before worked with. What cannot be changed while copies run stays, and if what is new is
wrong all of it stays: no file may take a running node down.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import click
import msgspec

from etcdreplica.cli.config_file import config_file
from etcdreplica.cli.options import node_settings
from etcdreplica.cli.settings import CONNECTION, SETTINGS
from etcdreplica.daemon.guard import Guard
from etcdreplica.daemon.memo import SESSION
from etcdreplica.daemon.memo import SETTINGS as WARD
from etcdreplica.errors import ConfigurationError, EtcdReplicaError, UsageError
from etcdreplica.store import Key, Kind, Store

log = logging.getLogger(__name__)

REACH = 0.1  # of a lease TTL: no lease is renewed meanwhile


async def in_force(guard: Guard, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings to work with, by parameter, and have them remembered. Raises UsageError if there are none before."""
    problem = config_file().problem
    kept = guard.wards.pop(WARD, None)
    if kept is not None:
        before = _revived(kept.memo, given)
        options = await _where_known(guard, before, reloaded(before, given, problem))
    elif problem:
        raise ConfigurationError(problem)
    else:
        options = _found_out(given)
    guard.keep(WARD, msgspec.to_builtins(options, enc_hook=str))
    return options


def reloaded(before: dict[str, Any], given: dict[str, Any], problem: str = "") -> dict[str, Any]:
    """Return what is given, as far as it may replace what was before, or all of what was before if it is wrong."""
    try:
        if problem:
            raise ConfigurationError(problem)
        found = _found_out(given)
        fixed = {s.key: before[s.key] for s in SETTINGS if not s.reload and s.key in before}
        options = {**found, **fixed}
        node_settings(**options)
    except (UsageError, click.UsageError) as error:
        text = error.format_message() if isinstance(error, click.UsageError) else str(error)
        log.error("the new configuration is wrong: %s; going on with the settings of before", text)
        return before
    for setting in SETTINGS:
        was, wanted = (settings.get(setting.key) for settings in (before, found))
        if was == wanted:
            continue
        if setting.reload:
            log.info("%s: %s is now %s", setting.name, was, wanted)
        else:
            log.warning("%s stays %s: it becomes %s when the node is started anew", setting.name, was, wanted)
    return options


async def _where_known(guard: Guard, before: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with those of etcd as before, unless the new ones lead to where this stay of the host is known."""
    connection = {s.key: before[s.key] for s in CONNECTION}
    session = guard.wards.get(SESSION)
    if session is None or connection.items() <= options.items():
        return options
    problem, settings = "does not know this host", node_settings(**options)
    within_s = REACH * settings.lease_ttl_s
    try:
        async with asyncio.timeout(within_s), Store(settings.etcd, options["cluster"]) as store:
            entry = await store.get(Key(Kind.HOSTS, (options["host"],)))
            if entry is not None and entry.create_revision == session.memo["session"]:
                return options
    except TimeoutError:
        problem = f"does not answer within {within_s:g} s"
    except EtcdReplicaError as error:
        problem = f"is of no use ({error})"
    log.error("the etcd of the new configuration %s; going on with that of before, %s", problem, before["etcd"])
    return options | connection


def _found_out(given: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults that are found out at run time: those of later are of no concern. Raises UsageError."""
    settings = node_settings(**given)
    return given | {name: getattr(settings, name) for name in ("host", "address", "state_dir", "socket_path")}


def _revived(memo: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Undo what JSON did to them. Another version may have written it: what it lacks is as given."""
    types: dict[type, type] = {Path: Path, dict: tuple}
    kept = {s: memo[s.key] for s in SETTINGS if s.key in memo}
    return given | {
        s.key: types[s.type](value) if s.type in types and value is not None else value for s, value in kept.items()
    }
