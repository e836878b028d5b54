"""The nemeses: each does one fault, and undoes it.

A nemesis is a generator that does its fault and yields the hosts whose copies may end by it, none for a fault that nobody
notices; what stands after the `yield` undoes it. All that is left to chance comes as a `Choice`, drawn from the seed and from
nothing else, so that the same seed makes the same series. A fault that lasts for a moment is over when it yields.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence

from attrs import frozen

from etcdreplica.clock import boottime
from etcdreplica.model import ReplicaState
from tests.lab.checks import Hit
from tests.lab.network import can_lose_packets
from tests.lab.world import HOSTS, MEMBERS, TTL_S, World

EVERYBODY = frozenset(HOSTS)
NOBODY: frozenset[str] = frozenset()
SLICE_S = (0.15, 0.05)  # how long a slow process stops, and runs
DAY_S = 86_400


@frozen
class Choice:
    """Chance. `short` is well below the TTL, `long` above it."""

    host: str
    others: tuple[str, ...]  # the other hosts, shuffled
    member: str
    app: float  # 0..1: which application
    copy: float  # 0..1: which of its copies
    short: float
    long: float

    @classmethod
    def draw(cls, rng: random.Random) -> Choice:
        """Draw one."""
        host, *others = rng.sample(HOSTS, len(HOSTS))
        member = rng.choice(MEMBERS)
        return cls(
            host, tuple(others), member, rng.random(), rng.random(), rng.uniform(0.2, 1.5), rng.uniform(TTL_S + 1, TTL_S + 4)
        )


# Each of these takes a part of the time in which a lease must be renewed, and leaves enough of it; two of them may not.
DELAYS = frozenset(
    {
        "WatchDog killed",
        "WatchDog stopped for a moment",
        "rolling upgrade",
        "cable out for a moment",
        "etcd leader killed",
        "etcd member silent",
        "etcd member split off",
        "etcd without quorum for a moment",
        "etcd slow",
    }
)
Nemesis = Callable[[World, Choice], Iterator[frozenset[str]]]
NEMESES: dict[str, Nemesis] = {}
MISSING: dict[str, str] = {}  # those that cannot be done here, and why


def nemesis(kind: str, unless: str = "") -> Callable[[Nemesis], Nemesis]:
    """Register a nemesis, or why it cannot be used."""

    def register(function: Nemesis) -> Nemesis:
        if unless:
            MISSING[kind] = unless
        else:
            NEMESES[kind] = function
        return function

    return register


@contextlib.contextmanager
def afflicted(world: World, kind: str, choice: Choice, hits: list[Hit], *, anybody: bool) -> Iterator[None]:
    """Do a fault, and undo it at the end of the block; `anybody`: it is not alone, and together they may hit anybody."""
    steps = NEMESES[kind](world, choice)
    hit = Hit(kind, EVERYBODY, boottime())  # whom it hits is known when it is done
    hits.append(hit)
    try:
        try:
            hosts = next(steps)
            hit.hosts = EVERYBODY if anybody else hosts
        except LookupError:
            hit.hosts = NOBODY
            raise
        yield
    finally:
        for _ in steps:
            pass
        hit.end = boottime()


def last(seconds: float) -> None:
    """Let a fault last: the one thing here that is a matter of time."""
    time.sleep(seconds)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _stop_for_long(pid: int, may_end: frozenset[str], choice: Choice) -> Iterator[frozenset[str]]:
    _signal(pid, signal.SIGSTOP)
    yield may_end
    last(choice.long)
    _signal(pid, signal.SIGCONT)


def _kill(world: World, choice: Choice, *, primary: bool) -> Iterator[frozenset[str]]:
    host, pid = _copy(world, choice, primary=primary)
    world.killed.add(pid)
    _signal(pid, signal.SIGKILL)
    yield frozenset({host})


def _copy(world: World, choice: Choice, *, primary: bool) -> tuple[str, int]:
    """Return host and process of a copy, as the view has it."""
    app = world.app(world.apps[int(choice.app * len(world.apps))])
    copies = sorted(app.replicas.items(), key=lambda item: item[1].role != "primary")
    running = [(host, replica.pid) for host, replica in copies if replica.pid and replica.state is not ReplicaState.STANDBY]
    host, pid = running[0 if primary else int(choice.copy * len(running))]
    world.note(f"    it is process {pid} of {app.name} on {host}")
    return host, pid


# --- processes -----------------------------------------------------------------------------------------------------


@nemesis("primary killed")
def kill_primary(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """SIGKILL."""
    yield from _kill(world, choice, primary=True)


@nemesis("copy killed")
def kill_copy(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """SIGKILL any copy."""
    yield from _kill(world, choice, primary=False)


@nemesis("copy stopped for a moment")
def pause_copy(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """SIGSTOP and SIGCONT, well within the hang timeout."""
    _, pid = _copy(world, choice, primary=False)
    _signal(pid, signal.SIGSTOP)
    last(choice.short)
    _signal(pid, signal.SIGCONT)
    yield NOBODY


@nemesis("primary stopped")
def stop_primary(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """SIGSTOP: a hang, or the end of what was started by hand."""
    host, pid = _copy(world, choice, primary=True)
    yield from _stop_for_long(pid, frozenset({host}), choice)


@nemesis("WatchDog killed")
def kill_watchdog(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """Its guardian starts another one."""
    _signal(world.daemon(choice.host, "node"), signal.SIGKILL)
    yield NOBODY


@nemesis("WatchDog stopped for a moment")
def pause_watchdog(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """For less than is left of its leases."""
    pid = world.daemon(choice.host, "node")
    _signal(pid, signal.SIGSTOP)
    last(choice.short)
    _signal(pid, signal.SIGCONT)
    yield NOBODY


@nemesis("WatchDog stopped")
def stop_watchdog(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """For longer than its leases live."""
    pid = world.daemon(choice.host, "node")
    yield from _stop_for_long(pid, frozenset({choice.host}), choice)


@nemesis("leading manager killed")
def kill_manager(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """A standby leads."""
    _signal(world.daemon(world.cluster.leaders["manager"], "manager"), signal.SIGKILL)
    yield NOBODY


@nemesis("leading manager stopped")
def stop_manager(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """For longer than its lease lives; it goes on deposed."""
    pid = world.daemon(world.cluster.leaders["manager"], "manager")
    yield from _stop_for_long(pid, NOBODY, choice)


@nemesis("guardian killed")
def kill_guardian(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """All that it started dies with it."""
    _signal(world.guardian(choice.host), signal.SIGKILL)
    yield frozenset({choice.host})
    world.cluster.hosts[choice.host].kill()
    world.bring_back(choice.host)


@nemesis("guardian stopped")
def stop_guardian(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """The kernel kills it when it misses a deadline."""
    pid = world.guardian(choice.host)
    yield from _stop_for_long(pid, frozenset({choice.host}), choice)
    world.cluster.hosts[choice.host].kill()
    world.bring_back(choice.host)


@nemesis("CheckpointServer killed")
def kill_checkpoint_server(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """It is started again."""
    _signal(world.daemon(choice.host, "checkpoint-server"), signal.SIGKILL)
    yield NOBODY


@nemesis("CheckpointServer stopped")
def stop_checkpoint_server(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """For longer than its lease lives."""
    pid = world.daemon(choice.host, "checkpoint-server")
    yield from _stop_for_long(pid, NOBODY, choice)


# --- hosts ---------------------------------------------------------------------------------------------------------


@nemesis("host killed")
def kill_host(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """Its cable out, and all its processes dead."""
    world.network.cut(choice.host)
    world.cluster.hosts[choice.host].kill()
    yield frozenset({choice.host})
    last(choice.short)
    world.bring_back(choice.host)


@nemesis("power lost")
def lose_power(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """The same, and its disk forgets what was not flushed."""
    world.lose_power(choice.host)
    yield frozenset({choice.host})
    last(choice.short)
    world.bring_back(choice.host)


@nemesis("two hosts killed")
def kill_two_hosts(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """A minority."""
    lost = (choice.host, choice.others[0])
    for host in lost:
        world.network.cut(host)
    for host in lost:
        world.cluster.hosts[host].kill()
    yield frozenset(lost)
    last(choice.long)
    for host in lost:
        world.bring_back(host)


@nemesis("node stopped in order and started")
def stop_node(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """It hands over what it runs, and takes part again."""
    world.cluster.hosts[choice.host].stop()
    yield frozenset({choice.host})  # programs that were started by hand are killed
    last(choice.short)
    world.bring_back(choice.host)


@nemesis("host drained and undrained")
def drain_host(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """What can go elsewhere does, and every end is a planned one."""
    world.cluster.drain(choice.host)
    yield NOBODY
    last(choice.long)
    world.cluster.undrain(choice.host)


@nemesis("rolling upgrade")
def upgrade(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """Every WatchDog is replaced, one after another."""
    for host in (choice.host, *choice.others):
        before = world.daemon(host, "node")
        _signal(world.guardian(host), signal.SIGHUP)
        world.cluster.wait_until(
            lambda view, host=host, before=before: host in view.hosts and view.hosts[host].host.pid != before,  # type: ignore[misc]
            f"the new WatchDog of {host}",
        )
    yield NOBODY


@nemesis("disk full")
def fill_disk(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """A host has no room for checkpoints, logs and state."""
    if disk := world.disks.get(choice.host):
        disk.fill()
    yield frozenset({choice.host})
    last(choice.long)
    if disk:
        disk.free()


@nemesis("clock jumps")
def jump_clock(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """The wall clock of one host is a day ahead, then a day behind."""
    world.clock.jump(DAY_S)
    yield NOBODY
    last(choice.long)
    world.clock.jump(-DAY_S)
    last(choice.short)
    world.clock.jump(0)


# --- the network ---------------------------------------------------------------------------------------------------


@nemesis("cable out")
def cut(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """For longer than the TTL."""
    world.network.cut(choice.host)
    yield frozenset({choice.host})
    last(choice.long)
    world.network.mend(choice.host)


@nemesis("cable out for a moment")
def cut_shortly(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """For less than it. An object's copy may leave the set, and none ends."""
    world.network.cut(choice.host)
    last(choice.short)
    world.network.mend(choice.host)
    yield NOBODY


