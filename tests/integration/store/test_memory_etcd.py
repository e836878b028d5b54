"""The etcd in memory does what real ones do: both are given the same requests, in any order, and must answer alike.

Revisions are compared from where each example begins, because the real one is not empty; leases have the same identities
in both. What depends on real time (the end of a lease that is not renewed) is compared once, not in each example.
"""

from __future__ import annotations

import itertools
import queue
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from aetcd.rpc import kv_pb2 as kv
from aetcd.rpc import rpc_pb2 as rpc
from aetcd.rpc import rpc_pb2_grpc as stubs
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from etcdreplica.testing.etcd import EmbeddedEtcd
from etcdreplica.testing.memory_etcd import EtcdError, MemoryEtcd

pytestmark = pytest.mark.integration

PATIENCE_S = 20.0
_examples = itertools.count(1)
NAMES = st.sampled_from([b"a", b"b", b"c", b"d"])
LEASES = st.sampled_from([0, 0, 0, 1, 2])
COMPARED = st.sampled_from(["version", "create", "mod", "lease", "value"])


class Real:
    """A connection to a real etcd."""

    def __init__(self, endpoint: str) -> None:
        self._channel = grpc.insecure_channel(endpoint)
        self._stubs = {"KV": stubs.KVStub(self._channel), "Lease": stubs.LeaseStub(self._channel)}
        self._watch = stubs.WatchStub(self._channel)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def handle(self, name: str, request: Any) -> Any:
        """Answer one request. Raises EtcdError."""
        service, method = name.split(".")
        try:
            if method == "LeaseKeepAlive":
                return next(self._stubs[service].LeaseKeepAlive(iter([request])))
            return getattr(self._stubs[service], method)(request, timeout=PATIENCE_S)
        except grpc.RpcError as error:
            raise EtcdError(error.code(), error.details().removeprefix("etcdserver: ")) from None

    def watch(self, create: Any) -> tuple[Iterator[Any], queue.Queue[Any]]:
        """Begin a watch; return its answers, and the queue whose None ends it."""
        requests: queue.Queue[Any] = queue.Queue()
        requests.put(rpc.WatchRequest(create_request=create))
        return self._watch.Watch(iter(requests.get, None), timeout=PATIENCE_S), requests


@pytest.fixture
def real(server: EmbeddedEtcd) -> Iterator[Real]:
    """A connection to each etcd of this machine in turn."""
    connection = Real(server.endpoint)
    yield connection
    connection.close()


