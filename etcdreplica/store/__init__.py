"""Everything that touches etcd; nothing else in the package imports it or gRPC for it.

`Store` reads, writes and follows typed records; `LeaseKeeper` renews leases on a few streams; `Election` chooses a leader
whose writes are fenced. Errors of gRPC and etcd leave as `errors.StoreError`.
"""

from etcdreplica.store.channel import EtcdOptions
from etcdreplica.store.election import Election
from etcdreplica.store.keys import Corrupt, Entry, Key, Keyspace, Kind
from etcdreplica.store.leases import Lease, LeaseKeeper
from etcdreplica.store.lineage import Lineage, accepted_origin
from etcdreplica.store.store import Changes, Snapshot, Store
from etcdreplica.store.txn import Delete, Exists, Held, Put, Txn, TxnResult, Unchanged

__all__ = [
    "Changes",
    "Corrupt",
    "Delete",
    "Election",
    "Entry",
    "EtcdOptions",
    "Exists",
    "Held",
    "Key",
    "Keyspace",
    "Kind",
    "Lease",
    "LeaseKeeper",
    "Lineage",
    "Put",
    "Snapshot",
    "Store",
    "Txn",
    "TxnResult",
    "Unchanged",
    "accepted_origin",
]
