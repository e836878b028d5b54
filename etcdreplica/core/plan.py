"""What the planner takes besides the picture of the cluster, and what it gives."""

from __future__ import annotations

from attrs import Factory, define, frozen

from etcdreplica.core.restarts import RestartPolicy
from etcdreplica.model import Assignment, Event

HISTORY_KEPT = 20  # events of an application


@frozen
class PlannerSettings:
    """Seconds throughout."""

    restart: RestartPolicy = Factory(RestartPolicy)
    start_grace_s: float = 15.0  # a host that is up shows a replica it was given within this
    refusal_retry_s: float = 30.0  # a host that refused the program is asked again after this
    quiet_s: float = 30.0  # a primary leaves a drained host while nothing starts, or after this
    failed_host_s: float = 60.0  # a host where the application just failed is chosen last


@define
class Memory:
    """What one manager remembers of one application."""

    missing_since: dict[int, float] = Factory(dict)
    refused_at: dict[str, float] = Factory(dict)
    failed_at: dict[str, float] = Factory(dict)
    running_since: tuple[int, float] | None = None
    heir_since: float | None = None  # when a primary could first have left a drained host
    primary_hold_until: float | None = None
    backup_hold_until: float | None = None
    recent: dict[int, float] | None = None  # failures of primaries within the window, by incarnation

    def clear(self) -> None:
        """Begin anew, as for an application that was registered once more."""
        self.__init__()  # type: ignore[misc]


@frozen
class Plan:
    """What to write, in one transaction. `assignment` None means to delete what is left of the application."""

    assignment: Assignment | None
    consumed: tuple[int, ...] = ()  # incarnations whose failure records are dealt with
    events: tuple[Event, ...] = ()
    answered: bool = False  # what a person asked for has begun, or there is nothing left to do


@frozen
class Decision:
    """`plan` None: nothing to write now. `wake_at`: ask again then, even if nothing has changed."""

    plan: Plan | None = None
    wake_at: float | None = None
