"""The `etcdreplica` command: parse, call, print, exit code.

Exit codes: 0 done; 1 it could not be done, and the message says why; 2 the command line is wrong; 130 interrupted.
Commands import what they need when they run, so that `--help` and `start` stay quick.
"""

from __future__ import annotations

import importlib
import os
import sys

import click

from etcdreplica.app.protocol import FINAL_CODES, GUARDIAN_ENV
from etcdreplica.errors import EtcdReplicaError, UsageError

COMMANDS = {
    "node": "daemons",
    "watchdog": "daemons",
    "manager": "daemons",
    "checkpoint-server": "daemons",
    "systemd-unit": "systemd_unit",
    "dev": "daemons",
    "start": "start",
    "protect": "protect",
    "apply": "applications",
    "diff": "applications",
    "export": "applications",
    "list": "show",
    "status": "show",
    "describe": "show",
    "explain": "explain",
    "history": "history",
    "logs": "logs",
    "hosts": "show",
    "leaders": "show",
    "pause": "pause",
    "resume": "pause",
    "switchover": "move",
    "failover": "move",
    "drain": "drain",
    "undrain": "drain",
    "scale": "scale",
    "stop": "stop",
    "remove": "remove",
    "checkpoints": "checkpoints",
    "config": "config",
    "doctor": "doctor",
    "accept-etcd": "accept",
    "completion": "completion",
    "demo": "demo",
    "bench": "bench",
}


class Commands(click.Group):
    """Loads the module of a command only when that command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return them in the order a reader needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"etcdreplica.cli.{COMMANDS[cmd_name]}")
        command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        assert isinstance(command, click.Command)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="etcdreplica")
def cli() -> None:
    """Fail-over protection for ordinary applications, coordinated by etcd.

    \b
    Try it:      etcdreplica demo
    On a laptop: etcdreplica dev
    On a host:   etcdreplica node --etcd 10.0.0.1:2379,10.0.0.2:2379
    """


def main() -> None:
    """Run the command line and exit."""
    guarded = GUARDIAN_ENV in os.environ
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except UsageError as error:
        click.echo(f"Error: {error}", err=True)
        code = 2
    except EtcdReplicaError as error:
        click.echo(f"Error: {error}", err=True)
        code = 1
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        code = 1
    sys.exit(FINAL_CODES.get(code or 0, code) if guarded else code)
