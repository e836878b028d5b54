"""Checkpoints while hosts are cut off from the network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from etcdreplica.testing.stateful_client import Stateful
from tests.lab.conftest import HOSTS, mended
from tests.lab.network import Network

pytestmark = pytest.mark.lab


@pytest.fixture
def state_lab(network: Network, state_hosts: LocalCluster) -> Iterator[LocalCluster]:
    """The hosts of this module."""
    yield state_hosts
    mended(network, state_hosts)


@pytest.fixture(scope="module")
def state_hosts(network: Network) -> Iterator[LocalCluster]:
    """Three nodes whose CheckpointServers answer each other at their own addresses."""
    prefixes = {host: network.prefix(host) for host in HOSTS}
    arguments = {host: ["--checkpoint-listen", f"{network.address_of(host)}:0", "--insecure"] for host in HOSTS}
    with (
        EmbeddedEtcd(address=network.address) as etcd,
        LocalCluster(HOSTS, etcd=etcd, cluster="state", prefixes=prefixes, node_arguments=arguments) as cluster,
    ):
        yield cluster


def test_cut_off_primary_loses_nothing(network: Network, state_lab: LocalCluster) -> None:
    """What it has acknowledged is there elsewhere; what it cannot have held elsewhere is not acknowledged."""
    app = Stateful(state_lab, 2, host="host-b")
    assert app.ask("put", text="acknowledged")["error"] is None
    network.cut("host-b")
    told = app.ask("put", text="alone", timeout=0.5)
    assert told.get("kind") in ("NotDurableError", None), told  # None: it was ended before it could say so
    app.wait_replaced()
    about = app.ask("about")
    assert about["host"] != "host-b"
    assert about["text"] == "acknowledged"
    network.mend("host-b")
    state_lab.wait_until(lambda view: "host-b" in view.hosts, "host-b to be back")
    assert app.ask("put", text="later")["error"] is None


def test_cut_off_holder_is_replaced(network: Network, state_lab: LocalCluster) -> None:
    """The call waits until another host holds the state."""
    app = Stateful(state_lab, 2, host="host-a")
    assert app.ask("put", text="before")["error"] is None
    assignment = state_lab.view.apps[app.name].assignment
    assert assignment is not None
    network.cut(assignment.backups[0].host)
    assert app.ask("put", text="meanwhile")["error"] is None
    app.crash()
    assert app.ask("about")["text"] == "meanwhile"
