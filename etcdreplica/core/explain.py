"""Why an application is as it is: each host with its part in it and the reason, by the rules of the planner themselves."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen

from etcdreplica.core.moves import is_up, misfit, no_room, unready
from etcdreplica.core.plan import PlannerSettings
from etcdreplica.core.planner import foresee
from etcdreplica.core.view import UNDER_WAY, AppView, ClusterView
from etcdreplica.model import Assignment, AssignmentState, Event, Registration, Seat


@frozen
class Part:
    """What one host is to the application, and why it is no more."""

    host: str
    part: str  # primary, successor, backup, next, spare, unfit or down
    reason: str


@frozen
class Explanation:
    """`reasons`: what there is to say of the application as a whole, the gravest first."""

    reasons: tuple[str, ...]
    hosts: tuple[Part, ...]


def explain(app: AppView, cluster: ClusterView, history: tuple[Event, ...] = ()) -> Explanation:
    """Explain an application that is registered, or was until a moment ago. `history`: its events."""
    reasons = tuple(_standing_still(app, cluster))
    assignment, registration = app.assignment, app.registration
    if registration is None or app.corrupt:
        return Explanation(reasons, ())
    why, following = foresee(app, cluster, PlannerSettings())
    seats = assignment.seats if assignment else ()
    parts = [_seated(app, cluster, seat, why, history) for seat in seats]
    others = sorted({*cluster.hosts, *registration.hosts} - {seat.host for seat in seats})
    wanting = assignment is None or assignment.state in UNDER_WAY
    parts += [_unseated(app, cluster, host, following if wanting else None) for host in others]
    if wanting and assignment is not None:
        reasons += tuple(_under_way(app, cluster, assignment, registration, why))
    return Explanation(reasons, tuple(parts))


def _standing_still(app: AppView, cluster: ClusterView) -> Iterator[str]:
    """What keeps the manager from doing anything, or from doing it soon."""
    name, assignment = app.name, app.assignment
    for error in app.corrupt.values():
        yield f"it is left alone, because {error}"
    for what, pause, resumed in (("it", app.pause, name), ("the whole cluster", cluster.pause, "--all")):
        if pause:
            yield f"{what} is paused by {pause.by}{_because(pause.reason)}: 'etcdreplica resume {resumed}' ends that"
    if app.request is not None:
        yield f"{app.request.by} asks for: {app.request.ask}{f' to {app.request.to}' if app.request.to else ''}"
    if assignment is None:
        yield "no manager has looked at it yet: see 'etcdreplica leaders'"
        return
    if assignment.leaving is not None:
        yield f"its primary is ending: {assignment.leaving.reason}"
    if assignment.state is not AssignmentState.ACTIVE:
        yield f"it is {assignment.state}{_because(assignment.reason)}"
    if assignment.state in (AssignmentState.FAILED, AssignmentState.STOPPED):
        yield f"'etcdreplica resume {name}' starts it again"


def _under_way(
    app: AppView, cluster: ClusterView, assignment: Assignment, registration: Registration, why: str
) -> Iterator[str]:
    if assignment.degraded:
        text = f"it is degraded: {len(assignment.seats)} of {registration.degree} copies have a place"
        yield text + _because(no_room(app, cluster))
    if assignment.primary is None:
        return
    if not is_up(cluster, assignment.primary):
        yield f"the host of its primary, {assignment.primary.host}, is down: a manager is about to act, if one leads"
    elif assignment.successor is not None:
        yield f"when its primary fails, {assignment.successor} takes over at once, without a manager"
    elif registration.degree > 1:
        waits = [reason for seat in assignment.backups if (reason := unready(app, cluster, seat))]
        reason = why or "; ".join(waits) or ("it has no backup" if not assignment.backups else "a manager is about to name one")
        yield f"when its primary fails, nobody takes over at once: {reason}"


def _seated(app: AppView, cluster: ClusterView, seat: Seat, why: str, history: tuple[Event, ...]) -> Part:
    assignment = app.assignment
    assert assignment is not None
    reason = unready(app, cluster, seat)
    drained = "; it moves away, because the host is drained" if seat.host in cluster.drains else ""
    if seat == assignment.primary:
        return Part(seat.host, "primary", _came(app, seat, history) + (f"; {reason}" if reason else "") + drained)
    if seat.host == assignment.successor:
        return Part(seat.host, "successor", "ready: it takes over when the primary fails" + drained)
    return Part(seat.host, "backup", (reason or (f"ready, but {why}" if why else "ready")) + drained)


def _came(app: AppView, seat: Seat, history: tuple[Event, ...]) -> str:
    """Say how the primary came to be where it is."""
    assert app.assignment is not None
    for event in reversed(history):
        if event.primary == seat.host and event.epoch == app.assignment.epoch:
            failure = event.failure
            return f"since epoch {event.epoch}: the {failure.role} on {failure.host} ended ({failure.reason})"
    origin = app.registration.origin if app.registration else None
    return f"since epoch {app.assignment.epoch}" + (": it was registered from here" if origin == seat.host else "")


def _unseated(app: AppView, cluster: ClusterView, host: str, following: str | None) -> Part:
    if host not in cluster.hosts:
        return Part(host, "down", "it is among its hosts, and not up")
    if reason := misfit(app, cluster, host):
        return Part(host, "unfit", reason)
    if host in cluster.drains:
        drain = cluster.drains[host]
        return Part(
            host, "unfit", f"it is drained by {drain.by}{_because(drain.reason)}: 'etcdreplica undrain {host}' ends that"
        )
    if cluster.is_silent(host):
        return Part(host, "unfit", "its peers cannot reach it")
    if app.assignment is not None and host in app.assignment.refusals:
        return Part(host, "unfit", f"it cannot run it ({app.assignment.refusals[host]}), and is asked again from time to time")
    if host == following:
        return Part(host, "next", "it would get the next copy; a copy moves only when it fails, or its host is lost or drained")
    return Part(host, "spare", "it could have a copy; another host comes first" if following else "it could have a copy")


def _because(reason: str) -> str:
    return f" ({reason})" if reason else ""
