"""A real etcd and a cluster of real nodes on one machine, for tests of ours and of applications, and for the demo.

    from etcdreplica.testing import LocalCluster

    with LocalCluster(hosts=3) as cluster:
        cluster.start("app.py")
        cluster.wait_ready("app")
        cluster.kill_replica("app")                    # SIGKILL to the primary
        cluster.wait_ready("app")

With pytest the fixtures `etcd_server` and `etcd_cluster` give the same; see `etcdreplica.testing.pytest_plugin`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etcdreplica.testing.cluster import LocalCluster, LocalHost
    from etcdreplica.testing.etcd import EmbeddedEtcd, find_etcd

__all__ = ["EmbeddedEtcd", "LocalCluster", "LocalHost", "find_etcd"]


def __getattr__(name: str) -> Any:
    """Load on first use what needs gRPC: an application under test that imports a module beside it starts without."""
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(f"etcdreplica.testing.{'cluster' if name.startswith('Local') else 'etcd'}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
