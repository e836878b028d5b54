"""What the tests of the store share: bounded waits, reading a follow, a relay that can be cut, and a cluster of etcd.

Everything here is real: the relay forwards bytes between real sockets, and the members are processes of etcd.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

from aetcd.rpc import rpc_pb2 as rpc

from etcdreplica.errors import StoreUnavailableError
from etcdreplica.model import Host
from etcdreplica.store import Changes, Entry, EtcdOptions, Key, Kind, Lease, Put, Snapshot, Store, Txn
from etcdreplica.store.txn import Operation
from etcdreplica.testing.etcd import EmbeddedEtcd
from etcdreplica.testing.processes import spawn_bound, stop

T = TypeVar("T")
Connect = Callable[..., Store]
Follow = AsyncGenerator[Snapshot | Changes, None]

BOUND_S = 60.0
POLL_S = 0.01
START_TRIES = 3


def new_cluster() -> str:
    """Return a cluster name that nobody has used."""
    return f"t-{uuid.uuid4().hex[:12]}"


def host(number: int) -> Host:
    """Return a record that can be told from others by its number."""
    return Host(address=f"10.0.0.{number}", pid=number)


def host_key(name: str) -> Key:
    """Return the key of a host."""
    return Key(Kind.HOSTS, (name,))


async def until(holds: Callable[[], bool], what: str, bound_s: float = BOUND_S) -> None:
    """Return as soon as `holds()`; fail, naming `what`, when it does not in time."""
    try:
        async with asyncio.timeout(bound_s):
            while not holds():  # noqa: ASYNC110 - what is waited for has no event of its own
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"not within {bound_s:g} s: {what}") from None


async def eventually(call: Callable[[], Awaitable[T]], what: str, bound_s: float = BOUND_S) -> T:
    """Repeat a call that may find etcd unavailable until it works."""
    last: Exception | None = None
    try:
        async with asyncio.timeout(bound_s):
            while True:
                try:
                    return await call()
                except StoreUnavailableError as error:
                    last = error
                    await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"not within {bound_s:g} s: {what}; last: {last}") from None


async def write(store: Store, *operations: Operation) -> int:
    """Write unconditionally and return the revision."""
    result = await store.commit(Txn(when=(), then=operations))
    assert result.succeeded
    return result.revision


async def write_hosts(store: Store, numbers: range) -> list[int]:
    """Write host `h<number>` for each number in turn, and return the revisions."""
    return [await write(store, Put(host_key(f"h{number}"), host(number))) for number in numbers]


async def write_raw(store: Store, path: str | bytes, value: bytes) -> int:
    """Write bytes under `path` below the cluster's prefix, past every check of the product."""
    below = path.encode() if isinstance(path, str) else path
    answer = await store.channel.call("KV.Put", rpc.PutRequest(key=store.keys.root.encode() + below, value=value))
    return int(answer.header.revision)


async def snapshot(batches: Follow) -> Snapshot:
    """Take the next batch of a follow, which must be a snapshot."""
    batch = await _next(batches, "a snapshot")
    assert isinstance(batch, Snapshot), f"a snapshot was due, not {batch}"
    return batch


async def changes(batches: Follow, count: int) -> list[Entry]:
    """Take `count` changes from a follow; a snapshot or more changes than that is an error."""
    found: list[Entry] = []
    while len(found) < count:
        batch = await _next(batches, f"{count} changes after {[str(entry.key) for entry in found]}")
        assert isinstance(batch, Changes), f"changes were due, not {batch}"
        assert batch.entries
        assert batch.revision == batch.entries[-1].mod_revision
        found.extend(batch.entries)
    assert len(found) == count, f"{count} changes were due, not {found}"
    return found


async def _next(batches: Follow, what: str) -> Snapshot | Changes:
    try:
        async with asyncio.timeout(BOUND_S):
            return await anext(batches)
    except TimeoutError:
        raise AssertionError(f"the follow did not yield within {BOUND_S:g} s: {what}") from None


async def time_to_live(store: Store, lease_id: int) -> int:
    """Ask etcd for the seconds a lease has left; -1 when it does not exist."""
    answer = await store.channel.call("Lease.LeaseTimeToLive", rpc.LeaseTimeToLiveRequest(ID=lease_id))
    return int(answer.TTL)


async def renewed(lease: Lease, times: int) -> None:
    """Wait until the deadline of a lease has grown so often."""
    for _ in range(times):
        await _grown(lease, lease.deadline)
        assert not lease.lost.done(), f"the lease was lost: {lease.lost.result()}"


async def _grown(lease: Lease, deadline: float) -> None:
    await until(lambda: lease.deadline > deadline or lease.lost.done(), "the lease is renewed")


async def lost(lease: Lease) -> str:
    """Wait until a lease is lost and return why."""
    await until(lease.lost.done, "the lease is lost")
    return lease.lost.result()


def send(process: subprocess.Popen[bytes] | None, number: signal.Signals) -> None:
    """Send a signal to a process that runs."""
    assert process is not None
    assert process.poll() is None, "etcd has ended by itself"
    process.send_signal(number)


@contextlib.contextmanager
def paused(*servers: EmbeddedEtcd | Member) -> Iterator[None]:
    """SIGSTOP etcd for the length of the block."""
    try:
        for server in servers:
            send(server.process, signal.SIGSTOP)
        for server in servers:
            _wait_until_stopped(server)
        yield
    finally:
        for server in servers:
            send(server.process, signal.SIGCONT)


