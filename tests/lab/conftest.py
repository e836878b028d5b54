"""Hosts as network namespaces on a bridge of their own; needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from tests.integration.conftest import repair
from tests.lab.network import Network

HOSTS = ("host-a", "host-b", "host-c")


@pytest.fixture(scope="session")
def rooted() -> None:
    """What network namespaces need."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("nsenter") is None:
        pytest.skip("network namespaces need root and the programs ip and nsenter")


@pytest.fixture(scope="module")
def network(rooted: None) -> Iterator[Network]:
    """A network of three hosts, for a module."""
    made = Network(f"{os.getpid() % 100000}", HOSTS)
    try:
        try:
            made.make()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        yield made
    finally:
        made.remove()


def mended(network: Network, cluster: LocalCluster) -> None:
    """Leave it as it was: every cable in, every host up, no application."""
    for host in HOSTS:
        network.mend(host)
    repair(cluster)


@pytest.fixture
def lab(network: Network, lab_hosts: LocalCluster) -> Iterator[LocalCluster]:
    """Three nodes, each in a namespace of its own, and an etcd that they reach over the network."""
    yield lab_hosts
    mended(network, lab_hosts)


@pytest.fixture(scope="module")
def lab_hosts(network: Network) -> Iterator[LocalCluster]:
    """The same, for a module."""
    prefixes = {host: network.prefix(host) for host in HOSTS}
    with (
        EmbeddedEtcd(address=network.address) as etcd,
        LocalCluster(HOSTS, etcd=etcd, cluster="lab", prefixes=prefixes) as cluster,
    ):
        yield cluster
