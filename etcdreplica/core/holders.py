"""Which hosts hold what of an application's checkpoints, and what may therefore be acknowledged.

The *holders* are the in-sync set, written in etcd. A checkpoint is acknowledged only when each of them holds it. So whatever
was acknowledged is on every holder, and whoever restores must either be one or ask one. The set changes in etcd only, by the
primary's CheckpointServer: a host joins when it holds all that was acknowledged, and leaves when it has no seat any more or
does not answer, but not before others make up for it. While a change is being written both sets must hold what is
acknowledged, since it may have happened.

This is primary-backup replication with etcd as the configuration manager, for a state that is replaced as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet

from etcdreplica.model import Stamp

NOTHING = Stamp()


def durable(holders: Iterable[str], held: Mapping[str, Stamp]) -> Stamp:
    """Return the newest checkpoint that all of them hold, or one before all."""
    return min((held.get(host, NOTHING) for host in holders), default=NOTHING)


def acknowledged(holders: AbstractSet[str], changing: AbstractSet[str], held: Mapping[str, Stamp], copies: int) -> Stamp:
    """Return the newest checkpoint that may be acknowledged as being on `copies` hosts.

    `holders` stand in etcd; `changing` are those of a change that is being written, or none.
    """
    if len(holders) < copies:
        return NOTHING
    return durable(holders | changing, held)


def next_holders(
    me: str,
    holders: AbstractSet[str],
    seats: AbstractSet[str],
    silent: AbstractSet[str],
    held: Mapping[str, Stamp],
    least: Stamp,
    copies: int,
) -> frozenset[str] | None:
    """Return what the holders should become, or None if they are as they should be, or cannot be said yet.

    `seats` are the hosts that should hold it, `silent` those that do not answer, `held` what each is known to hold, `least`
    the newest checkpoint that was acknowledged or stands in etcd: nobody joins with less. Fewer than `copies` acknowledge
    nothing, so whoever would leave fewer stays: what it holds is still all that was acknowledged, and may be all that is left.
    """
    if held.get(me, NOTHING) < max(least, Stamp(1)):
        return None  # we do not know enough to speak for anybody
    stay = {host for host in holders if host in seats and host not in silent}
    join = {host for host in seats - holders if host not in silent and held.get(host, NOTHING) >= max(least, Stamp(1))}
    found = frozenset(stay | join | {me})
    leaving = sorted(holders - found, key=lambda host: (host in seats, held.get(host, NOTHING), host), reverse=True)
    found |= frozenset(leaving[: max(0, copies - len(found))])
    return None if found == holders else found


def may_restore(me: str, holders: AbstractSet[str], here: Stamp, recorded: Stamp, *, damaged: bool) -> bool:
    """Whether what is on this host is all that was ever acknowledged.

    `here` is the newest checkpoint on it; `recorded` stands in etcd: a holder that has less has lost its disk.
    """
    return not holders or (me in holders and here >= recorded and not damaged)


def enough(holders: AbstractSet[str], answers: Mapping[str, Stamp], lossy: AbstractSet[str], recorded: Stamp) -> bool:
    """Whether the hosts that answered know all that was ever acknowledged, or all that is left of it.

    `answers` has the newest checkpoint of each host that answered; `lossy` are those that have lost a newer one.
    """
    trusted = (answers[host] for host in holders if host in answers and host not in lossy)
    return holders <= answers.keys() or any(stamp >= recorded for stamp in trusted)
