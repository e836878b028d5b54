"""`doctor`: looks at what a node depends on, and says what to do.

Every check is a small function in the table `CHECKS`. They run side by side, each for a limited time: one that hangs is told of
as such, and holds up none of the others.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import click

from etcdreplica.cli.checks import Finding, Subject, Verdict
from etcdreplica.cli.options import host_options, node_settings, output_option
from etcdreplica.cli.texts import printed

LIMIT_S = 10.0


@click.command("doctor", short_help="Check what a node depends on, and say what to do.")
@host_options
@output_option
def doctor_command(output: str, **options: Any) -> None:
    """Check, on this host and with the settings of its node, what the node depends on; say what is wrong and what to do.

    It may be run at any time, also beside a running node, best as the user of the node. The exit code is 1 if a check failed;
    warnings do not count.

    \b
    Examples:
      etcdreplica doctor
      etcdreplica doctor --config /etc/etcdreplica/etcdreplica.toml -o json
    """
    from etcdreplica.cli.checks_etcd import CHECKS as OF_ETCD
    from etcdreplica.cli.checks_host import CHECKS as OF_HOST

    logging.getLogger("etcdreplica").addHandler(logging.NullHandler())
    findings = asyncio.run(examine((*OF_HOST, *OF_ETCD), Subject(node_settings(**options)), LIMIT_S))
    if not printed([finding.shown for finding in findings], output):
        _tell(findings)
    if any(finding.verdict is Verdict.FAILED for finding in findings):
        raise SystemExit(1)


def _tell(findings: Sequence[Finding]) -> None:
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        click.echo(f"{finding.verdict:<11}  {finding.check:<{width}}  {finding.what}")
        if finding.advice:
            click.echo(f"{'':<11}  {'':<{width}}  -> {finding.advice}")
    counts = Counter(finding.verdict for finding in findings)
    click.echo(", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict]))


async def examine(checks: Sequence[Callable[[Subject], Any]], subject: Subject, limit_s: float) -> list[Finding]:
    """Run all checks at once, and return what each has found, in their order."""
    found = await asyncio.gather(*(_examine(check, subject, limit_s) for check in checks))
    return [finding for findings in found for finding in findings]


async def _examine(check: Callable[[Subject], Any], subject: Subject, limit_s: float) -> list[Finding]:
    name = check.__name__.strip("_").replace("_", " ")
    try:
        async with asyncio.timeout(limit_s):
            found = check(subject) if inspect.iscoroutinefunction(check) else _in_a_thread(lambda: list(check(subject)))
            return [finding.of(name) for finding in await found]
    except TimeoutError:
        return [Finding(Verdict.FAILED, f"this check hangs: it has not ended within {limit_s:g} s", "", name)]
    except Exception as error:
        return [Finding(Verdict.NOT_CHECKED, f"{type(error).__name__}: {error}", "", name)]


def _in_a_thread(work: Callable[[], list[Finding]]) -> asyncio.Future[list[Finding]]:
    """Do it in a thread that nobody has to wait for, neither now nor at the end of this process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[list[Finding]] = loop.create_future()

    def finish(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not future.done():
            set_outcome(outcome)

    def run() -> None:
        try:
            told: tuple[Callable[[Any], None], Any] = future.set_result, work()
        except Exception as error:
            told = future.set_exception, error
        if not loop.is_closed():
            loop.call_soon_threadsafe(finish, *told)

    threading.Thread(target=run, daemon=True).start()
    return future
