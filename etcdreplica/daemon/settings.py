"""Settings of the daemons, checked together when they are built."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from attrs import Factory, field, frozen

from etcdreplica.app.protocol import default_socket
from etcdreplica.core.timing import Timing
from etcdreplica.daemon.addresses import check_listen
from etcdreplica.errors import ConfigurationError
from etcdreplica.store import EtcdOptions
from etcdreplica.words import check_name


def default_state_directory() -> Path:
    """/var/lib/etcdreplica for root, else below $XDG_STATE_HOME or ~/.local/state."""
    if os.geteuid() == 0:
        return Path("/var/lib/etcdreplica")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "etcdreplica"


@frozen
class NodeSettings:
    """One host of one cluster."""

    host: str = field(factory=lambda: socket.gethostname().partition(".")[0])
    cluster: str = "default"
    etcd: EtcdOptions = Factory(EtcdOptions)
    socket_path: Path = field(factory=lambda: Path(default_socket()))
    state_dir: Path = field(factory=default_state_directory)
    address: str = field(factory=socket.gethostname)
    labels: Mapping[str, str] = Factory(dict)
    capacity: int = 100
    timing: Timing = Factory(Timing)
    peer_listen: str = "127.0.0.1:0"  # where this host answers the probes of others
    insecure: bool = False  # whether others may reach it there without TLS

    def __attrs_post_init__(self) -> None:
        check_name("host name", self.host)
        check_name("cluster name", self.cluster)
        if self.capacity < 1:
            raise ConfigurationError(f"bad capacity {self.capacity}: a host must hold at least 1 replica")
        if not 0 < self.etcd.timeout_s <= self.timing.timeout_s:
            raise ConfigurationError(
                f"an etcd call may take {self.etcd.timeout_s:g} s, but the timing was made for {self.timing.timeout_s:g} s"
            )
        check_listen(self.peer_listen, insecure=self.insecure)
        if len(os.fsencode(self.socket_path)) > 107:
            raise ConfigurationError(f"the socket path {self.socket_path} is over 107 bytes, which Linux does not allow")

    @property
    def lease_ttl_s(self) -> float:
        """How long a lost host may go unnoticed."""
        return self.timing.lease_ttl_s
