"""`systemd-unit`: the unit file of this host's node, filled in."""

from __future__ import annotations

import pwd
import sys
from importlib import resources
from pathlib import Path

import click

from etcdreplica.cli.daemons import node_command
from etcdreplica.cli.options import node_settings
from etcdreplica.errors import UsageError

# Only root may do what these forbid, and for another user they would also forbid setuid programs (NoNewPrivileges).
_OF_ROOT = "ProtectKernelModules=yes\nProtectKernelLogs=yes"

_PATHS = ("etcd_ca", "etcd_cert", "etcd_key", "peer_ca", "peer_cert", "peer_key", "state_dir", "socket_path")


@click.command(
    "systemd-unit", context_settings={"ignore_unknown_options": True}, short_help="Print a systemd unit that runs the node."
)
@click.option("--user", metavar="NAME", help="Run the node, and so all programs, as this user. [default: root]")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS OF node]...")
def systemd_unit_command(user: str | None, options: tuple[str, ...]) -> None:
    """Print a systemd unit that runs 'etcdreplica node' of this installation with these options, which are checked first.

    Options can also stand in /etc/etcdreplica/environment, as lines like ETCDREPLICA_ETCD=10.0.0.1:2379. That is the place
    for a password of etcd, because everybody may read a unit.

    \b
    Examples:
      etcdreplica systemd-unit --etcd 10.0.0.1:2379 > /etc/systemd/system/etcdreplica.service
      etcdreplica systemd-unit --user shop --etcd 10.0.0.1:2379 --host db-1 --label zone=a
    """
    if user is not None:
        try:
            pwd.getpwnam(user)
        except KeyError:
            raise UsageError(f"there is no user {user} on this host: make one first, e.g. useradd --system {user}") from None
    with node_command.make_context("node", list(options)) as context:
        node_settings(**context.params)
        _check_paths(context)
    command = " ".join(_quoted(word) for word in (*_executable(), "node", *options))
    unit = resources.files("etcdreplica").joinpath("systemd/etcdreplica.service").read_text()
    is_root = user in (None, "root")
    for place, text in (
        ("@COMMAND@", command),
        ("@USER@\n", "" if is_root else f"User={user}\n"),
        ("@HARDENING@\n", f"{_OF_ROOT}\n" if is_root else ""),
    ):
        unit = unit.replace(place, text)
    click.echo(unit, nl=False)


def _check_paths(context: click.Context) -> None:
    """A unit starts in /, whatever this directory is."""
    for name in _PATHS:
        path = context.params[name]
        if path is not None and not Path(path).is_absolute():
            raise UsageError(f"{path}: a unit starts in /, so give the whole path: {Path(path).absolute()}")


def _executable() -> tuple[str, ...]:
    script = Path(sys.executable).with_name("etcdreplica")
    return (str(script),) if script.exists() else (sys.executable, "-m", "etcdreplica")


def _quoted(word: str) -> str:
    """Return a word as it stands in ExecStart=, where %, $, quotes and backslashes mean something."""
    if not word.isprintable():
        raise UsageError(f"a unit cannot hold {word!r}: it has characters that cannot be printed")
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{word}"' if not word or set(word) & set(" ;'\"\\") else word
