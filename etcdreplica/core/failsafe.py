"""failsafe: a primary that runs on without its lease while every backup's WatchDog promises not to let one of its own lead.

For an outage of etcd in which nobody can be promoted anyway. The rules, each on the clock of whoever keeps it:

- `vouchers/<app>` in etcd names the hosts that must promise. The primary's WatchDog writes it while etcd is there. From then on
  only these may be promoted after the primary, until it is known to be dead: its WatchDog has said so, its host has begun a
  new stay, or another one leads. So whoever could be promoted has been asked.
- A promise holds for `VOUCH_S` from when it was given. The primary counts it from when it asked.
- A host that is told to lead, while the primary before is not known to be dead, promises nothing more from then on, and waits
  until its last promise is over. A WatchDog that has just started cannot know what the one before it has promised, and waits
  as if it had promised at its start.

Limits: a host name stands for one machine. With all vouchers lost, the application waits until one of them, or the host of
the primary, is back.
"""

from __future__ import annotations

from attrs import Factory, define

from etcdreplica.core.view import AppView, ClusterView
from etcdreplica.model import FailureKind, Vouchers
from etcdreplica.words import Role

VOUCH_S = 5.0  # how long a promise holds
ASK_AFTER = 0.45  # of a TTL without a confirmed renewal
ASK_S = 0.7  # between two rounds of asking
ANSWER_S = 0.5  # how long an answer may take

UNSEEN = (FailureKind.HOST, FailureKind.LOST)  # nobody has seen that replica dead


def in_doubt(app: AppView, cluster: ClusterView) -> Vouchers | None:
    """Return the record of a primary that may run, with its lease or without, unless it is known to be dead."""
    record = app.vouchers
    if record is None or not record.hosts or record.epoch < app.born:
        return None
    host, failure = cluster.hosts.get(record.host), app.failures.get(record.incarnation)
    began_anew = host is not None and host.session != record.session
    reported = failure is not None and failure.kind not in UNSEEN
    followed = any(died == record.incarnation for died, _ in app.successions.values())
    outranked = any(replica.role is Role.PRIMARY and replica.epoch > record.epoch for replica in app.replicas.values())
    return None if began_anew or reported or followed or outranked else record


@define
class Promises:
    """What the WatchDog of one host has promised since `began_at`."""

    began_at: float
    _until: dict[str, float] = Factory(dict)  # by application

    def give(self, app: str, now: float) -> float:
        """Promise that no copy here begins to lead for a while; return until when."""
        until = self._until[app] = now + VOUCH_S
        return until

    def free_at(self, app: str) -> float:
        """Return from when on a copy here may lead."""
        return max(self._until.get(app, 0.0), self.began_at + VOUCH_S)