@nemesis("host cannot reach etcd")
def lose_what_is_sent(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """What it sends to etcd is lost."""
    yield from _one_way(world, choice, (choice.host,), MEMBERS)


@nemesis("etcd cannot reach host")
def lose_what_is_received(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """What etcd sends to it is lost: its renewals arrive, and it does not learn of it."""
    yield from _one_way(world, choice, MEMBERS, (choice.host,))


@nemesis("host cannot reach hosts")
def lose_what_is_sent_to_hosts(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """What it sends to other hosts is lost; etcd is as near as ever."""
    yield from _one_way(world, choice, (choice.host,), choice.others)


def _one_way(world: World, choice: Choice, senders: Sequence[str], receivers: Sequence[str]) -> Iterator[frozenset[str]]:
    world.network.block(senders, receivers)
    yield frozenset({choice.host})
    last(choice.long)
    world.network.unblock()


@nemesis("hosts split from hosts")
def split_hosts(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """Two groups of hosts do not see each other, and both see etcd."""
    group = (choice.host, choice.others[0])
    world.network.split(group, choice.others[1:])
    yield EVERYBODY
    last(choice.long)
    world.network.unblock()


@nemesis("everything split")
def split_all(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """Two hosts and one member of etcd against the rest."""
    group = (choice.host, choice.others[0])
    rest = [member for member in MEMBERS if member != choice.member]
    world.network.split((*group, choice.member), (*choice.others[1:], *rest))
    yield EVERYBODY  # the majority side may have talked to the member that was split off
    last(choice.long)
    world.network.unblock()


@nemesis("packets lost", unless="" if can_lose_packets() else "no nft")
def lose_packets(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """A fifth of what a host sends, and of what it receives."""
    world.network.lose(choice.host, 20)
    yield frozenset({choice.host})
    last(choice.long)
    world.network.lose_nothing(choice.host)


# --- etcd ----------------------------------------------------------------------------------------------------------


@nemesis("etcd leader killed")
def kill_etcd_leader(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """Another member leads within two seconds."""
    world.etcd.kill(world.etcd.leader())
    yield NOBODY
    last(choice.short)
    world.etcd.revive()


@nemesis("etcd member silent")
def silence_member(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """Its cable is out: nobody refuses a connection, and nobody answers."""
    world.network.cut(choice.member)
    yield NOBODY
    last(choice.long)
    world.network.mend(choice.member)


@nemesis("etcd member split off")
def split_member(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """The other members do not see it, while all hosts do."""
    world.network.split((choice.member,), [member for member in MEMBERS if member != choice.member])
    yield NOBODY
    last(choice.long)
    world.network.unblock()


@nemesis("etcd without quorum for a moment")
def lose_quorum_shortly(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """Two members stop, for less than the TTL, and are continued."""
    stopped = [member for member in MEMBERS if member != choice.member]
    for member in stopped:
        world.etcd.signal(member, signal.SIGSTOP)
    last(choice.short / 2)
    for member in stopped:
        world.etcd.signal(member, signal.SIGCONT)
    yield NOBODY


@nemesis("etcd without quorum")
def lose_quorum(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """Two members die, and come back after the TTL."""
    world.etcd.kill(*(member for member in MEMBERS if member != choice.member))
    yield EVERYBODY
    last(choice.long)
    world.etcd.revive()


@nemesis("etcd slow")
def slow_etcd(world: World, choice: Choice) -> Iterator[frozenset[str]]:
    """Its leader stops and goes on in short slices, as with a slow disk."""
    leader = world.etcd.leader()
    yield NOBODY
    until = time.monotonic() + choice.long
    while time.monotonic() < until:
        for number, seconds in zip((signal.SIGSTOP, signal.SIGCONT), SLICE_S, strict=True):
            world.etcd.signal(leader, number)
            last(seconds)
