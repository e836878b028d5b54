"""Asking etcd for its origin: before the first call, and after each failure, since another one may answer then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aetcd.rpc import rpc_pb2 as rpc

from etcdreplica.model import Origin
from etcdreplica.store.keys import Key, Kind, decode, encode
from etcdreplica.store.lineage import Lineage, first_origin

LINEAR = ("KV.Range", "KV.Txn")  # their answers are never older than what was told before they were asked for


class OriginCheck:
    """Belongs to one channel; `path` is the key of the origin. Whoever calls `verify` holds `asking`."""

    def __init__(self, path: bytes, lineage: Lineage) -> None:
        self._path = path
        self._lineage = lineage
        self.is_sure = False
        self.asking = asyncio.Lock()

    def doubt(self) -> None:
        """Ask again before the next call."""
        self.is_sure = False

    def expected(self, name: str) -> int:
        """Return the revision that the answer to a call which is made now must have at least."""
        return self._lineage.revision if name in LINEAR else 0

    def see(self, answer: Any, at_least: int = 0) -> None:
        """Look at an answer. Raises EtcdReplacedError."""
        try:
            self._lineage.see(answer.header, at_least)
        except Exception:
            self.doubt()
            raise

    async def verify(self, method: Callable[[str], Any], timeout_s: float, metadata: Any) -> None:
        """See that it is the etcd of before, unless that is certain; `method` gives the methods of its connection.

        Raises EtcdReplacedError, or what gRPC raises.
        """
        if self.is_sure:  # somebody else has asked
            return
        options = {"timeout": timeout_s, "metadata": metadata}
        read = rpc.RangeRequest(key=self._path)
        at_least = self._lineage.revision
        answer = await method("KV.Range")(read, **options)
        if not answer.kvs and self._lineage.known is None:
            await method("KV.Txn")(_create(self._path), **options)
            answer = await method("KV.Range")(read, **options)
        found = decode(Key(Kind.ORIGIN, ("",)), answer.kvs[0].value) if answer.kvs else None
        self._lineage.verify(answer.header, found if isinstance(found, Origin) else None, at_least)
        self.is_sure = True


def _create(path: bytes) -> Any:
    """Write the first origin, unless somebody else has."""
    absent = rpc.Compare(result=rpc.Compare.EQUAL, target=rpc.Compare.MOD, key=path, mod_revision=0)
    put = rpc.RequestOp(request_put=rpc.PutRequest(key=path, value=encode(first_origin())))
    return rpc.TxnRequest(compare=[absent], success=[put])
