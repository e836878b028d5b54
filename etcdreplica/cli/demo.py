"""`demo`: see it work, in a minute, on this machine alone."""

from __future__ import annotations

import json
import signal
from typing import Any

import click

from etcdreplica.errors import EtcdReplicaError
from etcdreplica.words import Style


@click.command("demo", short_help="See fail-overs of all styles on this machine.")
@click.option(
    "--style", "styles", type=click.Choice([s.value for s in Style]), multiple=True, help="Only this one. [default: all]"
)
@click.option("--lease-ttl", "lease_ttl_s", type=float, default=2.0, show_default=True, help="How fast a lost host is noticed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the milliseconds of each phase.")
def demo_command(styles: tuple[str, ...], lease_ttl_s: float, as_json: bool) -> None:
    """Start an etcd and three hosts here, run a small server under each style, kill its primary, then a whole host.

    It needs nothing running, and leaves nothing behind. The exit code is 1 if anything did not happen as it should.

    \b
    Examples:
      etcdreplica demo
      etcdreplica demo --style warm --json
    """
    from etcdreplica.testing.demo import run_demo

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = run_demo(styles or [s.value for s in Style], lease_ttl_s, lambda line: click.echo(line, err=as_json))
    except EtcdReplicaError as error:
        if as_json:
            click.echo(json.dumps({"ok": False, "error": str(error).partition("\n")[0]}))
        raise
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo("\nEverything happened as it should; every process and file of the demo is gone.")


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