def _wait_until_stopped(server: EmbeddedEtcd | Member) -> None:
    """Wait until no thread runs any more: until then a request may still be answered."""
    assert server.process is not None
    deadline = time.monotonic() + BOUND_S
    while any(_state(task) not in "TZX" for task in Path(f"/proc/{server.process.pid}/task").iterdir()):
        assert time.monotonic() < deadline, "etcd does not stop"
        time.sleep(0.001)


def _state(task: Path) -> str:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def revive(server: EmbeddedEtcd | Member) -> None:
    """Make a server run again that a test has stopped or killed."""
    assert server.process is not None
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGCONT)
    else:
        server.start()


def metric(endpoint: str, name: str) -> float:
    """Read one of etcd's own counters; one that etcd has not counted yet is 0."""
    with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found: re.Match[str] | None = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Relay:
    """Forwards TCP from a port of its own to etcd, until it is cut."""

    def __init__(self, target_port: int, delay_s: float = 0.0) -> None:
        self.port = 0
        self._delay_s = delay_s  # before a new connection reaches etcd, as with a distant or busy one
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def endpoint(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> Relay:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cut()

    async def open(self) -> None:
        """Listen, on the same port each time."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Reset every connection and refuse new ones."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None
        for writer in self._writers:
            writer.transport.abort()
        await until(lambda: not self._writers, "the relay's connections end")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        back: asyncio.StreamWriter | None = None
        try:
            await asyncio.sleep(self._delay_s)
            forth, back = await asyncio.open_connection("127.0.0.1", self._target_port)
            self._writers.add(back)
            await asyncio.gather(_pump(reader, back), _pump(forth, writer))
        except OSError:
            pass
        finally:
            for each in (writer, back):
                if each is not None:
                    each.transport.abort()
                    self._writers.discard(each)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()


class Member:
    """One member of an etcd cluster; it keeps its ports and data when it is started again."""

    def __init__(self, program: str, name: str, directory: Path) -> None:
        self.name = name
        self.port = free_port()
        self.peer_url = f"http://127.0.0.1:{free_port()}"
        self.process: subprocess.Popen[bytes] | None = None
        self._program = program
        self._directory = directory
        self._initial_cluster = ""

    @property
    def endpoint(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    def join(self, initial_cluster: str) -> None:
        """Start it for the first time, as one of these members; do not wait for them."""
        self._initial_cluster = initial_cluster
        client = f"http://{self.endpoint}"
        command = [self._program, "--name", self.name, "--data-dir", str(self._directory / self.name)]
        command += ["--log-level", "warn", "--logger", "zap", "--initial-cluster", initial_cluster]
        command += ["--listen-client-urls", client, "--advertise-client-urls", client]
        command += ["--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url]
        self.process = spawn_bound(command, log=self._directory / f"{self.name}.log")

    def start(self) -> None:
        """Start it again, and return when it answers."""
        self.join(self._initial_cluster)
        self.wait_until_healthy()

    def kill(self) -> None:
        """SIGKILL it, leaving its data."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def wait_until_healthy(self) -> None:
        """Return when it knows a leader. Raises RuntimeError when it ends, or does not come up in time."""
        deadline = time.monotonic() + BOUND_S
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                break
            if self._is_healthy():
                return
            time.sleep(0.02)
        log = self._directory / f"{self.name}.log"
        raise RuntimeError(f"etcd {self.name} did not come up:\n{log.read_text(errors='replace')[-600:]}")

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.endpoint}/health", timeout=1) as answer:
                return bool(json.load(answer)["health"] in ("true", True))
        except (OSError, ValueError):
            return False


class Members:
    """An etcd cluster of several members on loopback, for the length of the `with` block."""

    def __init__(self, program: str, count: int) -> None:
        self._program = program
        self._count = count
        self._directory = Path(tempfile.mkdtemp(prefix="etcdreplica-members-"))
        self.all: list[Member] = []

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The endpoint of every member."""
        return tuple(member.endpoint for member in self.all)

    def __enter__(self) -> Members:
        for attempt in range(START_TRIES):
            try:
                self._start(attempt)
            except RuntimeError:
                self._stop()
                if attempt == START_TRIES - 1:
                    self.__exit__()
                    raise
            except BaseException:
                self.__exit__()
                raise
            else:
                break
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _start(self, attempt: int) -> None:
        directory = self._directory / str(attempt)
        directory.mkdir()
        self.all = [Member(self._program, f"m{number}", directory) for number in range(self._count)]
        initial = ",".join(f"{member.name}={member.peer_url}" for member in self.all)
        for member in self.all:
            member.join(initial)
        for member in self.all:
            member.wait_until_healthy()

    def _stop(self) -> None:
        for member in self.all:
            if member.process is not None:
                if member.process.poll() is None:
                    member.process.send_signal(signal.SIGCONT)
                stop(member.process, 5.0)

    async def leader(self) -> Member:
        """Return the member that leads."""
        return await eventually(self._leader, "a member leads")

    async def _leader(self) -> Member:
        for member in self.all:
            async with Store(EtcdOptions((member.endpoint,)), new_cluster()) as store:
                status = await store.channel.call("Maintenance.Status", rpc.StatusRequest())
                if status.leader == status.header.member_id:
                    return member
        raise StoreUnavailableError("no member says that it leads")
