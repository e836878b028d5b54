"""Transactions in terms of records: what must hold, then what is written."""

from __future__ import annotations

from typing import Any

from aetcd.rpc import rpc_pb2 as rpc
from attrs import frozen

from etcdreplica.store.keys import Key, Keyspace, encode


@frozen
class Unchanged:
    """The key's mod revision is still this one; 0 means that the key does not exist."""

    key: Key
    mod_revision: int


@frozen
class Exists:
    """The key exists, and was created at `create_revision` if that is given."""

    key: Key
    create_revision: int | None = None


@frozen
class Held:
    """The key exists under this lease."""

    key: Key
    lease: int


@frozen
class Put:
    """Write a record, under a lease if one is given."""

    key: Key
    value: Any
    lease: int = 0


@frozen
class Delete:
    """Delete a key; deleting one that does not exist is no error."""

    key: Key


Condition = Unchanged | Exists | Held
Operation = Put | Delete


@frozen
class Txn:
    """If every condition holds, do `then`, otherwise `otherwise`: all of it at one revision, or nothing."""

    when: tuple[Condition, ...]
    then: tuple[Operation, ...]
    otherwise: tuple[Operation, ...] = ()


@frozen
class TxnResult:
    """Whether the conditions held, and the revision of the store after the transaction."""

    succeeded: bool
    revision: int


def to_request(txn: Txn, keys: Keyspace) -> Any:
    """Translate to etcd's own message."""
    return rpc.TxnRequest(
        compare=[_compare(condition, keys) for condition in txn.when],
        success=[_operation(operation, keys) for operation in txn.then],
        failure=[_operation(operation, keys) for operation in txn.otherwise],
    )


def _compare(condition: Condition, keys: Keyspace) -> Any:
    path, compare = keys.path(condition.key), rpc.Compare
    if isinstance(condition, Unchanged):
        return compare(result=compare.EQUAL, target=compare.MOD, key=path, mod_revision=condition.mod_revision)
    if isinstance(condition, Held):
        return compare(result=compare.EQUAL, target=compare.LEASE, key=path, lease=condition.lease)
    if condition.create_revision is None:
        return compare(result=compare.GREATER, target=compare.CREATE, key=path, create_revision=0)
    return compare(result=compare.EQUAL, target=compare.CREATE, key=path, create_revision=condition.create_revision)


def _operation(operation: Operation, keys: Keyspace) -> Any:
    path = keys.path(operation.key)
    if isinstance(operation, Put):
        put = rpc.PutRequest(key=path, value=encode(operation.value), lease=operation.lease)
        return rpc.RequestOp(request_put=put)
    return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=path))
