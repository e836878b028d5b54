"""Checkpoints between hosts that show each other certificates."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

import pytest

from etcdreplica.checkpoint.peers import Peers
from etcdreplica.daemon.tls import PeerTls
from etcdreplica.errors import CheckpointError
from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from etcdreplica.testing.stateful_client import Stateful
from tests.integration.store.test_store_tls import Authority

pytestmark = pytest.mark.integration


def options(authority: Authority, host: str) -> tuple[str, ...]:
    """What a node is told, with a certificate of its own."""
    cert, key = authority.issue(host, "IP:127.0.0.1")
    return ("--peer-ca", authority.ca_file, "--peer-cert", cert, "--peer-key", key)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made with openssl")
def test_only_hosts_with_certificates(etcd_server: EmbeddedEtcd, tmp_path: Path) -> None:
    """Two hosts of one CA hold a state; one of another CA, and a client without any, are not heard."""
    ours, others = Authority(tmp_path / "ours"), Authority(tmp_path / "others")
    arguments = {host: options(ours, host) for host in ("host-a", "host-b")}
    arguments["host-c"] = options(others, "host-c")
    name = f"tls-{time.monotonic_ns()}"
    with LocalCluster(3, etcd=etcd_server, cluster=name, lease_ttl_s=5, node_arguments=arguments) as cluster:
        app = Stateful(cluster, 3, "cold", host="host-a")
        told = app.ask("put", text="between two", timeout=5.0)
        assert (told["kind"], told["reached"]) == ("NotDurableError", 2), told
        assert "host-c: " in told["error"]
        cert, key = ours.issue("client", "IP:127.0.0.1")
        address = cluster.servers["host-b"].address
        assert asyncio.run(have(PeerTls(ours.ca_file, cert, key), address, app.name)) == b"between two"
        for stranger in (PeerTls(), PeerTls(others.ca_file, *others.issue("stranger", "IP:127.0.0.1"))):
            with pytest.raises(CheckpointError, match="unavailable"):
                asyncio.run(have(stranger, address, app.name))


async def have(tls: PeerTls, address: str, app: str) -> bytes:
    """Ask a CheckpointServer for the newest state of an application."""
    peers = Peers(tls)
    try:
        holds = await peers.have("host-b", address, app, 0, 5.0)
        pieces = [data async for _, data in peers.fetch(address, holds.manifests[0], range(holds.manifests[0].count))]
        return b"".join(pieces)
    finally:
        await peers.close()
