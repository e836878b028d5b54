"""`apply`, `diff` and `export`: applications as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from attrs import evolve, frozen

from etcdreplica.cli.options import connection_options, output_option, with_store
from etcdreplica.errors import EtcdReplicaError, RefusedError

if TYPE_CHECKING:
    from etcdreplica.model import Registration
    from etcdreplica.store import Entry, Store

AT_ONCE = 100  # in one transaction; etcd takes 128 operations
LIVE = frozenset({"degree", "hosts", "restarts_here", "max_restarts", "restart_window", "failover"})
"""Settings that only managers look at. Of the others a running copy keeps what it was started with."""
files_argument = click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))


@frozen
class Change:
    """What a file would do to one application. `revision` is that of the registration there is, or 0."""

    before: Registration | None
    after: Registration
    revision: int
    differences: dict[str, tuple[Any, Any]]
    state: str = ""  # of its assignment

    @property
    def kind(self) -> str:
        """Created, changed or unchanged."""
        return "unchanged" if not self.differences else "created" if self.before is None else "changed"

    @property
    def note(self) -> str:
        """What a person should know besides."""
        name = self.after.name
        if self.kind == "unchanged" and self.state in ("failed", "stopped"):
            word = "parked" if self.state == "failed" else "stopped"
            return f"it is {word}: 'etcdreplica resume {name}' starts it again"
        if self.kind == "unchanged" and self.state == "completed":
            return f"it has completed: 'etcdreplica remove {name}' makes room for a new start"
        late = [key for key in self.differences if key.partition(".")[0] not in LIVE | {"labels"}]
        if self.kind == "changed" and self.state == "active" and late:
            return f"copies that run keep the {', '.join(late)} they were started with; new ones have the new"
        return ""

    def plain(self, *, applied: bool) -> dict[str, Any]:
        """Return it as JSON shows it."""
        changed = [{"key": key, "before": old, "after": new} for key, (old, new) in self.differences.items()]
        more = {"applied": applied and self.kind != "unchanged", "note": self.note}
        return {"name": self.after.name, "change": self.kind, "differences": changed, **more}


@click.command("apply", short_help="Register what application files say.")
@connection_options
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
@output_option
@files_argument
def apply_command(dry_run: bool, output: str, files: tuple[Path, ...], **options: Any) -> None:
    """Make the registrations of the applications in these files what the files say. Others are left alone.

    The same files again change nothing. If anything in them is wrong, nothing of them is applied. docs/programs.md has a file
    with all keys.

    \b
    Examples:
      etcdreplica apply cache.toml
      etcdreplica apply apps/*.toml --dry-run
    """
    from etcdreplica.cli.appfile import read_files

    wanted = read_files(files)

    async def work(store: Store) -> list[Change]:
        changes = await _compare(store, wanted)
        if not dry_run:
            await _write(store, changes)
        return changes

    changes = with_store(work, **options)
    if output == "json":
        click.echo(json.dumps([change.plain(applied=not dry_run) for change in changes], indent=2))
        return
    for change in changes:
        if dry_run:
            _show(change)
        kind = f"would be {change.kind}" if dry_run and change.kind != "unchanged" else change.kind
        click.echo(f"{change.after.name}: {kind}" + (f"; {change.note}" if change.note else ""))


@click.command("diff", short_help="Compare application files with what is registered.")
@connection_options
@output_option
@files_argument
def diff_command(output: str, files: tuple[Path, ...], **options: Any) -> None:
    """Show what 'apply' would change. Exit code 0: nothing, 1: something, 2: that could not be told.

    \b
    Examples:
      etcdreplica diff cache.toml
      etcdreplica diff apps/*.toml -o json
    """
    from etcdreplica.cli.appfile import read_files

    wanted = read_files(files)
    try:
        changes = with_store(lambda store: _compare(store, wanted), **options)
    except EtcdReplicaError as error:
        raise _TroubleError(str(error)) from None
    if output == "json":
        click.echo(json.dumps([change.plain(applied=False) for change in changes], indent=2))
    else:
        for change in changes:
            _show(change)
    if any(change.kind != "unchanged" for change in changes):
        raise click.exceptions.Exit(1)


@click.command("export", short_help="Write applications as a file.")
@connection_options
@click.option("-o", "--output", type=click.Choice(["toml", "json"]), default="toml", show_default=True, help="How to print.")
@click.argument("names", metavar="[APP]...", nargs=-1)
def export_command(output: str, names: tuple[str, ...], **options: Any) -> None:
    """Print the named applications, or all, as a file that 'apply' takes.

    It has their environments in it, with any secrets there.

    \b
    Examples:
      etcdreplica export > all.toml
      etcdreplica export cache -o json
    """
    from etcdreplica.cli.appfile import TABLE, settings_of, write
    from etcdreplica.cli.show import no_application

    found = with_store(_registered, **options)
    unknown = [name for name in names if name not in found]
    if unknown:
        raise no_application(unknown, found)
    chosen = [found[name].value for name in names or sorted(found)]
    for registration in chosen:
        if not hasattr(registration, "name"):
            raise EtcdReplicaError(f"a registration cannot be read: {registration.error}: mend or delete it with etcdctl first")
    if output == "json":
        click.echo(json.dumps({TABLE: {each.name: settings_of(each) for each in chosen}}, indent=2))
    elif chosen:
        click.echo(write(chosen), nl=False)


class _TroubleError(click.ClickException):
    """As `diff` of Unix has it: 1 is a difference, so this is 2."""

    exit_code = 2


async def _registered(store: Store) -> dict[str, Entry]:
    from etcdreplica.store import Kind

    return {entry.key.names[0]: entry for entry in (await store.list(Kind.REGISTRATIONS)).entries}


async def _compare(store: Store, wanted: dict[str, Registration]) -> list[Change]:
    """Return what there is to do, and warn of what looks odd. Raises RefusedError."""
    from etcdreplica.cli.appfile import differences
    from etcdreplica.model import AssignmentState
    from etcdreplica.store import Corrupt, Kind

    there = await _registered(store)
    assigned = {entry.key.names[0]: entry.value for entry in (await store.list(Kind.ASSIGNMENTS)).entries}
    up = {entry.key.names[0] for entry in (await store.list(Kind.HOSTS)).entries}
    changes = []
    for name, after in sorted(wanted.items()):
        entry = there.get(name)
        before = None if entry is None or isinstance(entry.value, Corrupt) else entry.value
        state = getattr(assigned.get(name), "state", "")
        if state == AssignmentState.REMOVING or (state and entry is None):
            raise RefusedError(f"{name} is just being removed: try again in a moment. Nothing was changed")
        after = evolve(after, origin=before.origin if before else None)
        changes.append(Change(before, after, entry.mod_revision if entry else 0, differences(before, after), str(state)))
        for host in sorted({*after.hosts, *after.overrides} - up):
            click.echo(f"warning: {name} names the host {host}, which is not up", err=True)
    return changes


async def _write(store: Store, changes: list[Change]) -> None:
    from etcdreplica.store import Key, Kind, Put, Txn, Unchanged

    rest = [change for change in changes if change.kind != "unchanged"]
    written: list[str] = []
    while rest:
        some, rest = rest[:AT_ONCE], rest[AT_ONCE:]
        keys = [Key(Kind.REGISTRATIONS, (change.after.name,)) for change in some]
        same = tuple(Unchanged(key, change.revision) for key, change in zip(keys, some, strict=True))
        puts = tuple(Put(key, change.after) for key, change in zip(keys, some, strict=True))
        if not (await store.commit(Txn(same, puts))).succeeded:
            done = f"applied were only {', '.join(written)}" if written else "nothing was applied"
            raise RefusedError(
                f"somebody has changed these registrations meanwhile: {done}; look at 'etcdreplica diff', and try again"
            )
        written += [change.after.name for change in some]


def _show(change: Change) -> None:
    """Print one change as lines of a file that go and come."""
    if change.kind == "unchanged":
        return
    from etcdreplica.cli.appfile import TABLE

    click.echo(f"{'+' if change.before is None else ' '} [{TABLE}.{change.after.name}]")
    for key, (old, new) in change.differences.items():
        for sign, value in (("-", old), ("+", new)):
            if value is not None:
                click.echo(f"{sign} {_line(key, value)}")


def _line(key: str, value: Any) -> str:
    import tomli_w

    text = tomli_w.dumps({"x": value}).strip().partition("=")[2]
    return f"{key} = {' '.join(text.split())}"
