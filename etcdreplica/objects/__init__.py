"""Replicated objects: a plain class whose instances stay identical on several hosts.

The primary orders updates and streams them to the other copies; an update is acknowledged when every in-sync copy has it.
`methods` marks the methods, `machine` applies updates in order and remembers what was answered, `primary` and `backup` are the
two sides of the log (all pure); `server` and `client` connect them. This is primary-backup replication with etcd as the
configuration manager (the scheme of PacificA): etcd holds the in-sync set, and is not asked while that stays as it is.
"""
