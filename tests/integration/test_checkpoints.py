"""Checkpoints on a real cluster: durable where they should be, given back to whoever is primary next, never an older one."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from etcdreplica.checkpoint.files import read
from etcdreplica.checkpoint.peers import Peers
from etcdreplica.daemon.tls import PeerTls
from etcdreplica.errors import EtcdReplicaError, StaleEpochError
from etcdreplica.model import Checkpoint
from etcdreplica.store import EtcdOptions, Key, Kind, Store
from etcdreplica.testing import EmbeddedEtcd, LocalCluster
from etcdreplica.testing.processes import halt
from etcdreplica.testing.stateful_client import Stateful
from tests.integration.conftest import PATIENCE_S, repair

pytestmark = pytest.mark.integration
T = TypeVar("T")
MIB = 1 << 20
BOUND_S = 60.0


def eventually(look: Callable[[], T | None], what: str, cluster: LocalCluster) -> T:
    """Wait until something is there, and return it."""
    deadline = time.monotonic() + BOUND_S
    while not (found := tried(look)):
        if time.monotonic() > deadline:
            raise EtcdReplicaError(f"waited in vain for {what}\n{cluster.describe()}")
        time.sleep(0.01)  # files raise no events here
    return found


def tried(look: Callable[[], T]) -> T | None:
    """Look, where files come and go."""
    try:
        return look()
    except FileNotFoundError:
        return None


def ask_etcd(cluster: LocalCluster, work: Callable[[Store], Awaitable[T]]) -> T:
    """Do something with the records of a cluster."""

    async def run() -> T:
        async with Store(EtcdOptions((cluster.etcd.endpoint,), timeout_s=PATIENCE_S), cluster.cluster) as store:
            return await work(store)

    return asyncio.run(run())


def record(cluster: LocalCluster, app: str) -> Checkpoint | None:
    """Return what stands in etcd of an application's checkpoints."""
    entry = ask_etcd(cluster, lambda store: store.get(Key(Kind.CHECKPOINTS, (app,))))
    return entry.value if entry is not None else None


def wait_holders(cluster: LocalCluster, app: str, holders: set[str]) -> Checkpoint:
    """Wait until these hosts hold what was acknowledged."""

    def look() -> Checkpoint | None:
        found = record(cluster, app)
        return found if found is not None and set(found.holders) == holders else None

    return eventually(look, f"{app} to be held by {holders}, not by {record(cluster, app)}", cluster)


def stored(cluster: LocalCluster, host: str, app: str) -> list[Path]:
    """Return the files of an application on a host, the newest first."""
    return sorted(directory_of(cluster, host, app).glob("*.checkpoint"), reverse=True)


def directory_of(cluster: LocalCluster, host: str, app: str) -> Path:
    """Where a host has the checkpoints of an application."""
    return cluster.hosts[host].directory / "checkpoints" / cluster.cluster / app


def seats(cluster: LocalCluster, app: str) -> list[str]:
    """Return the hosts of its seats, the primary first."""
    assignment = cluster.view.apps[app].assignment
    assert assignment is not None
    return [seat.host for seat in assignment.seats]


def flip(path: Path, at: int) -> None:
    """Change one bit of a file, counted from its end."""
    data = bytearray(path.read_bytes())
    data[-at] ^= 1
    path.write_bytes(data)


def is_gone(path: Path) -> bool:
    """Whether nothing is there any more."""
    return not path.exists()


def wait_server(cluster: LocalCluster, host: str, before: int) -> None:
    """Wait until a host has another CheckpointServer than before."""
    cluster.wait_until(lambda _: host in cluster.servers and cluster.servers[host].pid != before, f"the next server of {host}")


def restart_server(cluster: LocalCluster, host: str) -> None:
    """Kill a host's CheckpointServer, and wait for the next one."""
    before = cluster.servers[host].pid
    os.kill(before, signal.SIGKILL)
    wait_server(cluster, host, before)


@pytest.fixture
def cluster(shared_cluster: LocalCluster) -> Iterator[LocalCluster]:
    """The cluster of this module; its hosts may be killed, and all of them are up again afterwards."""
    yield shared_cluster
    repair(shared_cluster)


