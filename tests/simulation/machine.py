"""A simulated operating system: hosts with processes that can be killed and stopped, and sockets between them.

What the daemons see of it are stand-ins for the classes that ask a real kernel: `daemon.machine.Machine` is made of them. Each
process is a `SimulatedLoop` of its own. A kill takes a moment, and now and then, as with a process that waits for a disk,
many times that.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from etcdreplica.app.kernel import Slot
from etcdreplica.daemon.app_server import AppConnection, AppServer, OnHello
from etcdreplica.daemon.guard import Guard, WardView
from etcdreplica.daemon.peers import Answer, PeerClient, PeerServer
from etcdreplica.daemon.process import ReplicaProcess
from etcdreplica.daemon.settings import NodeSettings
from etcdreplica.daemon.state_file import StateFile
from etcdreplica.daemon.status_page import StatusPage
from etcdreplica.errors import RefusedError
from etcdreplica.model import Program
from etcdreplica.store import Lineage
from etcdreplica.testing.simulated_etcd import Link
from etcdreplica.testing.simulated_loop import Handle, SimulatedLoop, World

if TYPE_CHECKING:
    from tests.simulation.guardian import Guardian

SOCKET_S = 0.00005  # from one process of a host to another
PEER_S = 0.0004  # from one host to another
FIRST_PID = 5_000_000  # above what Linux gives, so that nothing real is ever looked at
SIGKILL = 9


class Host:
    """One machine of the cluster."""

    def __init__(self, network: Network, name: str, settings: NodeSettings, link: Link, random: Random) -> None:
        self.network = network
        self.world = network.world
        self.name = name
        self.settings = settings
        self.link = link
        self.random = random
        self.offset = random.uniform(0, 1e6)  # each host has booted at another time
        self.rate = 1 + random.uniform(-4e-5, 4e-5)  # and has another quartz
        self.boot = 0
        self.is_on = False
        self.processes: dict[int, Process] = {}
        self.guardian: Guardian | None = None
        self.listener: SimulatedAppServer | None = None
        self.peer_server: SimulatedPeerServer | None = None
        self.disk: dict[str, Any] = {}
        self.unable: set[str] = set()  # applications that this host cannot start

    def lose_power(self) -> None:
        """Everything on it is gone at once."""
        self.is_on = False
        for process in list(self.processes.values()):
            process.vanish(-SIGKILL)
        self.guardian = self.listener = self.peer_server = None

    def running(self, kind: str) -> list[Process]:
        """Return its live processes of a kind."""
        return [process for process in self.processes.values() if process.kind == kind and process.is_alive]


class Process:
    """One process. `kind` is guardian, watchdog, manager or app."""

    def __init__(self, host: Host, kind: str, parent: Process | None = None) -> None:
        network = host.network
        self.host = host
        self.kind = kind
        self.parent = parent  # dies with it
        self.pid = network.next_pid()
        self.name = f"{kind} of {host.name} ({self.pid - FIRST_PID})"
        self.loop: SimulatedLoop = network.world.loop(self.name, offset=host.offset, rate=host.rate)
        self.is_alive = True
        self.is_stopped = False
        self.steady_since = network.world.now  # for how long it has not been stopped
        self.status: int | None = None  # as wait tells it
        self.on_exit: list[Callable[[], object]] = []
        self.ends: dict[End, None] = {}
        self.main: asyncio.Task[Any] | None = None
        self._dying: Handle | None = None
        host.processes[self.pid] = self

    def was_steady(self, seconds: float) -> bool:
        """Whether it has lived and run for so long."""
        return self.is_alive and self.host.world.now - self.steady_since > seconds

    def kill(self) -> None:
        """SIGKILL: it is dead in a moment."""
        if self.is_alive and self._dying is None:
            random = self.host.random
            slow = random.random() < 0.05
            self._dying = self.host.world.after(random.uniform(0.01, 0.08) if slow else random.uniform(1e-4, 1e-3), self.vanish)

    def terminate(self) -> None:
        """SIGTERM: end in order."""
        if self.main is not None and self.is_alive:
            main = self.main
            self.loop.call_soon(lambda: main.cancel())

    def stop(self) -> None:
        """SIGSTOP."""
        self.is_stopped = True
        self.steady_since = float("inf")
        self.loop.stop_running()

    def go_on(self) -> None:
        """SIGCONT."""
        if self.is_stopped:
            self.is_stopped = False
            self.steady_since = self.host.world.now
            self.loop.continue_running()

    def run(self, main: Callable[[], Any]) -> None:
        """Run a coroutine as this process; its end is the end of the process."""

        def begin() -> None:
            self.main = self.loop.create_task(main())
            self.main.add_done_callback(self._finished)

        self.loop.call_soon(begin)

    def exit(self, code: int) -> None:
        """End by itself."""
        self.vanish(code)

    def vanish(self, code: int = -SIGKILL) -> None:
        """Be dead now."""
        if not self.is_alive:
            return
        self.is_alive = False
        self.status = -code if code < 0 else code << 8
        self.loop.kill()
        if self._dying is not None:
            self._dying.cancel()
        del self.host.processes[self.pid]
        self.host.network.on_exit(self, code)
        self.ended(code)
        for end in list(self.ends):
            end.hang_up()
        for callback in self.on_exit:
            callback()
        for child in [child for child in self.host.processes.values() if child.parent is self]:
            child.kill()

    def ended(self, code: int) -> None:
        """It is dead."""

    def crashed(self, error: BaseException) -> int:
        """Return the exit code after an exception."""
        self.host.network.complain(f"{self.name} crashed: {error!r}")
        return 1

    def _finished(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            self.exit(0)
        elif (error := task.exception()) is not None:
            self.exit(self.crashed(error))
        else:
            self.exit(0)


class Network:
    """What is between hosts, and where what concerns all of them is noted."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.hosts: dict[str, Host] = {}
        self.cuts: set[tuple[str, str]] = set()  # from, to
        self.complaints: list[str] = []
        self.on_exit: Callable[[Process, int], None] = lambda process, code: None
        self.promoted: Callable[[Any], None] = lambda application: None
        self._pids = FIRST_PID

    def next_pid(self) -> int:
        """Return a number that no process ever had."""
        self._pids += 1
        return self._pids

    def reaches(self, one: str, other: str) -> bool:
        """Whether what one host sends arrives at another one."""
        return one == other or (one, other) not in self.cuts

    def say(self, what: str) -> None:
        """Put something into the timeline."""

    def complain(self, what: str) -> None:
        """Note something that must never happen."""
        self.complaints.append(what)


