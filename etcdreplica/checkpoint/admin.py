"""What a person does with checkpoints, from any machine that reaches etcd and the CheckpointServers.

What is brought in must be what `restore` returns next. So it is newer than everything that any host may hold of the current
epoch, and older than anything of the next one, which the next primary gets; it is recorded in etcd with the hosts that have
confirmed it, by a transaction that fails once a primary has been chosen or somebody else has written. A primary that is seen
to run is left alone whatever is asked for: what it stores after that would count as older and be lost.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

from attrs import Factory, evolve, frozen

from etcdreplica.checkpoint.files import read
from etcdreplica.checkpoint.format import Manifest, chunk_count, damaged_chunks, digests
from etcdreplica.checkpoint.holding import Source, in_order
from etcdreplica.checkpoint.peers import Holds, Peers, pieces, span_bytes
from etcdreplica.checkpoint.wire import Piece
from etcdreplica.core.holders import NOTHING
from etcdreplica.core.view import AppView, ClusterView
from etcdreplica.errors import CheckpointError, CheckpointUnavailableError, DamagedError, RefusedError, StaleEpochError
from etcdreplica.model import AssignmentState, Checkpoint, Stamp
from etcdreplica.store import Key, Kind, Put, Store, Txn, Unchanged
from etcdreplica.words import Role

ASK_S = 5.0  # a person waits longer than a daemon does
GAP = 1_000_000_000  # so far an import is ahead of what is known: more than a primary makes unseen, on hosts that are away now
STOPPED = (AssignmentState.FAILED, AssignmentState.PENDING, AssignmentState.COMPLETED)


@frozen
class Answer:
    """What the CheckpointServer of a host has said of one application, or why it has not."""

    host: str
    holds: Holds = Factory(Holds)
    error: str = ""


async def ask(view: ClusterView, peers: Peers, app: AppView, *, whole: bool = False) -> list[Answer]:
    """Ask every host what it holds; `whole`: with the digests of all, not only of the newest one."""

    async def one(host: str) -> Answer:
        try:
            holds = await peers.have(host, view.servers[host].address, app.name, 0, ASK_S, whole=whole)
        except CheckpointError as error:
            return Answer(host, error=str(error))
        manifests = tuple(manifest for manifest in holds.manifests if manifest.stamp.epoch >= app.born)
        return Answer(host, Holds(manifests, holds.lost))

    return list(await asyncio.gather(*(one(host) for host in sorted(view.servers))))


# --- taking one away ---------------------------------------------------------------------------------------------------


@frozen
class Choice:
    """A checkpoint, and the hosts that it can be had from, the best first."""

    manifest: Manifest
    hosts: tuple[str, ...]


def choose(app: AppView, answers: Iterable[Answer], epoch: int | None = None, sequence: int | None = None) -> Choice:
    """Return the newest one that can be had, of these if any are named. Raises CheckpointUnavailableError."""
    found = [
        (manifest, answer.host)
        for answer in answers
        for manifest in answer.holds.manifests
        if epoch in (None, manifest.stamp.epoch) and sequence in (None, manifest.stamp.sequence)
    ]
    if not found:
        silent = ", ".join(answer.host for answer in answers if answer.error)
        wanted = "checkpoint" if epoch is None else f"checkpoint {epoch}.{'*' if sequence is None else sequence}"
        raise CheckpointUnavailableError(
            f"{app.name}: no host that answers has a {wanted}" + (f"; these do not answer: {silent}" if silent else "")
        )
    best = max((manifest.stamp, app.holds_checkpoint(host), manifest.digest) for manifest, host in found)
    same = [(manifest, host) for manifest, host in found if (manifest.stamp, manifest.digest) == (best[0], best[2])]
    hosts = sorted((host for _, host in same), key=lambda host: (not app.holds_checkpoint(host), host))
    return Choice(same[0][0], tuple(hosts))


async def fetch(view: ClusterView, peers: Peers, choice: Choice) -> AsyncIterator[bytes | memoryview]:
    """Yield its state in order, each chunk verified; where one host fails, the next one goes on. Raises CheckpointError."""
    manifest, at, failed = choice.manifest, 0, list[str]()
    for host in choice.hosts:
        if at == manifest.count:
            return
        coming = peers.fetch(view.servers[host].address, manifest, range(at, manifest.count))
        try:
            async with contextlib.aclosing(coming):
                async for first, data in in_order(coming, at):
                    if digests(data) != manifest.run(first, chunk_count(len(data))):
                        raise DamagedError(f"it is damaged there, within {chunk_count(len(data))} chunks from {first} on")
                    at += chunk_count(len(data))
                    yield data
        except CheckpointError as error:
            failed.append(f"{host}: {error}")
    if at < manifest.count:
        raise CheckpointUnavailableError(
            f"{manifest.app}: checkpoint {manifest.stamp} cannot be had ({'; '.join(failed)}); 'etcdreplica checkpoints "
            f"inspect {manifest.app}' shows older ones, which --epoch and --sequence choose"
        )


# --- bringing one in ---------------------------------------------------------------------------------------------------


@frozen
class Brought:
    """The checkpoint that was made, the hosts that hold it, and why others do not."""

    stamp: Stamp
    holders: tuple[str, ...]
    trouble: dict[str, str]


def open_file(path: Path) -> Source:
    """Open an exported checkpoint, all of it verified. Raises DamagedError."""
    try:
        source = Source.of(read(path))
        assert source.fd is not None
        bad = sum(1 for _ in damaged_chunks(source.fd, source.begin, source.manifest))
    except DamagedError as error:
        raise DamagedError(f"{path}: {error}") from None
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from None
    if bad:
        raise DamagedError(f"{path}: {bad} of {source.manifest.count} chunks are damaged")
    return source


def check_stopped(app: AppView) -> None:
    """Raise RefusedError while a primary is seen to run, or nobody has heard of the application yet."""
    for host, replica in app.replicas.items():
        if replica.role is Role.PRIMARY:
            raise RefusedError(
                f"{app.name}: its primary runs on {host} (process {replica.pid}) and would go on with its own state; --force "
                f"does not change that. Stop it first: 'etcdreplica pause {app.name}', end that process (kill -9), import, "
                f"and then 'etcdreplica resume {app.name}'"
            )
    if app.registration is None or app.assignment is None:
        raise RefusedError(f"{app.name}: it is being removed, or no ReplicaManager has taken it yet (etcdreplica status)")


def objections(app: AppView, file: Manifest, answers: Iterable[Answer]) -> list[str]:
    """Return why a careful person would not bring this in."""
    found, assignment = [], app.assignment
    assert assignment is not None
    primary = assignment.primary
    if primary is not None and primary.incarnation not in app.failures:
        found.append(f"its primary may run on {primary.host}, although that host does not show it")
    elif not assignment.paused and (primary is not None or assignment.state not in STOPPED):
        found.append(f"it is about to be started again: 'etcdreplica pause {app.name}' first")
    if file.app != app.name:
        found.append(f"the file is a checkpoint of {file.app}")
    codecs = {answer.holds.manifests[0].codec for answer in answers if answer.holds.manifests} - {file.codec}
    if codecs:
        found.append(f"the file was made with the codec {file.codec}, and its own checkpoints with {', '.join(sorted(codecs))}")
    return found


async def bring_in(
    store: Store,
    peers: Peers,
    view: ClusterView,
    app: AppView,
    answers: Iterable[Answer],
    file: Source,
    tell: Callable[[int], None],
) -> Brought:
    """Make a state the newest checkpoint, on as many hosts as the degree says, as far as they are up. Raises CheckpointError.

    `tell` is called with the number of bytes that have been sent. What `check_stopped` and `objections` say is the caller's
    to heed.
    """
    assert app.registration is not None
    assert app.assignment is not None
    epoch = app.assignment.epoch
    manifest = evolve(file.manifest, app=app.name, stamp=_next_stamp(app, epoch, answers))
    holders, trouble = list[str](), dict[str, str]()
    for host in _receivers(view, app):
        if len(holders) == app.registration.degree:
            break
        try:
            await peers.put(host, view.servers[host].address, epoch, manifest, _pieces(file, tell))
        except StaleEpochError as error:
            raise CheckpointError(f"{app.name}: a primary has been chosen meanwhile: {error}") from None
        except CheckpointError as error:
            trouble[host] = str(error)
        else:
            holders.append(host)
    if not holders:
        why = "; ".join(f"{host}: {reason}" for host, reason in trouble.items()) or "no host has a CheckpointServer just now"
        raise CheckpointError(f"{app.name}: no host can hold it ({why})")
    await _record(store, app, manifest, holders)
    return Brought(manifest.stamp, tuple(holders), trouble)


def _next_stamp(app: AppView, epoch: int, answers: Iterable[Answer]) -> Stamp:
    recorded = [app.own_checkpoint.stamp] if app.own_checkpoint else []
    known = [*recorded, *(manifest.stamp for answer in answers for manifest in answer.holds.manifests)]
    newest = max(known, default=NOTHING)
    if newest.epoch > epoch:
        raise CheckpointError(
            f"{app.name}: there is a checkpoint of epoch {newest.epoch} already, and etcd knows only of {epoch}"
        )
    return Stamp(epoch, max((stamp.sequence for stamp in known if stamp.epoch == epoch), default=0) + GAP)


def _receivers(view: ClusterView, app: AppView) -> list[str]:
    """Hosts with a CheckpointServer: those with a seat first, then those that hold the newest one, then those allowed."""
    assert app.registration is not None
    assert app.assignment is not None
    allowed = [host for host in sorted(view.servers) if host in (app.registration.hosts or view.servers)]
    holders = app.own_checkpoint.holders if app.own_checkpoint else ()
    ordered = dict.fromkeys((*(seat.host for seat in app.assignment.seats), *holders, *allowed))
    return [host for host in ordered if host in view.servers]


async def _pieces(file: Source, tell: Callable[[int], None]) -> AsyncIterator[Piece]:
    manifest = file.manifest
    for first, count in pieces([(0, manifest.count)], manifest.count):
        try:
            data = await asyncio.to_thread(file.read, *span_bytes(manifest, first, count))
        except OSError as error:
            raise CheckpointError(f"the file cannot be read: {error.strerror}") from None
        yield first, data
        tell(len(data))


async def _record(store: Store, app: AppView, manifest: Manifest, holders: list[str]) -> None:
    key, assignment = Key(Kind.CHECKPOINTS, (app.name,)), Key(Kind.ASSIGNMENTS, (app.name,))
    stamp, names = manifest.stamp, tuple(sorted(holders))
    value = Checkpoint(stamp.epoch, stamp.sequence, manifest.digest, manifest.size, names, manifest.wall)
    same = (Unchanged(assignment, app.assignment_revision), Unchanged(key, app.checkpoint_revision))
    if not (await store.commit(Txn(same, (Put(key, value),)))).succeeded:
        raise CheckpointError(
            f"{app.name}: something has changed meanwhile, so this is not recorded as its newest checkpoint, although "
            f"{', '.join(names)} may hand it out: look at 'etcdreplica status {app.name}', and import it again"
        )


# --- having them checked -----------------------------------------------------------------------------------------------


@frozen
class Report:
    """What a host has found: each checkpoint it holds, and what is wrong with it; `error`: why it did not get to its end."""

    host: str
    findings: tuple[tuple[Manifest, str], ...] = ()
    error: str = ""


async def verify(view: ClusterView, peers: Peers, app: str) -> list[Report]:
    """Have every host read all it holds of an application, or of all if none is named, and put aside what is damaged."""

    async def one(host: str) -> Report:
        findings: list[tuple[Manifest, str]] = []
        try:
            async for finding in peers.verify(view.servers[host].address, app):
                findings.append(finding)  # noqa: PERF401  (what came before an error counts)
        except CheckpointError as error:
            return Report(host, tuple(findings), str(error))
        return Report(host, tuple(findings))

    return list(await asyncio.gather(*(one(host) for host in sorted(view.servers))))