def machine(real: Real) -> type[RuleBasedStateMachine]:  # noqa: C901  (a class in a function, so that hypothesis can make it)
    """Return the state machine that compares with this etcd."""

    class Comparison(RuleBasedStateMachine):
        """The same requests to both."""

        @initialize()
        def begin(self) -> None:
            """Begin with a prefix and leases that were never used."""
            number = next(_examples)
            self.prefix = f"/compare/{number}/".encode()
            self.base = real.handle("KV.Put", rpc.PutRequest(key=self.prefix + b"@", value=b"")).header.revision
            self.memory = MemoryEtcd()
            self.memory.handle("KV.Put", rpc.PutRequest(key=self.prefix + b"@", value=b""), 0.0)
            self.shift = self.base - self.memory.revision
            self.first_lease = number * 10
            self.both("KV.Compact", lambda shift: rpc.CompactionRequest(revision=2 + shift, physical=True))

        # --- what is asked ---------------------------------------------------------------------------------------------

        @rule(name=NAMES, value=st.binary(max_size=3), lease=LEASES)
        def put(self, name: bytes, value: bytes, lease: int) -> None:
            """Write a key, under a lease or not."""
            self.both("KV.Put", lambda _: rpc.PutRequest(key=self.prefix + name, value=value, lease=self.lease(lease)))

        @rule(name=NAMES, every=st.booleans())
        def delete(self, name: bytes, every: bool) -> None:
            """Delete one key, or all from it on."""
            end = self.prefix + b"z" if every else b""
            self.both("KV.DeleteRange", lambda _: rpc.DeleteRangeRequest(key=self.prefix + name, range_end=end))

        @rule(data=st.data())
        def transaction(self, data: st.DataObject) -> None:
            """Compare, and then write one or the other."""
            compares = data.draw(st.lists(st.tuples(NAMES, COMPARED, st.integers(0, 3), st.integers(0, 3)), max_size=3))
            branches = [data.draw(st.lists(st.tuples(NAMES, st.integers(0, 3), LEASES), max_size=3)) for _ in range(2)]

            def request(shift: int) -> Any:
                return rpc.TxnRequest(
                    compare=[self.compare(*compare, shift) for compare in compares],
                    success=[self.operation(*operation) for operation in branches[0]],
                    failure=[self.operation(*operation) for operation in branches[1]],
                )

            self.both("KV.Txn", request)

        @rule(lease=st.sampled_from([1, 2]), ttl_s=st.integers(60, 90))
        def grant(self, lease: int, ttl_s: int) -> None:
            """Grant a lease, which may be there."""
            self.both("Lease.LeaseGrant", lambda _: rpc.LeaseGrantRequest(ID=self.lease(lease), TTL=ttl_s))

        @rule(lease=st.sampled_from([1, 2]))
        def revoke(self, lease: int) -> None:
            """Revoke a lease, which may not be there."""
            self.both("Lease.LeaseRevoke", lambda _: rpc.LeaseRevokeRequest(ID=self.lease(lease)))

        @rule(lease=st.sampled_from([1, 2]))
        def keep_alive(self, lease: int) -> None:
            """Renew a lease, which may not be there."""
            self.both("Lease.LeaseKeepAlive", lambda _: rpc.LeaseKeepAliveRequest(ID=self.lease(lease)))

        @rule(lease=st.sampled_from([1, 2]))
        def time_to_live(self, lease: int) -> None:
            """Ask for the keys of a lease."""
            request = rpc.LeaseTimeToLiveRequest(ID=self.lease(lease), keys=True)
            answers = [self.ask(etcd, "Lease.LeaseTimeToLive", request) for etcd in (real, self.memory)]
            assert sorted(answers[0].keys) == list(answers[1].keys)
            assert answers[0].grantedTTL == answers[1].grantedTTL
            assert (answers[0].TTL == -1) == (answers[1].TTL == -1)

        @rule(back=st.integers(-1, 3))
        def compact(self, back: int) -> None:
            """Forget what is older than some revision, which may be one to come, or gone already."""
            revision = self.memory.revision - back
            self.both("KV.Compact", lambda shift: rpc.CompactionRequest(revision=revision + shift, physical=True))

        @rule(back=st.integers(0, 5), name=st.sampled_from([b"a", b"b"]))
        def watch(self, back: int, name: bytes) -> None:
            """Watch from some revision on, up to a key that is written now."""
            start = self.memory.revision + 1 - back
            if start < 2:
                return
            key, end = self.prefix + name, self.prefix + b"z"
            told: list[Any] = []
            create = rpc.WatchCreateRequest(key=key, range_end=end, start_revision=start)
            watcher = self.memory.watch(create, 0, told.append)
            create.start_revision = start + self.shift
            answers, requests = real.watch(create)
            try:
                assert next(answers).created
                last = self.both("KV.Put", lambda _: rpc.PutRequest(key=self.prefix + b"y", value=b"end"))
                seen: list[Any] = []
                for answer in answers:
                    if answer.canceled:
                        assert watcher is None, "the real one forgets more"
                        assert told[-1].canceled
                        assert told[-1].compact_revision == answer.compact_revision - self.shift
                        return
                    seen += answer.events
                    if seen[-1].kv.mod_revision == last.header.revision:
                        break
            finally:
                requests.put(None)
                if watcher is not None:
                    self.memory.forget(watcher)
            assert watcher is not None, "the real one remembers more"
            expected = [_event(event, 0) for answer in told for event in answer.events]
            assert [_event(event, self.shift) for event in seen] == expected

        @invariant()
        def the_same_is_there(self) -> None:
            """Everything that can be read is the same."""
            if hasattr(self, "memory"):
                self.both("KV.Range", lambda _: rpc.RangeRequest(key=self.prefix, range_end=self.prefix + b"\xff"))

        # --- how it is compared ----------------------------------------------------------------------------------------

        def lease(self, number: int) -> int:
            return self.first_lease + number if number else 0

        def compare(self, name: bytes, target: str, result: int, number: int, shift: int) -> Any:
            revision = max(0, self.memory.revision - number)
            values: dict[str, tuple[str, int | bytes]] = {
                "version": ("version", number),
                "create": ("create_revision", revision + shift),
                "mod": ("mod_revision", revision + shift),
                "lease": ("lease", self.lease(number % 3)),
                "value": ("value", bytes([number])),
            }
            field, value = values[target]
            kind = {"version": 0, "create": 1, "mod": 2, "value": 3, "lease": 4}[target]
            return rpc.Compare(result=result, target=kind, key=self.prefix + name, **{field: value})

        def operation(self, name: bytes, kind: int, lease: int) -> Any:
            key = self.prefix + name
            if kind == 0:
                return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key))
            if kind == 1:
                return rpc.RequestOp(request_range=rpc.RangeRequest(key=key))
            return rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=bytes([kind]), lease=self.lease(lease)))

        def ask(self, etcd: Any, name: str, request: Any) -> Any:
            try:
                return etcd.handle(name, request) if etcd is real else etcd.handle(name, request, 0.0)
            except EtcdError as error:
                return error.code, error.text

        def both(self, name: str, request: Any) -> Any:
            """Ask both, compare the answers, and return the real one's."""
            theirs, ours = self.ask(real, name, request(self.shift)), self.ask(self.memory, name, request(0))
            if isinstance(theirs, tuple) or isinstance(ours, tuple):
                assert theirs == ours
            else:
                assert _plain(theirs, self.shift) == _plain(ours, 0)
            return theirs

    return Comparison


