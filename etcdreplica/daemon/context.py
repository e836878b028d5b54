"""What all runs of one session of a host share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from attrs import frozen

from etcdreplica.clock import Clock
from etcdreplica.daemon.failsafe import Failsafe
from etcdreplica.daemon.guard import Guard
from etcdreplica.daemon.hooks import Notifier
from etcdreplica.daemon.machine import Machine
from etcdreplica.daemon.objects import Copies
from etcdreplica.daemon.settings import NodeSettings
from etcdreplica.daemon.state_file import StateFile
from etcdreplica.daemon.turns import Turns
from etcdreplica.store import Lease, Store


@frozen
class HostContext:
    """One stay of this host in the cluster."""

    settings: NodeSettings
    store: Store
    clock: Clock
    guard: Guard
    starts: Turns
    handovers: Turns
    state: StateFile
    copies: Copies
    machine: Machine
    notifier: Notifier
    failsafe: Failsafe
    extended: Callable[[], None]  # to be called when what runs here may run for longer
    session: int
    lease: Lease  # of the host

    @property
    def host(self) -> str:
        """The name of this host."""
        return self.settings.host

    def log_path(self, app: str) -> Path:
        """Where the output of an application's replica goes."""
        return self.settings.log_path(app)
