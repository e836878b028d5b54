"""The checks of `doctor` that ask etcd."""

from __future__ import annotations

import asyncio
import functools
import statistics
from collections.abc import Awaitable, Callable

from attrs import evolve

import etcdreplica
from etcdreplica.cli.checks import Finding, Subject, failed, not_checked, ok, warning
from etcdreplica.cli.show import read_view
from etcdreplica.cli.texts import size_text
from etcdreplica.errors import StoreError
from etcdreplica.store import EtcdOptions, Store
from etcdreplica.store.diagnose import Member, alarms, is_compacted, member, round_trips

PATIENCE_S = 3.0  # a slow etcd is to be told of as slow
QUOTA = 2 << 30  # of etcd, unless it was given another one; it does not tell
YOUNG = 20_000  # revisions: an hour of a busy cluster
FRAGMENTED = 100 << 20
KNOWN_BAD: tuple[tuple[tuple[int, ...], tuple[int, ...], str], ...] = (
    ((3, 5, 0), (3, 5, 3), "may corrupt its data when it is killed under load"),
    ((3, 5, 3), (3, 5, 5), "can lose what a single member has acknowledged"),
    ((3, 5, 5), (3, 5, 15), "has faults of leases and watches that 3.5.15 mends"),
)
Check = Callable[[Subject], Awaitable[list[Finding]]]


def _options(subject: Subject) -> EtcdOptions:
    return evolve(subject.settings.etcd, timeout_s=PATIENCE_S)


def _if_it_answers(check: Check) -> Check:
    """Have a check say that it could not look when etcd does not answer, which `etcd_endpoints` tells of."""

    @functools.wraps(check)
    async def asked(subject: Subject) -> list[Finding]:
        try:
            return await check(subject)
        except StoreError as error:
            return [not_checked(str(error))]

    return asked


async def _members(subject: Subject) -> list[Member | StoreError]:
    async def one(endpoint: str) -> Member | StoreError:
        try:
            return await member(_options(subject), endpoint)
        except StoreError as error:
            return error

    return list(await asyncio.gather(*(one(endpoint) for endpoint in subject.settings.etcd.endpoints)))


async def etcd_endpoints(subject: Subject) -> list[Finding]:
    """Each must answer, belong to the same etcd and know a leader."""
    found = []
    members = await _members(subject)
    for each in members:
        if isinstance(each, StoreError):
            advice = "is it running there, does a firewall let us through, and are the TLS files and the user those of etcd?"
            found.append(failed(str(each), advice))
        elif not each.has_leader:
            found.append(failed(f"{each.endpoint} knows no leader", "see whether a majority of etcd's members runs"))
        else:
            found.append(ok(f"{each.endpoint} answers"))
    if len({each.cluster for each in members if isinstance(each, Member)}) > 1:
        found.append(failed("the endpoints belong to different etcds", "name only the members of one in etcd"))
    if len(members) == 1:
        found.append(warning("one endpoint only", "name every member in etcd, so that the loss of one costs nothing"))
    return found


async def etcd_version(subject: Subject) -> list[Finding]:
    """Those that are known to have faults that matter here."""
    versions = sorted({each.version for each in await _members(subject) if isinstance(each, Member)})
    return [judged(version) for version in versions] or [not_checked("no endpoint answers")]


def judged(version: str) -> Finding:
    """Say what is known of a version of etcd."""
    number, advice = tuple(int(part) for part in version.split("-")[0].split(".")), "use 3.6, or 3.5.15 and later"
    for first, end, fault in KNOWN_BAD:
        if first <= number < end:
            return warning(f"{version} {fault}", advice)
    if number < (3, 4):
        return failed(f"{version} is too old", advice)
    if number < (3, 5):
        return warning(
            f"{version} works, but is no longer maintained", f"{advice}; till then start all members with --pre-vote"
        )
    return ok(version)


