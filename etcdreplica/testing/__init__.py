"""A real etcd and a cluster of real nodes on one machine, for tests of ours and of applications, and for the demo.

    from etcdreplica.testing import LocalCluster

    with LocalCluster(hosts=3) as cluster:
        cluster.start("app.py")
        cluster.wait_ready("app")
        cluster.kill_replica("app")                    # SIGKILL to the primary
        cluster.wait_ready("app")

With pytest the fixtures `etcd_server` and `etcd_cluster` give the same; see `etcdreplica.testing.pytest_plugin`.
"""

from etcdreplica.testing.cluster import LocalCluster, LocalHost
from etcdreplica.testing.etcd import EmbeddedEtcd, find_etcd

__all__ = ["EmbeddedEtcd", "LocalCluster", "LocalHost", "find_etcd"]
