"""Asking etcd for its origin: before the first call, and after each failure, since another one may answer then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aetcd.rpc import rpc_pb2 as rpc
from attrs import frozen

from etcdreplica.model import Origin
from etcdreplica.store.keys import Key, Kind, decode, encode
from etcdreplica.store.lineage import Lineage, first_origin

LINEAR = ("KV.Range", "KV.Txn")  # their answers are never older than what was told before they were asked for


@frozen
class Answer:
    """What an etcd says of its origin; `at_least`: the revision that had been told when it was asked."""

    header: Any
    origin: Origin | None
    at_least: int


class OriginCheck:
    """Belongs to one channel; `path` is the key of the origin. Whoever asks holds `asking`."""

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

    async def ask(self, method: Callable[[str], Any], timeout_s: float, metadata: Any) -> Answer:
        """Ask an etcd for its origin; `method` gives the methods of a connection. Raises what gRPC raises."""
        options = {"timeout": timeout_s, "metadata": metadata}
        read = rpc.RangeRequest(key=self._path)
        at_least = self._lineage.revision
        answer = await method("KV.Range")(read, **options)
        if not answer.kvs and self._lineage.known is None:
            await method("KV.Txn")(_create(self._path), **options)
            answer = await method("KV.Range")(read, **options)
        found = decode(Key(Kind.ORIGIN, ("",)), answer.kvs[0].value) if answer.kvs else None
        return Answer(answer.header, found if isinstance(found, Origin) else None, at_least)

    def believe(self, answer: Answer) -> None:
        """Be sure that it is the etcd of before. Raises EtcdReplacedError when it is not."""
        self._lineage.verify(answer.header, answer.origin, answer.at_least)
        self.is_sure = True


def _create(path: bytes) -> Any:
    """Write the first origin, unless somebody else has."""
    absent = rpc.Compare(result=rpc.Compare.EQUAL, target=rpc.Compare.MOD, key=path, mod_revision=0)
    put = rpc.RequestOp(request_put=rpc.PutRequest(key=path, value=encode(first_origin())))
    return rpc.TxnRequest(compare=[absent], success=[put])
