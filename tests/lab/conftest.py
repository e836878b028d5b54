"""Hosts as network namespaces on a bridge of their own; needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
import zlib
from collections.abc import Iterator

import pytest
from attrs import frozen

from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from tests.integration.conftest import repair

HOSTS = ("host-a", "host-b", "host-c")
FIRST = 10  # of their addresses


@frozen
class Network:
    """One bridge, with an address of this machine on it, and one namespace for each host."""

    tag: str

    @property
    def _subnet(self) -> str:
        """One of its own: several labs may run at a time."""
        return f"10.213.{zlib.crc32(self.tag.encode()) % 250 + 1}"

    @property
    def address(self) -> str:
        """The address at which the hosts reach this machine."""
        return f"{self._subnet}.1"

    def address_of(self, host: str) -> str:
        """The address of a host."""
        return f"{self._subnet}.{FIRST + HOSTS.index(host)}"

    def namespace(self, host: str) -> str:
        """The namespace of a host."""
        return f"er{self.tag}-{host}"

    def cut(self, host: str) -> None:
        """Take the host's cable out."""
        _ip("link", "set", self._cable(host), "down")

    def mend(self, host: str) -> None:
        """Put it in again."""
        _ip("link", "set", self._cable(host), "up")

    def make(self) -> None:
        """Make the bridge and the namespaces."""
        bridge = f"er{self.tag}"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for host in HOSTS:
            name, inner = self.namespace(host), f"er{self.tag}i{host[-1]}"
            _ip("netns", "add", name)
            _ip("link", "add", self._cable(host), "type", "veth", "peer", "name", inner)
            _ip("link", "set", inner, "netns", name)
            _ip("link", "set", self._cable(host), "master", bridge, "up")
            _ip("-n", name, "addr", "add", f"{self.address_of(host)}/24", "dev", inner)
            _ip("-n", name, "link", "set", inner, "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def remove(self) -> None:
        """Remove all of it, as far as it was made."""
        for host in HOSTS:
            _ip("netns", "del", self.namespace(host), check=False)
            _ip("link", "del", self._cable(host), check=False)
        _ip("link", "del", f"er{self.tag}", check=False)

    def _cable(self, host: str) -> str:
        return f"er{self.tag}o{host[-1]}"


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True, timeout=30)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """A network of three hosts, for a module."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program ip")
    made = Network(f"{os.getpid() % 100000}")
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
    prefixes = {host: ("ip", "netns", "exec", network.namespace(host)) for host in HOSTS}
    with (
        EmbeddedEtcd(address=network.address) as etcd,
        LocalCluster(HOSTS, etcd=etcd, cluster="lab", prefixes=prefixes) as cluster,
    ):
        yield cluster
