"""Several hosts on one machine: each a real node process with its own name, state directory and socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from etcdreplica.app.protocol import SOCKET_ENV
from etcdreplica.core.view import ClusterView
from etcdreplica.daemon.state_file import last_guardian
from etcdreplica.daemon.waiting import insist
from etcdreplica.errors import EtcdReplicaError
from etcdreplica.guardian.tree import end_all
from etcdreplica.model import AssignmentState, Drain, Event, ReplicaState, Server
from etcdreplica.store import Corrupt, Delete, EtcdOptions, Key, Kind, Put, Snapshot, Store, Txn
from etcdreplica.testing.etcd import EmbeddedEtcd, EtcdServer
from etcdreplica.testing.processes import descendants, kill_tree, spawn_bound, stop
from etcdreplica.words import Role

T = TypeVar("T")
LONGEST_DIRECTORY = 60  # a socket's whole path may have 107 bytes


class LocalHost:
    """One host of a `LocalCluster`."""

    def __init__(self, cluster: LocalCluster, name: str) -> None:
        self.name = name
        self.directory = cluster.directory / name
        self.socket_path = cluster.sockets / f"{name}.sock"
        self.process: subprocess.Popen[bytes] | None = None
        self.programs: list[subprocess.Popen[bytes]] = []  # started by hand on this host
        self.prefix = tuple(cluster.prefixes.get(name, ()))  # what every program of this host is started with
        self._cluster = cluster

    @property
    def log_path(self) -> Path:
        """Where the output of its node goes."""
        return self.directory / "node.log"

    @property
    def environment(self) -> dict[str, str]:
        """What a program started on this host must have in its environment to find its WatchDog."""
        return {**os.environ, SOCKET_ENV: str(self.socket_path)}

    def start(self) -> None:
        """Start its node."""
        self.directory.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "etcdreplica", "node", "--host", self.name, "--state-dir", str(self.directory)]
        command += ["--socket", str(self.socket_path), "--lease-ttl", str(self._cluster.lease_ttl_s)]
        command += [*self._cluster.connection, *self._cluster.node_arguments.get(self.name, ())]
        self.process = spawn_bound([*self.prefix, *command], log=self.log_path)

    def kill(self) -> None:
        """SIGKILL everything on it, as a power cut would."""
        if self.process is not None:
            if self.process.poll() is None:  # else its number may be somebody else's by now
                kill_tree(self.process.pid)
                self.process.wait()
            if guardian := last_guardian(self.directory):
                end_all(guardian)
        self._kill_programs()

    def freeze(self) -> None:
        """SIGSTOP everything on it: it falls silent, as a host that is lost does. Only `kill` is of use after that."""
        if self.process is not None:
            for pid in (self.process.pid, *descendants(self.process.pid), *(program.pid for program in self.programs)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)

    def stop(self, grace_s: float = 20.0) -> None:
        """Stop its node in an orderly way, then whatever was started by hand."""
        if self.process is not None:
            stop(self.process, grace_s)
        self._kill_programs()

    def _kill_programs(self) -> None:
        for program in self.programs:
            program.kill()
            program.wait()
        self.programs.clear()


class LocalCluster:
    """N hosts and an etcd. `view` is kept up to date in the background; `wait_until` waits for it to look as wanted.

    Start and use it from one thread that lives as long as it does; everything it started ends with that thread.
    """

    def __init__(
        self,
        hosts: int | Sequence[str] = 3,
        *,
        etcd: EtcdServer | None = None,
        cluster: str = "test",
        lease_ttl_s: float = 2.0,
        directory: Path | None = None,
        node_arguments: Mapping[str, Sequence[str]] | None = None,
        prefixes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        names = [f"host-{chr(97 + i)}" for i in range(hosts)] if isinstance(hosts, int) else list(hosts)
        self.lease_ttl_s = lease_ttl_s
        self.cluster = cluster
        self.node_arguments = node_arguments or {}
        self.prefixes = prefixes or {}
        self._own_directory = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="etcdreplica-"))
        self.sockets = self.directory
        if len(os.fsencode(self.directory)) > LONGEST_DIRECTORY:
            self.sockets = Path(tempfile.mkdtemp(prefix="etcdreplica-", dir="/tmp"))
        self._own_etcd = etcd is None
        self.etcd: EtcdServer = etcd or EmbeddedEtcd()
        self.hosts = {name: LocalHost(self, name) for name in names}
        self.view = ClusterView()
        self.events: dict[tuple[str, int], Event] = {}  # by application and incarnation
        self.leaders: dict[str, str] = {}  # by role: the host that leads
        self.servers: dict[str, Server] = {}  # by host: its CheckpointServer
        self._candidates: dict[str, dict[str, tuple[int, str]]] = {}
        self._changed = threading.Condition()
        self._observer: _Observer | None = None

    @property
    def connection(self) -> list[str]:
        """The command line options that reach this cluster."""
        return ["--etcd", self.etcd.endpoint, "--cluster", self.cluster]

    @property
    def is_open(self) -> bool:
        """Whether its hosts may be running."""
        return self._observer is not None

    def __enter__(self) -> LocalCluster:
        try:
            if self._own_etcd:
                self.etcd.start()
            self._observer = _Observer(self)
            self._observer.start()
            for host in self.hosts.values():
                host.start()
            self.wait_until(
                lambda view: set(self.hosts) <= set(view.hosts) and {"manager", "superwatchdog"} <= set(self.leaders),
                f"{len(self.hosts)} hosts and a leader",
            )
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End every process and remove every file."""
        for host in self.hosts.values():
            host.kill()
        if self._observer is not None:
            self._observer.stop()
            self._observer = None
        if self._own_etcd:
            self.etcd.stop()
        if self._own_directory:
            shutil.rmtree(self.directory, ignore_errors=True)
        if self.sockets != self.directory:
            shutil.rmtree(self.sockets, ignore_errors=True)

    def start(
        self, program: str | Path, *arguments: str, host: str | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Run `python PROGRAM ARGUMENTS` on a host by hand, as a user would; the process becomes the first primary."""
        return self.run([sys.executable, str(program), *arguments], host=host, env=env)

    def run(
        self, command: Sequence[str], *, host: str | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Run any command on a host by hand. Its output goes to `programs.log` of that host."""
        chosen = self.hosts[host or next(iter(self.hosts))]
        environment = {**chosen.environment, **(env or {})}
        process = spawn_bound([*chosen.prefix, *command], log=chosen.directory / "programs.log", env=environment)
        chosen.programs.append(process)
        return process

    def catch_up(self, timeout: float = 60.0) -> None:
        """Wait until the view has all that is in etcd now."""
        assert self._observer is not None
        now = self._observer.call(lambda store: insist("reading", lambda: store.list()), timeout)
        newest = max((entry.mod_revision for entry in now.entries), default=0)
        self.wait_until(lambda view: view.revision >= newest, "the view to catch up", timeout)

    def observe_anew(self) -> None:
        """Read everything again: this etcd has taken the place of another one."""
        assert self._observer is not None
        self._observer.stop()
        self._take(Snapshot((), 0))
        self._observer = _Observer(self)
        self._observer.start()

    def restart(self, host: str, timeout: float = 60.0) -> None:
        """Start the node of a host that was killed or stopped, and wait until the host is up."""
        before = self.view.hosts.get(host)  # its lease may still live
        self.hosts[host].start()
        self.wait_until(
            lambda view: host in view.hosts and (before is None or view.hosts[host].session != before.session),
            f"{host} to come up",
            timeout,
        )

    def remove(self, app: str, timeout: float = 60.0) -> None:
        """Remove an application, as `etcdreplica remove` does, and wait until it has ended everywhere."""
        keys = Key(Kind.REGISTRATIONS, (app,)), Key(Kind.PAUSES, ("app", app))
        assert self._observer is not None
        txn = Txn((), tuple(map(Delete, keys)))
        self._observer.call(lambda store: insist(f"removing {app}", lambda: store.commit(txn)), timeout)
        self.wait_until(lambda view: app not in view.apps, f"{app} to be gone", timeout)

    def drain(self, host: str, timeout: float = 60.0) -> None:
        """Drain a host, as `etcdreplica drain --no-wait` does."""
        self._write(f"draining {host}", Put(Key(Kind.DRAINS, (host,)), Drain("a test")), timeout)

    def undrain(self, host: str, timeout: float = 60.0) -> None:
        """Take it into use again."""
        self._write(f"undraining {host}", Delete(Key(Kind.DRAINS, (host,))), timeout)

    def _write(self, what: str, operation: Put | Delete, timeout: float) -> None:
        assert self._observer is not None
        self._observer.call(lambda store: insist(what, lambda: store.commit(Txn((), (operation,)))), timeout)

    def primary(self, app: str) -> tuple[str, int]:
        """Return the primary's host and process id. Raises LookupError when it has none."""
        known = self.view.apps.get(app)
        shown = list(known.replicas.items()) if known else []
        found = [(r.epoch, host, r.pid) for host, r in shown if r.role is Role.PRIMARY and r.pid is not None]
        if not found:
            raise LookupError(f"{app} has no primary")
        _, host, pid = max(found)  # an earlier one is shown until its lease ends, even if it was given up
        return host, pid

    def in_sync(self, app: str) -> int:
        """Return how many copies of an object are in sync; 0 when its present primary has not said so yet."""
        view = self.view.apps.get(app)
        if view is None or view.in_sync is None or view.assignment is None or view.assignment.primary is None:
            return 0
        members = {member.incarnation for member in view.in_sync.members}
        is_said = view.in_sync.primary == view.assignment.primary.incarnation
        return len(members) if is_said and members <= {seat.incarnation for seat in view.assignment.seats} else 0

    def kill_replica(self, app: str, timeout: float = 60.0) -> tuple[str, int]:
        """SIGKILL the primary's process; return its host and process id. Raises LookupError if it has none for so long."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                host, pid = self.primary(app)
                os.kill(pid, signal.SIGKILL)
            except (LookupError, ProcessLookupError):  # none is shown just now, or it has ended and that is not known yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return host, pid

    def wait_ready(self, app: str, *, after_epoch: int = 0, timeout: float = 60.0) -> int:
        """Wait until the application has a running primary and its whole degree, all ready; return its epoch.

        A successor is waited for as well, unless the next failure would be made good on the primary's host, or park it.
        """

        def is_ready(view: ClusterView) -> bool:
            known = view.apps.get(app)
            assignment = known.assignment if known else None
            if not known or not assignment or assignment.state is not AssignmentState.ACTIVE or assignment.degraded:
                return False
            replicas = [known.replica(seat) for seat in assignment.seats]
            if assignment.epoch <= after_epoch or any(r is None or r.state is ReplicaState.STARTING for r in replicas):
                return False
            primary = replicas[0]
            if primary is None or primary.state is not ReplicaState.RUNNING or primary.epoch != assignment.epoch:
                return False
            if assignment.successor is None and len(replicas) > 1:
                ladder = known.registration
                return bool(ladder and (ladder.restarts_here or 0 < ladder.max_restarts <= assignment.recent))
            return primary.successor == assignment.successor

        self.wait_until(is_ready, f"{app} to be ready", timeout)
        found = self.view.apps[app].assignment
        assert found is not None
        return found.epoch

    def wait_until(self, condition: Callable[[ClusterView], bool], what: str, timeout: float = 60.0) -> None:
        """Wait until the view satisfies a condition. Raises EtcdReplicaError, with the node logs' ends, after `timeout`."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not condition(self.view):
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise EtcdReplicaError(f"waited {timeout:g} s in vain for {what}\n{self.describe()}")

    def look(self, at: Callable[[ClusterView], T]) -> T:
        """Return what a function makes of the view, which stands still meanwhile."""
        with self._changed:
            return at(self.view)

    def describe(self) -> str:
        """Return what is known, for messages of failed tests."""
        lines = [f"hosts up: {sorted(self.view.hosts)}; leaders: {self.leaders}"]
        for app in self.view.apps.values():
            lines += [f"{app.name}: {app.assignment}", *(f"  {host}: {r}" for host, r in app.replicas.items())]
            lines += [f"  {failure}" for failure in app.failures.values()]
        for host in self.hosts.values():
            for log in (host.log_path, host.directory / "programs.log", *host.directory.glob("logs/*.log")):
                if log.exists():
                    lines.append(f"--- {host.name} {log.name}\n{log.read_text(errors='replace')[-1500:]}")
        return "\n".join(lines)

    def _take(self, batch: Any) -> None:
        with self._changed:
            if isinstance(batch, Snapshot):
                self.view.clear()
                self._candidates.clear()
                self.leaders.clear()
                self.servers.clear()
            for entry in batch.entries:
                value = None if isinstance(entry.value, Corrupt) else entry.value
                kind, names = entry.key.kind, entry.key.names
                self.view.apply(kind, names, value, entry.mod_revision, entry.create_revision)
                if kind is Kind.HISTORY and value is not None:
                    self.events[names[0], int(names[1])] = value
                elif kind is Kind.LEADERS:
                    self._take_leader(names, value, entry.create_revision)
                elif kind is Kind.SERVERS:
                    self.servers.pop(names[0], None)
                    self.servers |= {names[0]: value} if value is not None else {}
            self.view.revision = batch.revision
            self._changed.notify_all()

    def _take_leader(self, names: tuple[str, ...], value: Any, created: int) -> None:
        candidates = self._candidates.setdefault(names[0], {})
        if value is None:
            candidates.pop(names[1], None)
        else:
            candidates[names[1]] = (created, value.host)
        self.leaders.pop(names[0], None)
        if candidates:
            self.leaders[names[0]] = min(candidates.values())[1]


class _Observer(threading.Thread):
    """Follows the cluster in a loop of its own."""

    def __init__(self, cluster: LocalCluster) -> None:
        super().__init__(name="etcdreplica-observer", daemon=True)
        self._cluster = cluster
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._store: Store | None = None
        self._ready = threading.Event()

    def run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(self._follow())
        self._ready.set()

    def stop(self) -> None:
        """End the thread."""
        self._ready.wait()
        if self._loop is not None and self._task is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._task.cancel)
        self.join()

    def call(self, work: Callable[[Store], Coroutine[Any, Any, T]], timeout: float) -> T:
        """Have it do something with its store, and return the result."""
        self._ready.wait()
        assert self._loop is not None
        assert self._store is not None
        return asyncio.run_coroutine_threadsafe(work(self._store), self._loop).result(timeout)

    async def _follow(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._store = Store(EtcdOptions(tuple(self._cluster.etcd.endpoint.split(","))), self._cluster.cluster)
        self._ready.set()
        async with self._store as store, contextlib.aclosing(store.follow()) as batches:
            async for batch in batches:
                self._cluster._take(batch)