@pytest.fixture
def make(shared_cluster: LocalCluster) -> Iterator[Callable[..., Stateful]]:
    """Make applications on the cluster of this module; they are removed afterwards."""
    made: list[Stateful] = []

    def start(*arguments: object, **named: object) -> Stateful:
        made.append(Stateful(shared_cluster, *arguments, **named))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for app in made:
        if app.name in shared_cluster.view.apps:
            shared_cluster.remove(app.name)


@pytest.mark.parametrize("style", ["cold", "warm"])
def test_state_survives_crashes(make: Callable[..., Stateful], style: str) -> None:
    """The next primary has what was acknowledged last; the same again for it."""
    app = make(2, style)
    assert app.ask("about")["text"] == ""
    for text in ("one", "two", "three"):
        assert app.ask("put", text=text)["error"] is None
        app.crash()
        assert app.ask("about")["text"] == text


def test_acknowledged_means_on_every_host_of_the_degree(make: Callable[..., Stateful], shared_cluster: LocalCluster) -> None:
    """Right after the call returns the files are there, whole, on all three."""
    app = make(3)
    for number in range(5):
        assert app.ask("put", text=f"state {number}")["error"] is None
        for host in seats(shared_cluster, app.name):
            newest = stored(shared_cluster, host, app.name)[0]
            assert newest.read_bytes().endswith(f"state {number}".encode())
            assert read(newest).manifest.size == len(f"state {number}")
    assert len(stored(shared_cluster, seats(shared_cluster, app.name)[0], app.name)) == 3  # the last K


def test_backup_is_told_of_what_comes(make: Callable[..., Stateful], shared_cluster: LocalCluster) -> None:
    """A warm backup holds each state before it is needed, and `on_checkpoint` gets it."""
    app = make(2)
    app.ask("put", text="first")
    wait_holders(shared_cluster, app.name, set(seats(shared_cluster, app.name)))
    app.ask("put", text="last")
    app.crash()
    about = app.ask("about")
    assert about["text"] == "last"
    assert set(about["loaded"]) <= {"first", "last"}
    eventually(lambda: app.ask("put", text="more")["error"] is None or None, "the degree again", shared_cluster)
    app.crash()
    assert app.ask("about")["text"] == "more"


def test_fails_with_how_many_it_reached(cluster: LocalCluster) -> None:
    """While a host's CheckpointServer is stopped the call fails in the end, and says so; later it works again."""
    app = Stateful(cluster, 3)
    assert app.ask("put", text="before")["error"] is None
    stopped = cluster.servers[seats(cluster, app.name)[1]].pid
    halt(stopped)
    try:
        told = app.ask("put", text="meanwhile", timeout=3.0)
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert (told["kind"], told["reached"]) == ("NotDurableError", 2), told
    assert "on 2 of 3 hosts after 3 s" in told["error"]
    assert app.ask("put", text="after")["error"] is None
    wait_holders(cluster, app.name, set(seats(cluster, app.name)))


def test_a_killed_server_goes_unnoticed(cluster: LocalCluster) -> None:
    """It is started again, and a call that was under way is acknowledged all the same."""
    app = Stateful(cluster, 2)
    for victim in seats(cluster, app.name) * 2:
        before = cluster.servers[victim].pid
        os.kill(before, signal.SIGKILL)
        assert app.ask("put", text=f"without {victim}")["error"] is None
        wait_server(cluster, victim, before)
    app.crash()
    assert app.ask("about")["text"] == f"without {victim}"


def test_new_seat_gets_the_state_in_the_background(cluster: LocalCluster) -> None:
    """A host that takes the place of another one holds the state without any new checkpoint, also a large one."""
    app = Stateful(cluster, 2)
    app.ask("save", size=20 * MIB, rounds=1, wait=True)
    before = app.ask("about")
    primary, backup = seats(cluster, app.name)
    (third,) = set(cluster.hosts) - {primary, backup}
    cluster.hosts[backup].kill()
    wait_holders(cluster, app.name, {primary, third})
    cluster.restart(backup)
    cluster.hosts[primary].kill()
    app.wait_replaced()
    after = app.ask("about")
    assert (after["host"], after["digest"]) == (third, before["digest"])