def _event(event: Any, shift: int) -> tuple[Any, ...]:
    return event.type == kv.Event.DELETE, _record(event.kv, shift)


def _record(record: Any, shift: int) -> tuple[Any, ...]:
    created = record.create_revision - shift if record.create_revision else 0
    return record.key, record.value, created, record.mod_revision - shift, record.version, record.lease


def _plain(answer: Any, shift: int) -> dict[str, Any]:
    """Return what of an answer can be compared."""
    plain: dict[str, Any] = {"revision": answer.header.revision - shift}
    for name in ("succeeded", "deleted", "count", "ID"):
        if name in answer.DESCRIPTOR.fields_by_name:
            plain[name] = getattr(answer, name)
    if "TTL" in answer.DESCRIPTOR.fields_by_name:
        plain["TTL"] = answer.TTL
    if "kvs" in answer.DESCRIPTOR.fields_by_name:
        plain["kvs"] = [_record(record, shift) for record in answer.kvs]
    for response in getattr(answer, "responses", ()):
        inner = getattr(response, response.WhichOneof("response"))
        found = {name: value for name, value in _plain(inner, shift).items() if name != "revision"}
        plain.setdefault("responses", []).append(found)
    return plain


def test_they_answer_alike(real: Real) -> None:
    """Any sequence of requests: keys, transactions, leases, compactions, watches."""
    run_state_machine_as_test(
        machine(real),
        settings=settings(
            max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
        ),
    )


def test_a_lease_that_is_not_renewed_ends(real: Real) -> None:
    """Its keys vanish at one revision after its time, which is at least what etcd grants to everybody."""
    memory = MemoryEtcd()
    grant = rpc.LeaseGrantRequest(ID=7_000_000, TTL=1)
    theirs, ours = real.handle("Lease.LeaseGrant", grant), memory.handle("Lease.LeaseGrant", grant, 0.0)
    assert theirs.TTL == ours.TTL == 2
    puts = [rpc.PutRequest(key=b"/expiry/" + name, value=b"1", lease=7_000_000) for name in (b"b", b"a")]
    for put in puts:
        real.handle("KV.Put", put)
        memory.handle("KV.Put", put, 0.0)
    create = rpc.WatchCreateRequest(key=b"/expiry/", range_end=b"/expiry0")
    told: list[Any] = []
    memory.watch(create, 0, told.append)
    answers, requests = real.watch(create)
    next(answers)
    assert memory.expire(1.99) == []
    assert memory.expire(2.0) == [7_000_000]
    events = [event for answer in told for event in answer.events]
    seen: list[Any] = []
    while len(seen) < 2:
        seen += next(answers).events
    requests.put(None)
    assert [(e.type, e.kv.key) for e in seen] == [(e.type, e.kv.key) for e in events]
    assert seen[0].kv.mod_revision == seen[1].kv.mod_revision
    assert real.handle("Lease.LeaseKeepAlive", rpc.LeaseKeepAliveRequest(ID=7_000_000)).TTL == 0