# --- sockets of one host ----------------------------------------------------------------------------------------------


class End(asyncio.Transport):
    """One end of a connection between two processes of a host."""

    def __init__(self, owner: Process, protocol: asyncio.BaseProtocol) -> None:
        super().__init__()
        self.owner = owner
        self.protocol = protocol
        self.other: End | None = None
        self._is_closed = False
        owner.ends[self] = None

    def write(self, data: Any) -> None:
        """Send."""
        if not self._is_closed and self.other is not None:
            self.owner.host.world.after(SOCKET_S, self.other._deliver, data)

    def close(self) -> None:
        """Hang up."""
        if not self._is_closed:
            self.hang_up()
            self.owner.loop.call_soon(self.protocol.connection_lost, None)

    abort = close

    def is_closing(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._is_closed

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return a socket that knows who is at the other end."""
        assert self.other is not None
        return _Peer(self.other.owner.pid) if name == "socket" else default

    def hang_up(self) -> None:
        """Let the other end know."""
        self._is_closed = True
        self.owner.ends.pop(self, None)
        if self.other is not None:
            self.owner.host.world.after(SOCKET_S, self.other._lose)

    def _deliver(self, data: bytes) -> None:
        if not self._is_closed:
            self.owner.loop.call_soon(self._feed, data)

    def _feed(self, data: bytes) -> None:
        if not self._is_closed:
            self.protocol.data_received(data)  # type: ignore[attr-defined]

    def _lose(self) -> None:
        self.owner.loop.call_soon(self._lost)  # after what was sent before: a socket gives that out first

    def _lost(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self.owner.ends.pop(self, None)
            self.protocol.connection_lost(None)


class _Peer:
    """Tells the credentials of a process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        """Return pid, user and group."""
        assert (level, option) == (socket.SOL_SOCKET, socket.SO_PEERCRED)
        return struct.pack("iII", self._pid, 0, 0)


def connect(one: Process, protocol: asyncio.BaseProtocol, other: Process, its_protocol: asyncio.BaseProtocol) -> None:
    """Connect two processes of a host."""
    ours, its = End(one, protocol), End(other, its_protocol)
    ours.other, its.other = its, ours
    other.loop.call_soon(its_protocol.connection_made, its)
    one.loop.call_soon(protocol.connection_made, ours)


# --- what stands in for the classes of the daemons --------------------------------------------------------------------


class SimulatedAppServer(AppServer):
    """The WatchDog's socket."""

    def __init__(self, owner: Process, path: Path, on_hello: OnHello) -> None:
        super().__init__(path, on_hello)
        self.owner = owner

    async def start(self) -> None:
        """Listen."""
        self.owner.host.listener = self

    async def close(self) -> None:
        """Hang up on everybody."""
        if self.owner.host.listener is self:
            self.owner.host.listener = None
        for connection in sorted(self.connections, key=lambda connection: connection.pid):
            if connection._transport:
                connection._transport.close()

    @property
    def is_there(self) -> bool:
        """Whether somebody listens."""
        return self.owner.is_alive

    def accept(self, process: Process, protocol: asyncio.BaseProtocol) -> None:
        """Take the connection of a process."""
        connect(process, protocol, self.owner, AppConnection(self))


class SimulatedPage(StatusPage):
    """The signs of life of a process."""

    def __init__(self, process: Any) -> None:
        self.address = None
        self._process = process

    def slots(self) -> bytes:
        """Return them, only to be compared."""
        return struct.pack("d", self._process.pulse())

    def read(self, slot: Slot) -> float:
        """Return one."""
        return float(self._process.pulse()) if slot is Slot.PULSE else 0.0


class SimulatedReplicaProcess(ReplicaProcess):
    """A process as its WatchDog sees it. Each host makes a class of its own of this."""

    host: Host

    @staticmethod
    async def end(ward: WardView) -> None:
        """Not used: each host has its own."""
        raise NotImplementedError

    def include(self, pid: int) -> None:
        """Watch one more: there is only one process in each simulated tree."""

    def has(self, pid: int) -> bool:
        """Whether a process belongs to this replica."""
        return pid == self.pid

    def expect_notice(self, pid: int, page: StatusPage) -> None:
        """Do nothing: a simulated death is known at once."""

    def signal(self, number: signal.Signals) -> None:
        """Signal it."""
        process = self.host.processes.get(self.pid)
        if process is not None:
            process.kill() if number == signal.SIGKILL else process.terminate()

    async def _kill_once(self) -> bool:
        process = self.host.processes.get(self.pid)
        if process is not None:
            process.kill()
        return process is not None

    def _watch(self, pid: int) -> bool:
        process = self.host.processes.get(pid)
        if process is None:
            return False
        self._alive[pid] = pid
        loop = asyncio.get_running_loop()
        process.on_exit.append(lambda: loop.call_soon(self._on_end, process))
        return True

    def _on_end(self, process: Process) -> None:
        self._alive.pop(process.pid, None)
        self._gone.set()
        self._exited(process.status)


def replica_process(host: Host) -> type[ReplicaProcess]:
    """Return the class of processes of a host."""

    class Here(SimulatedReplicaProcess):
        @staticmethod
        def _start_time(pid: int) -> int | None:
            return 1 if pid in host.processes else None

        @staticmethod
        def check(program: Program) -> None:
            if program.argv[0] == "app" and program.argv[1] in host.unable:
                raise RefusedError(f"no program {program.argv[1]}")

        @staticmethod
        async def end(ward: WardView) -> None:
            while ward.pid is not None and ward.pid in host.processes:
                host.processes[ward.pid].kill()
                await asyncio.sleep(0.002)

    Here.host = host
    return Here


class SimulatedStateFile(StateFile):
    """The file of a host, on a disk that survives a loss of power."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._path = Path("watchdog.json")  # only named
        self._boot = str(host.boot)
        self._guardian = ""
        self._lease: int | None = None
        self._processes: dict[str, tuple[int, int]] = {}

    def lock(self) -> None:
        """The simulated guardian never starts two."""

    def unlock(self) -> None:
        """See `lock`."""

    def forget(self) -> None:
        """The session ended in order."""
        self._lease, self._processes = None, {}
        self._host.disk.pop("state", None)

    async def end_leftovers(self, guardian: str) -> int | None:
        """Kill what an earlier guardian's host left running; return its lease once all of it is dead."""
        found = self._host.disk.get("state")
        if found is None:
            return None
        boot, last, lease, processes = found
        if last == guardian:
            self._guardian, self._lease, self._processes = guardian, lease, dict(processes)
            return None
        if boot == self._boot:
            pids = {pid for pid, _ in processes.values()}
            left = [p for p in self._host.processes.values() if p.pid in pids or getattr(p, "guardian_name", None) == last]
            for process in left:
                while process.is_alive:
                    process.kill()
                    await asyncio.sleep(0.002)
        return lease  # type: ignore[no-any-return]

    def _write(self, *, flush: bool = False) -> None:
        self._host.disk["state"] = (self._boot, self._guardian, self._lease, dict(self._processes))


class SimulatedLineage(Lineage):
    """What a daemon knows of its etcd, on the disk of its host."""

    def __init__(self, process: Process) -> None:
        super().__init__(None, process.host.settings.lease_ttl_s, process.loop.time)
        self._disk = process.host.disk
        self.known = self._disk.get("etcd")

    def _write(self, *, flush: bool = False) -> None:
        self._written_at = self._clock()
        self._disk["etcd"] = self.known


class SimulatedPeerServer(PeerServer):
    """Answers other hosts."""

    def __init__(
        self, owner: Process, settings: NodeSettings, session: Callable[[], int], vouch: Callable[[str, int], bool]
    ) -> None:
        self.address = ""
        self.owner = owner
        self._settings = settings
        self._session = session
        self._vouch = vouch
        self.client: PeerClient = SimulatedPeerClient(owner)

    async def start(self) -> None:
        """Listen."""
        self.address = f"{self.owner.host.name}:7400"
        self.owner.host.peer_server = self

    async def stop(self) -> None:
        """Answer no longer."""
        if self.owner.host.peer_server is self:
            self.owner.host.peer_server = None

    def answer(self, method: str, argument: Any) -> Any:
        """Answer one question, in this process."""
        if method == "ping":
            return Answer(self._settings.host, self._session())
        if method == "vouch":
            return frozenset(app for app, epoch in argument.items() if self._vouch(app, epoch))
        return self.client.ping(*argument)


class SimulatedPeerClient(PeerClient):
    """Asks other hosts."""

    def __init__(self, owner: Process) -> None:
        self._owner = owner

    async def close(self) -> None:
        """Do nothing."""

    def forget(self, address: str) -> None:
        """Do nothing."""

    async def ping(self, address: str, within_s: float) -> Answer | None:
        """Return who answered at an address, or None."""
        told, answer = await self._ask(address, "ping", ("", 0.0), within_s)
        return answer if told else None

    async def ping_via(self, helper: str, address: str, within_s: float, patience_s: float) -> tuple[bool, Answer | None]:
        """Have a helper ping an address."""
        return await self._ask(helper, "ping_via", (address, within_s), patience_s)

    async def vouch(self, host: str, address: str, epochs: Mapping[str, int], within_s: float) -> frozenset[str]:
        """Ask a host to vouch for primaries."""
        told, promised = await self._ask(address, "vouch", dict(epochs), within_s) if address else (False, None)
        return frozenset(promised or ()) if told else frozenset()

    async def is_refused(self, address: str, within_s: float) -> bool:
        """Whether nobody listens there."""
        here, there = self._owner.host, self._owner.host.network.hosts[address.partition(":")[0]]
        reaches = here.network.reaches
        await asyncio.sleep(PEER_S)
        if there.is_on and reaches(here.name, there.name) and reaches(there.name, here.name):
            return there.peer_server is None or not there.peer_server.owner.is_alive
        await asyncio.sleep(within_s)
        return False

    async def _ask(self, address: str, method: str, argument: Any, within_s: float) -> tuple[bool, Any]:
        here = self._owner.host
        network, there = here.network, here.network.hosts[address.partition(":")[0]]
        loop = self._owner.loop
        told: asyncio.Future[Any] = loop.create_future()

        def settle(answer: Any) -> None:
            if not told.done():
                told.set_result(answer)

        def reply(answer: Any) -> None:
            if network.reaches(there.name, here.name):
                network.world.after(_jitter(here.random), settle, answer)

        def work(server: SimulatedPeerServer) -> None:
            answer = server.answer(method, argument)
            if asyncio.iscoroutine(answer):
                task = server.owner.loop.create_task(answer)
                task.add_done_callback(lambda task: reply(task.result()))
            else:
                reply(answer)

        def arrive() -> None:
            server = there.peer_server
            if there.is_on and server is not None and network.reaches(here.name, there.name):
                server.owner.loop.call_soon(work, server)

        network.world.after(_jitter(here.random), arrive)
        try:
            async with asyncio.timeout(within_s):
                return True, await told
        except TimeoutError:
            return False, None


def _jitter(random: Random) -> float:
    return PEER_S * (0.5 + random.random())


class SimulatedGuard(Guard):
    """The real line to the guardian, over a simulated socket."""

    @classmethod
    def over(cls, process: Process, guardian: Guardian) -> SimulatedGuard:
        """Connect a WatchDog with its guardian. `ready` tells when it may be used."""
        guard = cls(guardian.name)
        connect(process, guard, guardian, guardian.line())
        return guard

    @property
    def ready(self) -> asyncio.Future[None]:
        """Done when the guardian has told everything."""
        return self._ready