@_if_it_answers
async def etcd_latency(subject: Subject) -> list[Finding]:
    """A renewal is a write by a quorum. It must fit into the timeout of a call many times, also when etcd is busy."""
    timing = subject.settings.timing
    found = []
    for what, seconds, advice in zip(
        ("linearizable read", "write, flushed by a quorum,"),
        await round_trips(_options(subject), subject.settings.cluster),
        ("look at the network between here and etcd's members", "give etcd a disk of its own that flushes fast (an SSD)"),
        strict=True,
    ):
        middle, worst, longest_s = statistics.median(seconds), max(seconds), timing.timeout_s
        text = f"a {what} takes {1000 * middle:.1f} ms, at worst {1000 * worst:.1f} ms of {len(seconds)}"
        rule = f"a call may take {longest_s:g} s with a lease TTL of {timing.lease_ttl_s:g} s"
        if worst >= longest_s:
            found.append(failed(f"{text}: too slow, {rule}", f"{advice}, or take a longer timing"))
        elif worst >= longest_s / 4:
            found.append(warning(f"{text}: slow, {rule}", f"{advice}, or take a longer timing"))
        else:
            found.append(ok(f"{text}; {rule}"))
    return found


@_if_it_answers
async def etcd_alarms(subject: Subject) -> list[Finding]:
    """With one of them etcd takes no writes, and so no renewals of new leases."""
    advice = {
        "NOSPACE": "compact and defragment it, raise --quota-backend-bytes if need be, then 'etcdctl alarm disarm'",
        "CORRUPT": "replace the member whose data differ; see etcd's guide on data corruption",
    }
    raised = await alarms(_options(subject))
    return [failed(f"{name} is raised", advice.get(name, "see etcd's log")) for name in raised] or [ok("none is raised")]


async def etcd_space(subject: Subject) -> list[Finding]:
    """Before it is used up."""
    found = []
    for each in await _members(subject):
        if not isinstance(each, Member):
            continue
        text = f"{each.endpoint} uses {size_text(each.db_size)}"
        if each.db_size > 0.8 * QUOTA:
            text += f", near the quota of {size_text(QUOTA)} that etcd has unless it was given another one"
            found.append(warning(text, "defragment it (etcdctl defrag), or raise --quota-backend-bytes"))
        elif each.db_size > FRAGMENTED and each.db_in_use < each.db_size / 2:
            text += f", of which {size_text(each.db_in_use)} are in use"
            found.append(warning(text, "defragment it, one member after the other (etcdctl defrag)"))
        else:
            found.append(ok(text))
    return found or [not_checked("no endpoint answers")]


@_if_it_answers
async def etcd_compaction(subject: Subject) -> list[Finding]:
    """An etcd that keeps all that ever was fills up."""
    compacted = await is_compacted(_options(subject), subject.settings.cluster, YOUNG)
    if compacted is None:
        return [not_checked(f"it is too young to tell (less than {YOUNG} revisions)")]
    if compacted:
        return [ok("old revisions are removed")]
    return [warning("all revisions are still there", "start it with --auto-compaction-retention=1h, else it fills up")]


@_if_it_answers
async def versions_of_nodes(subject: Subject) -> list[Finding]:
    """Nodes of two versions work together while an upgrade lasts."""
    async with Store(_options(subject), subject.settings.cluster) as store:
        view, _ = await read_view(store)
    by_version: dict[str, list[str]] = {}
    for name, host in sorted(view.hosts.items()):
        by_version.setdefault(host.host.version or "unknown", []).append(name)
    mine = etcdreplica.__version__
    if set(by_version) <= {mine}:
        hosts = ", ".join(by_version.get(mine, [])) or "no host is up"
        return [ok(f"this is {mine}; with it: {hosts}")]
    text = "; ".join(f"{version} on {', '.join(names)}" for version, names in by_version.items())
    return [warning(f"this is {mine}, and there are {text}", "bring all hosts to one version")]


CHECKS = (
    etcd_endpoints,
    etcd_version,
    etcd_latency,
    etcd_alarms,
    etcd_space,
    etcd_compaction,
    versions_of_nodes,
)
