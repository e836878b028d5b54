"""Planned changes: who may follow a primary, when a copy has replaced another one, and what is in the way of either.

The planner acts by these rules, and the command line refuses and explains by them, so that the two cannot disagree. An empty
text means that nothing is in the way.
"""

from __future__ import annotations

from collections.abc import Iterable

from etcdreplica.core.lifecycle import PROMOTABLE
from etcdreplica.core.view import AppView, ClusterView
from etcdreplica.model import Ask, AssignmentState, Seat

NOBODY_ABLE = "no other host is up, allowed and able"


def is_up(cluster: ClusterView, seat: Seat) -> bool:
    """Whether the stay of the host for which the seat was given lasts."""
    host = cluster.hosts.get(seat.host)
    return host is not None and host.session == seat.session


def unready(app: AppView, cluster: ClusterView, seat: Seat) -> str:
    """Say why this backup cannot take over at once."""
    replica, members = app.replica(seat), app.members
    if not is_up(cluster, seat):
        return f"{seat.host} is down"
    if replica is None or seat.incarnation in app.failures:
        return f"the copy on {seat.host} is not there yet"
    if replica.state not in PROMOTABLE:
        return f"the copy on {seat.host} is {replica.state}"
    if members and seat.incarnation not in {member.incarnation for member in members}:
        return f"the copy on {seat.host} is not in sync"
    return ""


def unsettled(app: AppView, cluster: ClusterView, seat: Seat) -> str:
    """Say why this backup is not yet as good as one that was here before."""
    if app.own_checkpoint is not None and app.own_checkpoint.holders and not app.holds_checkpoint(seat.host):
        return unready(app, cluster, seat) or f"{seat.host} does not hold the last checkpoint yet"
    return unready(app, cluster, seat)


def heirs(app: AppView, cluster: ClusterView, backups: Iterable[Seat]) -> list[Seat]:
    """Return the backups that can follow a primary which is asked to end, best first."""
    able = [seat for seat in backups if not is_away(cluster, seat.host) and not unready(app, cluster, seat)]
    return sorted(able, key=lambda seat: not app.holds_checkpoint(seat.host))


def is_away(cluster: ClusterView, host: str) -> bool:
    """Whether nothing should be moved to a host that is up."""
    return host in cluster.drains or cluster.is_silent(host)


def misfit(app: AppView, cluster: ClusterView, host: str) -> str:
    """Say why a host that is up may hold no copy; whether it was refused one lately is the planner's own knowledge."""
    registration, record = app.registration, cluster.hosts[host].host
    if registration is None or (registration.hosts and host not in registration.hosts):
        return f"{host} is not among its hosts"
    if any(record.labels.get(key) != value for key, value in registration.labels.items()):
        return f"{host} lacks its labels"
    own = sum(seat.host == host for seat in app.assignment.seats) if app.assignment else 0
    if cluster.seats[host] - own >= record.capacity:  # a seat of its own there is being given up
        return f"{host} is full"
    return ""


def obstacle(app: AppView, cluster: ClusterView, ask: Ask, to: str | None) -> str:
    """Say why no planned change of primary can be made now."""
    assignment = app.assignment
    if app.corrupt:
        return "a value of it in etcd is corrupt: see 'etcdreplica status'"
    if app.pause or cluster.pause:
        return "it is paused: 'etcdreplica resume' ends that"
    if app.request is not None and app.request.ask is Ask.STOP:
        return "it is stopped, or being stopped: 'etcdreplica resume' starts it again"
    if assignment is None or assignment.primary is None:
        state = assignment.state if assignment else AssignmentState.PENDING
        return f"it has no primary now ({state}{f': {assignment.reason}' if assignment and assignment.reason else ''})"
    if assignment.leaving is not None and ask is Ask.SWITCHOVER:
        return f"its primary on {assignment.primary.host} is ending already ({assignment.leaving.reason})"
    return _no_heir(app, cluster, assignment.backups, to)


def _no_heir(app: AppView, cluster: ClusterView, backups: tuple[Seat, ...], to: str | None) -> str:
    named = [seat for seat in backups if to in (None, seat.host)]
    if to is not None and not named:
        there = f"its backups are on {', '.join(seat.host for seat in backups)}" if backups else "it has no backup"
        return f"{to} is no backup of it: {there}"
    if not named:
        return "it has no backup"
    if heirs(app, cluster, named):
        return ""
    return "no backup can take over: " + "; ".join(
        unready(app, cluster, seat) or f"{seat.host} is {'drained' if seat.host in cluster.drains else 'silent'}"
        for seat in named
    )


def remains(app: AppView, cluster: ClusterView, host: str) -> str:
    """Say why an application still has a seat on a drained host."""
    assignment = app.assignment
    if app.corrupt or assignment is None:
        return "a value of it in etcd is corrupt"
    if app.pause or cluster.pause:
        return "it is paused"
    if assignment.leaving is not None:
        return f"its primary is ending: {assignment.leaving.reason}"
    if not any(seat.host == host for seat in assignment.seats):
        return "its copy is ending"
    lasting = [seat for seat in assignment.backups if seat.host not in cluster.drains]
    waits = [why for seat in lasting if (why := unsettled(app, cluster, seat))]
    kept = sum(seat.host not in cluster.drains for seat in assignment.seats)
    is_short = app.registration is not None and kept < app.registration.degree
    nobody = no_room(app, cluster) if is_short else ""
    return "; ".join(waits) or nobody or "it is being moved"


def no_room(app: AppView, cluster: ClusterView) -> str:
    """Say why no further host can hold a copy."""
    others = sorted(name for name in cluster.hosts if name not in app.seated_on and not is_away(cluster, name))
    refusals = app.assignment.refusals if app.assignment else {}
    refused = {name: f"{name}: {refusals[name]}" for name in others if name in refusals}
    unfit = [misfit(app, cluster, name) or refused.get(name, "") for name in others]
    if not all(unfit):
        return ""
    return NOBODY_ABLE + (f" ({'; '.join(unfit)})" if unfit else "")
