"""A cluster of etcd in a simulated world: `MemoryEtcd` behind a network that delays, loses and cuts, with members that fail.

`SimulatedEtcd.channel` returns what `grpc.aio.insecure_channel` would, as far as `store.channel` uses it, so that the retries,
streams and timeouts of the store are the real ones. Every chance comes from one `Random`.

What can go wrong here: a member is down (connections are refused), or frozen (silent; all it was sent is answered later), and
if it led, the others have no leader until they elect one, and never answer the renewals that they have passed on to it; the
cluster has no leader (calls wait, fail, or happen although they failed; all leases begin anew with the next leader); an answer
is lost; a watch is compacted, broken, or falls silent; a link is cut in one direction or both, and what was under way may come
through when it is whole again, even after the caller has given up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any, NoReturn

import grpc
from aetcd.rpc import rpc_pb2 as rpc

from etcdreplica.testing.memory_etcd import EtcdError, MemoryEtcd, Watcher
from etcdreplica.testing.simulated_loop import Handle, World

EXPIRY_CHECK_S = 0.5  # etcd looks for leases that are over this often
_UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
_STREAMS = {"Lease.LeaseKeepAlive", "Watch.Watch"}


def failure(code: grpc.StatusCode, text: str) -> grpc.aio.AioRpcError:
    """Return the error that grpc would raise."""
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=text)


class Link:
    """The network between one host and etcd: each direction whole or cut, with a delay."""

    def __init__(self, world: World, random: Random) -> None:
        self.delay_s = 0.0003
        self.answer_delay_s = 0.0  # how much more an answer takes
        self.out_cut = False
        self.in_cut = False
        self.lose_answers = 0.0  # how likely an answer never comes
        self._world = world
        self._random = random
        self._held: list[tuple[Callable[[], None], Callable[[], None]]] = []

    def send(self, deliver: Callable[[], None], lose: Callable[[], None], *, out: bool, not_before: float = 0.0) -> float:
        """Have something arrive at the other end, some time; return when. `lose` is called if its connection breaks first."""
        if self.out_cut if out else self.in_cut:
            self._held.append((deliver, lose))
            return not_before
        world = self._world
        at = world.now + self.delay_s * (0.5 + self._random.random()) + (0.0 if out else self.answer_delay_s)
        if at < not_before:
            at = not_before
        world.at(at, deliver)
        return at

    def mend(self) -> None:
        """Make it whole. What was under way comes through now, or its connections break."""
        self.out_cut = self.in_cut = False
        waiting, self._held = self._held, []
        through = self._random.random() < 0.5
        for deliver, lose in waiting:
            self._world.after(self.delay_s, deliver if through else lose)


class SimulatedEtcd:
    """Several members with one store behind them. Methods named after faults."""

    def __init__(self, world: World, random: Random, endpoints: tuple[str, ...]) -> None:
        self.store = MemoryEtcd(random)
        self.endpoints = endpoints
        self.world = world
        self.random = random
        self.down: set[str] = set()
        self.frozen: set[str] = set()
        self.has_leader = True
        self.leader = endpoints[1 % len(endpoints)]  # not the one that all use first
        self.election_s = 1.0  # followers wait once to twice as long for a leader before they elect another one
        self.commit_s = 0.001  # what a write costs beside the network
        self.calls = 0
        self._waiting: deque[tuple[str, Callable[[], None], Callable[[str], None]]] = deque()
        self._streams: dict[SimulatedStream, None] = {}
        self._expiring: Handle | None = None
        self._election: Handle | None = None

    # --- faults ----------------------------------------------------------------------------------------------------------

    def lose_leader(self) -> None:
        """No leader until `elect`: nothing is served, no lease ends, and many streams break."""
        self._end_election()
        self.has_leader = False
        self.break_streams(0.5)

    def elect(self) -> None:
        """Have a leader again: each lease gets its whole time anew. What waited is lost, done, or done without an answer."""
        self._end_election()
        self.has_leader = True
        able = [each for each in self.endpoints if each not in self.down | self.frozen]
        if self.leader not in able and able:
            self.leader = self.random.choice(able)
        self.store.extend_all(self.world.now)
        self._serve_waiting(lossy=True)
        self._watch_expiry()

    def freeze(self, endpoint: str) -> None:
        """Stop a member: it keeps its connections and says nothing."""
        self.frozen.add(endpoint)
        self._miss_leader()

    def thaw(self, endpoint: str) -> None:
        """Let it go on. If all were stopped, leases may have ended before it looks at what it was sent meanwhile."""
        stalled = self._is_stalled()
        self.frozen.discard(endpoint)
        if self._election is not None and endpoint == self.leader:
            self._end_election()
            self.has_leader = True
        if stalled and self.random.random() < 0.5:
            self.store.expire(self.world.now)
        self._serve_waiting(lossy=False)
        self._watch_expiry()

    def shut(self, endpoint: str) -> None:
        """End a member: its connections break."""
        self.down.add(endpoint)
        self.break_streams(1.0, endpoint)
        if len(self.down) > len(self.endpoints) // 2:
            self._end_election()
            self.has_leader = False
        self._miss_leader()

    def start(self, endpoint: str) -> None:
        """Start it again."""
        self.down.discard(endpoint)
        if not self.has_leader and len(self.down) <= len(self.endpoints) // 2:
            self.elect()

    def break_streams(self, share: float, endpoint: str | None = None) -> None:
        """Break this share of all streams, of one member or of all."""
        for stream in list(self._streams):
            if endpoint in (None, stream.endpoint) and self.random.random() < share:
                stream.fail("the connection was lost")

    def silence_streams(self, share: float) -> None:
        """Have this share of all streams say nothing any more, without an end."""
        for stream in list(self._streams):
            if self.random.random() < share:
                stream.silence()

    def compact(self) -> None:
        """Forget all but the newest revision."""
        if self.store.compacted < self.store.revision:
            self.store.handle("KV.Compact", rpc.CompactionRequest(revision=self.store.revision), self.world.now)

    # --- serving ---------------------------------------------------------------------------------------------------------

    def channel(self, endpoint: str, link: Link) -> SimulatedChannel:
        """Return a connection to a member, for one process."""
        return SimulatedChannel(self, endpoint, link)

    def serve(self, endpoint: str, work: Callable[[], None], refuse: Callable[[str], None]) -> None:
        """Do something on a member, now or when it can; or say why it will not be done."""
        if endpoint in self.down:
            refuse("connection refused")
        elif endpoint in self.frozen or not self.has_leader:
            self._waiting.append((endpoint, work, refuse))
        else:
            work()

    def _miss_leader(self) -> None:
        if self.has_leader and self.leader in self.down | self.frozen:
            self.has_leader = False
            self._election = self.world.after(self.election_s * (1 + self.random.random()), self._try_election)

    def _try_election(self) -> None:
        if len(self.down | self.frozen) > len(self.endpoints) // 2:
            self._election = self.world.after(self.election_s, self._try_election)
        else:
            self.elect()

    def _end_election(self) -> None:
        if self._election is not None:
            self._election.cancel()
            self._election = None

    def passes_on(self, endpoint: str) -> bool:
        """Whether a member passes renewals on to a leader that says nothing."""
        return self._election is not None and self.leader in self.frozen and endpoint != self.leader

    def _is_stalled(self) -> bool:
        return len(self.frozen) > len(self.endpoints) // 2

    def _serve_waiting(self, *, lossy: bool) -> None:
        waiting, self._waiting = self._waiting, deque()
        for endpoint, work, refuse in waiting:
            if endpoint in self.frozen or not self.has_leader:
                self._waiting.append((endpoint, work, refuse))
            elif endpoint in self.down or (lossy and self.random.random() < 0.5):
                refuse("etcdserver: leader changed")
            else:
                work()

    def answer(self, name: str, request: Any) -> Any:
        """Let the store answer."""
        self.calls += 1
        answer = self.store.handle(name, request, self.world.now)
        if name == "Lease.LeaseGrant" and self._expiring is None:
            self._watch_expiry()
        return answer

    def _watch_expiry(self) -> None:
        if self._expiring is not None:
            self._expiring.cancel()
            self._expiring = None
        leases = self.store.leases
        if leases:
            late_s = EXPIRY_CHECK_S * self.random.random()
            self._expiring = self.world.at(min(lease.until for lease in leases.values()) + late_s, self._expire)

    def _expire(self) -> None:
        self._expiring = None
        if self.has_leader and not self._is_stalled():
            self.store.expire(self.world.now)
            self._watch_expiry()


class SimulatedChannel:
    """What `grpc.aio.insecure_channel` returns, as far as the stubs and `store.channel` use it."""

    def __init__(self, etcd: SimulatedEtcd, endpoint: str, link: Link) -> None:
        self.etcd = etcd
        self.endpoint = endpoint
        self.link = link
        self._pending: dict[asyncio.Future[Any], None] = {}
        self._streams: dict[SimulatedStream, None] = {}

    def unary_unary(self, path: str, **_: Any) -> Callable[..., Any]:
        """Return a method."""
        name = _name(path)
        return lambda request, timeout=None, metadata=None: self._call(name, request, timeout)

    def stream_stream(self, path: str, **_: Any) -> Callable[..., Any]:
        """Return a method."""
        name = _name(path)
        return lambda metadata=None: self._open(name)

    def unary_stream(self, path: str, **_: Any) -> Any:
        """Return nothing: the store does not use such methods."""
        return None

    stream_unary = unary_stream

    async def close(self, grace: float | None = None) -> None:
        """Cancel what is under way."""
        for pending in list(self._pending):
            pending.cancel()
        for stream in list(self._streams):
            stream.cancel()

    async def _call(self, name: str, request: Any, timeout_s: float | None) -> Any:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        self._pending[answer] = None
        etcd, link = self.etcd, self.link

        def settle(result: Any, error: grpc.aio.AioRpcError | None) -> None:
            if not answer.done():
                answer.set_result(result) if error is None else answer.set_exception(error)

        def lose() -> None:
            settle(None, failure(_UNAVAILABLE, "the connection was lost"))

        def reply(result: Any, error: grpc.aio.AioRpcError | None = None) -> None:
            if not link.lose_answers or etcd.random.random() >= link.lose_answers:
                link.send(lambda: settle(result, error), lose, out=False)

        def work() -> None:
            try:
                result = etcd.answer(name, request)
            except EtcdError as error:
                reply(None, failure(error.code, error.text))
            else:
                reply(result)

        def arrive() -> None:
            etcd.serve(self.endpoint, work, lambda why: reply(None, failure(_UNAVAILABLE, why)))

        link.send(arrive, lose, out=True, not_before=etcd.world.now + etcd.commit_s * etcd.random.random())
        timer = None
        if timeout_s is not None:
            late = failure(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
            timer = loop.call_later(timeout_s, settle, None, late)
        try:
            return await answer
        finally:
            del self._pending[answer]
            if timer is not None:
                timer.cancel()

    def _open(self, name: str) -> SimulatedStream:
        stream = SimulatedStream(self, name)
        self._streams[stream] = None
        return stream

    def forget(self, stream: SimulatedStream) -> None:
        """The stream has ended."""
        self._streams.pop(stream, None)


class SimulatedStream:
    """One bidirectional call, as its caller has it."""

    def __init__(self, channel: SimulatedChannel, name: str) -> None:
        self.endpoint = channel.endpoint
        self._channel = channel
        self._etcd = channel.etcd
        self._link = channel.link
        self._name = name
        self._answers: deque[Any] = deque()
        self._reading: asyncio.Future[Any] | None = None
        self._error: BaseException | None = None
        self._silent = False
        self._watchers: list[Watcher] = []
        self._sent_until = self._answered_until = 0.0
        self._etcd._streams[self] = None

    async def write(self, request: Any) -> None:
        """Send one message."""
        if self._error is not None:
            self._raise()
        self._sent_until = self._link.send(lambda: self._arrive(request), self._lose, out=True, not_before=self._sent_until)

    async def read(self) -> Any:
        """Return the next answer."""
        if self._answers:
            return self._answers.popleft()
        if self._error is not None:
            self._raise()
        self._reading = asyncio.get_running_loop().create_future()
        try:
            return await self._reading
        finally:
            self._reading = None

    def cancel(self) -> None:
        """End it, from this side."""
        self._end(asyncio.CancelledError())

    def fail(self, why: str) -> None:
        """End it, from the other side."""
        self._close_watches()
        self._link.send(lambda: self._end(failure(_UNAVAILABLE, why)), self._lose, out=False)

    def silence(self) -> None:
        """Say nothing any more."""
        self._silent = True
        self._close_watches()

    def _raise(self) -> NoReturn:
        assert self._error is not None
        raise self._error

    def _lose(self) -> None:
        self._end(failure(_UNAVAILABLE, "the connection was lost"))

    def _close_watches(self) -> None:
        self._etcd._streams.pop(self, None)
        for watcher in self._watchers:
            self._etcd.store.forget(watcher)
        self._watchers.clear()

    def _end(self, error: BaseException) -> None:
        if self._error is not None:
            return
        self._error = error
        self._close_watches()
        self._channel.forget(self)
        if self._reading is not None and not self._reading.done():
            if isinstance(error, asyncio.CancelledError):
                self._reading.cancel()
            else:
                self._reading.set_exception(error)

    def _arrive(self, request: Any) -> None:
        if self._name == "Lease.LeaseKeepAlive" and self._etcd.passes_on(self.endpoint):
            self.silence()
        if not self._silent and self._error is None:
            self._etcd.serve(self.endpoint, lambda: self._serve(request), self.fail)

    def _serve(self, request: Any) -> None:
        if self._silent or self._error is not None:
            return
        if self._name == "Lease.LeaseKeepAlive":
            self._send(self._etcd.answer(self._name, request))
        elif request.WhichOneof("request_union") == "create_request":
            watcher = self._etcd.store.watch(request.create_request, len(self._watchers), self._send)
            if watcher is not None:
                self._watchers.append(watcher)
        else:
            self._send(self._etcd.store.progress())

    def _send(self, answer: Any) -> None:
        at = self._link.send(lambda: self._deliver(answer), self._lose, out=False, not_before=self._answered_until)
        self._answered_until = at

    def _deliver(self, answer: Any) -> None:
        if self._error is not None:
            return
        if self._reading is not None and not self._reading.done():
            self._reading.set_result(answer)
        else:
            self._answers.append(answer)


def _name(path: str) -> str:
    service, _, method = path.strip("/").rpartition("/")
    return f"{service.rpartition('.')[2]}.{method}"
