"""Settings of the daemons, checked together when they are built."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from attrs import Factory, field, frozen

from etcdreplica.app.protocol import default_socket
from etcdreplica.daemon.addresses import check_listen
from etcdreplica.errors import ConfigurationError
from etcdreplica.store import EtcdOptions
from etcdreplica.words import check_name

MIN_TTL_S = 2.0  # etcd grants no shorter lease with its default election timings
MAX_TTL_S = 600.0
FENCE_MARGIN_S = 0.5  # a WatchDog begins to kill this long before its lease could end


def default_state_directory() -> Path:
    """/var/lib/etcdreplica for root, else below $XDG_STATE_HOME or ~/.local/state."""
    if os.geteuid() == 0:
        return Path("/var/lib/etcdreplica")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "etcdreplica"


@frozen
class NodeSettings:
    """One host of one cluster. `lease_ttl_s` bounds how long a lost host goes unnoticed."""

    host: str = field(factory=lambda: socket.gethostname().partition(".")[0])
    cluster: str = "default"
    etcd: EtcdOptions = Factory(EtcdOptions)
    socket_path: Path = field(factory=lambda: Path(default_socket()))
    state_dir: Path = field(factory=default_state_directory)
    address: str = field(factory=socket.gethostname)
    labels: Mapping[str, str] = Factory(dict)
    capacity: int = 100
    lease_ttl_s: float = 5.0
    peer_listen: str = "127.0.0.1:0"  # where this host answers the probes of others
    insecure: bool = False  # whether others may reach it there without TLS

    def __attrs_post_init__(self) -> None:
        check_name("host name", self.host)
        check_name("cluster name", self.cluster)
        if self.capacity < 1:
            raise ConfigurationError(f"bad capacity {self.capacity}: a host must hold at least 1 replica")
        if not MIN_TTL_S <= self.lease_ttl_s <= MAX_TTL_S:
            raise ConfigurationError(
                f"bad lease TTL {self.lease_ttl_s:g} s: etcd grants no lease under {MIN_TTL_S:g} s, and one over "
                f"{MAX_TTL_S:g} s would leave a lost host unnoticed for too long"
            )
        if not 0 < self.etcd.timeout_s <= self.lease_ttl_s / 2:
            raise ConfigurationError(
                f"an etcd call may take {self.etcd.timeout_s:g} s, more than half the lease TTL of {self.lease_ttl_s:g} s: "
                "a lease must outlive a failed call"
            )
        check_listen(self.peer_listen, insecure=self.insecure)
        if len(os.fsencode(self.socket_path)) > 107:
            raise ConfigurationError(f"the socket path {self.socket_path} is over 107 bytes, which Linux does not allow")
