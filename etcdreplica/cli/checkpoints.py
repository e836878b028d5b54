"""`checkpoints`: what is stored of applications, taking it away, bringing it in, having it checked."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import click

from etcdreplica.cli.completion import applications
from etcdreplica.cli.options import connection_options, output_option, peer_options, peer_tls, with_store
from etcdreplica.cli.show import damages, no_application, read_view
from etcdreplica.cli.texts import age_text, printed, size_text, table
from etcdreplica.errors import EtcdReplicaError, RefusedError

if TYPE_CHECKING:
    from etcdreplica.checkpoint.admin import Answer, Brought, Report
    from etcdreplica.checkpoint.format import Manifest
    from etcdreplica.checkpoint.peers import Peers
    from etcdreplica.core.view import AppView, ClusterView
    from etcdreplica.store import Store

T = TypeVar("T")
LARGE = 8 << 20  # bytes: from here on a person is shown how far it is


@click.group("checkpoints", short_help="Show, export, import and verify checkpoints.")
def checkpoints_command() -> None:
    """Show what is stored of applications, take it away as a file, bring it in again, and have it checked.

    \b
    Examples:
      etcdreplica checkpoints list
      etcdreplica checkpoints export shop shop.checkpoint
    """


@checkpoints_command.command("list", short_help="Show the newest checkpoint of each application.")
@connection_options
@output_option
def list_command(output: str, **options: Any) -> None:
    """Show the newest checkpoint of each application that is known to be durable, and what was found damaged.

    The hosts named hold this one or a newer one: while a primary runs, what stands here is up to a second behind.

    \b
    Examples:
      etcdreplica checkpoints list
      etcdreplica checkpoints list -o json
    """

    async def read(store: Store) -> ClusterView:
        return (await read_view(store))[0]

    view = with_store(read, **options)
    shown = [_listed(view, app) for _, app in sorted(view.apps.items())]
    if printed(shown, output):
        return
    rows = [
        [s["name"], _stamp(s), *((size_text(s["size"]), age_text(s["age_s"])) if s["epoch"] else ("", "")), s["holders"]]
        for s in shown
    ]
    table(["name", "newest", "size", "age", "holders"], rows, empty="no application is registered")
    for s in shown:
        for host, what in s["damaged"].items():
            click.echo(f"{s['name']}: warning: {host} has found a checkpoint damaged, {what}")


def _listed(view: ClusterView, app: AppView) -> dict[str, Any]:
    found = app.own_checkpoint
    shown: dict[str, Any] = {"name": app.name, "epoch": None, "sequence": None, "size": None, "digest": None, "age_s": None}
    if found is not None:
        shown |= {"epoch": found.epoch, "sequence": found.sequence, "size": found.size, "digest": found.digest}
        shown["age_s"] = _age(found.wall)
    return {**shown, "holders": list(found.holders) if found else [], "damaged": damages(view, app.name)}


# --- inspect -----------------------------------------------------------------------------------------------------------


@checkpoints_command.command("inspect", short_help="Ask every host what it holds of an application.")
@peer_options
@output_option
@click.argument("name", shell_complete=applications)
def inspect_command(output: str, name: str, **options: Any) -> None:
    """Ask the CheckpointServer of every host what it holds of an application.

    A host marked * is a holder: it has all that was ever acknowledged. A host that has lost something found a checkpoint
    damaged that was newer than all it holds.

    \b
    Examples:
      etcdreplica checkpoints inspect shop
      etcdreplica checkpoints inspect shop -o json
    """
    from etcdreplica.checkpoint.admin import ask

    async def work(store: Store, peers: Peers) -> tuple[ClusterView, AppView, list[Answer]]:
        view, app = await registered(store, name)
        return view, app, await ask(view, peers, app)

    view, app, answers = with_peers(work, options)
    hosts = [_inspected(view, app, answer) for answer in answers]
    if printed({**_listed(view, app), "hosts": hosts}, output):
        return
    rows = []
    for host in hosts:
        first = host["host"] + ("*" if host["holder"] else "")
        for held in host["checkpoints"] or [None]:
            cells = [_stamp(held), size_text(held["size"]), held["codec"], age_text(held["age_s"])] if held else [""] * 4
            rows.append([first, *cells])
            first = ""
    table(["host", "checkpoint", "size", "codec", "age"], rows, empty="no host has a CheckpointServer just now")
    for host in hosts:
        if host["error"]:
            click.echo(f"{host['host']} does not answer: {host['error']}")
        if host["lost"]:
            click.echo(f"{host['host']} has lost something newer than it holds")
        if host["damaged"]:
            click.echo(f"{host['host']} has found a checkpoint damaged, {host['damaged']}")
    for host_name in _listed(view, app)["holders"]:
        if host_name not in view.servers:
            click.echo(f"{host_name} is a holder, and has no CheckpointServer just now")


def _inspected(view: ClusterView, app: AppView, answer: Answer) -> dict[str, Any]:
    return {
        "host": answer.host,
        "holder": app.own_checkpoint is not None and answer.host in app.own_checkpoint.holders,
        "lost": answer.holds.lost,
        "damaged": damages(view, app.name).get(answer.host),
        "error": answer.error,
        "checkpoints": [_described(manifest) for manifest in answer.holds.manifests],
    }


def _described(manifest: Manifest) -> dict[str, Any]:
    stamp = {"epoch": manifest.stamp.epoch, "sequence": manifest.stamp.sequence}
    return {**stamp, "size": manifest.size, "codec": manifest.codec, "age_s": _age(manifest.wall)}


# --- export ------------------------------------------------------------------------------------------------------------


@checkpoints_command.command("export", short_help="Write a checkpoint to a file.")
@peer_options
@click.option("--epoch", type=click.IntRange(1), help="That of an older checkpoint. [default: the newest one]")
@click.option("--sequence", type=click.IntRange(0), help="Its number within the epoch. [default: the newest one]")
@click.option("--payload", "form", flag_value="payload", help="Write only the state, as the application has encoded it.")
@click.option("--json", "form", flag_value="json", help="Write the state as JSON, for people; bytes in base64.")
@click.option("--force", is_flag=True, help="Overwrite the file.")
@click.argument("name", shell_complete=applications)
@click.argument("file", type=click.Path(allow_dash=True, path_type=Path))
def export_command(
    epoch: int | None, sequence: int | None, form: str | None, force: bool, name: str, file: Path, **options: Any
) -> None:
    """Write the newest checkpoint that can be had to a file, which 'import' takes; - is standard output.

    Every part of it is verified. The file appears as a whole or not at all, readable only by its owner.

    \b
    Examples:
      etcdreplica checkpoints export shop shop.checkpoint
      etcdreplica checkpoints export shop --epoch 1201 --sequence 7 --force shop.checkpoint
      etcdreplica checkpoints export shop --json -
    """
    from etcdreplica.checkpoint.admin import ask, choose, fetch
    from etcdreplica.checkpoint.format import prefix

    if sequence is not None and epoch is None:
        raise click.UsageError("--sequence counts within an epoch: say --epoch too")

    async def work(store: Store, peers: Peers) -> tuple[AppView, Manifest]:
        view, app = await registered(store, name)
        choice = choose(app, await ask(view, peers, app, whole=True), epoch, sequence)
        with _progress(choice.manifest.size) as tell:
            if form == "json":
                out.write(_for_people(choice.manifest, [data async for data in _told(fetch(view, peers, choice), tell)]))
                return app, choice.manifest
            if form is None:
                out.write(prefix(choice.manifest))
            async for data in _told(fetch(view, peers, choice), tell):
                out.write(data)
        return app, choice.manifest

    with _writing(file, force) as out:
        app, manifest = with_peers(work, options)
    recorded = app.own_checkpoint
    if epoch is None and recorded is not None and manifest.stamp < recorded.stamp:
        holders = ", ".join(recorded.holders)
        click.echo(f"Warning: {recorded.stamp} is newer, and cannot be had now: it is on {holders}", err=True)
    click.echo(f"{name}: checkpoint {manifest.stamp} of {size_text(manifest.size)} has been exported", err=True)


async def _told(data: AsyncIterator[bytes | memoryview], tell: Callable[[int], None]) -> AsyncIterator[bytes | memoryview]:
    async for piece in data:
        yield piece
        tell(len(piece))


@contextlib.contextmanager
def _writing(file: Path, force: bool) -> Iterator[BinaryIO]:
    """Give something to write to, which becomes that file when all has gone well."""
    if str(file) == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    _check_free(file, force)
    try:
        fd, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    except OSError as error:
        raise EtcdReplicaError(f"cannot write {file}: {error.strerror}") from None
    try:
        with os.fdopen(fd, "wb") as out:
            yield out
            out.flush()
            os.fsync(fd)
        _check_free(file, force)
        Path(name).replace(file)
    except OSError as error:
        raise EtcdReplicaError(f"cannot write {file}: {error.strerror}") from None
    finally:
        Path(name).unlink(missing_ok=True)


def _check_free(file: Path, force: bool) -> None:
    if os.path.lexists(file) and not force:
        raise EtcdReplicaError(f"{file} exists already: --force overwrites it")


def _for_people(manifest: Manifest, data: list[bytes | memoryview]) -> bytes:
    import msgspec

    from etcdreplica.app.state import BYTES, MSGPACK

    def show(value: Any) -> Any:
        return {"extension": value.code, "data": value.data} if isinstance(value, msgspec.msgpack.Ext) else repr(value)

    state: Any = b"".join(data)
    if manifest.codec not in (BYTES, MSGPACK):
        raise EtcdReplicaError(f"only the application itself can decode {manifest.codec!r}: use --payload")
    try:
        if manifest.codec == MSGPACK:
            state = msgspec.msgpack.decode(state)
        return msgspec.json.format(msgspec.json.encode(state, enc_hook=show)) + b"\n"
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise EtcdReplicaError(f"the state cannot be shown as JSON ({error}): use --payload") from None


# --- import ------------------------------------------------------------------------------------------------------------


@checkpoints_command.command("import", short_help="Make an exported checkpoint the newest one of an application.")
@peer_options
@click.option("--force", is_flag=True, help="Do it in spite of what speaks against it.")
@click.argument("name", shell_complete=applications)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def import_command(force: bool, name: str, file: Path, **options: Any) -> None:
    """Make the state in an exported file the newest checkpoint of an application that stands still: 'restore' returns it next.

    The application must be parked, completed, without a host that could run it, or paused after its primary has ended.

    \b
    Examples:
      etcdreplica checkpoints import shop shop.checkpoint
      etcdreplica checkpoints import shop-test shop.checkpoint --force
    """
    from etcdreplica.checkpoint.admin import ask, bring_in, check_stopped, objections, open_file

    source = open_file(file)

    async def work(store: Store, peers: Peers) -> tuple[AppView, Brought]:
        view, app = await registered(store, name)
        check_stopped(app)
        answers = await ask(view, peers, app)
        found = objections(app, source.manifest, answers)
        if found and not force:
            raise RefusedError(f"{name}: {'; '.join(found)}; --force goes on nevertheless")
        for objection in found:
            click.echo(f"Warning: {objection}", err=True)
        with _progress(source.manifest.size) as tell:
            return app, await bring_in(store, peers, view, app, answers, source, tell)

    app, brought = with_peers(work, options)
    for host, reason in brought.trouble.items():
        click.echo(f"Warning: {host} does not hold it: {reason}", err=True)
    degree = app.registration.degree if app.registration else 0
    if len(brought.holders) < degree:
        click.echo(f"Warning: it is on {len(brought.holders)} of {degree} hosts: no other one can take it now", err=True)
    click.echo(f"{name}: the state has been imported as checkpoint {brought.stamp}, and is on {', '.join(brought.holders)}")


# --- verify ------------------------------------------------------------------------------------------------------------


@checkpoints_command.command("verify", short_help="Have every host read all that it holds.")
@peer_options
@output_option
@click.argument("name", required=False, shell_complete=applications)
def verify_command(output: str, name: str | None, **options: Any) -> None:
    """Have every host read all checkpoints that it holds, or those of one application, and put aside what is damaged.

    The exit code is 1 if something is damaged, or a host does not answer.

    \b
    Examples:
      etcdreplica checkpoints verify
      etcdreplica checkpoints verify shop -o json
    """
    from etcdreplica.checkpoint.admin import verify

    async def work(store: Store, peers: Peers) -> list[Report]:
        view = (await registered(store, name))[0] if name else (await read_view(store))[0]
        return await verify(view, peers, name or "")

    reports = with_peers(work, options)
    found = [(r.host, manifest, damage) for r in reports for manifest, damage in r.findings]
    shown = [{"host": host, "name": m.app, **_described(m), "damage": damage} for host, m, damage in found]
    silent = {report.host: report.error for report in reports if report.error}
    if not printed({"checkpoints": shown, "silent": silent}, output):
        rows = [[s["host"], s["name"], _stamp(s), size_text(s["size"]), s["damage"] or "whole"] for s in shown]
        table(["host", "name", "checkpoint", "size", "found"], rows, empty="no host holds a checkpoint")
    damaged = sum(1 for s in shown if s["damage"])
    problems = [f"{damaged} of {len(shown)} checkpoints are damaged and have been put aside"] if damaged else []
    problems += [f"{host} has not read all it holds: {error}" for host, error in silent.items()]
    if problems:
        raise EtcdReplicaError("; ".join(problems))


# --- what they share ---------------------------------------------------------------------------------------------------


def with_peers(work: Callable[[Store, Peers], Awaitable[T]], options: dict[str, Any]) -> T:
    """Run `work` with a store and the way to other hosts."""
    from etcdreplica.checkpoint.peers import Peers

    tls = peer_tls(**options)

    async def run(store: Store) -> T:
        peers = Peers(tls)
        try:
            return await work(store, peers)
        finally:
            await peers.close()

    return with_store(run, **options)


async def registered(store: Store, name: str) -> tuple[ClusterView, AppView]:
    """Return the cluster, and an application of it. Raises EtcdReplicaError if there is none of that name."""
    view, _ = await read_view(store)
    if name not in view.apps:
        raise no_application([name], view.apps)
    return view, view.apps[name]


@contextlib.contextmanager
def _progress(size: int) -> Iterator[Callable[[int], None]]:
    """Give something to call with the number of bytes that have been moved."""
    if size < LARGE or not sys.stderr.isatty():
        yield lambda _: None
        return
    with click.progressbar(length=size, file=sys.stderr, label=size_text(size)) as bar:
        yield bar.update


def _stamp(shown: dict[str, Any]) -> str:
    return f"{shown['epoch']}.{shown['sequence']}" if shown["epoch"] is not None else ""


def _age(wall: float) -> float:
    return round(time.time() - wall, 3)
