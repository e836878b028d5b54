"""`history`: what has failed, and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from etcdreplica.cli.completion import applications
from etcdreplica.cli.options import connection_options, output_option, with_store
from etcdreplica.cli.show import no_application
from etcdreplica.cli.texts import printed, table, when

if TYPE_CHECKING:
    from etcdreplica.model import Event, Replica
    from etcdreplica.store import Store


@click.command("history", short_help="Tell what has failed, why, and how long fail-overs took.")
@connection_options
@output_option
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many, the newest.")
@click.argument("name", required=False, shell_complete=applications)
def history_command(output: str, limit: int, name: str | None, **options: Any) -> None:
    """Tell what has ended in an application, or in all of them, why, and what was done; the newest comes last.

    \b
    TOLD   from when the next primary's WatchDog learned of it until it had told the process, or began to start it
    BODY   from then until the first line of its body
    GAP    from when the end was noticed until then, by the clocks of the two hosts

    The last 20 events of each application are kept.

    \b
    Examples:
      etcdreplica history shop
      etcdreplica history --limit 5 -o json
    """
    events = with_store(lambda store: read_history(store, name), **options)[-limit:]
    if printed(events, output):
        return
    rows = []
    for event in events:
        failure, who = event["failure"], f"{event['failure']['role']} on {event['failure']['host']}"
        times = [_milliseconds(event[phase]) for phase in ("told_s", "body_s", "gap_s")]
        rows.append([when(event["wall"]), event["name"], who, failure["kind"], event["action"], *times, failure["reason"]])
    heads = ["when", "name", "who", "what", "then", "told", "body", "gap", "why"]
    table(heads, rows, empty=f"nothing of {name} has ended" if name else "nothing has ended")


async def read_history(store: Store, name: str | None = None) -> list[dict[str, Any]]:
    """Return the events of one application, or of all, the oldest first, with how long each promotion took."""
    from etcdreplica.store import Corrupt, Kind

    if name is not None:
        known = [entry.key.names[0] for entry in (await store.list(Kind.REGISTRATIONS)).entries]
        if name not in known:
            raise no_application([name], known)
    parts = (name,) if name else ()
    history, replicas = await store.list(Kind.HISTORY, *parts), await store.list(Kind.REPLICAS, *parts)
    shown = {entry.key.names: entry.value for entry in replicas.entries if not isinstance(entry.value, Corrupt)}
    events = [(entry.key.names[0], entry.value) for entry in history.entries if not isinstance(entry.value, Corrupt)]
    return sorted((_told(app, event, events, shown) for app, event in events), key=lambda event: event["wall"])


def _told(app: str, event: Event, events: list[tuple[str, Event]], replicas: dict[tuple[str, ...], Replica]) -> dict[str, Any]:
    """The phases of a promotion stand in what its primary shows as long as it lives, and then in how it ended."""
    import msgspec

    phases: dict[str, float] = {}
    if event.primary is not None and event.primary in event.action:
        alive = replicas.get((app, event.primary))
        ended = [e.failure for other, e in events if other == app and e.failure.host == event.primary]
        found = [dict(failure.phases) for failure in ended if failure.epoch == event.epoch]
        found += [alive.phases] if alive is not None and alive.epoch == event.epoch else []
        phases = next(filter(None, found), {})
    gap_s = round(phases["body_wall"] - event.failure.wall, 6) if phases.get("body_wall") else None
    timings = {"told_s": phases.get("told_s"), "body_s": phases.get("body_s"), "gap_s": gap_s}
    plain: dict[str, Any] = msgspec.to_builtins(event)
    return {"name": app, **plain, **timings}


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.1f} ms"