def test_the_last_holder_is_waited_for(cluster: LocalCluster) -> None:
    """With every holder gone the next primary does not begin with an older state, but waits until one of them is back."""
    app = Stateful(cluster, 1, "cold", host="host-a")
    assert app.ask("put", text="only here")["error"] is None
    assert record(cluster, app.name) is not None
    cluster.hosts["host-a"].kill()
    cluster.wait_until(lambda view: seats(cluster, app.name)[:1] not in ([], ["host-a"]), "another primary", 60)
    assert cluster.view.apps[app.name].assignment is not None
    cluster.restart("host-a")
    app.wait_replaced()
    assert app.ask("about")["text"] == "only here"


def test_damaged_on_the_successor(cluster: LocalCluster) -> None:
    """A flipped bit is found, the whole copy of the other host is used, and the damage is shown."""
    app = Stateful(cluster, 2, "cold")
    assert app.ask("put", text="old")["error"] is None
    assert app.ask("put", text="new")["error"] is None
    primary, backup = seats(cluster, app.name)
    flip(stored(cluster, backup, app.name)[0], 1)
    app.crash()
    about = app.ask("about")
    assert (about["host"], about["text"]) == (backup, "new")
    assert "1 of 1 chunks are damaged" in cluster.servers[backup].damaged[app.name]
    assert primary in cluster.servers


@pytest.mark.parametrize("how", ["flipped", "cut off", "header"])
def test_damaged_everywhere(cluster: LocalCluster, how: str) -> None:
    """When no holder has the newest one whole any more, the next older one is used."""
    app = Stateful(cluster, 2, "cold")
    assert app.ask("put", text="old")["error"] is None
    assert app.ask("put", text="new")["error"] is None
    hosts = seats(cluster, app.name)
    for host in hosts:
        newest = stored(cluster, host, app.name)[0]
        if how == "cut off":
            os.truncate(newest, newest.stat().st_size - 1)
        else:
            flip(newest, 1 if how == "flipped" else newest.stat().st_size - 40)
    for host in hosts:  # it would still know the state; and only now, or it would be given a whole one by the other host
        restart_server(cluster, host)
    app.crash()
    assert app.ask("about")["text"] == "old"
    assert app.ask("put", text="newer")["error"] is None
    app.crash()
    assert app.ask("about")["text"] == "newer"


def test_disk_full(cluster: LocalCluster) -> None:
    """The call says so, the last good state stays, and all goes on when there is room again."""
    app = Stateful(cluster, 1, "cold", host="host-a")
    assert app.ask("put", text="good")["error"] is None
    directory = directory_of(cluster, "host-a", app.name)
    kept = {path.name: path.read_bytes() for path in directory.iterdir()}
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(directory)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        for name, data in kept.items():
            (directory / name).write_bytes(data)
        told = app.ask("put", text="x" * 500_000)
        assert told["kind"] == "CheckpointError", told
        assert "the disk is full; the last good one is kept" in told["error"]
        assert app.ask("put", text="small")["error"] is None
        app.crash()
        assert app.ask("about")["text"] == "small"
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def transfers(cluster: LocalCluster, host: str, app: str) -> list[tuple[int, int]]:
    """Return what a host has told of large states that came to it: chunks that came, of so many."""
    found = re.findall(rf"{app}: (\d+) of (\d+) chunks of \S+ come from", cluster.hosts[host].log_path.read_text())
    return [(int(came), int(count)) for came, count in found]


def test_little_moves_when_little_has_changed(cluster: LocalCluster) -> None:
    """Of 100 MiB of which 1 % has changed, hardly more than that travels."""
    app = Stateful(cluster, 2)
    backup = seats(cluster, app.name)[1]
    app.ask("save", size=100 * MIB, rounds=1, wait=True)
    app.ask("change", share=0.01, wait=True)
    ((first, count), (second, _)) = transfers(cluster, backup, app.name)
    assert (first, count) == (1600, 1600)
    assert second == 16
    digest = app.ask("about")["digest"]
    app.crash()
    assert app.ask("about")["digest"] == digest


