"""Settings of the daemons, checked together when they are built."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from attrs import Factory, field, frozen

from etcdreplica.app.protocol import checkpoint_socket, default_socket
from etcdreplica.core.timing import Timing
from etcdreplica.daemon.addresses import check_listen
from etcdreplica.daemon.tls import PeerTls
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
    peer_tls: PeerTls = Factory(PeerTls)
    checkpoint_listen: str = "127.0.0.1:0"  # where its CheckpointServer answers others
    checkpoint_keep: int = 3  # of each application
    checkpoint_mib_s: float = 0.0  # at most so much is sent in a second, for all applications; 0: no limit

    def __attrs_post_init__(self) -> None:
        check_name("host name", self.host)
        check_name("cluster name", self.cluster)
        if self.capacity < 1:
            raise ConfigurationError(f"bad capacity {self.capacity}: a host must hold at least 1 replica")
        if not 0 < self.etcd.timeout_s <= self.timing.timeout_s:
            raise ConfigurationError(
                f"an etcd call may take {self.etcd.timeout_s:g} s, but the timing was made for {self.timing.timeout_s:g} s"
            )
        for listen in (self.peer_listen, self.checkpoint_listen):
            check_listen(listen, insecure=self.insecure or bool(self.peer_tls))
        if not 1 <= self.checkpoint_keep <= 1000:
            raise ConfigurationError(f"cannot keep {self.checkpoint_keep} checkpoints of an application: keep 1 to 1000")
        if self.checkpoint_mib_s and not 1 <= self.checkpoint_mib_s < float("inf"):
            raise ConfigurationError(
                f"bad checkpoint bandwidth {self.checkpoint_mib_s:g} MiB/s: use 0 (no limit), or 1 and more"
            )
        longest = checkpoint_socket(str(self.socket_path))
        if len(os.fsencode(longest)) > 107:
            raise ConfigurationError(f"the socket path {longest} is over 107 bytes, which Linux does not allow")

    def log_path(self, app: str) -> Path:
        """Where the output of an application's copies goes that this host starts; what was there before may be in FILE.1."""
        return self.state_dir / "logs" / f"{app}.log"

    @property
    def lease_ttl_s(self) -> float:
        """How long a lost host may go unnoticed."""
        return self.timing.lease_ttl_s
