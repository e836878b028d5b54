"""What the guardian remembers of each replica for the next WatchDog of this host, and of the host's stay itself."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import Factory, frozen

from etcdreplica.model import Placement, Replica

SESSION = "@session"  # wards that are no application's begin with @
OPENING = "@opening"  # the lease of a session that is being opened
SETTINGS = "@settings"  # what the WatchDog was told to work with
MANAGER = "@manager"
CHECKPOINTS = "@checkpoints"


@frozen
class Memo:
    """One incarnation: where it stands, and under which lease. `ended`: it is over, and must not be begun again.

    `object`: it is a copy of a replicated object. `vouchers`: with failsafe, who must vouch for it, and where they answer.
    """

    placement: Placement
    revision: int
    replica: Replica | None = None
    lease: int | None = None
    ttl_s: float = 0.0
    ended: bool = False
    object: bool = False
    vouchers: Mapping[str, str] = Factory(dict)


@frozen
class SessionMemo:
    """A host's stay in the cluster: the create revision of its key, and the lease."""

    session: int
    lease: int
    ttl_s: float