def test_goes_on_after_a_cut(etcd_server: EmbeddedEtcd) -> None:
    """A receiver that is killed in the middle does not fetch again what it has."""
    arguments = {f"host-{letter}": ("--checkpoint-bandwidth", "20") for letter in "abc"}
    name = f"cut-{time.monotonic_ns()}"
    with LocalCluster(3, etcd=etcd_server, cluster=name, lease_ttl_s=5, node_arguments=arguments) as cluster:
        app = Stateful(cluster, 2)
        app.ask("put", text="small")
        backup = seats(cluster, app.name)[1]
        draft = directory_of(cluster, backup, app.name) / "draft"
        app.ask("save", size=60 * MIB, rounds=1, wait=False)
        eventually(lambda: draft.stat().st_blocks * 512 > 60 * MIB, "a draft", cluster)  # all of its room is taken first
        eventually(lambda: is_written(draft, 30 * MIB), "half of it", cluster)
        restart_server(cluster, backup)
        about = app.ask("about")
        eventually(lambda: [s for s in stored(cluster, backup, app.name) if s.stat().st_size > 60 * MIB], "all of it", cluster)
        (first, *_, last), count = zip(*transfers(cluster, backup, app.name), strict=True)
        assert set(count) == {960}
        assert first == 960
        assert last < 600
        app.crash()
        assert app.ask("about")["digest"] == about["digest"]


def is_written(path: Path, at: int) -> bool:
    """Whether something stands at a place of a file."""
    with path.open("rb") as file:
        file.seek(at)
        return any(file.read(4096))


def test_older_epochs_are_refused(make: Callable[..., Stateful], shared_cluster: LocalCluster) -> None:
    """Every CheckpointServer refuses what a deposed primary offers."""
    app = make(2)
    app.ask("put", text="of the first")
    old = app.epoch
    app.crash()
    app.ask("put", text="of the second")

    async def offer() -> None:
        peers = Peers(PeerTls())
        try:
            for host in seats(shared_cluster, app.name):
                address = shared_cluster.servers[host].address
                holds = await peers.have(host, address, app.name, 0, 5.0)
                with pytest.raises(StaleEpochError, match=f"epoch {old} is over"):
                    await peers.offer(host, address, "host-x", old, holds.manifests[0], b"of the second")
        finally:
            await peers.close()

    asyncio.run(offer())


def test_state_function(make: Callable[..., Stateful], shared_cluster: LocalCluster) -> None:
    """It is asked again and again; what it gave survives a crash."""
    app = make(2, "warm", "--interval", "0.05")
    app.ask("become", text="by itself")

    def is_everywhere() -> bool:
        newest = [stored(shared_cluster, host, app.name)[:1] for host in seats(shared_cluster, app.name)]
        return all(files and files[0].read_bytes().endswith(b"by itself") for files in newest)

    eventually(is_everywhere, "the state on both hosts", shared_cluster)
    app.crash()
    assert app.ask("about")["text"] == "by itself"


def test_last_state_at_a_handover(make: Callable[..., Stateful], shared_cluster: LocalCluster) -> None:
    """A copy that is asked to end stores its state once more, and the next one begins with it."""
    app = make(2, "warm", "--interval", "3600")
    app.ask("become", text="at the very end")
    os.kill(shared_cluster.primary(app.name)[1], signal.SIGTERM)
    app.wait_replaced()
    assert app.ask("about")["text"] == "at the very end"


def test_removed_application_leaves_nothing(make: Callable[..., Stateful], shared_cluster: LocalCluster) -> None:
    """Neither files nor a record; an application of the same name begins anew."""
    app = make(2)
    app.ask("put", text="old life")
    hosts = seats(shared_cluster, app.name)
    shared_cluster.remove(app.name)
    assert record(shared_cluster, app.name) is None
    for host in hosts:
        directory = directory_of(shared_cluster, host, app.name)
        eventually(partial(is_gone, directory), f"{directory} to be gone", shared_cluster)


def test_node_that_leaves_in_order(cluster: LocalCluster) -> None:
    """What a host held is held by the next one before long."""
    app = Stateful(cluster, 2)
    app.ask("put", text="moves on")
    primary, backup = seats(cluster, app.name)
    (third,) = set(cluster.hosts) - {primary, backup}
    cluster.hosts[primary].stop()
    app.wait_replaced()
    assert app.ask("about")["text"] == "moves on"
    wait_holders(cluster, app.name, {backup, third})
