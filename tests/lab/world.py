"""Everything of one lab: the network, the etcd cluster, hosts with disks of their own, applications of all styles, clients."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from etcdreplica.clock import boottime
from etcdreplica.core.view import AppView
from etcdreplica.errors import EtcdReplicaError
from etcdreplica.testing import LocalCluster
from etcdreplica.testing.processes import descendants
from etcdreplica.testing.witness import Witness
from tests.integration.stage import WallClock
from tests.lab.checks import Journal
from tests.lab.disk import Disk
from tests.lab.etcd_cluster import EtcdCluster
from tests.lab.network import Network

APPS = Path(__file__).parent / "apps"
CLAIMANT = Path(__file__).parents[1] / "integration" / "apps" / "claimant.py"
HOSTS = tuple(f"host-{letter}" for letter in "abcde")
MEMBERS = ("etcd-1", "etcd-2", "etcd-3")
MANAGERS = 3  # of the hosts have one
TTL_S = 5.0
BOUND_S = 120.0  # until all is whole again after the faults; restarts wait up to 30 s, and the machine is shared
OBJECT = "tokens"
_numbers = itertools.count()


class World:
    """Use it in `with`. `out` gets the journals at once, and the logs when it ends."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.began = boottime()
        self.network = Network(f"{os.getpid() % 100000}", (*HOSTS, *MEMBERS))
        self.directory = Path(tempfile.mkdtemp(prefix="er-lab-", dir="/tmp"))
        self.etcd = EtcdCluster(self.network, MEMBERS, self.directory / "etcd")
        self.clock = WallClock(self.directory)  # of the last host
        self.witness = Witness(out / "claims")
        self.cluster = self._cluster()
        self.disks: dict[str, Disk] = {}
        self.writers: dict[str, Path] = {}
        self.clients: dict[str, Journal] = {}
        self.killed: set[int] = set()  # processes of copies
        self.timeline: list[tuple[float, str]] = []
        self._client_processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stack = contextlib.ExitStack()

    def _cluster(self) -> LocalCluster:
        prefixes: dict[str, Sequence[str]] = {host: self.network.prefix(host) for host in HOSTS}
        prefixes[HOSTS[-1]] = (*prefixes[HOSTS[-1]], *self.clock.prefix)
        arguments = _Arguments(self.network)
        return LocalCluster(
            HOSTS,
            etcd=self.etcd,
            cluster="lab",
            lease_ttl_s=TTL_S,
            directory=self.directory,
            node_arguments=arguments,
            prefixes=prefixes,
        )

    def __enter__(self) -> World:
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            stack.callback(self.network.remove)
            self.network.make()
            for host in HOSTS:
                disk = Disk(self.directory / f"{host}.img", self.directory / host)
                stack.callback(disk.remove)
                try:
                    disk.make()
                except OSError as error:
                    self.note(f"{host} has no disk of its own ({error}): a power loss takes nothing, and it is never full")
                else:
                    self.disks[host] = disk
            stack.callback(self.etcd.stop)
            self.etcd.start()
            stack.callback(self.keep_logs)
            stack.enter_context(self.cluster)
            stack.callback(self.calm_down)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    # --- what runs on it -------------------------------------------------------------------------------------------

    def start_applications(self, styles: Sequence[str] = ("cold", "warm", "hot")) -> None:
        """Start claimants and writers of these styles, the object, and two clients of it."""
        claims = ("--claims", str(self.witness.path))
        hosts = itertools.cycle(HOSTS)
        for style in styles:
            name = f"claimant-{style}"
            self.cluster.start(CLAIMANT, "--name", name, "--style", style, "--degree", "2", *claims, host=next(hosts))
            if style != "hot":
                name = f"writer-{style}"
                self.writers[name] = self.out / f"{name}.journal"
                words = ("--name", name, "--style", style, "--degree", "3", "--journal", str(self.writers[name]), *claims)
                self.cluster.start(APPS / "writer.py", *words, host=next(hosts))
        self.cluster.start(APPS / "tokens.py", "--name", OBJECT, "--degree", "3", "--durable", host=next(hosts))
        self.wait_whole("the start")
        self.revive_clients()

    @property
    def apps(self) -> list[str]:
        """The names of all applications."""
        return [f"claimant-{style}" for style in ("cold", "warm", "hot") if f"claimant-{style}" in self.cluster.view.apps] + [
            *self.writers,
            OBJECT,
        ]

    def revive_clients(self) -> None:
        """Have a client run on two hosts; each is a new one, with a new name."""
        for host in HOSTS[:2]:
            if host not in self._client_processes or self._client_processes[host].poll() is not None:
                name = f"client-{next(_numbers)}"
                self.clients[name] = Journal(self.out / f"{name}.journal")
                words = ("--name", OBJECT, "--client", name, "--journal", str(self.clients[name].path))
                self._client_processes[host] = self.cluster.start(APPS / "token_client.py", *words, host=host)

    def end_clients(self) -> None:
        """End them, each between two updates or within one."""
        for process in self._client_processes.values():
            process.kill()
            process.wait()

    def wait_whole(self, after: str) -> float:
        """Wait until every host is up and every application has its degree; return how long it took."""
        started = time.monotonic()
        self.etcd.wait_healthy()
        self.cluster.catch_up(BOUND_S)
        self.cluster.wait_until(lambda view: set(HOSTS) <= set(view.hosts), f"every host to be up after {after}", BOUND_S)
        self.cluster.wait_until(
            lambda view: not any(replica.pid in self.killed for app in view.apps.values() for replica in app.replicas.values()),
            f"what was killed to be seen dead after {after}",
        )
        self.killed.clear()
        for app in self.apps:
            self.cluster.wait_ready(app, timeout=BOUND_S)
        self.cluster.wait_until(lambda _: self.cluster.in_sync(OBJECT) == 3, f"three copies in sync after {after}", BOUND_S)
        return time.monotonic() - started

    # --- who is who ------------------------------------------------------------------------------------------------

    def app(self, name: str) -> AppView:
        """What is known of an application."""
        return self.cluster.view.apps[name]

    def guardian(self, host: str) -> int:
        """The process of a host's guardian."""
        process = self.cluster.hosts[host].process
        assert process is not None
        return process.pid

    def daemon(self, host: str, command: str) -> int:
        """The process of a daemon of a host: node, manager or checkpoint-server. Raises LookupError."""
        for pid in descendants(self.guardian(host)):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"etcdreplica" in words and command.encode() in words:
                    return pid
        raise LookupError(f"no {command} on {host}")

    # --- what is done to it ----------------------------------------------------------------------------------------

    def lose_power(self, host: str) -> None:
        """Kill everything on a host, and have its disk forget what was not flushed."""
        self.network.cut(host)
        self.cluster.hosts[host].kill()
        self.keep_logs(host)
        if host in self.disks:
            self.disks[host].lose_power()

    def bring_back(self, host: str) -> None:
        """Have a host run that was killed or stopped."""
        self.network.mend(host)
        deadline = time.monotonic() + BOUND_S
        while time.monotonic() < deadline:
            process = self.cluster.hosts[host].process
            if process is not None and process.poll() is None:
                return
            with contextlib.suppress(EtcdReplicaError):  # it may end because its name is taken, until its lease ends
                self.cluster.restart(host, 2 * TTL_S)

    def calm_down(self) -> None:
        """End every fault of the network and of etcd."""
        self.network.unblock()
        for host in (*HOSTS, *MEMBERS):
            self.network.mend(host)
        for member in MEMBERS:
            self.etcd.signal(member, signal.SIGCONT)

    def note(self, what: str) -> None:
        """Put a line into the timeline; `progress.txt` has it at once."""
        self.timeline.append((boottime(), what))
        with (self.out / "progress.txt").open("a") as file:
            file.write(f"{boottime() - self.began:9.3f} {what}\n")

    def keep_logs(self, *hosts: str) -> None:
        """Copy the logs of hosts, and of etcd, to `out`."""
        for host in hosts or HOSTS:
            for log in (self.directory / host).rglob("*.log"):
                with contextlib.suppress(OSError), (self.out / f"{host}.{log.name}").open("ab") as copy:
                    copy.write(log.read_bytes())
        for log in self.etcd.directory.glob("*.log"):
            with contextlib.suppress(OSError):
                shutil.copy(log, self.out / log.name)


class _Arguments(Mapping[str, Sequence[str]]):
    """The node's options by host; the addresses are known once the network is made."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def __getitem__(self, host: str) -> Sequence[str]:
        address = self._network.address_of(host)
        words = ["--peer-listen", f"{address}:0", "--checkpoint-listen", f"{address}:0", "--address", address, "--insecure"]
        return words if host in HOSTS[:MANAGERS] else [*words, "--no-manager"]

    def __iter__(self) -> Iterator[str]:
        return iter(HOSTS)

    def __len__(self) -> int:
        return len(HOSTS)
